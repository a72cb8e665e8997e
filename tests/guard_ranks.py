"""What two real DeepSpeed ranks do with a step that the guard leaves out.

    torchrun --nproc-per-node 2 guard_ranks.py OUT CASE...      a CASE is such as zero2-float32 or zero3-offload-bfloat16

Each rank R writes OUT/CASE-R.json, and what it makes of a norm that is sharded as FSDP2's is in OUT/sharded-R.json. The engine is driven as
accelerate's DeepSpeedEngineWrapper does, and the guard asked where the trainer asks it: before `engine.step`.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from harness import distributed
from harness.guard import Guard, local_gradient_norm, skip_engine_step
from harness.recipe.schema import Guard as Settings

GOOD = [0, 1, 2, 3, 4]
NOT_A_NUMBER, FINITE = 100, 101
"""A batch of which one rank's second half is not a number, and one with nothing wrong with it that is to be left out all the same, for
then nothing but the guard can."""


def batch(number: int, micro: int) -> torch.Tensor:
    rank = distributed.rank()
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * number + 10 * micro + rank))
    if number == NOT_A_NUMBER and micro == 1 and rank == 1:
        rows[0, 0] = float("nan")
    return rows


def build_engine(case: str):
    *stage, dtype = case.split("-")
    torch.manual_seed(0)
    # Persistent parameters (small ones that ZeRO-3 never frees) and sharded ones.
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    offload = {"offload_optimizer": {"device": "cpu"}} if "offload" in stage else {}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(stage[0][-1]), "stage3_param_persistence_threshold": 64, **offload},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8, "loss_scale_window": 2},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=config)[0]


def everything(engine) -> dict[str, torch.Tensor]:
    """Masters, moments, counts of the optimiser, weights as the model has them, and the loss scale: this rank's part of each."""
    found = {f"module {name}": getattr(parameter, "ds_tensor", parameter) for name, parameter in engine.module.named_parameters()}
    inner = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    for place, (parameter, values) in enumerate(inner.state.items()):
        found |= {f"{name} {place}": torch.as_tensor(value) for name, value in {"master": parameter, **values}.items()}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    found["loss scale"] = torch.tensor([scaler.cur_scale, getattr(scaler, "cur_iter", 0)] if scaler else [])
    return {name: value.detach().clone().contiguous().view(torch.uint8) if value.ndim else value.clone() for name, value in found.items()}


def differences(before: dict, after: dict) -> list[str]:
    assert before.keys() == after.keys()
    return sorted(name for name in before if not before[name].equal(after[name]))


def train(case: str, numbers: list[int], *, leave_out: tuple = (FINITE,)) -> tuple[dict, dict]:
    """(everything at the end, what was seen on the way)"""
    engine = build_engine(case)
    guard = Guard(Settings(), fp16=case.endswith("float16") and not case.endswith("bfloat16"))
    seen = {"bad": [], "changed_by_skip": [], "overflow": [], "applied": 0}
    current = None

    def guarded_step():
        bad, _ = guard.local_verdict(local_gradient_norm(engine))
        seen["bad"].append(bad)
        if not distributed.vote([float(bad)])[0] and current not in leave_out:
            seen["applied"] += 1
            return type(engine).step(engine)
        if hasattr(engine.optimizer, "overflow"):
            # As after a step that the loss scaler has left out.
            engine.optimizer.overflow = True
        before = everything(engine)
        skip_engine_step(engine)
        seen["changed_by_skip"] += differences(before, everything(engine))
        seen["overflow"].append(bool(getattr(engine.optimizer, "overflow", False)))

    engine.step = guarded_step
    wrapper = DeepSpeedEngineWrapper(engine)
    for current in numbers:
        for micro in range(2):
            loss = engine(batch(current, micro).to(next(engine.module.parameters()).dtype)).float().square().mean() / 2
            guard.observe(loss)
            wrapper.backward(loss, sync_gradients=micro == 1, scale_wrt_gas=False)
    seen |= {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}
    end = everything(engine)
    engine.destroy()
    return end, seen


def see_sharded_norms() -> list[bool]:
    """This rank's verdicts on the norm that FSDP2's gradients have: first all is well, then rank 1's part is not a number."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, guard, verdicts = init_device_mesh("cpu", (2,)), Guard(Settings(), fp16=False), []
    for worst in (1.0, float("nan")):
        mine = torch.tensor([1.0, worst if distributed.rank() == 1 else 1.0])
        guard.observe(torch.tensor(2.0))
        verdicts.append(guard.local_verdict(torch.nn.utils.get_total_norm([DTensor.from_local(mine, mesh, [Shard(0)])]))[0])
    return verdicts


def main(out: Path, cases: list[str]) -> None:
    distributed.start(120, decisions_s=120, group_of_one=True)
    deepspeed.init_distributed("gloo", verbose=False)
    # DeepSpeed calls fp16 too slow for a CPU; it is right all the same.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    (out / f"sharded-{distributed.rank()}.json").write_text(json.dumps(see_sharded_norms()))
    for case in cases:
        never, _ = train(case, GOOD)
        skipped, seen = train(case, [0, NOT_A_NUMBER, 1, 2, FINITE, 3, NOT_A_NUMBER, 4])
        moved, _ = train(case, [0, FINITE, 1, 2, 3, 4], leave_out=())
        report = seen | {"differs_from_never": differences(never, skipped), "moved": differences(never, moved), "compared": sorted(never)}
        (out / f"{case}-{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
