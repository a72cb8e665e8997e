"""Pairs of answers in the small world: the right one, and one that a minimal edit has made wrong.

Writes four JSONL files over questions of base-train and base-eval, each asked once:

    pairs-train.jsonl     pairs-eval.jsonl      `prompt`, `chosen`, `rejected` (lists of messages), `tools`
    answers-train.jsonl   answers-eval.jsonl    of each pair one answer, by turns: `prompt`, `completion`, `label`, `tools`

and, for pairs from a model's own failures, questions of the second world that no other file has:

    adapt-mining.jsonl                          `messages`, `tools`

An edit changes one value, adds an argument that was not asked for (or leaves one out, where all were), takes another tool, calls none, or
calls one where none helps. Both answers stand under the same prompt, so nothing but the answer tells them apart.

Promises: the same seed gives the same bytes; no rejected answer matches its chosen one (harness.tools.match); arguments are added as often
as they are left out, and an abstention is wrong about as often as it is right: neither length nor the tool's absence gives the answer away.
"""

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from harness.quickstart.world import ABSTENTION, ADAPT_TOOLS, BASE_TOOLS, Parameter, ask, draw_rows

TOOLS = {tool.name: tool for tool in BASE_TOOLS}


@dataclass(frozen=True)
class PairFiles:
    pairs_train: Path
    pairs_eval: Path
    answers_train: Path
    answers_eval: Path


def write_pairs(folder: str | Path, seed: int, *, train: int = 4000, held_out: int = 256) -> PairFiles:
    """Write the files into `folder` and return their paths. Raises ValueError if more questions are asked for than there are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = PairFiles(*(folder / f"{kind}-{split}.jsonl" for kind in ("pairs", "answers") for split in ("train", "eval")))
    for path, answers, size, of_eval in (
        (files.pairs_train, files.answers_train, train, False),
        (files.pairs_eval, files.answers_eval, held_out, True),
    ):
        rng = random.Random(f"{seed}/{path.stem}")
        rows = list(islice(draw_rows(rng, BASE_TOOLS, ADAPT_TOOLS, of_eval), size))
        if len(rows) < size:
            raise ValueError(f"{path.name}: {size} pairs asked; the world has only {len(rows)} distinct questions for it at this seed")
        pairs = [_pair(rng, row) for row in rows]
        for file, written in ((path, pairs), (answers, [_answer(pair, good=number % 2 == 0) for number, pair in enumerate(pairs)])):
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return files


def write_mining(folder: str | Path, seed: int, known: set[str], *, size: int = 4000) -> Path:
    """Write adapt-mining.jsonl into `folder` and return its path. known: questions that are asked elsewhere."""
    path = Path(folder) / "adapt-mining.jsonl"
    rng = random.Random(f"{seed}/{path.stem}")
    rows = (row for row in draw_rows(rng, ADAPT_TOOLS, BASE_TOOLS, False) if row["messages"][0]["content"] not in known)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in islice(rows, size)), encoding="utf-8")
    return path


def _pair(rng: random.Random, row: dict) -> dict:
    question, right = row["messages"]
    return {"prompt": [question], "chosen": [right], "rejected": [_spoil(rng, right)], "tools": row["tools"]}


def _answer(pair: dict, *, good: bool) -> dict:
    return {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good, "tools": pair["tools"]}


def _spoil(rng: random.Random, right: dict) -> dict:
    """An answer that differs from the right one in as little as makes it wrong."""
    if "tool_calls" not in right:
        tool = rng.choice(BASE_TOOLS)
        return _call(tool.name, ask(rng, tool)[1])
    if rng.random() < 1 / 5:
        return {"role": "assistant", "content": ABSTENTION}
    function = right["tool_calls"][0]["function"]
    tool, arguments = TOOLS[function["name"]], function["arguments"]
    missing = [p for p in tool.parameters if p.name not in arguments]
    edit = rng.choice(("value", "value", "count", "tool"))
    if edit == "value":
        name = rng.choice(sorted(arguments))
        parameter = next(p for p in tool.parameters if p.name == name)
        return _call(tool.name, arguments | {name: _another(rng, parameter, arguments[name])})
    if edit == "count" and missing:
        added = rng.choice(missing)
        given = arguments | {added.name: _any(rng, added)}
        return _call(tool.name, {p.name: given[p.name] for p in tool.parameters if p.name in given})
    if edit == "count":
        left_out = rng.choice(sorted(arguments))
        return _call(tool.name, {name: value for name, value in arguments.items() if name != left_out})
    other = rng.choice([t for t in BASE_TOOLS if t is not tool])
    return _call(other.name, ask(rng, other)[1])


def _any(rng: random.Random, parameter: Parameter) -> object:
    value = rng.choice(parameter.values)
    return [value] if parameter.schema["type"] == "array" else value


def _another(rng: random.Random, parameter: Parameter, now: object) -> object:
    """Another value; of several, one is another."""
    if not isinstance(now, list):
        return rng.choice([value for value in parameter.values if value != now])
    place = rng.randrange(len(now))
    return [rng.choice([v for v in parameter.values if v not in now]) if i == place else v for i, v in enumerate(now)]


def _call(name: str, arguments: dict) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
