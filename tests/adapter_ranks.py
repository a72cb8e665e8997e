"""What two real ranks see of a policy and its reference.

    python adapter_ranks.py BASE ADAPTER EXPECTED OUT           starts them, forked from one process that has imported everything

EXPECTED holds `ids` and the logits of base + adapter, as PEFT alone makes them. Each rank R writes OUT/rank-R.json: for each backend and
each way to go on from the adapter how far the reference is from those logits before a step and after it, how far the policy has moved from
them, and which tensors have changed.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from zero_ranks import run_world

from harness import distributed
from harness.model import attach_adapter
from harness.model.adapters import add_reference_adapter, reference_of
from harness.recipe import load
from harness.recipe.backend import load_backend


def build(backend: str, base: str, recipe):
    """(the wrapped model, a function that makes one step on a loss)"""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": int(backend[-1]) if backend != "ddp" else 0, "stage3_param_persistence_threshold": 64},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # While it lives `from_pretrained` reads weights into shards.
    switch = HfDeepSpeedConfig(config) if backend == "zero3" else None
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    del switch
    policy = attach_adapter(policy, recipe, load_backend(backend), "float32")
    assert add_reference_adapter(policy) == ("earlier" if recipe.model.adapter_mode == "stack" else "reference")
    optimizer = torch.optim.SGD([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=1.0)
    if backend == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(policy)

        def step(loss):
            loss.backward()
            without = [name for name, parameter in policy.named_parameters() if parameter.requires_grad and parameter.grad is None]
            optimizer.step()
            return without

        return policy, model, step
    model = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]

    def step(loss):
        reached = set()
        trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        for name, parameter in trained:
            parameter.register_hook(lambda _, name=name: reached.add(name))
        model.backward(loss)
        model.step()
        return [name for name, _ in trained if name not in reached]

    return policy, model, step


def weights(policy) -> dict:
    """This rank's part of every tensor."""
    return {name: getattr(value, "ds_tensor", value).detach().clone() for name, value in policy.named_parameters()}


def flags(policy) -> list[bool]:
    return [parameter.requires_grad for parameter in policy.parameters()]


def reference(model, ids) -> torch.Tensor:
    with torch.no_grad(), reference_of(model):
        return model(ids).logits


def see(backend: str, base: str, recipe, ids, expected) -> dict:
    policy, model, step = build(backend, base, recipe)
    before, required = weights(policy), flags(policy)
    first = reference(model, ids)
    for _ in range(2):
        # The reference in between, as a preference loss has it.
        policy_logits, there = model(ids).logits, reference(model, ids)
        without = step((policy_logits - there - 1).square().mean() + policy_logits.square().mean())
    with torch.no_grad():
        moved = (model(ids).logits - expected).abs().max().item()
    after = weights(policy)
    changed = [distributed.all_reduce_max([float(not torch.equal(before[name], after[name]))])[0] for name in before]
    return {
        "reference_before": (first - expected).abs().max().item(),
        "reference_after": (reference(model, ids) - expected).abs().max().item(),
        "policy_moved": moved,
        "without_gradient": without,
        "changed": [name for name, moved in zip(before, changed, strict=True) if moved],
        "flags_kept": flags(policy) == required,
    }


def look(base: str, adapter: str, expected: str, out: Path) -> None:
    given, seen = torch.load(expected), {}
    for mode, lora in (("continue", None), ("stack", {"r": 3, "alpha": 9})):
        file = out / f"{mode}-{distributed.rank()}.yaml"
        model = {"name_or_path": base, "adapter": adapter, "adapter_mode": mode, "lora": lora}
        file.write_text(json.dumps({"model": model, "data": {"train": "rows.jsonl"}}))
        for backend in ("ddp", "zero2", "zero3"):
            seen[f"{backend} {mode}"] = see(backend, base, load(str(file)), given["ids"], given["reference"])
    (out / f"rank-{distributed.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run_world(2, [look], *sys.argv[1:4], Path(sys.argv[4]))
