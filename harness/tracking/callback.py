"""TrackingCallback: everything that the trainer logs goes to metrics.jsonl and to W&B, under the same keys and at the same steps."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from harness.run import git_commit, library_versions
from harness.tracking.metrics import MetricsFile, metric_values, name_non_finite
from harness.tracking.replay import Replay, wandb_values
from harness.tracking.wandb_run import TrackingSection, WandbRun

logger = logging.getLogger(__name__)


class TrackingCallback(TrainerCallback):
    """Give it to the trainer on every rank; only the main one (`is_main`) writes.

    `config` is the resolved recipe. Add it after `Throughput`, whose values it records, and call `finish(exit_code)` when the process ends:
    training's end is too early, because the export still has to be logged.

    `attempt` and what follows are about this life of the run: the three of `Replay`, and `alarm(step, key, was, is)`, which is called
    for each value that a repeated step should have brought again and has not.
    """

    def __init__(
        self,
        run_folder: Path,
        tracking: TrackingSection,
        config: dict[str, Any],
        is_main: bool,
        *,
        backend: str | None = None,
        world_size: int = 1,
        attempt: int | None = None,
        resumed_from: int | None = None,
        exact: bool = True,
        compare_until: int | None = None,
        alarm: Callable[[int, str, Any, Any], None] | None = None,
    ):
        self.run_folder = Path(run_folder)
        self._tracking = tracking
        self._config = config
        self._is_main = is_main
        self._launch = {"backend": backend, "world_size": world_size, "attempt": attempt, "resumed_from": resumed_from}
        self._compares = {"resumed_from": resumed_from, "exact": exact, "compare_until": compare_until}
        self._alarm = alarm
        self._file: MetricsFile | None = None
        self._replay: Replay | None = None
        self._wandb: WandbRun | None = None

    def start(self) -> None:
        """Open metrics.jsonl and the W&B run. Training's begin does it; call it earlier to have the start-up's metrics recorded too."""
        if self._file is not None or not self._is_main:
            return
        self._file = MetricsFile(self.run_folder)
        self._replay = Replay(self._file.earlier, **self._compares)
        about = {"git_commit": git_commit(), "versions": library_versions(), **self._launch}
        self._wandb = WandbRun.start(self.run_folder, self._tracking, {**self._config, "harness": about})

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb is not None else None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log(state.global_step, logs)

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Record one line: keys as the trainer says them (`eval_loss`) or as `area/name`. Nothing happens on other ranks."""
        if not self._is_main:
            return
        self.start()
        values = name_non_finite(metric_values(logs))
        repeated = self._replay.repeated(step, values)
        values.update(self._compare(step, values))
        row = self._file.rows
        self._file.append(step, values, repeated)
        if self._wandb is not None:
            self._wandb.log(row, step, wandb_values(values, repeated))

    def log_table(self, step: int, key: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """A table beside the next line; W&B alone has it. Nothing happens without rows, and on other ranks."""
        if not self._is_main or not rows:
            return
        self.start()
        if self._wandb is not None:
            self._wandb.log_table(self._file.rows, step, key, columns, rows)

    def _compare(self, step: int, values: dict[str, Any]) -> dict[str, int]:
        """Say what a repeated step has brought otherwise than the first time; returns how many values that are, if any."""
        differences = self._replay.differences(step, values)
        if not differences:
            return {}
        named = ", ".join(f"{key} was {was} and is {now}" for key, was, now in differences)
        logger.warning("step %d came out otherwise than before the resume: %s", step, named)
        if self._alarm is not None:
            for difference in differences:
                self._alarm(step, *difference)
        return {"replay/differs": len(differences)}

    def log_artifact(self, export_folder: Path, lineage: dict[str, Any]) -> None:
        """The export as a W&B artifact of type "model". `lineage`: base model, data fingerprint, recipe digest."""
        if self._wandb is not None:
            self._wandb.log_artifact(Path(export_folder), lineage)

    def finish(self, exit_code: int = 0) -> None:
        """Close both, with the exit code that the process is going to return. May be called twice."""
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None
        if self._file is not None:
            self._file.close()
            self._file = None
