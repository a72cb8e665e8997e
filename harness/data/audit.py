"""What is wrong in data before it is trained, row by row (findings.py), and what is done about it: `harness validate`.

    audit(files, ...)                 reads everything once -> Audit: counts, first places, and what becomes of each row
    write_audited(audit, output)      reads again, writes what is left as canonical rows, and OUTPUT.changes.jsonl

A class of findings has one action: `fail` (the command ends with 1 and writes nothing), `drop` the row, `repair` it (a row that stays
broken is dropped) or `keep` it as it is, counted. A line of OUTPUT.changes.jsonl is one change to one row:

    {"location", "class", "action": "dropped", "why"}     {"location", "class", "action": "repaired", "where", "before", "after"}

Rows are checked in several processes (spans.py). Promises. A row without findings is written as it was read. Memory grows by less than 200
bytes a row, whatever the rows hold, and by some 500 more for a row that is to be dropped or repaired. No torch.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.data.conversation import UnknownTool, Unpaired
from harness.data.findings import ACTIONS, CLASSES, CONTROL_TOKENS, NO_ROW, OF_CALLS, Finding, check_row, repair_row
from harness.data.formats import LeftOut, Reading, detect_format, to_canonical
from harness.data.reading import Span, read_spans
from harness.data.repeats import NearDuplicates, Suites, first_alike, signature_of
from harness.data.report import EXAMPLES
from harness.data.rows import Places, content_digest
from harness.data.spans import in_order
from harness.errors import DataError


@dataclass
class Found:
    """Of one class."""

    findings: int = 0
    rows: int = 0
    calls: int = 0
    """Distinct ones, of the classes that are about calls."""
    mended_rows: int = 0
    """Rows in which a repair would leave nothing of this class."""
    first: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class File:
    """What is read; a recipe's source will do as well."""

    path: str
    format: str = "auto"
    name: str | None = None
    split: str = "train"


@dataclass
class Audit:
    files: Sequence[File]
    actions: dict[str, str]
    pattern: re.Pattern
    rows: int = 0
    calls: int = 0
    """That are trained."""
    broken_calls: int = 0
    """Of these, that break their tool's schema."""
    layouts: Counter = field(default_factory=Counter)
    found: dict[str, Found] = field(default_factory=dict)
    fate: dict[int, dict[str, str]] = field(default_factory=dict)
    """Number of a row -> class -> why, for classes that drop or repair."""

    @property
    def failed(self) -> list[str]:
        return [kind for kind in self.found if self.actions[kind] == "fail"]

    @property
    def dropped(self) -> int:
        return sum(any(self.actions[kind] == "drop" for kind in fate) for fate in self.fate.values())


def plan_actions(asked: Sequence[str]) -> dict[str, str]:
    """class -> action, from the defaults and `CLASS=ACTION`. Raises DataError for a class or action that is not there."""
    actions = {kind: known.action for kind, known in CLASSES.items()}
    for text in asked:
        kind, _, action = text.partition("=")
        if kind not in CLASSES:
            raise DataError(f"--on {text}: no class {kind!r}; must be one of {', '.join(CLASSES)}")
        takes = [name for name in ACTIONS if (name != "repair" or CLASSES[kind].repair) and (name != "keep" or kind not in NO_ROW)]
        if action not in takes:
            raise DataError(f"--on {text}: {kind} takes {', '.join(takes)}")
        actions[kind] = action
    return actions


# ---- everything


def audit(
    files: Sequence[File],
    actions: dict[str, str],
    *,
    suites: Suites | None = None,
    pattern: re.Pattern = CONTROL_TOKENS,
    asks: bool = False,
) -> Audit:
    """Raises DataError where a file cannot be read at all, and where there is no row. asks: rows are questions, as in `to_canonical`."""
    report, places, near = Audit(files, actions, pattern), Places(), NearDuplicates()
    digests, numbers = bytearray(), array("q")
    work = partial(_check_span, asks=asks, pattern=pattern, suites=suites)
    for checked in in_order(work, _pieces(files), None, "checked"):
        for row in checked:
            number = report.rows
            report.rows += 1
            report.layouts.update(row.layout)
            report.calls += row.calls
            report.broken_calls += row.broken_calls
            places.append(row.location)
            if row.digest:
                numbers.append(number)
                digests += row.digest
            if row.signature:
                near.add(number, row.signature)
            _count(report, number, row.location, row.findings, row.mended)
    if not report.rows:
        raise DataError(f"{', '.join(file.path for file in files)}: no row; nothing can be audited")
    _find_repeats(report, places, near, bytes(digests), numbers)
    report.found = {kind: report.found[kind] for kind in CLASSES if kind in report.found}
    return report


