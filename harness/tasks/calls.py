"""Task accuracy while training: at each evaluation the model answers held-out questions greedily, and the one scorer counts.

Logged as eval/exact_match, eval/valid_json, eval/valid_schema and eval/right_abstention (harness.tools.summarise says of what); W&B also
gets a table of questions that the model failed, eval/failing_calls. Every rank answers its share. Nothing of training is touched: no random
number is drawn, and weights that ZeRO-3 has cut up are gathered and cut up again as they were.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trl.models.utils import unwrap_model_for_generation

from harness import distributed
from harness.data import held_out_rows
from harness.data.templates import Renderer, end_of_turn_ids
from harness.evaluate.calls import Answer, Question, answer_questions, choose_questions
from harness.model import follow_tokenizer
from harness.recipe import Recipe
from harness.tasks.templates import training_template
from harness.tasks.trainer import without_checkpointing
from harness.tools import summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.tasks.trainer import HarnessTrainer

RATES = ("exact_match", "valid_json", "valid_schema", "right_abstention")
LEAST_TOKENS = 32
"""That an answer may have, however short the gold is."""
FAILING_ROWS, FAILING_CHARACTERS = 50, 2000
"""Of a table of failing questions, and of one cell in it."""
FAILING_COLUMNS = ("location", "failure", "question", "said", "gold")


class HeldOutCalls:
    """Held-out questions, of which each rank has its share."""

    def __init__(self, questions: Sequence[Question], longest_call: int, tokenizer, batch_size: int):
        """longest_call: tokens of the longest gold. batch_size: of one rank."""
        rank, world = distributed.rank(), distributed.world_size()
        rounds = -(-len(questions) // world)
        self._mine = list(questions[rank::world])
        self._counted = len(self._mine)
        # All ranks have as many, so that they agree after every batch; what fills a share up is not counted.
        self._mine += questions[:1] * (rounds - self._counted)
        self._tokenizer, self._batch_size = tokenizer, batch_size
        # Whoever writes twice as much as the longest gold call has not made the call. An answer in words may be cut: it counts that there
        # is one and that it calls nothing.
        self._most_tokens = max(LEAST_TOKENS, 2 * longest_call)
        self.tell: Callable[[int, list[tuple]], None] = lambda step, failing: None
        """Is told at each evaluation of a training, on every rank, rows of FAILING_COLUMNS: the first questions that were failed."""
        self._failing: list[tuple] = []

    def measure(self, model: "PreTrainedModel", after_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The rates of a model that is whole on every rank; all ranks call it. A rate over nothing is left out.

        after_batch: called after each batch of questions, on every rank as often.
        """
        with attends_to_padded_batches(model):
            answers = answer_questions(
                model,
                self._tokenizer,
                self._mine,
                max_new_tokens=self._most_tokens,
                batch_size=self._batch_size,
                after_batch=after_batch,
            )
        mine = answers[: self._counted]
        failing = [_failing_row(answer) for answer in mine if answer.score.failure][:FAILING_ROWS]
        shares = distributed.gather_objects(([answer.score for answer in mine], failing))
        self._failing = [row for _, rows in shares for row in rows][:FAILING_ROWS]
        summary = summarise([score for scores, _ in shares for score in scores])
        return {key: summary[key] for key in RATES if summary[key] is not None}

    def measure_in_training(self, trainer: "HarnessTrainer") -> dict[str, float]:
        """The rates of the model that is being trained."""
        writing = unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator)
        with without_checkpointing(trainer.model), writing as model:
            rates = self.measure(model, trainer.after_evaluation_batch)
        self.tell(trainer.state.global_step, self._failing)
        return rates


def _failing_row(answer: Answer) -> tuple:
    gold = json.dumps([{"name": call.name, "arguments": call.arguments} for call in answer.gold], ensure_ascii=False)
    cells = (answer.location, answer.score.failure, answer.question, answer.said, gold)
    return tuple(str(cell)[:FAILING_CHARACTERS] for cell in cells)


@contextlib.contextmanager
def attends_to_padded_batches(model: "PreTrainedModel"):
    """With an attention that takes padded batches; those for flattened ones refuse them."""
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    own = base.config._attn_implementation
    if own not in ("sdpa", "eager"):
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if own not in ("sdpa", "eager"):
            base.set_attn_implementation(own)


def measure_teacher(trainer: "HarnessTrainer", tracking) -> None:
    """Before the first step: what the teacher makes of the same questions, as eval/teacher_exact_match and so on. Only of one that is
    resident and whole; none is loaded for it."""
    teacher = getattr(trainer, "whole_teacher", None)
    if teacher is None or trainer.calls is None:
        return
    follow_tokenizer(teacher, trainer.processing_class, end_of_turn_ids(trainer.processing_class))
    rates = trainer.calls.measure(teacher, trainer.lives.report.beat)
    tracking.log(0, {f"eval/teacher_{key}": rate for key, rate in rates.items()})
    if distributed.is_main():
        print(f"the teacher's calls on the held-out rows: {rates['exact_match']:.1%} exactly right", flush=True)


# ---- from the recipe


def load_held_out_calls(recipe: Recipe, tokenizer, batch_size: int) -> HeldOutCalls | None:
    """The recipe's `train.eval_tool_calls` questions, None when it wants none. Rank 0 reads them.

    Raises EvaluationError, on every rank, when none wants a call.
    """
    if not recipe.train.eval_tool_calls:
        return None

    def choose():
        renderer = Renderer(tokenizer, training_template, recipe.data.train_on)
        return choose_questions(held_out_rows(recipe.data, recipe.task), renderer, recipe.train.eval_tool_calls, recipe.data.max_length)

    return HeldOutCalls(*distributed.on_main(choose), tokenizer, batch_size)
