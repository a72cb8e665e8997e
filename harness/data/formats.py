"""Rows as people have them become canonical rows, which everything after this file reads.

A canonical row is a JSON-serialisable dict in one of three shapes. What a row does not have is absent, never null, and nothing is invented.

    {"messages": [Message…], "tools": [Tool…]?, "train_from": int?}   assistant turns are trained, from message `train_from` (absent: 0) on
        and "json_schema": OBJECT?, what an answer must be, for the reward of that name
    {"prompt": str, "completion": str}                                the completion is trained
    {"text": str}                                                     everything is trained

    Message  {"role": "system"|"user"|"assistant"|"tool", "content": str?, "reasoning_content": str?, "tool_calls": [Call…]?,
              "tool_call_id": str?, "name": str?}
    Call     {"id": str?, "type": "function", "function": {"name": str, "arguments": OBJECT}}
    Tool     see harness/tools/schema.py

Layouts read: see `LAYOUTS`, one file of layouts/ for each family. Every conversation that leaves here to be trained ends with the
assistant, and every call that is trained names a tool that its row offers: the opposite teaches a model to make tools up. A call that
breaks its tool's *schema* passes (12-19 % of the gold calls of public sets do); `broken_calls` lists them, so that they are counted.
"""

from __future__ import annotations

from harness.data.conversation import check_conversation, object_of
from harness.data.layouts.apibench import APIBENCH, APIBENCH_API, is_python
from harness.data.layouts.base import Layout, LeftOut, Reading, Settings
from harness.data.layouts.benchmarks import BFCL, WHEN2CALL
from harness.data.layouts.glaive import GLAIVE
from harness.data.layouts.plain import KTO, MESSAGES, PROMPT_COMPLETION, QUESTIONS, TEXT
from harness.data.layouts.responses import ROLLOUTS
from harness.data.layouts.retrieval import RETRIEVAL
from harness.data.layouts.sharegpt import HERMES, SHAREGPT, TOOLACE
from harness.data.layouts.xlam import HAMMER, SEALTOOLS, XLAM
from harness.errors import DataError
from harness.tools import Problem, ToolCall, check_call

__all__ = [
    "LAYOUTS", "LeftOut", "Reading", "Settings", "broken_calls", "detect_format", "is_python", "to_canonical", "trained_calls",
]  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "messages": MESSAGES,
    "prompt_completion": PROMPT_COMPLETION,
    "text": TEXT,
    "xlam": XLAM,
    "hammer": HAMMER,
    "sharegpt": SHAREGPT,
    "hermes": HERMES,
    "toolace": TOOLACE,
    "glaive": GLAIVE,
    "sealtools": SEALTOOLS,
    "apibench": APIBENCH,
    "apibench_api": APIBENCH_API,
    "bfcl": BFCL,
    "when2call": WHEN2CALL,
    "kto": KTO,
    "rollouts": ROLLOUTS,
    "retrieval": RETRIEVAL,
    "questions": QUESTIONS,
}
"""What a source's `format` may be, beside auto (harness/recipe/schema.py has the same names)."""

# What people take for rows, and is something else.
_NOT_ROWS = (
    ({"chosen", "rejected"}, "a preference pair, which supervised training does not read; tasks dpo, reward and kto do"),
    ({"api_name", "api_description"}, "tools of Seal-Tools, which are read beside its rows"),
    ({"id", "ground_truth"}, "gold calls of BFCL, which are read beside its questions"),
)


def detect_format(row: dict) -> str:
    """The layout of a row, by its keys and, where they do not say enough, its values. Raises DataError where none or several fit."""
    found = [name for name, layout in LAYOUTS.items() if layout.is_shown_by(row)]
    found = [name for name in found if not any(name in LAYOUTS[other].instead_of for other in found)]
    if len(found) == 1:
        return found[0]
    seen = f"the row's keys are {', '.join(map(str, row)) or 'none'}"
    if found:
        raise DataError(f"{seen}, which fit {' and '.join(found)}; say which with the source's `format`")
    seen += next((f" ({what})" for keys, what in _NOT_ROWS if keys <= row.keys()), "")
    accepted = "; ".join(f"{name}: {layout.shown}" for name, layout in LAYOUTS.items())
    raise DataError(f"{seen}; must be one of the layouts {accepted}")


def to_canonical(row: dict, layout: str = "auto", *, asks: bool = False, reading: Reading | None = None) -> dict:
    """Converts one raw row. Raises DataError saying what is wrong in it (the caller knows where it stands); LeftOut, a kind of it, for a
    row that is not to be imitated.

    asks: the row is a question, which may end with the user or a tool and must be a conversation.
    reading: what the layout leaves open, and what is lost (layouts/base.py).
    """
    if layout == "auto":
        layout = detect_format(row)
    known = LAYOUTS[layout]
    if not any(key_set <= row.keys() for key_set in known.keys):
        raise DataError(f"the row's keys are {', '.join(map(str, row)) or 'none'}; {layout} rows have {known.shown}")
    if known.fits and not known.fits(row):
        raise DataError(f"the row is not of the layout {layout} ({known.shown})")
    reading = reading or Reading()
    reading.asks = asks
    canonical = known.read(row, reading)
    known.lose_other_keys(row, reading)
    if "messages" in canonical:
        if row.get("json_schema") is not None:
            canonical["json_schema"] = object_of(row["json_schema"], "json_schema")
        check_conversation(canonical, asks=asks)
    elif asks:
        raise DataError(f"a row of {' and '.join(canonical)} has no turn that could be answered; must be messages")
    return canonical


def trained_calls(row: dict) -> list[ToolCall]:
    """The calls of a canonical row that are trained."""
    trained = row.get("messages", [])[row.get("train_from", 0) :]
    return [ToolCall(c["function"]["name"], c["function"]["arguments"]) for m in trained for c in m.get("tool_calls", [])]


def broken_calls(row: dict) -> list[Problem]:
    """The first problem of each trained call that breaks its tool's schema."""
    return [problems[0] for call in trained_calls(row) if (problems := check_call(call, row.get("tools", [])))]
