"""Supervised fine-tuning by TRL's SFTTrainer: full, LoRA and QLoRA are the same task with another model section.

Its head is fused: the loss is computed from hidden states in tiles, so no [B, T, V] logits stand in memory.
"""

import warnings

from trl import SFTConfig, SFTTrainer

from harness.tasks.checkpointing import CheckpointedTrainer
from harness.tasks.job import Stage, TaskPlan
from harness.tasks.trainer import HarnessTrainer


class HarnessSFTTrainer(CheckpointedTrainer, HarnessTrainer, SFTTrainer):
    pass


def build_arguments(recipe, arguments: dict, *, flattens: bool) -> SFTConfig:
    """flattens: batches are one row of several samples, without padding."""
    return SFTConfig(
        **arguments,
        loss_type=recipe.train.loss_type,
        # Rows come tokenised, masked, cut and packed; TRL's own preparation has nothing left to do.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=flattens,
        shuffle_dataset=False,
    )


def build_trainer(
    args: SFTConfig,
    model,
    tokenizer,
    train_dataset,
    eval_dataset,
    callbacks: list,
    kind: type[HarnessSFTTrainer] = HarnessSFTTrainer,
    data_collator=None,
) -> HarnessSFTTrainer:
    with warnings.catch_warnings():
        # TRL prefers hub kernels to Liger; the recipe's author chose.
        warnings.filterwarnings("ignore", message=".*use_liger_kernel.*", category=FutureWarning)
        return kind(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )


def plan(stage: Stage) -> TaskPlan:
    return TaskPlan(build_trainer, build_arguments)
