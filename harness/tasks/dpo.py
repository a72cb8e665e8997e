"""Direct preference optimisation over pairs of a better and a worse answer: harness.tasks.preference with the losses of pairs."""

import functools

import torch
from torch import Tensor

from harness.losses.preference import Pairs, divergence_of_tokens, pair_loss
from harness.recipe.schema import Dpo
from harness.tasks import sft
from harness.tasks.answer_batches import Answer, answers_of_pairs, sum_by_answer, trained_owners
from harness.tasks.job import Stage, TaskPlan
from harness.tasks.preference import PreferenceTrainer, build_arguments, choose_layout, tokens_read
from harness.tasks.reference import Reference, choose_reference

COLUMNS = {"chosen_reference": "chosen_labels", "rejected_reference": "rejected_labels"}
"""Of a cached reference."""


class DpoTrainer(PreferenceTrainer):
    answers_of_item = 2
    remedy_of_falling = (
        "add the cross-entropy of what is chosen (dpo.loss_type: [sigmoid, sft]), or give it more weight, raise beta, or lower "
        "train.learning_rate"
    )

    def learn_by(self, dpo: Dpo) -> None:
        self._dpo = dpo
        self._losses = (dpo.loss_type,) if isinstance(dpo.loss_type, str) else dpo.loss_type

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference = self.reference_log_probs(model, inputs)
        policy = self.policy_log_probs(model, inputs)
        owners, tokens = trained_owners(inputs), self._tokens_of_answers(inputs)
        (chosen, rejected), (ref_chosen, ref_rejected), (chosen_tokens, rejected_tokens) = (
            (of_answers[0::2], of_answers[1::2])
            for of_answers in (*(sum_by_answer(values, owners, len(tokens)) for values in (policy, reference)), tokens)
        )
        pairs, counted = Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens), self._counted(tokens)
        losses = pair_loss(pairs, self._losses, self._dpo.loss_weights, beta=self._beta, label_smoothing=self._dpo.label_smoothing)
        self._note_pairs(pairs, counted, policy.detach(), reference, inputs)
        return self._mean_over_step(losses, counted, num_items_in_batch)

    @torch.no_grad()
    def _note_pairs(self, pairs: Pairs, counted: Tensor, policy: Tensor, reference: Tensor, inputs: dict) -> None:
        chosen, rejected = self._beta * pairs.chosen_ratio, self._beta * pairs.rejected_ratio
        of_pairs = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/accuracies": (pairs.chosen > pairs.rejected).float(),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
            "logps/chosen_drift": pairs.chosen_ratio,
            "logps/rejected_drift": pairs.rejected_ratio,
            "length/chosen": pairs.chosen_tokens,
            "length/rejected": pairs.rejected_tokens,
            "length/gap": pairs.chosen_tokens - pairs.rejected_tokens,
        }
        of_tokens = {"kl": (divergence_of_tokens(policy, reference), torch.ones_like(policy, dtype=torch.bool))}
        self._note({name: (values, counted) for name, values in of_pairs.items()} | of_tokens, tokens_read(inputs))


class PairCollator:
    """Rows of pairs as a batch."""

    def __init__(self, lay_out):
        self._lay_out = lay_out

    def __call__(self, rows: list[dict]) -> dict:
        return self._lay_out(answers_of_pairs(rows))


def build_trainer(
    args, model, tokenizer, train_rows, eval_rows, callbacks: list, *, reference: Reference, dpo: Dpo, flattens: bool
) -> DpoTrainer:
    lay_out = choose_layout(model, tokenizer, flattens=flattens, pairs=True)
    collator = PairCollator(lay_out)
    trainer = sft.build_trainer(args, model, tokenizer, train_rows, eval_rows, callbacks, kind=DpoTrainer, data_collator=collator)
    trainer.compare(reference, dpo.beta)
    trainer.learn_by(dpo)
    return trainer


def plan(stage: Stage) -> TaskPlan:
    """With the reference loaded, or what it says computed."""

    def answers_of(row: dict) -> list[Answer]:
        return answers_of_pairs([row])

    def lay_out(model):
        return choose_layout(model, stage.tokenizer, flattens=stage.settled.flattens, pairs=True)

    dpo = stage.recipe.dpo
    reference = choose_reference(stage, dpo.reference, COLUMNS, answers_of, lay_out)
    build = functools.partial(build_trainer, reference=reference, dpo=dpo, flattens=stage.settled.flattens)
    rows = reference.add_to(stage.train_rows, stage.eval_rows)
    return TaskPlan(build, build_arguments, {"reference": reference.digest}, rows, copies_adapter=reference.copied)
