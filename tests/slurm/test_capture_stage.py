"""A capture as an array on a real Slurm, with a real teacher: hurt in the middle of it, and learnt from when it is whole."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from conftest import harness

from harness.checkpoint.ledger import read_ledger
from harness.cluster import slurm
from harness.cluster.submission import read_job
from harness.run import RunDir, rank_reports
from harness.share import Units, units_of
from slurm.jobs import VARIABLES
from slurm.rig import Rig

UNITS = {"teacher.unit_tokens": 2000}
CLUSTER = {
    "partition": "low",
    "time": "20",
    "signal_lead_s": 60,
    "preflight": False,
    "sbatch": {"exclusive": True},
    "environment": VARIABLES,
}
INSIDE = """
import sys, time
from pathlib import Path

if "capture" in sys.orig_argv:
    from harness.teacher.writer import UnitWriter

    commit = UnitWriter.commit

    def slowly(writer):
        time.sleep(float(Path({pace!r}).read_text() or 0))
        return commit(writer)

    UnitWriter.commit = slowly
"""
"""sitecustomize.py of every Python in the jobs: so long a unit takes more than it needs."""
PATIENCE_S = 400


class Asked:
    """`harness` with its jobs in a folder of their own, and units that take as long as the file `pace` says."""

    def __init__(self, rig: Rig, tmp_path: Path, alone: Path):
        self.rig, self.folder, self.pace, self._place = rig, tmp_path / "runs" / "chain", tmp_path / "pace", tmp_path
        self._alone, self.cache = alone, {"teacher.cache": str(tmp_path / "cache")}
        self.pace.write_text("0")
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "sitecustomize.py").write_text(INSIDE.format(pace=str(self.pace)))
        (tmp_path / "cluster.yaml").write_text(json.dumps(CLUSTER))

    def __call__(self, *arguments) -> str:
        paths = os.pathsep.join([str(self._place / "inside"), os.environ.get("PYTHONPATH", "")])
        done = harness(*arguments, cwd=self._place, PYTHONPATH=paths, OMP_NUM_THREADS="1")
        assert done.code == 0, done.output + self.said()
        return done.output

    def pipeline(self, **stages) -> str:
        (self._place / "chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        return self.send()

    def send(self) -> str:
        return self("submit", "chain.yaml", "--cluster", "cluster.yaml")

    def said(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.rglob("*.log")))

    def wait_for_unit(self, run: RunDir, life: int = 1) -> dict:
        """Until rank 0 of that life has done one itself; what its heart says."""

        def report():
            found = rank_reports(run.attempt(life), "alive", [0])
            return found and found[0]["step"] and found[0]

        return self.rig.wait_for(report, f"a unit of life {life} of {run.path.name}", PATIENCE_S)

    def wait_for_end(self, run: RunDir) -> None:
        ended = self.rig.wait_for_state(job_of(run), "COMPLETED", "FAILED", "CANCELLED", timeout_s=PATIENCE_S)
        assert ended == "COMPLETED", self.said()

    def same_as_alone(self, units: Units) -> bool:
        """Whether the cache is `alone`, byte for byte."""
        assert len(files_of(self._alone)) == units.count + 2
        return files_of(units.folder) == files_of(self._alone)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The cache of one process which nobody disturbs."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    settings = [f"{key}={value}" for key, value in UNITS.items()]
    done = harness("capture", "tiny/distill-offline", *settings, f"teacher.cache={cache}", OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    return cache


@pytest.fixture
def ask(slurm_cluster, tmp_path, alone) -> Asked:
    return Asked(slurm_cluster, tmp_path, alone)


def job_of(run: RunDir) -> str:
    return read_job(run)["jobs"][-1]["id"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_an_array_that_is_killed_and_preempted_makes_the_cache_of_one_process_and_the_student_learns_from_it(ask):
    ask.pace.write_text("1")
    said = ask.pipeline(
        ask={"do": "capture", "recipe": "tiny/distill-offline", "set": UNITS | ask.cache, "shards": 2},
        learn={"recipe": "tiny/distill-offline", "set": UNITS | ask.cache | {"train.max_steps": 3}, "needs": ["ask"]},
    )
    assert "learn: job" in said and said.count("after ask") == 1
    killed, preempted, student = (RunDir(ask.folder / name) for name in ("ask/shard-000", "ask/shard-001", "learn"))
    os.kill(ask.wait_for_unit(killed)["pid"], signal.SIGKILL)
    ask.wait_for_unit(preempted)
    [host] = ask.rig.hosts(job_of(preempted))
    urgent = ask.rig.submit("exec sleep 1", "--partition=high", "--exclusive", f"--nodelist={host}")
    ask.rig.wait_for_state(urgent, "COMPLETED", timeout_s=PATIENCE_S)
    assert slurm.find_job(job_of(student)).state == "PENDING"
    drawn, units = ask("status", ask.folder).splitlines()[1].split(), units_of(preempted)
    assert drawn[0] == "ask" and drawn[drawn.index("units") + 1].endswith(f"/{units.count}") and 2 <= units.there < units.count
    ask.wait_for_unit(killed, life=2)
    ask.pace.write_text("0")
    ask.wait_for_end(student)

    assert [event["then"] for event in read_ledger(killed.ledger) if event["event"] == "life_ended"] == ["again", "done"]
    ended = [event for event in read_ledger(preempted.ledger) if event["event"] == "life_ended"]
    assert [(event["outcome"], event["then"]) for event in ended] == [("stopped", "requeue"), ("done", "done")]
    assert ended[0]["why"].startswith("preempted") and ask.rig.show(job_of(preempted))["Restarts"] == "1"
    assert ask.same_as_alone(units)
    assert "  ask    done  units " in ask("status", ask.folder) and student.final.is_dir()
    assert ask.send().count(": complete\n") == 2


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_nodes_of_an_element_share_one_teacher_by_zero3(ask):
    one = {"do": "capture", "recipe": "tiny/distill-offline", "set": UNITS | ask.cache | {"backend": "zero3"}, "nodes": 2}
    ask.pipeline(ask=one)
    run = RunDir(ask.folder / "ask" / "shard-000")
    ask.wait_for_end(run)
    assert {report["rank"]: report["phase"] for report in rank_reports(run.attempt(1), "alive")} == {0: "finished", 1: "finished"}
    # By turns: a rank each.
    assert sum(report["step"] for report in rank_reports(run.attempt(1), "alive")) == units_of(run).count
    assert ask.same_as_alone(units_of(run))
