"""What `dpo` and `kto` have in common: TRL's SFTTrainer with a loss over whole answers, which a reference has scored too.

TRL's DPOTrainer and KTOTrainer have the same losses (tests/test_preference_losses.py holds ours against theirs); they are not the
engine, because what is around the loss is what a user is burnt by. They train the tool results in an answer, read a prompt twice for each
pair, copy the reference to every GPU under ZeRO-1 and 2, fail when they compute it beforehand over ranks, count rows that only fill a
batch, make a collective of each metric of each micro-batch, and are not continued exactly.

The mean is over the pairs (answers) of the whole step on all ranks, so that accumulation, ranks and rows that fill up change nothing.

Logged, under TRL's names: rewards/chosen, rewards/rejected (beta times the log-ratio), rewards/margins, rewards/accuracies, logps/chosen,
logps/rejected; and besides logps/accuracies (pairs whose chosen answer is the more probable one), logps/chosen_drift,
logps/rejected_drift (policy less reference, which is where the run began), kl (harness.losses.preference.divergence_of_tokens, nats per
token), length/chosen, length/rejected and length/gap in tokens. A warning says once when the chosen answers become less probable, which is
how DPO is known to fail.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from harness import distributed
from harness.errors import ModelError
from harness.tasks import sft
from harness.tasks.answer_batches import Answer, Apart, Shared, model_inputs, shares_prompts, sum_by_answer, trained_owners
from harness.tasks.lessons import add_lessons, check_router_has_no_loss, gold_log_probs
from harness.tasks.reference import Reference
from harness.tasks.sft import HarnessSFTTrainer
from harness.tasks.trainer import without_checkpointing
from harness.teacher.probe import HALVES_NATS, ROUNDING_NATS, check_two_ways

if TYPE_CHECKING:
    from trl import SFTConfig

PROBED_ROWS = 2
"""Of the training rows, by which a reference is known again when a run is continued."""
FALLING_NATS = -0.1
"""Per token of the chosen answers: each has a tenth less of the probability that it began with."""
SUM, COUNT = "sum of ", "count of "
"""Before a metric's name, until its mean is taken."""
FALLING_LINES = 3
"""So many lines of the log in a row: one alone may be of odd pairs."""


