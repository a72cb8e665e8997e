"""Kahneman-Tversky optimisation over answers that are good or bad, each by itself: harness.tasks.preference with the loss of answers.

How far the policy is from the reference is estimated from answers that do not belong to their prompts: each prompt with the answer of the
next row with another prompt. The estimate is of a whole step, on all ranks, before its first gradient (TRL makes one of each micro-batch,
which is another loss on other ranks); of an evaluation, over all held-out rows. Logged as kl_baseline, in nats of an answer, never below 0.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from harness import distributed
from harness.errors import DataError
from harness.losses.preference import answer_loss, divergence_of_tokens
from harness.recipe.schema import Kto
from harness.tasks import sft
from harness.tasks.answer_batches import Answer, answer_of_row, sum_by_answer, trained_owners
from harness.tasks.job import Stage, TaskPlan
from harness.tasks.preference import PreferenceTrainer, build_arguments, choose_layout, tokens_read
from harness.tasks.reference import Reference, choose_reference
from harness.teacher.targets import UNTRAINED

COLUMNS = {"reference": "labels", "other_reference": None}
"""Of a cached reference: of a row's answer, and of the one that does not belong."""


class KtoTrainer(PreferenceTrainer):
    def learn_by(self, kto: Kto) -> None:
        self._kto = kto

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "others" in batches[0] and not self.lives.guard.passes_over(self.state.global_step + 1):
            divergence = self._divergence(self.model_wrapped, [batch.pop("others") for batch in batches])
            for batch in batches:
                batch["divergence"] = divergence
        return batches, items

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if self._kto.loss_type == "kto":
            model = self.model_wrapped
            was_training = model.training
            model.eval()
            self._of_held_out = self._divergence(model, (batch["others"] for batch in dataloader))
            model.train(was_training)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    @torch.no_grad()
    def _divergence(self, model, batches: Iterable[dict]) -> float:
        """Of the policy from the reference, over answers that do not belong to their prompts, of all ranks."""
        total = answers = 0.0
        for inputs in map(self._prepare_inputs, batches):
            self.lives.report.beat()
            tokens = self._tokens_of_answers(inputs)
            ratios = self.policy_log_probs(model, inputs) - self.reference_log_probs(model, inputs)
            total += float(ratios.double().sum())
            answers += float((tokens > 0).sum())
        total, answers = distributed.all_reduce_sum([total, answers])
        return max(total / max(answers, 1), 0.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        divergence = self._of_held_out if inputs.pop("others", None) is not None else inputs.pop("divergence", None)
        reference = self.reference_log_probs(model, inputs)
        policy = self.policy_log_probs(model, inputs)
        owners, tokens = trained_owners(inputs), self._tokens_of_answers(inputs)
        log_probs, of_reference = (sum_by_answer(values, owners, len(tokens)) for values in (policy, reference))
        ratio, counted, good = log_probs - of_reference, self._counted(tokens), inputs["good"]
        kto = self._kto
        losses = answer_loss(
            ratio,
            good,
            None if divergence is None else ratio.new_tensor(divergence),
            beta=self._beta,
            desirable_weight=kto.desirable_weight,
            undesirable_weight=kto.undesirable_weight,
        )
        self._note_answers(ratio.detach(), log_probs.detach(), tokens, counted, divergence, policy.detach(), reference, inputs)
        return self._mean_over_step(losses, counted, num_items_in_batch)

    def _note_answers(self, ratio, log_probs, tokens, counted, divergence, policy: Tensor, reference: Tensor, inputs: dict) -> None:
        means = {"kl": (divergence_of_tokens(policy, reference), torch.ones_like(policy, dtype=torch.bool))}
        if divergence is not None:
            means["kl_baseline"] = (torch.full_like(ratio, divergence), torch.ones_like(counted))
        for side, those in (("chosen", counted & inputs["good"]), ("rejected", counted & ~inputs["good"])):
            means |= {
                f"rewards/{side}": (self._beta * ratio, those),
                f"logps/{side}": (log_probs, those),
                f"logps/{side}_drift": (ratio, those),
                f"length/{side}": (tokens, those),
            }
        self._note(means, tokens_read(inputs))

    def _settle_log(self, means: dict[str, float]) -> dict[str, float]:
        if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
            return means
        margin, gap = (means[f"{name}/chosen"] - means[f"{name}/rejected"] for name in ("rewards", "length"))
        return means | {"rewards/margins": margin, "length/gap": gap}


# ---- answers that do not belong to their prompts


def numbered(train: Dataset, held_out: Dataset | None) -> tuple[Dataset, Dataset | None]:
    """With the place, among all rows, of the one whose answer each prompt is given: of its split."""
    numbered_train = train.add_column("other", others(train))
    if held_out is None:
        return numbered_train, None
    return numbered_train, held_out.add_column("other", [len(train) + other for other in others(held_out)])


def others(rows: Dataset) -> list[int]:
    """For each row the next one with another prompt: neighbours are often answers to one. Raises DataError where all prompts are equal."""
    prompts = [hash(tuple(row["input_ids"][: row["prompt_length"]])) for row in rows]
    # From the end, twice around: the next of a row is its neighbour, or its neighbour's next where the two share a prompt.
    found: list[int | None] = [None] * len(rows)
    for at in reversed(range(2 * len(rows))):
        row, neighbour = at % len(rows), (at + 1) % len(rows)
        found[row] = neighbour if prompts[neighbour] != prompts[row] else found[neighbour]
    if None in found:
        raise DataError(
            f"task = kto: all {len(rows)} rows have one prompt, and only an answer to another one tells how far the policy is from the "
            "reference; add rows, or set kto.loss_type: apo_zero_unpaired"
        )
    return found


class Partners:
    """Each prompt with the answer of another row. longest: tokens, beyond which an answer is cut off."""

    def __init__(self, train: Dataset, held_out: Dataset | None, longest: int):
        self._rows = train if held_out is None else concatenate_datasets([train, held_out])
        self._longest = longest

    def of(self, row: dict) -> Answer:
        if all(label == UNTRAINED for label in row["labels"]):
            # It only fills a batch up.
            return Answer(row["input_ids"], row["labels"], row.get("other_reference"))
        other = self._rows[row["other"]]
        at, other_at = row["prompt_length"], other["prompt_length"]
        ids = row["input_ids"][:at] + other["input_ids"][other_at:]
        labels = [UNTRAINED] * at + other["labels"][other_at:]
        return Answer(ids[: self._longest], labels[: self._longest], row.get("other_reference"))


class AnswerCollator:
    """Rows of answers with labels as a batch. partners: of answers that do not belong; None where no divergence is wanted."""

    def __init__(self, lay_out: Callable[[list[Answer]], dict], partners: Partners | None):
        self._lay_out, self._partners = lay_out, partners

    def __call__(self, rows: list[dict]) -> dict:
        batch = {**self._lay_out([answer_of_row(row) for row in rows]), "good": torch.tensor([row["label"] for row in rows])}
        if self._partners is None:
            return batch
        return {**batch, "others": self._lay_out([self._partners.of(row) for row in rows])}


def build_trainer(
    args,
    model,
    tokenizer,
    train_rows,
    eval_rows,
    callbacks: list,
    *,
    reference: Reference,
    kto: Kto,
    partners: Partners | None,
    flattens: bool,
) -> KtoTrainer:
    lay_out = choose_layout(model, tokenizer, flattens=flattens, pairs=False)
    collator = AnswerCollator(lay_out, partners)
    trainer = sft.build_trainer(args, model, tokenizer, train_rows, eval_rows, callbacks, kind=KtoTrainer, data_collator=collator)
    trainer.compare(reference, kto.beta)
    trainer.learn_by(kto)
    return trainer


def plan(stage: Stage) -> TaskPlan:
    """With the reference loaded, or what it says computed."""
    kto, flattens = stage.recipe.kto, stage.settled.flattens
    train, held_out, partners, columns = stage.train_rows, stage.eval_rows, None, {"reference": "labels"}
    if kto.loss_type == "kto":
        train, held_out = numbered(train, held_out)
        partners, columns = Partners(train, held_out, stage.recipe.data.max_length), COLUMNS

    def lay_out(model):
        return choose_layout(model, stage.tokenizer, flattens=flattens, pairs=False)

    def answers_of(row: dict) -> list[Answer]:
        return [answer_of_row(row), *([partners.of(row)] if partners else ())]

    stage = replace(stage, train_rows=train, eval_rows=held_out)
    reference = choose_reference(stage, kto.reference, columns, answers_of, lay_out)
    build = functools.partial(build_trainer, reference=reference, kto=kto, partners=partners, flattens=flattens)
    rows = reference.add_to(train, held_out)
    return TaskPlan(build, build_arguments, {"reference": reference.digest}, rows, copies_adapter=reference.copied)
