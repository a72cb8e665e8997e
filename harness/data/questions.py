"""Conversations become questions for a policy that writes the answers itself: tokenised prompts, and beside each what its row has to say
about a right answer.

    prepare_questions(recipe, train rows, held-out rows, tokenizer)    as prepare.prepare, into a folder of the same format

Columns: input_ids (the prompt, as a server would ask), labels (all -100: nothing of it is trained), length, sample and location as of any
prepared rows, and `row`, the JSON text of

    {"messages": [...], "tools": [...]?, "answer": str?, "tool_calls": [...]?, "json_schema": {...}?}

`messages` is what is asked; `answer` and `tool_calls` are what the row's own last turn says and calls, absent where it ends with the user.
Where tools really run, the question ends with the last word of the user, and all that the assistant calls after it is gold.

Promises. A prompt is asked whole or not at all: one that leaves less than rlhf.max_completion_length of data.max_length is dropped and
counted (with `too_long: fail` an error).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from datasets import Features, Value

from harness.data.encode import check_characters
from harness.data.prepare import percentiles, tokenizer_digest
from harness.data.report import Dropped, PrepareReport, SplitReport
from harness.data.samples import REFUSED, TOO_LONG, TooLongError, row_digest
from harness.data.store import SAMPLE_FEATURES, Prepared, building, is_complete, load_prepared, save_manifest
from harness.data.templates import Renderer, check_tokenizer
from harness.errors import DataError, RecipeError
from harness.plugins import load_plugin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.data.rows import SourceRow
    from harness.recipe import Recipe

FEATURES = Features({**SAMPLE_FEATURES, "row": Value("string")})
VERSION = 1
"""Raise it when the same row would give another question than before."""
WRITTEN = "none: what is trained is what the policy writes"
ROWS_AT_ONCE = 500


def prepare_questions(
    recipe: Recipe,
    train: Sequence[SourceRow],
    held_out: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path,
    skipped: Dropped,
) -> Prepared:
    """Tokenise, or find that it was done before. Raises DataError for a row, ModelError for the tokenizer, RecipeError for tools that
    cannot be loaded."""
    check_tokenizer(tokenizer)
    offered = offered_tools(recipe)
    data, room = recipe.data, recipe.data.max_length - recipe.rlhf.max_completion_length
    splits = {"train": train} | ({"eval": held_out} if held_out else {})
    rows = {name: [row_digest(source.row) for source in sources] for name, sources in splits.items()}
    settings = [room, data.too_long, data.on_error, acts(recipe), offered]
    name = json.dumps(["questions", VERSION, rows, tokenizer_digest(tokenizer), settings], ensure_ascii=False)
    folder = cache_dir / hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    if not is_complete(folder):
        asked = Asked(recipe, Renderer(tokenizer), offered, room)
        with building(folder) as scratch:
            report, files = PrepareReport(SplitReport(), mask_source=WRITTEN), {}
            for split, sources in splits.items():
                files[split] = [scratch / f"{split}-00000.arrow"]
                setattr(report, split, asked.write(split, sources, files[split][0]))
            save_manifest(scratch, report, files)
    return load_prepared(folder).with_skipped(skipped)


def acts(recipe: Recipe) -> bool:
    """Whether tools really run."""
    return bool(recipe.rlhf.tools or recipe.rlhf.environment)


def load_tools(recipe: Recipe) -> list[Callable]:
    """The functions that rlhf.tools names. Raises RecipeError when they are none, or not named as tools are."""
    if not recipe.rlhf.tools:
        return []
    tools = load_plugin("rlhf.tools", recipe.rlhf.tools)
    if not isinstance(tools, (list, tuple)) or not tools or not all(callable(tool) and hasattr(tool, "__name__") for tool in tools):
        raise RecipeError(f"rlhf.tools = {recipe.rlhf.tools}; is {type(tools).__name__}; must be a list of functions, at least one")
    return list(tools)


def load_environment(recipe: Recipe) -> Callable | None:
    """The factory that rlhf.environment names, after making one of it. Raises RecipeError when that has no `reset`."""
    if not recipe.rlhf.environment:
        return None
    factory = load_plugin("rlhf.environment", recipe.rlhf.environment)
    environment = factory()
    if not callable(getattr(environment, "reset", None)):
        raise RecipeError(f"rlhf.environment = {recipe.rlhf.environment}; what it makes has no method reset; TRL's environments have one")
    return factory


def methods_of(environment: object) -> list[Callable]:
    """The tools that an environment has: its public methods, as TRL takes them."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    return [getattr(environment, name) for name, _ in members if name not in ("reset", "get_reward") and not name.startswith("_")]