class PreferenceTrainer(HarnessSFTTrainer):
    """`compare` must follow construction."""

    keeps_means_of_batches = False
    loss_is_scaled_for_ga = True
    """By `_mean_over_step`, whatever the model's forward takes."""
    answers_of_item = 1
    """Answers that a loss is of: 2 of a pair."""
    remedy_of_falling = "raise beta, or lower train.learning_rate"

    def compare(self, reference: Reference, beta: float) -> None:
        check_router_has_no_loss(self, "a preference")
        add_lessons(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)
        switch_dropout_off(self.model)
        self._reference, self._beta = reference, beta
        self._unchecked, self._lines_falling = True, 0

    # ---- log-probabilities

    def policy_log_probs(self, model, inputs: dict) -> Tensor:
        """[N], of each trained token."""
        return model(**model_inputs(inputs), lesson=gold_log_probs)

    def reference_log_probs(self, model, inputs: dict) -> Tensor:
        """[N], of the same tokens, without gradient."""
        if "reference" in inputs:
            return inputs["reference"]
        with torch.no_grad(), without_checkpointing(self.model):
            if self._reference.model is not None:
                return self._reference.log_probs(inputs)
            with self._reference.instead_of(self.accelerator.unwrap_model(model)):
                return self.policy_log_probs(model, inputs)

    # ---- training

    def training_step(self, model, inputs, *args, **kwargs):
        if self._unchecked:
            self._unchecked = False
            check_two_ways(model, self.model.config.get_text_config().vocab_size, self.args.device)
            self._check_layout(model, inputs)
            if self.state.global_step == 0:
                self._check_reference(model, inputs)
            self._check_same_reference(model)
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _check_layout(self, model, inputs: dict) -> None:
        """Raises ModelError when an answer has other log-probabilities in its pair's row than by itself. Every rank calls it."""
        if "segments" not in inputs:
            return
        inputs = self._prepare_inputs(inputs)
        together = self.policy_log_probs(model, inputs)
        apart = self.policy_log_probs(model, self._taken_apart(inputs))
        different = float((together - apart).abs().mean()) if len(together) else 0.0
        if distributed.agree(not different <= self._rounding):
            raise ModelError(
                f"model: a token is {different:.3g} nats more or less probable where the two answers of a pair share a row than where each "
                "has its own, so this architecture sees across; set model.attn_implementation: eager, which keeps them apart"
            )

    def _taken_apart(self, inputs: dict) -> dict:
        """A shared batch as rows of their own, in the same order, made of its tensors: what is compared is the mask and the positions."""
        answers = []
        for ids, labels, segments in zip(*(inputs[key].tolist() for key in ("input_ids", "labels", "segments")), strict=True):
            tokens = list(zip(ids, labels, segments, strict=True))
            prompt = [token for token in tokens if token[2] == 0]
            repeated = 1 if prompt else 0
            chosen, rejected = ([token for token in tokens if token[2] == side] for side in (1, 2))
            for answer in (prompt + chosen, prompt + rejected[repeated:]):
                answers.append(Answer([token[0] for token in answer], [token[1] for token in answer]))
        return self._prepare_inputs(Apart(DataCollatorForLanguageModeling(self.processing_class.pad_token_id))(answers))

    @torch.no_grad()
    def _check_reference(self, model, inputs: dict) -> None:
        """Raises ModelError when the reference is not the model that the run begins from."""
        inputs = self._prepare_inputs(inputs)
        policy, reference = self.policy_log_probs(model, inputs), self.reference_log_probs(model, inputs)
        different = float((policy - reference).abs().mean()) if len(policy) else 0.0
        if distributed.agree(not different <= self._rounding):
            raise ModelError(
                f"{self._reference.name}: a token is {different:.3g} nats more or less probable to it than to the policy before its first "
                "step; the two must be one model. Was the base changed since its log-probabilities were computed? Remove that folder"
            )

    @torch.no_grad()
    def _check_same_reference(self, model) -> None:
        """Raises ModelError when a life that continues is compared with another reference than the run began with, whatever was loaded or
        computed anew for it. What it says of the first rows stands in every manifest. Every rank calls it."""
        rows = [self.train_dataset[row] for row in range(min(PROBED_ROWS, len(self.train_dataset)))]
        says = float(self.reference_log_probs(model, self._prepare_inputs(self.data_collator(rows))).mean())
        facts, resumed = self.lives.facts, self.lives.resumed and self.lives.resumed.manifest
        before = resumed.get("reference_says") if resumed and resumed["data"]["digest"] == facts["data"]["digest"] else None
        if before is not None and distributed.agree(not abs(says - before) <= self._rounding):
            raise ModelError(
                f"{self._reference.name}: gives a token of the first rows {says:.4g} nats, and {before:.4g} when the run began; a run is "
                "compared with one reference from its first step to its last. Put back the weights that it began with (or remove what was "
                "computed of others), or begin again with --fresh"
            )
        facts["reference_says"] = says if before is None else before

    @property
    def _rounding(self) -> float:
        halves = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        return HALVES_NATS if halves else ROUNDING_NATS[torch.float32]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        items = sum(self.items_of(batch) for batch in batch_samples)
        (total,) = distributed.all_reduce_sum([float(items)])
        return torch.tensor(total, device=device)

    def items_of(self, inputs: dict) -> Tensor:
        """Pairs (answers) that are more than filling."""
        return self._counted(self._tokens_of_answers(inputs)).sum()

    def _tokens_of_answers(self, inputs: dict) -> Tensor:
        """[answers], trained tokens of each."""
        owners = trained_owners(inputs)
        return sum_by_answer(torch.ones_like(owners), owners, inputs["answers"])

    def _counted(self, tokens: Tensor) -> Tensor:
        """[pairs] or [answers], bool: which are real, of the trained tokens of each answer."""
        return (tokens.view(-1, self.answers_of_item) > 0).all(1)

    def _mean_over_step(self, losses: Tensor, counted: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
        """losses: of each pair (answer). Whatever wraps the model takes the mean over the ranks."""
        total = torch.where(counted, losses, 0.0).sum()
        if num_items_in_batch is None:
            return total / counted.sum().clamp(min=1)
        return total / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    # ---- what is logged

    @torch.no_grad()
    def _note(self, means: dict[str, tuple[Tensor, Tensor]], read: Tensor) -> None:
        """Keep what is logged: sums and counts of all ranks, of which `log` makes means over all that there was since the last line.
        means: name -> (values, which of them count), both [n]. read: tokens that the model has read."""
        sums = [part.double().sum() for values, counted in means.values() for part in (torch.where(counted, values, 0), counted)]
        *sums, read = distributed.all_reduce_sum(torch.stack([*sums, read.to(sums[0])]).tolist())
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total, count in zip(means, sums[0::2], sums[1::2], strict=True):
            # In lists, as TRL's own: so a checkpoint carries them, and a step that is passed over takes its part back.
            metrics[SUM + name].append(total)
            metrics[COUNT + name].append(count)
        if self.model.training:
            self._total_train_tokens += int(read)
        metrics["num_tokens"] = [self._total_train_tokens]

    def _take_means(self, metrics: dict[str, list[float]]) -> dict[str, float]:
        """Of what `_note` has kept, which goes."""
        names = [key.removeprefix(SUM) for key in metrics if key.startswith(SUM)]
        kept = {name: (sum(metrics.pop(SUM + name)), sum(metrics.pop(COUNT + name))) for name in names}
        return {name: total / count for name, (total, count) in kept.items() if count}

    def _settle_log(self, means: dict[str, float]) -> dict[str, float]:
        """What follows from the means is added."""
        return means

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        means = self._settle_log(self._take_means(metrics))
        metrics.update({name: [mean] for name, mean in means.items()})
        if self.model.training and "logps/chosen_drift" in means:
            per_token = means["logps/chosen_drift"] / max(means["length/chosen"], 1)
            self._lines_falling = self._lines_falling + 1 if per_token < FALLING_NATS else min(self._lines_falling, 0)
            if self._lines_falling == FALLING_LINES:
                # Once is enough.
                self._lines_falling = -math.inf
                self._say(
                    f"warning: the chosen answers have become {-per_token:.2f} nats a token less probable than to the reference "
                    f"({1 - math.exp(per_token):.0%} of each token's probability is lost), however much less probable the rejected ones "
                    f"are: that is how preference training is known to fail; {self.remedy_of_falling}"
                )
        super().log(logs, *args, **kwargs)


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Also where it is a number of a layer and no module, as most architectures have that of their attention."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def tokens_read(inputs: dict) -> Tensor:
    mask = inputs.get("attention_mask")
    return mask.sum() if mask is not None else torch.tensor(inputs["input_ids"].numel())


def choose_layout(model, tokenizer, *, flattens: bool, pairs: bool) -> Callable[[list[Answer]], dict]:
    """How answers become a batch for this model's attention."""
    if pairs and not flattens and shares_prompts(model):
        return Shared(tokenizer.pad_token_id)
    return Apart(DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=flattens))


def build_arguments(recipe, arguments: dict, *, flattens: bool) -> "SFTConfig":
    """Rows have columns of their own, which the collator reads; how they are laid out is its own to say."""
    return sft.build_arguments(recipe, arguments | {"remove_unused_columns": False}, flattens=False)
