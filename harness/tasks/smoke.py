"""A smoke test: two steps on the rows that take most memory, and what they took. Where the student writes some micro-batches, two steps on
the rows as they are, and then two in which it writes all."""

from pyarrow.compute import list_value_length

from harness import distributed
from harness.launcher import accumulation_steps
from harness.recipe import Recipe
from harness.tasks.trainer import row_lengths
from harness.tracking.throughput import peak_memory

STEPS = 2


def smoke_test(recipe: Recipe, rows, world_size: int):
    """A few steps on the longest rows: if they fit, every batch of the run does."""
    needed = STEPS * recipe.train.per_device_train_batch_size * accumulation_steps(recipe, world_size) * world_size
    if recipe.task == "rlhf":
        needed //= recipe.rlhf.num_generations
    lengths, writes = _lengths(recipe, rows), recipe.distill.on_policy
    longest = sorted(range(len(rows)), key=lambda index: -lengths[index])[:needed]
    train = recipe.train.model_copy(
        update={
            "max_steps": 2 * STEPS if writes and writes.fraction < 1 else STEPS,
            "num_train_epochs": None,
            "logging_steps": 1,
            "eval_strategy": "no",
            "eval_steps": None,
            "eval_on_start": False,
        }
        | dict.fromkeys(("eval_tool_calls", "metric_for_best_model", "early_stopping_patience", "warmup_steps", "warmup_ratio"))
    )
    checkpoint = recipe.checkpoint.model_copy(update={"every_steps": None, "every_minutes": None, "auto": False})
    return recipe.model_copy(update={"train": train, "checkpoint": checkpoint}), rows.select(longest), None


def _lengths(recipe: Recipe, rows) -> list[int]:
    """The most tokens that each row can have in a step: of task dpo both answers together (a reward model pads both to the longer)."""
    if recipe.task == "dpo":
        sides = (rows.with_format("arrow")[:][f"{side}_input_ids"] for side in ("chosen", "rejected"))
        return [sum(lengths) for lengths in zip(*(list_value_length(side).to_pylist() for side in sides), strict=True)]
    lengths, writes = row_lengths(rows), recipe.distill.on_policy
    if recipe.task == "rlhf":
        return [length + recipe.rlhf.max_completion_length for length in lengths]
    if not writes:
        return lengths
    from harness.tasks.on_policy import prompt_lengths

    written = (prompt_lengths(rows) + writes.max_new_tokens).tolist()
    return written if writes.fraction == 1 else [*map(max, lengths, written)]


def report_smoke(recipe: Recipe, rows) -> None:
    """The last line of a smoke test: what was run, and the memory that the fullest rank took."""
    names = {"memory/peak_gib": "peak", "memory/peak_reserved_gib": "reserved by torch"}
    measured = peak_memory()
    highest = distributed.all_reduce_max(list(measured.values()))
    memory = ", ".join(f"{names[key]} {value:.2f} GiB" for key, value in zip(measured, highest, strict=True))
    kind = "GPU memory" if "memory/peak_reserved_gib" in measured else "resident memory"
    if distributed.is_main():
        longest, steps = max(_lengths(recipe, rows)), recipe.train.max_steps
        print(
            f"smoke: {steps} steps on the {len(rows)} longest rows (longest {longest} tokens); {kind} of the fullest rank: {memory}",
            flush=True,
        )
