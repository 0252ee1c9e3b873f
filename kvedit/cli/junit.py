"""JUnit XML of a verification, so that CI systems show regressed facts as failed tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from kvedit.editing.verify import VerifyReport
    from kvedit.events import RetentionCheck

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(report: VerifyReport) -> bytes:
    """The report as one `testsuite`: a `testcase` for each check, a `failure` in those lost."""
    failed = sum(not check.passed for check in report.checks)
    suite = ElementTree.Element(
        "testsuite",
        name=f"kvedit verify, revision {report.revision}",
        tests=str(len(report.checks)),
        failures=str(failed),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    for check in report.checks:
        _add_case(suite, check)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _add_case(suite: ElementTree.Element, check: RetentionCheck) -> None:
    name = NOT_XML.sub("\ufffd", check.key)
    case = ElementTree.SubElement(suite, "testcase", classname=f"kvedit.{check.kind}", name=name)
    if check.passed:
        return
    margin = "" if check.margin is None else f" (margin {check.margin:.3f})"
    text = f"no longer recalled at revision {check.revision}{margin}"
    ElementTree.SubElement(case, "failure", message=text)


def write_junit(path: Path, report: VerifyReport) -> None:
    """Write the XML, whole or not at all."""
    from kvedit.files import write_atomic

    write_atomic(path, junit_xml(report))
