"""benchmarks/rlhf.py: its pure parts."""

import importlib
import sys
from pathlib import Path

import pytest

from harness.recipe import load

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def rlhf(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module("rlhf")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_sign_test_is_of_a_coin(rlhf):
    # Of three tosses all alike: 2 of 8 outcomes.
    assert rlhf.sign_test(3, 0) == rlhf.sign_test(0, 3) == 0.25
    assert rlhf.sign_test(2, 2) == rlhf.sign_test(0, 0) == 1.0
    assert rlhf.sign_test(9, 1) == pytest.approx(2 * 11 / 1024)


def test_its_recipes_are_what_its_table_says(rlhf, tmp_path):
    for name, text in (("sft", rlhf.SFT), ("rlhf", rlhf.RLHF)):
        (tmp_path / f"{name}.yaml").write_text(text)
    sft, policy = (load(tmp_path / f"{name}.yaml") for name in ("sft", "rlhf"))
    assert sft.train.max_steps == rlhf.SFT_STEPS
    assert (policy.train.per_device_train_batch_size, policy.rlhf.num_generations) == (rlhf.ANSWERS, rlhf.EACH)
    rlhf.write_rows(tmp_path)
    asked = {name: {line for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()} for name in ("train", "eval")}
    assert len(asked["eval"]) == rlhf.QUESTIONS and not asked["train"] & asked["eval"]
    assert all('"tool_calls"' in line and '"tool"' not in line for line in asked["eval"])
