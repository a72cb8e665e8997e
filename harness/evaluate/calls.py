"""How well a model calls tools: held-out conversations, the model's own last turn, and the one scorer of harness.tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.sources import load_rows
from harness.errors import EvaluationError
from harness.evaluate.generate import generate_greedily
from harness.recipe.schema import Source
from harness.tools import Score, ToolCall, score, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """One held-out question: what was asked, what the model said, what would have been right, and the verdict."""

    location: str
    question: str
    said: str
    gold: list[ToolCall]
    score: Score


def evaluate_calls(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    max_rows: int | None = None,
) -> tuple[dict, list[Answer]]:
    """(metrics, answers) over the rows of a data file; a row's last assistant turn is the gold, everything before it the prompt.

    Metrics are summarise's: exact_match, valid_json and valid_schema over rows that want a call, right_abstention over rows that want none.
    Raises EvaluationError when no row ends with an assistant turn.
    """
    rows = [row for row in load_rows(Source(path=str(path))).rows if row.row.get("messages", [{}])[-1].get("role") == "assistant"][
        :max_rows
    ]
    if not rows:
        raise EvaluationError(f"{path}: no row is a conversation that ends with the assistant; nothing can be scored")
    prompts = [
        tokenizer.apply_chat_template(
            row.row["messages"][:-1], tools=row.row.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    continuations = generate_greedily(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    answers = []
    for row, ids in zip(rows, continuations, strict=True):
        said = tokenizer.decode(ids, skip_special_tokens=True)
        gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in row.row["messages"][-1].get("tool_calls", ())]
        question = next((message["content"] for message in reversed(row.row["messages"][:-1]) if message["role"] == "user"), "")
        answers.append(Answer(row.location, question, said, gold, score(said, gold, row.row.get("tools", []))))
    return summarise([answer.score for answer in answers]), answers
