"""Rows of any layout as rows of one: `harness convert`.

    convert(path, target, output, ...)    reads and writes span by span, in several processes -> Conversion, which says what was lost

`messages` is the canonical form (formats.py): it holds everything that harness trains, and reading it back gives the same rows. `openai`
has arguments as JSON text and an id for every call. `xlam` holds rows that end with calls. A row that the target cannot hold is a bad row.

Promises. The output appears whole or not at all. Every row that was read is written, left out by its layout, or listed as skipped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.data.formats import LeftOut, Reading, Settings, detect_format, to_canonical
from harness.data.reading import Span, read_spans
from harness.data.report import Dropped
from harness.data.spans import in_order
from harness.errors import DataError

Lose = Callable[[str], None]


@dataclass
class Conversion:
    read: int = 0
    written: int = 0
    layouts: Counter = field(default_factory=Counter)
    """Rows read of each layout."""
    lost: dict[str, Dropped] = field(default_factory=dict)
    """What was lost -> rows that had it."""
    left_out: dict[str, Dropped] = field(default_factory=dict)
    """Why the layout leaves it out -> rows."""
    skipped: Dropped = field(default_factory=Dropped)


def convert(
    path: str,
    target: str,
    output: Path,
    *,
    layout: str = "auto",
    settings: Settings | None = None,
    on_error: str = "fail",
    questions: bool = False,
    force: bool = False,
) -> Conversion:
    """Raises DataError for a bad row (on_error = "fail"; "skip" lists them in OUTPUT.skipped.txt), for an output that is there and where no
    row is left.

    layout: a name of LAYOUTS, or auto. questions: rows may ask and have no answer (they are for `harness generate`).
    """
    if output.exists() and not force:
        raise DataError(f"{output} is there already; give another --output, or --force to replace it")
    done, listed = Conversion(), output.with_name(f"{output.name}.skipped.txt")
    scratch = [file.with_name(f".{file.name}.{os.getpid()}") for file in (output, listed)]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(scratch[0], "wb") as rows, open(scratch[1], "wb") as skipped:
            work = partial(_convert_span, layout=layout, target=target, settings=settings or Settings(), questions=questions)
            for converted in in_order(work, read_spans(path), None, "converted"):
                for row in converted:
                    done.read += 1
                    done.layouts.update(row.layout)
                    if isinstance(row.made, LeftOut):
                        done.left_out.setdefault(str(row.made), Dropped()).add(1, [row.location])
                        continue
                    if isinstance(row.made, DataError):
                        if on_error == "fail":
                            raise DataError(f"{row.location}: {row.made}")
                        done.skipped.add(1, [f"{row.location}: {row.made}"])
                        skipped.write(f"{row.location}: {row.made}\n".encode("utf-8", "replace"))
                        continue
                    rows.write(row.made)
                    done.written += 1
                    for what in row.lost:
                        done.lost.setdefault(what, Dropped()).add(1, [row.location])
        if not done.written:
            first = (*done.skipped.locations, *(f"{where.locations[0]}: {why}" for why, where in done.left_out.items()))
            raise DataError(f"{path}: no row is left of {done.read}" + (f"; the first: {first[0]}" if first else ""))
        os.replace(scratch[0], output)
        if done.skipped.rows:
            os.replace(scratch[1], listed)
        elif force:
            listed.unlink(missing_ok=True)
    finally:
        for file in scratch:
            file.unlink(missing_ok=True)
    return done


@dataclass
class _Converted:
    location: str
    layout: list[str]
    """One, or none where the row has none that is known."""
    made: bytes | DataError
    lost: set[str]


def _convert_span(span: Span, *, layout: str, target: str, settings: Settings, questions: bool) -> list[_Converted]:
    converted = []
    for location, raw in span.read():
        reading, layouts = Reading(settings, lost=[]), []
        try:
            made = _convert_row(raw, layout, target, reading, questions, layouts)
        except DataError as error:
            made = error
        converted.append(_Converted(location, layouts, made, set(reading.lost)))
    return converted


def _convert_row(raw: dict | DataError, layout: str, target: str, reading: Reading, questions: bool, layouts: list[str]) -> bytes:
    if isinstance(raw, DataError):
        raise raw
    try:
        layout = detect_format(raw) if layout == "auto" else layout
        layouts.append(layout)
        row = TARGETS[target](to_canonical(raw, layout, asks=questions, reading=reading), reading.lose)
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object[error.start]!r} is half of a surrogate pair, no character; write the file as UTF-8 again") from None
    except RecursionError:
        raise DataError("nested too deeply") from None


# ---- targets


def as_messages(row: dict, lose: Lose) -> dict:
    return row


def as_openai(row: dict, lose: Lose) -> dict:
    """Messages as OpenAI's API takes them: every call has an id, its arguments are JSON text, and the result names the call. Assistant
    messages before `train_from` have weight 0."""
    messages, waiting, made = [], [], 0
    for i, message in enumerate(_messages_of(row, "openai")):
        message = dict(message)
        if message["role"] == "assistant":
            calls, waiting = [], []
            for call in message.get("tool_calls", []):
                function, identity = call["function"], call.get("id")
                if identity is None:
                    identity, made = f"call_{made}", made + 1
                calls.append({"id": identity, "type": "function", "function": {**function, "arguments": _json(function["arguments"])}})
                waiting.append(identity)
            message = {"role": "assistant", "content": message.get("content"), **message} | ({"tool_calls": calls} if calls else {})
            if i < row.get("train_from", 0):
                message["weight"] = 0
        elif message["role"] == "tool" and waiting:
            identity = message.setdefault("tool_call_id", waiting[0])
            waiting = [other for other in waiting if other != identity]
        messages.append(message)
    return {"messages": messages} | ({"tools": row["tools"]} if "tools" in row else {})


def as_xlam(row: dict, lose: Lose) -> dict:
    """{query, tools, answers}, the last two as JSON text, as in xLAM; a dialogue as API-Bank has it, of which only the end is trained."""
    messages = _messages_of(row, "xlam")
    last, before = messages[-1], messages[:-1]
    if not last.get("tool_calls"):
        raise DataError("ends with words; an xlam row ends with calls, which are its answers")
    for message in messages:
        for key in ("reasoning_content", "tool_call_id", "name"):
            if key in message:
                lose(f"`{key}` of a message")
        if any("id" in call for call in message.get("tool_calls", ())):
            lose("`id` of a call")
    earlier = [i for i, message in enumerate(before) if message["role"] == "assistant"]
    if earlier and earlier[-1] >= row.get("train_from", 0):
        lose("the training of earlier turns of the assistant")
    turns = [turn for message in before for turn in _turns_of(message)]
    turns += [{"role": "agent", "content": last["content"]}] if last.get("content") else []
    query = turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns
    tools = [tool["function"] for tool in row["tools"]]
    return {"query": query, "tools": _json(tools), "answers": _json(_bare(last["tool_calls"]))}


def _turns_of(message: dict) -> list[dict]:
    if message["role"] != "assistant":
        return [{"role": message["role"], "content": message["content"]}]
    words = [{"role": "agent", "content": message["content"]}] if message.get("content") else []
    calls = _bare(message.get("tool_calls", []))
    return words + ([{"role": "assistant", "content": f"```\n{_json(calls)}\n```"}] if calls else [])


def _bare(calls: list[dict]) -> list[dict]:
    return [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]


def _messages_of(row: dict, target: str) -> list[dict]:
    if "messages" not in row:
        raise DataError(f"a row of {' and '.join(row)} has no messages, which {target} rows are made of; `--to messages` keeps it as it is")
    return row["messages"]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


TARGETS: dict[str, Callable[[dict, Lose], dict]] = {"messages": as_messages, "openai": as_openai, "xlam": as_xlam}


def render_conversion(done: Conversion, output: Path) -> str:
    layouts = ", ".join(f"{count:,} as {name}" for name, count in done.layouts.items())
    lines = [f"{done.read:,} rows read ({layouts}), {done.written:,} written to {output}"]
    lines += [f"left out, {why}: {_places(rows)}" for why, rows in done.left_out.items()]
    lines += [f"lost, {what}: {_places(rows)}" for what, rows in sorted(done.lost.items())]
    if done.skipped.rows:
        lines.append(f"skipped: {done.skipped.rows:,} rows, each with its reason in {output}.skipped.txt; the first:")
        lines.append(f"  {done.skipped.locations[0]}")
    if not (done.lost or done.left_out or done.skipped.rows):
        lines.append("nothing was lost")
    return "\n".join(lines)


def _places(rows: Dropped) -> str:
    return f"{rows.rows:,} rows, the first {rows.locations[0]}"
