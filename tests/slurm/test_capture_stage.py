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
from harness.share import units_of
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
PATIENCE_S = 240


def job_of(run: RunDir) -> str:
    return read_job(run)["jobs"][-1]["id"]


def said(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in sorted(folder.rglob("slurm-*.log")))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def wait_for_unit(rig: Rig, run: RunDir, life: int = 1) -> dict:
    """Until rank 0 of that life has done one itself; what its heart says."""

    def report():
        found = rank_reports(run.attempt(life), "alive", [0])
        return found and found[0]["step"] and found[0]

    return rig.wait_for(report, f"a unit of life {life} of {run.path.name}", PATIENCE_S)


@pytest.mark.slow
def test_an_array_that_is_killed_and_preempted_makes_the_cache_of_one_process_and_the_student_learns_from_it(slurm_cluster, tmp_path):
    rig, folder, pace = slurm_cluster, tmp_path / "runs" / "chain", tmp_path / "pace"
    pace.write_text("1.5")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "sitecustomize.py").write_text(INSIDE.format(pace=str(pace)))
    (tmp_path / "cluster.yaml").write_text(json.dumps(CLUSTER))
    stages = {
        "ask": {"do": "capture", "recipe": "tiny/distill-offline", "set": UNITS, "shards": 2},
        "learn": {"recipe": "tiny/distill-offline", "set": UNITS | {"train.max_steps": 3}, "needs": ["ask"]},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))

    def ask(*arguments, cache: str = "cache") -> str:
        paths = os.pathsep.join([str(tmp_path / "inside"), os.environ.get("PYTHONPATH", "")])
        done = harness(*arguments, cwd=tmp_path, PYTHONPATH=paths, HARNESS_CACHE=str(tmp_path / cache), OMP_NUM_THREADS="1")
        assert done.code == 0, done.output + said(folder)
        return done.output

    ask("submit", "chain.yaml", "--cluster", "cluster.yaml")
    killed, preempted, student = (RunDir(folder / name) for name in ("ask/shard-000", "ask/shard-001", "learn"))
    os.kill(wait_for_unit(rig, killed)["pid"], signal.SIGKILL)
    wait_for_unit(rig, preempted)
    [host] = rig.hosts(job_of(preempted))
    urgent = rig.submit("exec sleep 1", "--partition=high", "--exclusive", f"--nodelist={host}")
    rig.wait_for_state(urgent, "COMPLETED")
    assert slurm.find_job(job_of(student)).state == "PENDING"
    drawn = ask("status", folder).splitlines()[1].split()
    units = units_of(preempted)
    assert drawn[0] == "ask" and drawn[drawn.index("units") + 1].endswith(f"/{units.count}") and 2 <= units.there < units.count
    wait_for_unit(rig, killed, life=2)
    pace.write_text("0")
    assert rig.wait_for_state(job_of(student), "COMPLETED", "FAILED", "CANCELLED", timeout_s=PATIENCE_S) == "COMPLETED", said(folder)

    assert [event["then"] for event in read_ledger(killed.ledger) if event["event"] == "life_ended"] == ["again", "done"]
    ended = [event for event in read_ledger(preempted.ledger) if event["event"] == "life_ended"]
    assert [(event["outcome"], event["then"]) for event in ended] == [("stopped", "requeue"), ("done", "done")]
    assert ended[0]["why"].startswith("preempted") and rig.show(job_of(preempted))["Restarts"] == "1"
    ask("capture", "tiny/distill-offline", *(f"{key}={value}" for key, value in UNITS.items()), cache="alone")
    [alone] = (tmp_path / "alone" / "teachers").iterdir()
    assert units.folder.name == alone.name and len(files_of(alone)) == units.count + 2
    assert files_of(units.folder) == files_of(alone)
    assert "  ask    done  units " in ask("status", folder) and student.final.is_dir()
    assert ask("submit", "chain.yaml", "--cluster", "cluster.yaml").count(": complete\n") == 2
