"""Bytes under real ZeRO ranks, beside the plan's: two gloo ranks train a tiny Llama, and every tensor that they hold is counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from harness.planner.architecture import load_architecture
from harness.planner.setting import Setting
from harness.planner.states import plan_states
from harness.recipe import load
from harness.recipe.backend import Backend

pytestmark = pytest.mark.slow

CELLS = [f"{stage}-{method}-bfloat16" for stage in (1, 2, 3) for method in ("full", "lora")] + ["2-full-float32", "3-full-float32"]
BUCKET = 1000


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("ranks")
    config = LlamaConfig(
        hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    program = Path(__file__).with_name("count_ranks.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *CELLS],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, json.loads((folder / "counted.json").read_text())


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_rank_holds_at_rest_is_what_is_planned(counted, cell):
    folder, found = counted
    stage, method, dtype = cell.split("-")
    overrides = [f"model.dtype={dtype}", f"train.bf16={str(dtype == 'bfloat16').lower()}"]
    if method == "lora":
        recipe = load("tiny/sft-lora", [f"model.name_or_path={folder / 'model'}", "model.lora.r=32", *overrides])
    else:
        recipe = load("tiny/sft-full", [f"model.init={folder / 'model'}", *overrides])
    zero = {"stage": int(stage), "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    backend = Backend(f"zero{stage}", Path("x"), "deepspeed", int(stage), zero=zero)
    setting = Setting(recipe, backend, load_architecture(str(folder / "model")), 2)
    planned = sum(size.expected for size in plan_states(setting).always.values())
    # Padding to equal shares, ids, rotary tables and counters: some kilobytes of megabytes.
    assert found[cell] == pytest.approx(planned, rel=0.01)
