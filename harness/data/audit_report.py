"""What an audit found, for people (counts, first places, what to do) and as JSON."""

from __future__ import annotations

from collections import Counter

from harness.data.audit import Audit
from harness.data.findings import ACTIONS, CLASSES, NO_ROW
from harness.data.overlap import SHARE, WORDS
from harness.data.repeats import NEAR


def render_audit(report: Audit) -> str:
    layouts = ", ".join(f"{count:,} {name}" for name, count in report.layouts.items())
    lines = [f"{report.rows:,} rows ({layouts or 'none of a known layout'}), {report.calls:,} trained calls"]
    if report.broken_calls:
        lines[0] += f", of which {report.broken_calls:,} ({report.broken_calls / report.calls:.1%}) break their own tool's schema"
    for kind in sorted(report.found, key=lambda kind: ACTIONS.index(report.actions[kind])):
        found = report.found[kind]
        calls = f" ({_count(found.calls, 'call')})" if found.calls else ""
        lines += ["", f"{report.actions[kind].upper():<6} {kind}: {_count(found.rows, 'row')}{calls}. Such a row {CLASSES[kind].what}."]
        lines += [f"         {place}" for place in found.first]
        if found.rows > len(found.first):
            lines.append(f"         and {found.rows - len(found.first):,} more")
        lines += [f"       {line}" for line in _advice(report, kind)]
    if not report.found:
        lines.append("nothing is wrong")
    return "\n".join(lines)


def _advice(report: Audit, kind: str) -> list[str]:
    """What is done, and what else can be done."""
    found, action, known = report.found[kind], report.actions[kind], CLASSES[kind]
    all_rows, mended, rest = _count(found.rows, "row"), _count(found.mended_rows, "row"), found.rows - found.mended_rows
    outcome = {
        "drop": f"drops {all_rows}",
        "repair": f"mends {mended}" + (f" and drops {rest:,}" if rest else "") + f": it {known.repair}",
        "keep": "keeps such rows as they are",
    }
    lines = [] if action == "fail" else [f"--output {outcome[action]}"]
    offers = ["repair"] * bool(known.repair and found.mended_rows) + ["drop"] + ["keep"] * (kind not in NO_ROW)
    lines += [
        f"--on {kind}={offer} {outcome[offer]}" for offer in offers if offer != action and action in ("fail", "keep") and offer != "fail"
    ]
    if kind == "contamination":
        lines.append(
            f"(a text of the row is the question, or runs of {WORDS} words that both hold cover more than {SHARE:.0%} of the shorter one; "
            f"of fewer than {2 * WORDS} words all stand in both)"
        )
    if kind == "near_duplicate":
        lines.append(f"(rows that share {NEAR:.0%} of their runs of 3 words, by estimate)")
    return lines


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def audit_json(report: Audit, written: Counter | None = None) -> dict:
    """For programs: {rows, calls, broken_calls, layouts, failed, classes: {class: {action, rows, calls, …}}, written?}."""
    classes = {
        kind: {
            "action": report.actions[kind],
            "rows": found.rows,
            "calls": found.calls,
            "findings": found.findings,
            "mendable_rows": found.mended_rows,
            "first": found.first,
        }
        for kind, found in report.found.items()
    }
    result = {
        "rows": report.rows,
        "calls": report.calls,
        "broken_calls": report.broken_calls,
        "layouts": dict(report.layouts),
        "failed": report.failed,
        "classes": classes,
    }
    return result | ({"written": dict(written)} if written is not None else {})
