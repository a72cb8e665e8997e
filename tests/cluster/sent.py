"""What the tests of arrays and pipelines share: verbs in this process, a Slurm that counts its jobs, and runs that are done."""

import json
from pathlib import Path

from click.testing import CliRunner, Result
from fake_slurm import FakeSlurm, as_lines, job_row

from harness.checkpoint.ledger import Ledger
from harness.errors import HarnessError
from harness.model.export import MANIFEST
from harness.recipe import load, recipe_digest
from harness.run import RunDir, write_outcome

FIRST_JOB = 100


class CountingSlurm(FakeSlurm):
    """Gives its jobs the ids 100, 101, ...; from job `refused` on it takes none. What lives says `lives`."""

    def __init__(self, folder: Path, monkeypatch, refused: int = 0):
        super().__init__(folder, monkeypatch)
        (folder / "next").write_text(f"{FIRST_JOB}\n")
        refuse = f"[ $n -lt {refused or 10**9} ] || {{ echo 'sbatch: error: invalid partition specified: none' >&2; exit 1; }}"
        self.says("sbatch", last=f"read n <{folder}/next\n{refuse}\necho $((n + 1)) >{folder}/next\necho $n")

    def lives(self, *job_ids: str) -> None:
        self.says("squeue", as_lines(*(job_row(job_id) for job_id in job_ids)))

    @property
    def sent(self) -> list[str]:
        """The arguments of each sbatch but those that every job has, in one line."""
        return [
            " ".join(argument for argument in call if not argument.startswith(("--parsable", "--chdir"))) for call in self.asked("sbatch")
        ]


def ask(verb, *arguments) -> str:
    """What the verb prints. Errors with a name are raised, for `harness` itself to render."""
    done = answer(verb, *arguments)
    assert done.exit_code == 0, done.output
    return done.output


def answer(verb, *arguments) -> Result:
    done = CliRunner().invoke(verb.command, [str(argument) for argument in arguments])
    if isinstance(done.exception, HarnessError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def finish(folder: Path, weights: str = "w", base: str | None = None) -> None:
    """Write what a run leaves that has been trained to its end. `weights`, `base`: digests of the model that it made, and of its base."""
    run = RunDir(folder)
    Ledger(run.ledger, None).append("job_began", job="of this run", restart=0, hosts=[])
    write_outcome(run.open_attempt(), "done", step=2, checkpoint=2, reason="")
    run.final.mkdir(exist_ok=True)
    facts = {"recipe_digest": recipe_digest(load(run.recipe)), "data": "d", "step": 2, "base_digest": base}
    (run.final / MANIFEST).write_text(json.dumps(facts | {"files": {"config.json": "c", "model.safetensors": weights}}))


def finish_merge(folder: Path, weights: str) -> None:
    """Write what `harness export --merge` leaves."""
    run = RunDir(folder)
    run.merged.mkdir(exist_ok=True)
    facts = json.loads((run.final / MANIFEST).read_text())
    (run.merged / MANIFEST).write_text(json.dumps(facts | {"files": {"model.safetensors": weights}}))
