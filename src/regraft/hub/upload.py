"""Files to a repository of the hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from regraft.errors import InputError, first_line
from regraft.hub import names_repository
from regraft.hub.access import HTTP_ERROR, LOGIN, asking, endpoint, is_offline


def upload(repo: str, files: Mapping[str, Path | bytes], message: str, *, private: bool = False) -> str:
    """Make the repository unless it is there, and add files to it.

    Args:
        repo: ``org/name``.
        files: name in the repository → file on disk, or its content.
        message: of the commit.
        private: of a repository that is made.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub refuses, does not answer, or ``repo`` is no name of one.
    """
    if not names_repository(repo):
        raise InputError("is no name of a repository", file=repo, remedy="Give org/name.")
    if is_offline():
        raise InputError("can't be sent to: HF_HUB_OFFLINE forbids it", file=repo, remedy="Unset HF_HUB_OFFLINE.")
    api = HfApi(endpoint=endpoint())
    adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=held) for name, held in files.items()]
    with asking(repo):
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            made = api.create_commit(repo, adds, commit_message=message)
        except HTTP_ERROR as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status not in (401, 403):
                raise
            what = "the hub does not let you write there"
            raise InputError(what, file=repo, remedy=f"With a token that may write, {LOGIN}.") from None
        except (OSError, RuntimeError) as error:
            # Large files have a client of their own, with errors of its own.
            what = f"can't be sent to ({first_line(error)})"
            raise InputError(what, file=repo, remedy="Try again; nothing is there in part.") from None
    return str(made.commit_url)
