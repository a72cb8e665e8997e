"""How well a model calls tools: held-out conversations, the model's own last turn, and the one scorer of harness.tools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.rows import SourceRow, content_digest
from harness.data.sources import load_rows
from harness.data.templates import Renderer
from harness.errors import DataError, EvaluationError
from harness.evaluate.generate import generate_greedily
from harness.recipe.schema import Source
from harness.tools import Score, ToolCall, score, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One held-out conversation up to the turn that is its gold."""

    location: str
    ids: list[int]
    """As a server would ask."""
    asked: str
    """The last words of the user."""
    gold: list[ToolCall]
    tools: list[dict]


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
    rows = [row for row in load_rows(Source(path=str(path))).rows if "messages" in row.row][:max_rows]
    if not rows:
        raise EvaluationError(f"{path}: no row is a conversation that ends with the assistant; nothing can be scored")
    renderer = Renderer(tokenizer)
    questions = [question_of(row, renderer) for row in rows]
    answers = answer_questions(model, tokenizer, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return summarise([answer.score for answer in answers]), answers


def question_of(source: SourceRow, renderer: Renderer) -> Question:
    """A canonical conversation as a question. Raises DataError where the chat template refuses it."""
    row, (*asked, answer) = source.row, source.row["messages"]
    ids = renderer.render_prompt({**row, "messages": asked}, source.location)
    gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in answer.get("tool_calls", ())]
    words = next((message["content"] for message in reversed(asked) if message["role"] == "user"), "")
    return Question(source.location, ids, words, gold, row.get("tools", []))


def choose_questions(rows: Sequence[SourceRow], renderer: Renderer, count: int, max_length: int) -> tuple[list[Question], int]:
    """(questions, tokens of the longest gold call): `count` of the distinct conversations that offer tools and fit into max_length tokens,
    by their content, so that they are the same in any order of the rows. Those that the chat template refuses are left out: who wants such
    rows to fail has had them fail when the data was prepared.

    Raises EvaluationError when none of them wants a call.
    """
    offering = {content_digest(row.row): row for row in rows if row.row.get("tools")}
    chosen, longest_call = [], 0
    for _, row in sorted(offering.items()):
        try:
            question, tokens = question_of(row, renderer), len(renderer.render(row.row, row.location).ids)
        except DataError:
            continue
        if tokens <= max_length:
            chosen.append(question)
            longest_call = max(longest_call, tokens - len(question.ids)) if question.gold else longest_call
        if len(chosen) == count:
            break
    if not any(question.gold for question in chosen):
        raise EvaluationError(
            f"train.eval_tool_calls = {count}; of {len(rows)} held-out rows {len(offering)} offer tools, and of {len(chosen)} that were "
            "chosen none wants a call; give held-out rows with calls, or remove it"
        )
    return chosen, longest_call


def answer_questions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The model's greedy answers, in the order of the questions, and their scores. after_batch: as in generate."""
    continuations = generate_greedily(
        model,
        tokenizer,
        [question.ids for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        after_batch=after_batch,
    )
    answers = []
    for question, ids in zip(questions, continuations, strict=True):
        # With special tokens: Llama and Mistral mark calls by them.
        said = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        verdict = score(said, question.gold, question.tools)
        answers.append(Answer(question.location, question.asked, said, question.gold, verdict))
    return answers
