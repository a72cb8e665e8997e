"""benchmarks/data.py: its pure parts, and what it has written."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("data")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
            del sys.modules[name]


def seconds(**stages):
    return {"seconds": dict.fromkeys(("convert", "validate", "read", "tokenise", "pack", "map"), 0.0) | stages}


def test_ratios_are_of_the_stages_that_they_name_and_of_the_same_turn(data):
    ours = [seconds(convert=1, validate=2, read=3, tokenise=4, pack=1), seconds(convert=1, validate=4, read=1, tokenise=2, pack=2)]
    theirs = [seconds(map=2, tokenise=18, pack=2), seconds(map=1, tokenise=6, pack=3)]
    (found,) = data.ratios({"harness": ours, "TRL": theirs})
    wanted = {"tokenise_pack": (9 / 4, 4.0), "read_tokenise_pack": (9 / 5, 2.5), "unvalidated": (10 / 6, 22 / 9), "everything": (1.0, 2.0)}
    assert found.pop("side") == "TRL" and {what: (of["min"], of["max"]) for what, of in found.items()} == wanted


def test_sides_that_made_other_tokens_give_no_result_and_packs_may_differ(data):
    counts = {"rows": 2, "tokens": 9, "trained_tokens": 4, "packs": 1}
    data.check_same({"harness": [{"counts": counts}], "TRL": [{"counts": counts | {"packs": 2}}]})
    with pytest.raises(SystemExit, match="did not make the same"):
        data.check_same({"harness": [{"counts": counts}], "TRL": [{"counts": counts | {"trained_tokens": 5}}]})


def test_rows_are_drawn_from_a_seed_and_pass_every_check(data, tmp_path):
    from harness.data.audit import File, audit, plan_actions

    words = data.words_of_the_docs()
    for name in "ab":
        data.make_rows(tmp_path / f"{name}.jsonl", 60, words)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    report = audit([File(str(tmp_path / "a.jsonl"))], plan_actions([]))
    assert report.rows == 60 and report.calls >= 60 and not report.failed and not report.fate and report.layouts == {"xlam": 60}


def test_memory_is_that_of_a_process_and_its_children_by_stage(data):
    held = "import time; kept = b'x' * 300_000_000; time.sleep(3)"
    code = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        peaks = {}
        watch = data.Watch(process.pid, peaks, every_s=0.02)
        while not peaks:
            time.sleep(0.01)
        watch.stage = "later"
        process.wait()
        watch.stop()
    assert 300e6 < peaks["anonymous"]["later"] <= peaks["resident"]["later"] < 600e6 and "starting" in peaks["anonymous"]


def test_an_inner_stage_is_taken_out_of_the_one_around_it(data):
    sides = importlib.import_module("data_sides")
    clock = sides.Clock()
    with clock.stage("read"):
        clock.around("tokenise", time.sleep)(0.1)
        clock.around("pack", time.sleep)(0.05)
    assert clock.seconds["tokenise"] >= 0.1 and clock.seconds["pack"] >= 0.05 and clock.seconds["read"] < 0.05


def test_the_committed_results_are_what_their_numbers_say(data):
    result = json.loads((BENCHMARKS / "results" / "data-cpu.json").read_text())
    assert data.render(result) == (BENCHMARKS / "results" / "data-cpu.md").read_text()
    assert len({tuple(v for k, v in counts.items() if k != "packs") for counts in result["comparison"]["counts"].values()}) == 1
