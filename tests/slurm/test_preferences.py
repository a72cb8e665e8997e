"""DPO of all weights over two nodes: both compute their share of what the reference says, a rank is killed, and what follows is the run
that nobody disturbed."""

import pytest

from slurm.jobs import JobRun, at_step, whole

pytestmark = pytest.mark.slow
PAIRS = [
    "task=dpo",
    "model.lora=null",
    "train.learning_rate=1e-3",
    'data.train=[{path: "embedded:pairs-train", max_rows: 40}]',
    'data.eval=[{path: "embedded:pairs-eval", max_rows: 9}]',
]


def test_two_nodes_compare_with_one_cached_reference_and_survive_a_kill(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, *PAIRS, pace_s=0, inject=at_step(9, "die()", rank=1))
    run.submit()
    run.wait_for_life(2)
    run.hurt("")
    assert run.wait() == "COMPLETED", run.said()
    run.check_same(whole(tmp_path, *PAIRS), repeats=True)
    first, second = ((run.path / "logs" / f"attempt-{life}" / "rank-0.log").read_text() for life in (1, 2))
    assert "reference: computes log-probabilities of 40 rows once" in first
    assert "reference: read from" in second
    run.check_nothing_left()
