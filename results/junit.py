"""A comparison for machines that run builds: JUnit XML, GitHub annotations and step summary."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from results import text
from results.compare import Comparison, Finding

# GitHub shows so many annotations of a step; the summary and the XML hold all of them.
_MOST_ANNOTATIONS = 10


def junit(comparison: Comparison) -> str:
    """Return the comparison as JUnit XML: a suite an experiment, a test case a check of a cell.

    Regressions are failures, inconclusive checks are skipped. Characters that XML does not allow
    are shown as escapes.
    """
    root = ElementTree.Element("testsuites", name="tokenmark compare")
    suites: dict[str, list[Finding]] = {}
    for finding in comparison.findings:
        suites.setdefault(finding.experiment, []).append(finding)
    for experiment, findings in suites.items():
        suite = ElementTree.SubElement(root, "testsuite", name=text.plain(experiment))
        properties = ElementTree.SubElement(suite, "properties")
        for name in ("base", "head"):
            value = text.plain(getattr(comparison, name))
            ElementTree.SubElement(properties, "property", name=name, value=value)
        for finding in findings:
            _test_case(suite, finding)
        _count(suite, findings)
    _count(root, comparison.findings)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode") + "\n"


def _test_case(suite: ElementTree.Element, finding: Finding) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=text.plain(f"{finding.experiment}.{finding.method}"),
        name=finding.check,
        time="0",
    )
    if finding.is_regression:
        failure = ElementTree.SubElement(
            case, "failure", message=finding.line, type=finding.verdict
        )
        failure.text = finding.line
    elif finding.verdict == "INCONCLUSIVE":
        ElementTree.SubElement(case, "skipped", message=finding.line)
    else:
        ElementTree.SubElement(case, "system-out").text = finding.line


def _count(element: ElementTree.Element, findings: tuple[Finding, ...] | list[Finding]) -> None:
    element.set("tests", str(len(findings)))
    element.set("failures", str(sum(finding.is_regression for finding in findings)))
    element.set("errors", "0")
    element.set("skipped", str(sum(finding.verdict == "INCONCLUSIVE" for finding in findings)))


def github_annotations(comparison: Comparison) -> list[str]:
    """Return workflow commands of GitHub Actions, one a line: an error for each regression.

    No text of a method or model can begin a command of its own: each is one line that begins with
    ours, and what separates its parts is escaped.
    """
    regressions = comparison.regressions
    lines = [
        f"::error title={_property(f'{finding.check} {finding.verdict}')}::{_data(finding.line)}"
        for finding in regressions[:_MOST_ANNOTATIONS]
    ]
    rest = len(regressions) - _MOST_ANNOTATIONS
    if rest > 0:
        lines.append(f"::error title=more regressions::and {rest} more; see the step summary")
    lines += [
        f"::notice title={_property(f'{finding.check} changed')}::{_data(finding.line)}"
        for finding in comparison.findings
        if finding.verdict == "CHANGED"
    ][:_MOST_ANNOTATIONS]
    return lines


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
