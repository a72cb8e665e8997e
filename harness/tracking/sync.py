"""All lives of a run as one W&B run, made once more from metrics.jsonl and sent by W&B's own `wandb sync`.

W&B 0.31 records each offline life in a folder of its own, and knows nothing of the others when it sends one. So what is sent is one
offline run, RUN/wandb/joined, which holds for each line of metrics.jsonl what one online life would have sent for it: under the same
number, with what was repeated under `replay/`, at the time at which it was logged; then the recipe, the facts of run.json and the export,
if there is one.

`wandb sync` adds the lines of a file to those that W&B has, whatever they are. W&B's counter is the number of the line in metrics.jsonl, in
a join as in an online life, so W&B is asked for the last that it has, and only those behind it are joined: sending can be done again after
further lives, and after lives that were online. Where W&B cannot be asked, and may have some, nothing is joined.

The limits: W&B takes no line before its last, so what was recorded offline before an online life, and not sent before it, stays out (that
is said, and a new id sends all). Its answer may lag behind by seconds after a sync. The machine's own measurements (W&B's "system" charts)
are not carried over, and the runtime of a point is the join's.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, RecipeError, first_line
from harness.model.export import MANIFEST
from harness.recipe import Recipe, load
from harness.run import RunDir
from harness.tracking.metrics import read_rows
from harness.tracking.replay import wandb_values
from harness.tracking.wandb_run import (
    EXIT_RESUMABLE,
    ID_FILE,
    failures,
    has_credentials,
    load_run_id,
    log_export,
    machine_settings,
    open_run,
)

BOOKKEEPING = ("step", "time", "replays")
FACTS = ("git_commit", "versions", "backend", "world_size", "attempt")
"""Of run.json, under the names that a life gives them in W&B's config."""


@dataclass(frozen=True)
class Lives:
    """What there is of a run: `rows` are the lines of metrics.jsonl under their numbers in it."""

    run: RunDir
    recipe: Recipe
    facts: dict[str, Any]
    rows: dict[int, dict[str, Any]]

    @property
    def joined(self) -> Path:
        return self.run.path / "wandb" / "joined"

    @property
    def wandb_id(self) -> str:
        return load_run_id(self.run.path)

    def behind(self, sent: "Sent") -> dict[int, dict[str, Any]]:
        """The lines that W&B has not and can take."""
        return {row: line for row, line in self.rows.items() if row > sent.last}


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


@dataclass(frozen=True)
class Sent:
    """What W&B has of a run: how many lines, and the number of the last, -1 for none."""

    lines: int
    last: int


NOTHING = Sent(0, -1)


def can_send() -> bool:
    return has_credentials(machine_settings(_import_wandb()))


def ask_what_is_sent(lives: Lives) -> Sent:
    """Raises HarnessError when W&B does not answer."""
    wandb = _import_wandb()
    from wandb.apis.public.runs import RunNotFoundError

    tracking = lives.recipe.tracking
    path = "/".join(filter(None, (tracking.entity, tracking.project, lives.wandb_id)))
    try:
        run = wandb.Api().run(path)
        return Sent(run.historyLineCount, run.lastHistoryStep)
    except failures(wandb) as error:
        if isinstance(getattr(error, "exc", None), RunNotFoundError):  # wandb.CommError, around what it is about
            return NOTHING
        raise HarnessError(f"{lives.run.path}: W&B does not say what it has of {path}: {first_line(error)}; nothing was sent") from error


def check_nothing_sent(lives: Lives) -> Sent:
    """For a machine that cannot ask. Raises HarnessError when W&B may have lines of this run."""
    online = sorted((lives.run.path / "wandb").glob(f"run-*-{lives.wandb_id}"))
    sent = sorted(lives.joined.rglob("*.wandb.synced"))
    if online or sent:
        raise HarnessError(
            f"{(online or sent)[0]}: W&B has lines of this run already, and without a key (WANDB_API_KEY or `wandb login`) "
            "it cannot be asked which; run `harness sync` where there is one, so that no line is sent twice"
        )
    return NOTHING


def describe(lives: Lives, sent: Sent) -> str:
    new, repeated = len(lives.behind(sent)), sum("replays" in line for line in lives.rows.values())
    said = f"run {lives.wandb_id}: {len(lives.rows)} lines in {lives.run.metrics}"
    if repeated:
        said += f", {repeated} of them repeat an earlier life"
    said += f"; {new} to send" if new else "; W&B has them all"
    lacking = len(lives.rows) - new - sent.lines
    if lacking > 0:
        said += (
            f"\nwarning: W&B lacks {lacking} lines before the last that it has, and takes none there; "
            f"to have all in one run, remove {lives.run.path / ID_FILE} and sync again: they are sent under a new id"
        )
    return said


def record(lives: Lives, sent: Sent) -> Path:
    """Join the lines that W&B has not, in place of a join that was not sent, and return the .wandb file.

    Raises HarnessError when W&B cannot record.
    """
    wandb = _import_wandb()
    lives.joined.mkdir(parents=True, exist_ok=True)
    for older in lives.joined.glob("wandb/offline-run-*"):
        if not any(older.glob("*.wandb.synced")):  # what was sent stays, for it says that it was
            shutil.rmtree(older)
    recipe, final = lives.recipe, lives.run.final
    tracking = recipe.tracking.model_copy(update={"name": recipe.tracking.name or lives.run.path.name})
    config = {**recipe.model_dump(mode="json"), "harness": lives.facts}
    summary: dict[str, Any] = {}
    try:
        # Stats would be those of the machine that joins.
        run = open_run(wandb, lives.joined, tracking, config, lives.wandb_id, "offline", x_disable_stats=True)
        for row, line in lives.rows.items():
            values = {"step": line["step"], "_timestamp": line["time"], **_values(line)}
            if row > sent.last:
                run.log(values, step=row)
                summary = {key: value for key, value in summary.items() if key not in values}
            else:
                summary |= values
        run.summary.update(summary)  # of the keys that only earlier lines have: W&B takes a file's summary for the run's
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


def send(recorded: Path) -> None:
    """`wandb sync`, whose own lines say where the run can be seen. Raises HarnessError when W&B has not taken everything."""
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"}  # it would hide why something was not sent
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(recorded)], env=environment)
    if not recorded.with_suffix(".wandb.synced").is_file():  # its exit code is 0 as well when the server refused
        raise HarnessError(f"{recorded}: not sent, for the reason above; nothing is lost, and `harness sync` can be tried again")


def _values(line: dict[str, Any]) -> dict[str, Any]:
    """A line's values as its life gave them to W&B, which has NaN and infinities."""
    values = {key: value for key, value in line.items() if key not in BOOKKEEPING}
    for named in line.get("non_finite", "").split():
        key, _, value = named.rpartition("=")
        values[key] = float(value)
    return wandb_values(values, line.get("replays", ()))


def _import_wandb():
    # It beats every argument of wandb.init, and `wandb sync` of what was recorded under it gives its lines other numbers.
    os.environ.pop("WANDB_RESUME", None)
    import wandb

    return wandb
