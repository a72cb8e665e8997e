"""benchmarks/planner.py: its grids, its published page, and a row that it really measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import planner  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_grid_has_at_least_24_rows_and_none_twice(device):
    names = [row.name for row in planner.grid(device)]
    assert len(names) == len(set(names)) >= 24


def test_the_published_page_is_what_its_numbers_say_and_meets_the_aim():
    result = json.loads((RESULTS / "planner-cpu.json").read_text())
    assert (RESULTS / "planner-cpu.md").read_text() == planner.render(result)
    assert result["summary"] == planner.summary(result["rows"])
    assert [row["row"] for row in result["rows"]] == [row.name for row in planner.grid("cpu")]
    plan = result["summary"]["plan"]
    assert result["summary"]["failed"] == 0
    assert plan["median_absolute_percent"] <= 5 and plan["under_by_more_than_10_percent"] == 0


@pytest.mark.slow
def test_a_row_is_measured_and_the_plan_is_near_it(tmp_path):
    wanted = "llama 256x704x4 lora singlex1 4x128 checkpointing"
    argv = [sys.executable, str(REPOSITORY / "benchmarks" / "planner.py"), "--device", "cpu", "--rows", wanted, "--results", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = json.loads(Path(tmp_path, "planner-cpu.json").read_text())["rows"]
    assert abs(row["error"]) < 0.05
    # It is a plan for what was trained, and no constant: Accelerate's is far from it.
    assert abs(row["others"]["accelerate"]["error"]) > 0.05


def test_a_trial_cannot_replace_a_measurement():
    with pytest.raises(SystemExit):
        planner.main(["--rows", "x"])
