"""A run as JUnit XML, which continuous-integration servers read: a suite for each family, a test for each Case.

Splat, mismatch and regressed are failures, lost is an error, unsupported is skipped; healed, suspect and known pass and
say so in ``system-out``. What keeps the results from being whole is an error of its own.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Final

from harness.journal import RunResults
from harness.report.views import NOTED, Record, family_and_mode, replay_command, verdict_of
from harness.verdict import Verdict

_FAILURES: Final = (Verdict.SPLAT, Verdict.MISMATCH, Verdict.REGRESSED)
_NO_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def junit_report(run: RunResults) -> str:
    """The XML document."""
    top = ET.Element("testsuites", name="kvm-harness")
    suites: dict[str, list[Record]] = {}
    for record in run.records:
        name = " ".join(filter(None, (run.cell(record), family_and_mode(record["case"])[0])))
        suites.setdefault(name or "cases", []).append(record)
    for name, records in suites.items():
        _suite(run, top, name, records)
    if not run.complete:
        _incomplete(run, top)
    for count in ("tests", "failures", "errors", "skipped"):
        top.set(count, str(sum(int(suite.get(count, "0")) for suite in top)))
    ET.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(top, encoding="unicode") + "\n"


def _suite(run: RunResults, top: ET.Element, name: str, records: Iterable[Record]) -> None:
    suite = ET.SubElement(top, "testsuite", name=_clean(name))
    if started := run.header.get("started"):
        suite.set("timestamp", _clean(str(started)))
    properties = ET.SubElement(suite, "properties")
    for key in ("host", "device", "cell"):
        if value := run.header.get(key):
            ET.SubElement(properties, "property", name=key, value=_clean(str(value)))
    seconds = 0.0
    for record in records:
        seconds += record["seconds"]
        _test(run, suite, record)
    for count, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(1 for _ in suite.iter(tag))))
    suite.set("time", f"{seconds:.6f}")


def _test(run: RunResults, suite: ET.Element, record: Record) -> None:
    family, mode = family_and_mode(record["case"])
    where = ".".join(filter(None, ("kvm-harness", family, mode)))
    test = ET.SubElement(
        suite, "testcase", classname=_clean(where), name=_clean(record["case"]), time=f"{record['seconds']:.6f}"
    )
    verdict, summary = verdict_of(record), _clean(record["summary"])
    if verdict in _FAILURES or verdict is Verdict.LOST:
        tag = "failure" if verdict in _FAILURES else "error"
        found = ET.SubElement(test, tag, type=verdict.value, message=summary)
        found.text = f"{summary}\n{replay_command(run, record)}"
    elif verdict is Verdict.UNSUPPORTED:
        ET.SubElement(test, "skipped", message=summary)
    elif verdict in NOTED:
        ET.SubElement(test, "system-out").text = f"{verdict.value}: {summary}"


def _incomplete(run: RunResults, top: ET.Element) -> None:
    suite = ET.SubElement(top, "testsuite", name="the run itself", failures="0", skipped="0")
    for text in run.incomplete_because():
        test = ET.SubElement(suite, "testcase", classname="kvm-harness", name="results are whole")
        ET.SubElement(test, "error", type="lost", message=_clean(text))
    suite.set("tests", str(len(suite)))
    suite.set("errors", str(len(suite)))


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
