"""JUnit XML, as continuous integration reads it: a case for each adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

# What XML 1.0 can't hold, however it is written.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One adapter that was judged.

    Attributes:
        name: of the adapter.
        text: what is said of it.
        failure: why it fails; empty where it passes.
        seconds: that it took.
    """

    name: str
    text: str
    failure: str = ""
    seconds: float = 0.0


def junit(suite: str, cases: Sequence[Case]) -> str:
    """The file's text.

    Args:
        suite: what all of them were checked for.
        cases: in their order.
    """
    failed = sum(bool(case.failure) for case in cases)
    root = ElementTree.Element("testsuites")
    inner = ElementTree.SubElement(
        root, "testsuite", name=_plain(suite), tests=str(len(cases)), failures=str(failed), errors="0", skipped="0"
    )
    for case in cases:
        found = ElementTree.SubElement(
            inner, "testcase", classname="regraft.check", name=_plain(case.name), time=f"{case.seconds:.3f}"
        )
        if case.failure:
            ElementTree.SubElement(found, "failure", message=_plain(case.failure)).text = _plain(case.text)
        else:
            ElementTree.SubElement(found, "system-out").text = _plain(case.text)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _plain(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