def offered_tools(recipe: Recipe) -> list[dict]:
    """The schemas of the tools that run, for rows that say none themselves. Raises RecipeError for a function without docstring or
    types."""
    if not acts(recipe):
        return []
    from transformers.utils import get_json_schema

    factory = load_environment(recipe)
    schemas = []
    for tool in (*load_tools(recipe), *(methods_of(factory()) if factory else ())):
        try:
            schemas.append(get_json_schema(tool))
        except Exception as error:
            raise RecipeError(
                f"rlhf.tools: {tool.__name__} tells the policy nothing about itself: {error}; give it types, and a docstring with a line "
                "`name: meaning` below `Args:` for each parameter"
            ) from error
    return schemas


class Asked:
    """Turns rows into questions."""

    def __init__(self, recipe: Recipe, renderer: Renderer, offered: list[dict], room: int):
        self._acts, self._offered, self._room, self._renderer = acts(recipe), offered, room, renderer
        self._too_long, self._on_error, self._longest = recipe.data.too_long, recipe.data.on_error, recipe.rlhf.max_completion_length

    def write(self, split: str, sources: Sequence[SourceRow], path: Path) -> SplitReport:
        report, schema, lengths = SplitReport(), FEATURES.arrow_schema, []
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for first in range(0, len(sources), ROWS_AT_ONCE):
                samples = [sample for source in sources[first : first + ROWS_AT_ONCE] if (sample := self._sample(source, report))]
                writer.write_batch(pa.RecordBatch.from_pylist(samples, schema=schema))
                lengths += [sample["length"] for sample in samples]
        if not lengths:
            reasons = "; ".join(f"{reason}: {dropped.rows} (first: {dropped.locations[0]})" for reason, dropped in report.dropped.items())
            raise DataError(f"data.{split}: none of {report.rows_in} rows is left to ask ({reasons or 'there were none'})")
        report.length_percentiles = percentiles(lengths)
        return report

    def _sample(self, source: SourceRow, report: SplitReport) -> dict | None:
        report.rows_in += 1
        row = question_and_gold(source.row, acts=self._acts, offered=self._offered)
        self._check_runnable(row, source.location)
        text = json.dumps(row, ensure_ascii=False)
        try:
            check_characters(text, source.location)
            ids = self._renderer.render_prompt(row, source.location)
        except DataError as error:
            if self._on_error == "fail":
                raise
            report.drop(REFUSED, str(error))
            return None
        if len(ids) > self._room:
            said = f"asks in {len(ids)} tokens; data.max_length leaves {self._room} beside rlhf.max_completion_length = {self._longest}"
            if self._too_long == "fail":
                raise TooLongError(f"{source.location}: {said}; raise data.max_length, or set data.too_long: drop_row")
            report.drop(TOO_LONG, f"{source.location}: {said}")
            return None
        if control := self._renderer.control_token_in(source.row):
            report.control_tokens.add(1, [f"{source.location}: {control}"])
        report.rows += 1
        report.tokens += len(ids)
        digest = row_digest(source.row)
        return {
            "input_ids": ids,
            "labels": [-100] * len(ids),
            "length": len(ids),
            "sample": digest,
            "location": source.location,
            "row": text,
        }

    def _check_runnable(self, row: dict, location: str) -> None:
        """Raises DataError where the row offers a tool that nothing runs."""
        runs = {tool["function"]["name"] for tool in self._offered}
        missing = [tool["function"]["name"] for tool in row.get("tools", ()) if tool["function"]["name"] not in runs] if self._acts else []
        if missing:
            raise DataError(
                f"{location}: offers {missing[0]}, which rlhf.tools does not run (it runs {', '.join(sorted(runs))}); add it there, or "
                "remove it from the row"
            )


def question_and_gold(row: dict, *, acts: bool, offered: Sequence[dict] = ()) -> dict:
    """See the module. offered: tools of a row that says none."""
    messages, cut = row["messages"], len(row["messages"])
    if acts:
        cut = max((at + 1 for at, message in enumerate(messages) if message["role"] == "user"), default=cut)
    elif messages[-1]["role"] == "assistant":
        cut -= 1
    found = {"messages": messages[:cut]}
    if tools := row.get("tools") or list(offered):
        found["tools"] = tools
    if said := [message for message in messages[cut:] if message["role"] == "assistant"]:
        found["answer"] = said[-1].get("content", "")
        found["tool_calls"] = [call["function"] for message in said for call in message.get("tool_calls", ())]
    return found | ({"json_schema": row["json_schema"]} if "json_schema" in row else {})
