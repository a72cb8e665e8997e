"""From a recipe to the arguments that every trainer of TRL takes. A setting is passed on or refused, never adjusted in silence."""

from pathlib import Path

from harness.launcher import accumulation_steps
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.precision import autocasts_bf16

# Names that mean the same to transformers and are passed on as they are.
SAME_NAME = (
    "per_device_train_batch_size learning_rate lr_scheduler_type optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm fp16 "
    "gradient_checkpointing use_liger_kernel torch_compile neftune_noise_alpha logging_steps eval_steps eval_on_start greater_is_better "
    "dataloader_num_workers ddp_timeout seed full_determinism"
).split()


def training_arguments(recipe: Recipe, backend: Backend, output_dir: Path, world_size: int, *, has_gpu: bool, bf16_hardware: bool) -> dict:
    """Keyword arguments for SFTConfig and its siblings."""
    train = recipe.train
    arguments = {name: getattr(train, name) for name in SAME_NAME}
    arguments |= {
        "output_dir": str(output_dir),
        "num_train_epochs": train.num_train_epochs or 1.0,
        "max_steps": train.max_steps or -1,
        "per_device_eval_batch_size": train.per_device_eval_batch_size or train.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, world_size),
        # transformers reads a number below 1 as a share of all steps.
        "warmup_steps": train.warmup_ratio or train.warmup_steps or 0,
        "lr_scheduler_kwargs": {key: value for key, value in train.lr_scheduler_kwargs if value is not None},
        "bf16": autocasts_bf16(recipe, bf16_hardware),
        "tf32": (True if has_gpu and bf16_hardware else None) if train.tf32 == "auto" else train.tf32,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant(recipe, backend)} if train.gradient_checkpointing else None,
        "use_cpu": not has_gpu,
        # A tensor without a gradient is an error here (model.check_gradients), not something to search for at every step.
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": True,
        # Ours: tracking, progress, checkpoints and data are not the trainer's here.
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_first_step": True,
        # By default transformers logs the last finite loss in place of one that is not.
        "logging_nan_inf_filter": False,
        # A blocking copy to the card waits for all that was queued before it, and would count as waiting for data.
        "accelerator_config": {"non_blocking": has_gpu},
        "dataloader_persistent_workers": train.dataloader_num_workers > 0,
        # Patience that had run before a resume has run after it.
        "restore_callback_states_from_checkpoint": True,
    }
    return arguments | {"eval_strategy": eval_strategy(recipe)} | _saving(recipe)


def use_reentrant(recipe: Recipe, backend: Backend) -> bool:
    """Reentrant checkpointing where an adapter's base is gathered anew for the backward pass (ZeRO-3), non-reentrant everywhere else."""
    asked = recipe.train.gradient_checkpointing_kwargs.use_reentrant
    return asked if asked is not None else recipe.model.trains_adapter and backend.zero_stage == 3


def eval_strategy(recipe: Recipe) -> str:
    """`no`, `steps` or `epoch`; schema.Train says what leaving it out means."""
    train, data = recipe.train, recipe.data
    if train.eval_strategy:
        return train.eval_strategy
    if train.eval_steps:
        return "steps"
    return "epoch" if data.eval or data.eval_fraction or data.eval_rows else "no"


def _saving(recipe: Recipe) -> dict:
    """When and how long checkpoints are kept is harness.checkpoint's; transformers is told of the best model alone."""
    metric = recipe.train.metric_for_best_model
    if metric:
        asked = recipe.train.greater_is_better
        better_is_more = not metric.endswith(("loss", "kl")) if asked is None else asked
        return {
            "save_strategy": "best",
            "load_best_model_at_end": True,
            # `eval/rewards/margins` is `eval_rewards/margins` to transformers.
            "metric_for_best_model": metric.replace("/", "_", 1),
            "greater_is_better": better_is_more,
        }
    return {"save_strategy": "no"}
