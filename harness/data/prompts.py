"""What a model is asked: the rows of a recipe's `data.train` up to the assistant's last turn, each distinct one once.

A row that ends with the assistant is asked without that turn, which the model never sees; a row that ends with the user or a tool as it is.
Rows that ask the same (content_digest of messages and tools) are one prompt. Prompts stand in the order of their keys, which depends on
nothing but what is asked, so that files may be reordered or split and every prompt keeps its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.data.rows import SourceRow, content_digest
from harness.data.sources import Skipped, load_rows, mix
from harness.data.templates import Renderer
from harness.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.recipe.schema import Data


@dataclass(frozen=True)
class Prompt:
    key: str
    """content_digest of `row`."""
    location: str
    """Of the first row that asks it."""
    row: dict
    """{"messages": [...], "tools": [...]?}, without the answer."""
    ids: list[int]


@dataclass(frozen=True)
class Prompts:
    prompts: list[Prompt]
    rows: int
    """That were read and chosen; more than there are prompts where several ask the same."""
    left_out: list[Skipped]
    """Rows and prompts that cannot be asked."""


def load_prompts(data: Data, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Prompts:
    """The prompts of a recipe, tokenised as a server would ask them.

    A prompt that leaves less than max_new_tokens of data.max_length is left out, or with `data.too_long: fail` an error; what cannot be
    read or rendered goes by `data.on_error`. Raises DataError then, and when nothing is left to ask.
    """
    loaded = [load_rows(source, data.on_error, asks=True) for source in data.train]
    rows = mix(data.train, loaded, seed=data.seed).train
    left_out = [skipped for part in loaded for skipped in part.skipped]
    renderer, room, prompts = Renderer(tokenizer), data.max_length - max_new_tokens, []
    for key, location, row in _distinct(rows):
        try:
            ids = renderer.render_prompt(row, location)
        except DataError as error:
            if data.on_error == "fail":
                raise
            left_out.append(Skipped(location, str(error).removeprefix(f"{location}: ")))
            continue
        if len(ids) <= room:
            prompts.append(Prompt(key, location, row, ids))
            continue
        reason = f"asks in {len(ids)} tokens; data.max_length leaves {room} beside generate.max_new_tokens = {max_new_tokens}"
        if data.too_long == "fail":
            raise DataError(f"{location}: {reason}; raise data.max_length, or set data.too_long: drop_row")
        left_out.append(Skipped(location, reason))
    if not prompts:
        raise DataError(f"data.train: no prompt is left of {len(rows)} rows; the first: {left_out[0].location}: {left_out[0].reason}")
    return Prompts(prompts, len(rows), left_out)


def question_of(row: dict) -> dict:
    """A canonical conversation without the turn that answers it, and without what is only about its training."""
    messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    return {"messages": messages} | ({"tools": row["tools"]} if "tools" in row else {})


def _distinct(rows: Sequence[SourceRow]) -> list[tuple[str, str, dict]]:
    """(key, location, question), each question once, by key."""
    found: dict[str, tuple[str, str, dict]] = {}
    for source in rows:
        row = question_of(source.row)
        found.setdefault(key := content_digest(row), (key, source.location, row))
    return sorted(found.values(), key=lambda question: question[0])
