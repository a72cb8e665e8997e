"""Reward models by TRL's RewardTrainer: a score for each answer, the better one's above the worse one's; full, LoRA and QLoRA.

TRL's own loss is the mean over the pairs of a rank's micro-batch. Ours is the sum over its pairs divided by the pairs of the whole step on
all ranks, because rows that only fill a step must count nothing, and a step of several micro-batches or ranks is to be the same as one
large batch. Logits, margin and centring are TRL's.

Logged per pair, in training and on held-out pairs (eval/): accuracy, margin, mean and deviation of either side's scores; on held-out
pairs also log_loss and calibration_error. harness.losses.reward has what each of them is.
"""

from typing import TYPE_CHECKING

import torch
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from harness import distributed
from harness.losses.reward import (
    MOMENTS,
    bradley_terry,
    calibration_sums,
    describe_calibration,
    describe_moments,
    off_centre,
    pair_moments,
)
from harness.model.reward import settle_pad
from harness.tasks.checkpointing import CheckpointedTrainer
from harness.tasks.job import Stage, TaskPlan, say
from harness.tasks.trainer import HarnessTrainer

if TYPE_CHECKING:
    from datasets import Dataset

UNSPOKEN = -100
COLUMNS = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
"""Of prepared pairs, and what TRL calls them."""


class PairsCollator(DataCollatorForPreference):
    """TRL's (chosen rows, then rejected ones, padded at the right), with a margin of 0 where none is given, and which pairs count."""

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [2 B, T], margin and is_pair [B]; a pair whose labels are all -100 only fills a batch."""
        batch = super().torch_call([{**example, "margin": example.get("margin") or 0.0} for example in examples])
        counts = [any(label != UNSPOKEN for label in example["chosen_labels"]) for example in examples]
        return batch | {"is_pair": torch.tensor(counts)}


class HarnessRewardTrainer(CheckpointedTrainer, HarnessTrainer, RewardTrainer):
    # What compute_loss returns is already divided by what the whole step holds.
    loss_is_scaled_for_ga = True

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "chosen_labels" not in self._signature_columns:
            self._signature_columns.append("chosen_labels")

    # ---- loss

    def items_of(self, inputs: dict) -> torch.Tensor:
        return inputs["is_pair"].sum()

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor:
        """The pairs of a step on all ranks."""
        pairs = torch.stack([self.items_of(batch) for batch in batch_samples]).sum() if batch_samples else torch.tensor(0)
        return self.accelerator.gather(pairs.to(device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_pair, training = inputs["is_pair"], self.model.training
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        losses = bradley_terry(chosen, rejected, inputs["margin"])
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * off_centre(chosen, rejected)
        loss = torch.where(is_pair, losses, 0.0).sum()
        self._note(chosen.detach()[is_pair], rejected.detach()[is_pair], inputs["attention_mask"])
        if training and num_items_in_batch is not None:
            # Whatever wraps the model takes the mean over the ranks.
            loss = loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        else:
            loss = loss / is_pair.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    # ---- what is logged

    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep sums, which add up over micro-batches, ranks and the lives of a run: `log` and `evaluation_loop` make means of them."""
        moments = pair_moments(chosen, rejected)
        if not self.model.training:
            self._eval_scores.append(torch.cat([moments, calibration_sums(chosen, rejected)]))
            return
        *sums, read = distributed.all_reduce_sum([*moments.tolist(), int(mask.sum())])
        for name, value in zip(MOMENTS, sums, strict=True):
            self._metrics["train"][name].append(value)
        self._total_train_tokens += int(read)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        sums = [sum(metrics.pop(name, ())) for name in MOMENTS] if self.model.training else [0.0]
        if sums[0]:
            metrics.update({key: [value] for key, value in describe_moments(sums).items()})
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        self._eval_scores: list[torch.Tensor] = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = distributed.all_reduce_sum(torch.stack(self._eval_scores).sum(0).tolist())
        found = describe_moments(sums[: len(MOMENTS)]) | describe_calibration(sums[len(MOMENTS) :])
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in found.items()})
        return output


def build_arguments(recipe, arguments: dict, *, flattens: bool) -> RewardConfig:
    """flattens: never, as the recipe's rules say."""
    return RewardConfig(
        **arguments,
        center_rewards_coefficient=recipe.reward.center_rewards_coefficient,
        # Rows come tokenised and cut.
        max_length=None,
        # The recipe says what dropout there is (model.lora.dropout).
        disable_dropout=False,
    )


def build_trainer(args: RewardConfig, model, tokenizer, train_dataset, eval_dataset, callbacks: list) -> HarnessRewardTrainer:
    return HarnessRewardTrainer(
        model=model,
        args=args,
        data_collator=PairsCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=train_dataset.rename_columns(COLUMNS),
        eval_dataset=eval_dataset.rename_columns(COLUMNS) if eval_dataset is not None else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def plan(stage: Stage) -> TaskPlan:
    """With a pad token that no answer ends with, which the export carries."""
    rows = [rows for rows in (stage.prepared.train, stage.prepared.eval) if rows is not None]
    said = settle_pad(stage.tokenizer, set().union(*map(endings, rows)))
    if said and distributed.is_main():
        say(said)
    return TaskPlan(build_trainer, build_arguments)


def endings(rows: "Dataset") -> set[int]:
    """The ids with which answers end; of a selection perhaps those of other rows too. Reads one id of each."""
    found: set[int] = set()
    for name in COLUMNS:
        for chunk in rows.data.column(name).chunks:
            ends = chunk.offsets.to_numpy()[1:] - 1
            found |= set(chunk.values.to_numpy()[ends].tolist())
    return found
