"""A smoke test: two steps on the rows that take most memory, and what they took."""

from harness import distributed
from harness.launcher import accumulation_steps
from harness.recipe import Recipe
from harness.tasks.trainer import row_lengths
from harness.tracking.throughput import peak_memory


def smoke_test(recipe: Recipe, rows, world_size: int):
    """Two steps on the longest rows: if they fit, every batch of the run does."""
    needed = 2 * recipe.train.per_device_train_batch_size * accumulation_steps(recipe, world_size) * world_size
    lengths = row_lengths(rows)
    if writes := recipe.distill.on_policy:
        from harness.tasks.on_policy import prompt_lengths

        written = prompt_lengths(rows) + writes.max_new_tokens
        lengths = written.tolist() if writes.fraction == 1 else [*map(max, lengths, written.tolist())]
    longest = sorted(range(len(rows)), key=lambda index: -lengths[index])[:needed]
    train = recipe.train.model_copy(
        update={
            "max_steps": 2,
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


def report_smoke(rows) -> None:
    """The last line of a smoke test: what was run, and the memory that the fullest rank took."""
    names = {"memory/peak_gib": "peak", "memory/peak_reserved_gib": "reserved by torch"}
    measured = peak_memory()
    highest = distributed.all_reduce_max(list(measured.values()))
    memory = ", ".join(f"{names[key]} {value:.2f} GiB" for key, value in zip(measured, highest, strict=True))
    kind = "GPU memory" if "memory/peak_reserved_gib" in measured else "resident memory"
    if distributed.is_main():
        longest = max(row_lengths(rows))
        print(
            f"smoke: 2 steps on the {len(rows)} longest rows (longest {longest} tokens); {kind} of the fullest rank: {memory}", flush=True
        )