@dataclass(frozen=True)
class _Piece:
    span: Span
    layout: str
    fate: dict[int, dict[str, str]] = field(default_factory=dict)
    """Number of a row in the span -> class -> why."""

    def __str__(self) -> str:
        return str(self.span)


def _pieces(files: Sequence[File], fate: dict[int, dict[str, str]] | None = None) -> Iterator[_Piece]:
    """fate: as an Audit has it."""
    number = 0
    for file in files:
        for span in read_spans(file.path, file.name, file.split):
            rows = len(span) if fate else 0
            yield _Piece(span, file.format, {i: fate[number + i] for i in range(rows) if number + i in fate})
            number += rows


@dataclass
class _Checked:
    location: str
    layout: list[str]
    """One, or none where the row has none that is known."""
    findings: list[Finding]
    mended: set[str] = field(default_factory=set)
    """Classes of findings of which a repair would leave nothing."""
    calls: int = 0
    broken_calls: int = 0
    digest: bytes | None = None
    signature: bytes | None = None


def _check_span(piece: _Piece, *, asks: bool, pattern: re.Pattern, suites: Suites | None) -> list[_Checked]:
    checked = []
    for location, raw in piece.span.read():
        layout: list[str] = []
        row, findings = _canonical(raw, piece.layout, asks, layout)
        found = _Checked(location, layout, findings)
        if row is not None:
            found.calls = sum(len(message.get("tool_calls", ())) for message in row.get("messages", ())[row.get("train_from", 0) :])
            findings += check_row(row, pattern)
            found.broken_calls = len({finding.where for finding in findings if finding.kind in OF_CALLS})
            found.digest, found.signature = bytes.fromhex(content_digest(row)), signature_of(row)
            if suites and (repeated := suites.find(row)):
                findings.append(Finding("contamination", "", repeated))
            kinds = {finding.kind for finding in findings if CLASSES[finding.kind].repair}
            found.mended = {kind for kind in kinds if not _left_of(row, kind, {kind}, pattern)}
        checked.append(found)
    return checked


def _find_repeats(report: Audit, places: Places, near: NearDuplicates, digests: bytes, numbers: array) -> None:
    import numpy as np

    of_digest, first = np.array(numbers), first_alike(np.frombuffer(digests, "S16"))
    again = np.flatnonzero(first != np.arange(len(first)))
    for number, earlier in zip(of_digest[again].tolist(), of_digest[first[again]].tolist(), strict=True):
        _count(report, number, places[number], [Finding("duplicate", "", f"is the row at {places[earlier]}")])
    for number, earlier, share in near.found(besides=of_digest[again]):
        message = f"shares about {share:.0%} of its runs of words with the row at {places[earlier]}"
        _count(report, number, places[number], [Finding("near_duplicate", "", message)])


def _canonical(raw: dict | DataError, layout: str, asks: bool, layouts: list[str]) -> tuple[dict | None, list[Finding]]:
    """layouts: the row's is appended, where it is known."""
    try:
        if isinstance(raw, DataError):
            raise raw
        layout = detect_format(raw) if layout == "auto" else layout
        layouts.append(layout)
        row = to_canonical(raw, layout, asks=asks, reading=Reading())
        json.dumps(row, ensure_ascii=False).encode()
        return row, []
    except UnicodeEncodeError as error:
        return None, [Finding("unreadable", "", f"{error.object[error.start]!r} is half of a surrogate pair, no character")]
    except RecursionError:
        return None, [Finding("unreadable", "", "nested too deeply")]
    except DataError as error:
        kinds = {UnknownTool: "unknown_tool", Unpaired: "unpaired_result", LeftOut: "left_out"}
        return None, [Finding(kinds.get(type(error), "unreadable"), "", str(error))]


