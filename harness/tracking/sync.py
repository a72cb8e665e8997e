"""All lives of a run as one W&B run, made once more from metrics.jsonl and sent by W&B's own `wandb sync`.

W&B 0.31 records each offline life in a folder of its own, and `wandb sync` writes such a file from the first line of the run's history on:
the second life takes the place of the first. So what is sent is one offline run, RUN/wandb/joined, which holds for each line of
metrics.jsonl what one online life would have sent for it: under the same number, with what was repeated under `replay/`, at the time at
which it was logged; then the recipe, the facts of run.json and the export, if there is one.

So sending can be done again, after further lives and over lives that were online: the request begins with line 0, what W&B has there
already is the same, and the join is never shorter. Only a file that was recorded with `resume` is added at the end instead, each point a
second time; `record` sees to it that this one is not. Left out are the machine's own measurements (W&B's "system" charts), and the runtime
of a point is the join's.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, RecipeError
from harness.model.export import MANIFEST
from harness.recipe import Recipe, load
from harness.run import RunDir
from harness.tracking.metrics import read_rows
from harness.tracking.replay import wandb_values
from harness.tracking.wandb_run import EXIT_RESUMABLE, failures, first_line, has_credentials, load_run_id, log_export, open_run

BOOKKEEPING = ("step", "time", "replays")
FACTS = ("git_commit", "versions", "backend", "world_size", "attempt")
"""Of run.json, under the names that a life gives them in W&B's config."""


@dataclass(frozen=True)
class Lives:
    """What is to be sent of a run: `rows` are the lines of metrics.jsonl under their numbers in it."""

    run: RunDir
    recipe: Recipe
    facts: dict[str, Any]
    rows: dict[int, dict[str, Any]]

    @property
    def joined(self) -> Path:
        return self.run.path / "wandb" / "joined"

    def describe(self) -> str:
        steps = [line["step"] for line in self.rows.values()]
        repeated = sum("replays" in line for line in self.rows.values())
        again = f", {repeated} of them repeat an earlier life" if repeated else ""
        return f"lives: {len(self.run.attempts())}; lines: {len(self.rows)}, steps {min(steps)} to {max(steps)}{again}"


def read_lives(run: RunDir) -> Lives:
    """Raises HarnessError for what is no run, has logged nothing, or is not for W&B."""
    manifest = run.read_manifest()
    recipe = load(run.recipe)
    if recipe.tracking.mode == "disabled":
        raise RecipeError(
            f"{run.recipe}: tracking.mode = disabled, so the run is not for W&B; its metrics are in {run.metrics}. "
            "A run that is to be sent is started with tracking.mode=offline"
        )
    rows = read_rows(run.path)
    if not rows:
        raise HarnessError(f"{run.metrics}: holds no whole line; nothing was logged yet that could be sent")
    return Lives(run, recipe, {name: manifest[name] for name in FACTS}, rows)


def record(lives: Lives) -> Path:
    """Make the join anew, in place of an older one, and return its .wandb file. Raises HarnessError when W&B cannot."""
    # It would be recorded, beats every argument of wandb.init, and has the lines added to those of the server.
    os.environ.pop("WANDB_RESUME", None)
    import wandb

    shutil.rmtree(lives.joined, ignore_errors=True)
    lives.joined.mkdir(parents=True)
    recipe, final = lives.recipe, lives.run.final
    tracking = recipe.tracking.model_copy(update={"name": recipe.tracking.name or lives.run.path.name})
    config = {**recipe.model_dump(mode="json"), "harness": lives.facts}
    try:
        run = open_run(
            wandb,
            lives.joined,
            tracking,
            config,
            load_run_id(lives.run.path),
            "offline",
            x_disable_stats=True,  # of the machine that joins
        )
        for row, line in lives.rows.items():
            run.log({"step": line["step"], "_timestamp": line["time"], **_values(line)}, step=row)
        if final.is_dir():
            manifest = json.loads((final / MANIFEST).read_text())
            log_export(wandb, run, final, {name: value for name, value in manifest.items() if name != "files"})
        else:
            run.mark_preempting()
        recorded = Path(run.settings.sync_file)
        run.finish(exit_code=0 if final.is_dir() else EXIT_RESUMABLE)
        wandb.teardown()  # the end of the file is written by W&B's helper process, after `finish`
    except failures(wandb) as error:
        raise HarnessError(f"{lives.joined}: W&B cannot record there: {first_line(error)}; {lives.run.metrics} has everything") from error
    return recorded


def _values(line: dict[str, Any]) -> dict[str, Any]:
    """A line's values as its life gave them to W&B, which has NaN and infinities."""
    values = {key: value for key, value in line.items() if key not in BOOKKEEPING}
    for named in line.get("non_finite", "").split():
        key, _, value = named.rpartition("=")
        values[key] = float(value)
    return wandb_values(values, line.get("replays", ()))


def can_send() -> bool:
    import wandb

    return has_credentials(wandb.setup().settings)


def send(recorded: Path) -> None:
    """`wandb sync`, whose own lines say where the run can be seen. Raises HarnessError when W&B has not taken everything."""
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(recorded)])
    if not recorded.with_suffix(".wandb.synced").is_file():  # its exit code is 0 as well when the server refused
        raise HarnessError(f"{recorded}: not sent, for the reason above; nothing is lost, and `harness sync` can be tried again")
