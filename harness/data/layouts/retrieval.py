"""Questions to be answered from passages: {question, gold, distractors?, answer}, or {question, passages: [{text, gold}], answer}.

The passages stand in the user's message before the question, numbered, in an order that the row's content draws. In a share of the rows
(`without_gold`) the gold passages are missing, as in RAFT (Zhang et al. 2024, arXiv:2403.10131), which keeps the answer there: the model
must know it. Where a row says what is right then (`answer_without_gold`), that is trained instead.
"""

from __future__ import annotations

from harness.data.conversation import conversation, kind_of
from harness.data.layouts.base import Layout, Reading, key_set
from harness.errors import DataError


def read_retrieval(row: dict, reading: Reading) -> dict:
    question, settings = _text(row["question"], "question"), reading.settings
    gold, distractors = _passages(row)
    if not gold:
        raise DataError("no passage is gold; must be gold, or passages of which one has gold: true")
    answer = _text(row["answer"], "answer") if not reading.asks or row.get("answer") else ""
    distractors = sorted(distractors, key=lambda text: reading.draw(text, question))
    if settings.distractors is not None and len(distractors) > settings.distractors:
        distractors = distractors[: settings.distractors]
        reading.lose("distractors beyond those asked for")
    if reading.draw("without gold", question) < settings.without_gold:
        if not distractors:
            raise DataError("the row is drawn to lose its gold passage and has no other; must have distractors")
        gold, answer = [], row.get("answer_without_gold", answer)
        reading.lose("gold passages, in the share without them")
    elif row.get("answer_without_gold") is not None:
        reading.lose("`answer_without_gold`, where the gold passage is there")
    shown = sorted([*gold, *distractors], key=lambda text: reading.draw(f"place of {text}", question))
    context = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(shown, 1))
    messages = [{"role": "user", "content": f"{context}\n\n{question}"}]
    return conversation([*messages, {"role": "assistant", "content": answer}] if answer else messages, None, reading)


def _passages(row: dict) -> tuple[list[str], list[str]]:
    """(gold, distractors)."""
    if "gold" in row:
        gold = row["gold"] if isinstance(row["gold"], list) else [row["gold"]]
        others = row.get("distractors") or []
        if not isinstance(others, list):
            raise DataError(f"distractors is {kind_of(others)}; must be a list of passages")
        return [_passage(text, f"gold[{i}]") for i, text in enumerate(gold)], [
            _passage(text, f"distractors[{i}]") for i, text in enumerate(others)
        ]
    passages = row["passages"]
    if not isinstance(passages, list) or not all(isinstance(part, dict) and isinstance(part.get("gold"), bool) for part in passages):
        raise DataError(f"passages is {kind_of(passages)}; must be a list of {{text, gold: true|false}}")
    said = [(_passage(part, f"passages[{i}]"), part["gold"]) for i, part in enumerate(passages)]
    return [text for text, is_gold in said if is_gold], [text for text, is_gold in said if not is_gold]


def _passage(raw: object, where: str) -> str:
    """Text, or {title?, text}."""
    if not isinstance(raw, dict):
        return _text(raw, where)
    text = _text(raw.get("text"), f"{where}.text")
    return f"{raw['title']}\n{text}" if isinstance(raw.get("title"), str) and raw["title"] else text


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{what} is {kind_of(value)}; must be text that is not empty")
    return value


RETRIEVAL = Layout(
    (key_set("question gold answer"), key_set("question passages answer")),
    "question, gold (+ distractors) or passages, answer",
    read_retrieval,
    key_set("distractors answer_without_gold"),
)
