"""A run of two nodes that nobody disturbs."""

import json

import pytest

from slurm.jobs import JobRun, whole

pytestmark = pytest.mark.slow


def test_two_nodes_train_as_one_machine_with_two_ranks_does(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, pace_s=0)
    said = run.submit()
    assert said.startswith(f"job {run.job}: {run.path}, 2 ranks on 2 nodes\n  watch   harness status {run.path}\n")
    assert run.wait() == "COMPLETED", run.said()
    run.check_same(whole(tmp_path))
    assert json.loads((run.path / "logs" / "attempt-1" / "outcome.json").read_text())["outcome"] == "done"
    run.check_nothing_left()
    assert "is complete" in run.submit(code=2)