def _count(report: Audit, number: int, location: str, findings: list[Finding], mended: Collection[str] = ()) -> None:
    for kind, of_kind in _by_kind(findings).items():
        found = report.found.setdefault(kind, Found())
        found.findings += len(of_kind)
        found.calls += len({finding.where for finding in of_kind}) if kind in OF_CALLS else 0
        found.rows += 1
        why = f"{of_kind[0].where}: {of_kind[0].message}" if of_kind[0].where else of_kind[0].message
        if len(found.first) < EXAMPLES:
            found.first.append(f"{location}: {why}")
        found.mended_rows += kind in mended
        action = report.actions[kind]
        if action in ("drop", "repair"):
            report.fate.setdefault(number, {})[kind] = why


def _by_kind(findings: list[Finding]) -> dict[str, list[Finding]]:
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.kind, []).append(finding)
    return grouped


def _left_of(row: dict, kind: str, kinds: set[str], pattern: re.Pattern) -> list[Finding]:
    return [finding for finding in check_row(repair_row(row, kinds, pattern)[0], pattern) if finding.kind == kind]


# ---- writing what is left


def write_audited(report: Audit, output: Path, *, force: bool = False) -> Counter:
    """Rows `written`, `dropped`, `repaired`. Raises DataError for an output that is there, findings that fail, and where none is left."""
    changes = output.with_name(f"{output.name}.changes.jsonl")
    if output.exists() and not force:
        raise DataError(f"{output} is there already; give another --output, or --force to replace it")
    if report.failed:
        raise DataError(f"nothing is written while there are findings that fail ({', '.join(report.failed)})")
    scratch = [file.with_name(f".{file.name}.{os.getpid()}") for file in (output, changes)]
    counts: Counter = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(scratch[0], "wb") as rows, open(scratch[1], "wb") as record:
            work = partial(_settle_span, actions=report.actions, pattern=report.pattern)
            for settled in in_order(work, _pieces(report.files, report.fate), None, "written"):
                for line, told in settled:
                    record.write(told)
                    counts["written" if line else "dropped"] += 1
                    counts["repaired"] += bool(line and told)
                    rows.write(line)
        if sum(counts[key] for key in ("dropped", "written")) != report.rows:
            raise DataError("the files changed while they were read; validate them again")
        if not counts["written"]:
            raise DataError(f"no row is left of {report.rows}")
        for file, target in zip(scratch, (output, changes), strict=True):
            os.replace(file, target)
    finally:
        for file in scratch:
            file.unlink(missing_ok=True)
    return counts


def _settle_span(piece: _Piece, *, actions: dict[str, str], pattern: re.Pattern) -> list[tuple[bytes, bytes]]:
    """Of each row the line that is written, empty where it is dropped, and the lines of the record about it."""
    settled = []
    for number, (location, raw) in enumerate(piece.span.read()):
        row, lines = _settle(piece.fate.get(number, {}), actions, pattern, _canonical(raw, piece.layout, False, [])[0])
        told = "".join(json.dumps({"location": location, **line}, ensure_ascii=False) + "\n" for line in lines)
        line = b"" if row is None else (json.dumps(row, ensure_ascii=False) + "\n").encode()
        settled.append((line, told.encode("utf-8", "replace")))
    return settled


def _settle(fate: dict[str, str], actions: dict[str, str], pattern: re.Pattern, row: dict | None) -> tuple[dict | None, list[dict]]:
    """The row as it is written, None where it is dropped, and the lines of the record about it."""
    drops = [kind for kind in CLASSES if kind in fate and actions[kind] == "drop"]
    if drops:
        return None, [{"class": kind, "action": "dropped", "why": fate[kind]} for kind in drops]
    kinds = set(fate)
    if not kinds or row is None:
        return row, []
    row, changes = repair_row(row, kinds, pattern)
    left = [finding for finding in check_row(row, pattern) if finding.kind in kinds]
    if left:
        why = f"cannot be repaired: {left[0].where}: {left[0].message}"
        return None, [{"class": left[0].kind, "action": "dropped", "why": why}]
    return row, [
        {"class": kind, "action": "repaired", "where": where, "before": before, "after": after} for kind, where, before, after in changes
    ]
