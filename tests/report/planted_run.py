"""Run folders whose story is known: every time, step and number in them is chosen by the test."""

import json
from pathlib import Path

RECIPE = """\
task: sft
model: {{name_or_path: "embedded:tiny-llama", lora: {{r: 8, alpha: 16}}}}
data: {{train: "embedded:base-train", max_length: 256}}
train: {{max_steps: {steps}, per_device_train_batch_size: 4, learning_rate: {rate}}}
tracking: {{mode: disabled}}
output_dir: {folder}
"""


class Planted:
    """Lines are appended in the order of the calls. Times count from `began`."""

    began = 1_790_000_000.0

    def __init__(self, path: Path, *, steps: int = 8, rate: float = 1e-3, recipe: str | None = None):
        self.path = path
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(RECIPE.format(steps=steps, rate=rate, folder=path) if recipe is None else recipe)

    def event(self, at: float, event: str, attempt: int | None = None, **facts) -> "Planted":
        return self._append("ledger.jsonl", {"time": self.began + at, "attempt": attempt, "event": event, **facts})

    def line(self, at: float, step: int, **values) -> "Planted":
        """`train_loss=1.0` is train/loss."""
        areas = ("train_", "eval_", "speed_")
        named = {key.replace("_", "/", 1) if key.startswith(areas) else key: value for key, value in values.items()}
        return self._append("metrics.jsonl", {"step": step, "time": self.began + at, **named})

    def raw(self, text: str) -> "Planted":
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(text)
        return self

    def manifest(self, **facts) -> "Planted":
        (self.path / "run.json").write_text(json.dumps({"world_size": 1, "backend": "single", **facts}))
        return self

    def ended(self, attempt: int, outcome: str | None, reason: str = "", step: int | None = None) -> "Planted":
        folder = self.path / "logs" / f"attempt-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        if outcome:
            content = {"outcome": outcome, "step": step, "checkpoint": step, "reason": reason}
            (folder / "outcome.json").write_text(json.dumps(content))
        return self

    def _append(self, name: str, line: dict) -> "Planted":
        with open(self.path / name, "a") as file:
            file.write(json.dumps(line) + "\n")
        return self


def interrupted(path: Path) -> Planted:
    """Sent, killed after step 8 with a checkpoint of step 4, begun again from it, and done. Seconds:

    0 sent   10 the job begins   20 life 1 shows itself, and trains from 32 on: two steps of 2 s for each line
    41 checkpoint-4, which took 1 s   49 step 8, and death   70 life 2 shows itself, and trains from 71 on
    75 step 6   78 its evaluation, which took 3 s   82 step 8   84 checkpoint-8, which took 1.5 s   86 the end
    """
    run = Planted(path).manifest().ended(1, None).ended(2, "done", step=8)
    run.event(0, "submitted", last_attempt=0).event(10, "job_began", job="7", restart=0, hosts=["n1"])
    run.event(20, "run_began", 1, run="x").event(30, "life_began", 1, world_size=1, backend="single", resumed_from=None)
    run.line(36, 2, train_loss=4.0, speed_step_s=2.0).line(40, 4, train_loss=3.0, speed_step_s=2.0)
    run.event(41, "committed", 1, step=4, reason="interval", bytes=1, save_s=1.0)
    run.line(45, 6, train_loss=2.9, speed_step_s=2.0).line(49, 8, train_loss=2.8, speed_step_s=2.0)
    run.event(55, "life_ended", 1, life="attempt-1", outcome=None, then="again", why="rank 0 was killed from outside")
    run.event(70, "life_began", 2, world_size=1, backend="single", resumed_from=4)
    run.line(75, 6, train_loss=2.0, speed_step_s=2.0, replays=["train/loss"]).line(78, 6, eval_loss=2.5, eval_runtime_s=2.5)
    run.line(82, 8, train_loss=1.0, speed_step_s=2.0)
    run.event(84, "committed", 2, step=8, reason="end", bytes=1, save_s=1.5).event(86, "finished", 2, step=8, reason="")
    return run
