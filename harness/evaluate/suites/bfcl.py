"""The single-turn Python categories of the Berkeley Function-Calling Leaderboard (harness.evaluate.suite reads its files).

An answer is right when the leaderboard's own rules say so, that the numbers compare with published ones; `strict` beside it is the one
scorer of training and reports, of what would have worked. docs/score.md has what tells them apart.

Paths: a folder with BFCL_v4_CATEGORY.json and possible_answer/, or some of these files, whose answers lie in possible_answer/ beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.data.conversation import messages_of
from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.scoring import Judged, Prediction, score_predictions
from harness.evaluate.suite import Question, load_questions, question_files
from harness.evaluate.suites import Loaded, Verdict
from harness.tools import normalise_tools

NEEDS = "answers"
NOTE = "categories of the leaderboard; its overall weighs others too, and is not made up from these"


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    answers = [path / "possible_answer" if path.is_dir() else path.parent / "possible_answer" / path.name for path in paths]
    answers = [path for path in answers if path.exists()]
    questions = load_questions(paths, answers, underscore_names=underscore_names)
    files = [*question_files(paths, "questions"), *question_files(answers, "answers")]
    return Loaded([_item(question) for question in questions.values()], files)


def _item(question: Question) -> Item:
    if question.gold is None:
        raise DataError(f'"{question.id}" has no answer; its file must lie in possible_answer/ beside the questions, under the same name')
    if not isinstance(question.turns, list) or len(question.turns) != 1:
        raise DataError(f'"{question.id}" has no "question" of one turn; must be [[{{"role": "user", "content": …}}]]')
    messages = messages_of(question.turns[0], f'"{question.id}"')
    return Item(question.id, question.category, messages, normalise_tools(question.functions), {"question": question})


def judge(item: Item, text: str) -> Verdict:
    judged = _judge(item, text, "bfcl")
    # Anything that is called is right in live_relevance; to `strict` that says nothing.
    measures = {} if item.category == "live_relevance" else {"strict": (int(_judge(item, text, "strict").right), 1)}
    return Verdict(None if judged.right else judged.kind, "" if judged.right else judged.reason, measures)


def _judge(item: Item, text: str, mode: str) -> Judged:
    question = item.gold["question"]
    return score_predictions([Prediction(item.id, item.id, text, None)], {question.id: question}, mode)[0]
