"""Reinforcement learning over ranks and lives: a run that was killed writes after its resume, bit for bit, what it would have written, and
learns the same from it; and a policy's gradient is one process's, whatever ranks share the answers."""

import json

import pytest
from conftest import metrics
from lives import Run, check_same
from rig import die_at_call, die_in_phase
from test_distill_lives import wholly_sharded  # noqa: F401

REINFORCED = [
    "task=rlhf",
    "model.lora.dropout=0",
    "rlhf.num_generations=4",
    "rlhf.max_completion_length=16",
    "rlhf.rewards=[{type: tool_calls}, {type: length, target_tokens: 4}]",
    "rlhf.temperature=0.9",
    "train.global_batch_size=8",
    "data.train.0.max_rows=21",
    "train.eval_tool_calls=4",
]
"""Two prompts a step; epochs of ten steps, of whose 21 prompts one is left out."""
GRPO = ["rlhf.algorithm=grpo", "rlhf.beta=0.1"]
VARIANTS = {
    "rloo, an adapter": ("ddp", []),
    "rloo, an adapter, zero2": ("zero2", []),
    "rloo, an adapter, zero3": ("zero3", []),
    "grpo, all weights and a reference beside them": ("ddp", ["model.lora=null", *GRPO]),
    "grpo, all weights and a reference beside them, zero3": ("zero3", ["model.lora=null", *GRPO]),
    "rloo, 4 bits, one process": ("single", ["model.quantization.load_in_4bit=true"]),
}
QUICK = "rloo, an adapter"
WRITTEN = """
def around(compute):
    def computing(trainer, model, inputs):
        if trainer.model.training:
            keep("written", {"ids": inputs["completion_ids"].tolist()})
        return compute(trainer, model, inputs)
    return computing
wrap("harness.tasks.reinforced:Reinforced._compute_loss", around)
"""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in VARIANTS])
def test_a_killed_and_continued_run_writes_and_learns_bit_for_bit_as_the_one_that_was_not(tmp_path, name):
    backend, overrides = VARIANTS[name]
    whole, cut = (Run(tmp_path / folder, *REINFORCED, *overrides, backend=backend, inject=WRITTEN) for folder in ("whole", "cut"))
    life = whole.live()
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    if name != QUICK:
        cut.live(die_at_call(cut.world - 1, "harness.tasks.reinforced:Reinforced._write_plainly", 4), code=-9)
    cut.live()
    assert [event["resumed_from"] for event in cut.events("life_began")] == ([None, 5] if name == QUICK else [None, 5, 5])
    check_same(cut, whole, repeats=True)
    # Both are of a run in which something was drawn, paid and learnt.
    written = [json.dumps(row) for record in life.records("written", 0) for row in record["ids"]]
    assert len(written) == 14 * 8 // whole.world and len(set(written)) > 0.9 * len(written)
    assert len({step["weights"] for step in whole.steps[0].values()}) > 11
    assert len(metrics(whole.path, "eval/reward")) == 4 and max(metrics(whole.path, "train/reward_std").values()) > 0
