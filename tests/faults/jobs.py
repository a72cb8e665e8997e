"""The job that the lives in tests/faults go through in a second: one epoch, five steps of eight rows."""

from pathlib import Path

LORA = ", lora: {r: 8, alpha: 16, dropout: 0.1}"
RECIPE = """
model: {{name_or_path: "embedded:tiny-llama"{adapter}}}
data: {{train: [{{path: {rows}}}], max_length: 256}}
train: {{max_steps: 5, per_device_train_batch_size: 4, global_batch_size: 8, learning_rate: 1.0e-2, logging_steps: 1}}
tracking: {{mode: disabled}}
"""
ROWS = 40


def write_job(folder: Path, adapter: str = "") -> Path:
    """The recipe; `adapter` is LORA, or nothing to train all weights."""
    from harness.embedded import resolve

    # Rows in a file of their own: to choose 40 of `embedded:base-train` takes longer than to train on them.
    with open(resolve("embedded:base-train"), encoding="utf-8") as source:
        (folder / "rows.jsonl").write_text("".join(next(source) for _ in range(ROWS)))
    recipe = folder / "job.yaml"
    recipe.write_text(RECIPE.format(rows=folder / "rows.jsonl", adapter=adapter))
    return recipe
