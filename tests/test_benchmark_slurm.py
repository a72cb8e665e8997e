"""benchmarks/slurm.py: its pure parts, and (slow) one of each thing that it measures, on a real Slurm."""

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours, as a script beside them does
        spec = importlib.util.spec_from_file_location("benchmark_slurm", BENCHMARKS / "slurm.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "benchmark_slurm", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def test_faults_are_the_seeds_and_come_equally_often(bench):
    def first(count, seed):
        return list(itertools.islice(bench.next_faults(bench.FULL, random.Random(seed)), count))

    faults = first(15, 1)
    assert faults == first(15, 1) != first(15, 2)
    assert {kind: [name for _, name in faults].count(kind) for kind in bench.FAULTS} == dict.fromkeys(bench.FAULTS, 3)
    assert all(40 <= gap_s <= 70 for gap_s, _ in faults) and len({gap_s for gap_s, _ in faults}) == 15


def test_a_death_costs_the_dead_time_and_the_steps_that_were_lost(bench):
    """A step takes a second. At 3.5 s step 4 is being made; from 10 s on the next life makes step 2 again."""
    lives = {1: [(0, 1), (1, 2), (2, 3), (3, 4)], 2: [(10, 2), (11, 3), (12, 4), (13, 5)]}
    death = {"life": 1, "s": 3.5, "step": 4}
    # Undisturbed step 4 began at 3, and now does again at 12; half a second of it had passed.
    assert bench.lost_s(death, lives, step_s=1.0) == 8.5
    assert bench.lost_s(death, {1: lives[1], 2: lives[2][:2]}, step_s=1.0) is None
    # The second life died before it had come so far; the third makes up for both.
    assert bench.lost_s(death, {1: lives[1], 2: lives[2][:2], 3: [(20, 3), (21, 4)]}, step_s=1.0) == 17.5


def test_a_stop_that_saved_costs_the_dead_time_alone(bench):
    """Told at 2.5 s, the life still makes steps 4 and 5; the next one goes on with 6, which would have begun at 5."""
    lives = {1: [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], 2: [(30, 6), (31, 7)]}
    assert bench.lost_s({"life": 1, "s": 2.5, "step": 3}, lives, step_s=1.0) == 30 - 2.5 - 3


@pytest.mark.parametrize(
    "kinds, ended_by, steps",
    [
        (["rank killed", "requeued"], "rank killed", 10),
        (["requeued", "preempted"], "preempted", 30),
        (["requeued", "requeued"], "nothing", 40),
        ([], "nothing", 40),
    ],
)
def test_a_plain_script_keeps_what_was_saved_before_its_end(bench, kinds, ended_by, steps):
    faults = [{"kind": kind, "s": moment} for moment, kind in zip((15.0, 35.0), kinds, strict=False)]
    # First step 1 at 0 s, a commit every ten steps and ten seconds.
    commits = [(10.0 * number, 10 * number) for number in range(1, 5)]
    plain = bench.plain_goodput(faults, commits, first=1, seconds=50.0, step_s=1.0)
    assert (plain["ended_by"], plain["steps"], plain["goodput"]) == (ended_by, steps, steps / 50)
    assert bench.plain_goodput([{"kind": "rank stopped", "s": 5.0}], commits, 1, 50.0, 1.0)["steps"] == 0


def test_a_fault_that_the_next_one_overtook_has_no_cost_of_its_own(bench):
    faults = [{"s": 10.0, "lost_s": 20.0}, {"s": 31.0, "lost_s": 40.0}, {"s": 70.0, "lost_s": None}, {"s": 90.0, "lost_s": 9.0}]
    assert [fault["s"] for fault in bench.overcome(faults)] == [10.0, 90.0]


def test_p95_of_twenty_is_the_last_but_one(bench):
    values = list(range(1, 21))
    random.Random(3).shuffle(values)
    assert (bench.percentile(values, 0.95), bench.percentile(values, 0.5), bench.percentile([7.0], 0.95)) == (19, 10, 7.0)


def test_every_phase_of_a_start_is_a_part_of_a_restart(bench):
    assert bench.START_PARTS.keys() - bench.LIFE_PARTS.keys() == {"command"}
    code = "".join(path.read_text() for path in (BENCHMARKS.parent / "harness").rglob("*.py"))
    said = set(re.findall(r'enter\(f?"((?:joining|opening|loading|building|importing|resuming|training)[^"{]*)"', code))
    # What it runs has neither.
    elsewhere = {"resuming: loading DeepSpeed's shards", "loading teacher", "loading rewards"}
    assert said - elsewhere == {word for word in bench.LIFE_PARTS if word in said}


def test_what_a_job_says_is_kept_line_by_line_and_what_a_rank_says_change_by_change(bench, tmp_path):
    watch = bench.Watch(bench.RunDir(tmp_path))
    watch.look_at_log(b"one\ntw")
    watch.look_at_log(b"o\nthree")
    assert [line for _, line in watch.lines] == ["one", "two"]
    for moment, phase, step in [
        (1.0, "starting", None),
        (2.0, "training", None),
        (2.5, "training", None),
        (3.0, "training", 7),
        (4.0, "training", 8),
    ]:
        watch.look_at_rank(1, {"time": moment, "phase": phase, "step": step})
    assert watch.phases[1] == [(1.0, "starting"), (2.0, "training")] and watch.steps[1] == [(3.0, 7), (4.0, 8)]
    assert watch.steps[2] == []


def test_a_process_began_when_it_was_started(bench):
    before = time.time()
    process = subprocess.Popen(["sleep", "9"])
    after = time.time()
    try:
        assert before - 0.03 <= bench.began(process.pid) <= after + 0.03
    finally:
        process.kill()
        process.wait()


def test_a_trial_never_replaces_a_measurement(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--trial"])
    assert "--trial measures nothing" in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_what_is_missing(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install slurm-wlm munge"):
        bench.main(["--trial", "--results", str(tmp_path)])


def test_the_committed_result_is_what_its_numbers_say_and_tells_when_others_used_the_machine(bench):
    result = json.loads((BENCHMARKS / "results" / "slurm-cpu.json").read_text())
    assert bench.render(result) == (BENCHMARKS / "results" / "slurm-cpu.md").read_text()
    assert (len(result["preemptions"]), len(result["deaths"])) == (bench.FULL.preemptions, bench.FULL.deaths), "a trial is no measurement"
    for cores, is_told in ((0.1, False), (1.0, True)):
        result["machine"]["cores_taken_by_others_before"] = {"lives": cores}
        assert ("Others used the machine" in bench.render(result)) is is_told


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)  # three minutes on two cores that nobody else uses
def test_a_trial_measures_everything_and_writes_both_results(bench, tmp_path, monkeypatch):
    for name in ("HARNESS_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # main sets them; restored after the test
    bench.main(["--trial", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])
    result = json.loads((tmp_path / "results" / "slurm-cpu.json").read_text())
    text = (tmp_path / "results" / "slurm-cpu.md").read_text()
    assert text == bench.render(result)
    (preemption,), (death,) = result["preemptions"], result["deaths"]
    assert sum(preemption["parts"].values()) == pytest.approx(preemption["saved_s"] + preemption["restart_s"])
    assert sum(death["parts"].values()) == pytest.approx(death["restart_s"])
    for measured in (preemption, death):
        assert all(seconds >= -0.02 for seconds in measured["parts"].values()), measured
        assert all(measured["parts"][part] > 0 for part in ("imports: torch", "loading model", "first step"))
    # Slurm lets a requeued job wait so long, whatever else.
    assert preemption["parts"]["`scontrol requeue`, and Slurm until the job begins again"] > result["cred_expire_s"]
    assert preemption["saved_s"] < 20 and 0.5 < result["undisturbed"]["goodput"] < 1.2
    assert result["goodput"]["faults"] and 0 < result["goodput"]["goodput"] < result["undisturbed"]["goodput"]
    assert len([line for line in text.splitlines() if line.startswith("|")]) > 40 and "nan" not in text
