"""Does an adapter's lineage speak of the base that it is to be carried from?"""

from __future__ import annotations

from regraft.adapter import Adapter
from regraft.lineage import lineage_of
from regraft.lineage.model import Lineage
from regraft.migrations.base_id import called, from_summary
from regraft.migrations.recognise import recognise
from regraft.report.schema import BaseSummary


def other_base(adapter: Adapter, old: BaseSummary) -> str | None:
    """A sentence where the lineage names another base than ``old``; None where it agrees, or says nothing of it.

    Raises:
        InputError: the lineage is damaged, or of a later major version.
    """
    document = lineage_of(adapter)
    if document is None:
        return None
    lineage = Lineage.model_validate(document)
    given = lineage.base.model_validate(from_summary(old))
    # A fingerprint of another scheme (version 0's, a later one's) can't be compared.
    if lineage.base.fingerprint.partition(":")[0] != given.fingerprint.partition(":")[0]:
        return None
    components = {name for group in lineage.updates for name in group.modules}
    if recognise(lineage.base, {given.fingerprint: given}, components).base is given:
        return None
    return (
        f"the adapter's lineage says that it is for {called(lineage.base)} ({lineage.base.fingerprint}), and the old "
        f"base is {called(given)} ({given.fingerprint})"
    )
