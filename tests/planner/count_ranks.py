"""Real DeepSpeed ranks on gloo, for test_ranks.py: `python count_ranks.py FOLDER CELL...`; rank 0's bytes of tensors are left there.

A cell is `stage-method-type`. Counted is every tensor's storage once, when two steps are done and gradients are dropped.
"""

import gc
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM

from harness.model import attach_adapter
from harness.recipe import load
from harness.recipe.backend import load_backend

BUCKET = 1000


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def count(folder: Path, cell: str) -> int:
    stage, method, dtype = cell.split("-")
    before = live_bytes()
    recipe = load("tiny/sft-lora", [f"model.name_or_path={folder / 'model'}", "model.lora.r=32", f"model.dtype={dtype}"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    if method == "lora":
        model = attach_adapter(model, recipe, load_backend(f"zero{stage}"), dtype)
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage), "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4), config=config)
    ids = torch.arange(16)[None]
    for _ in range(2):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        del loss
        engine.step()
    return live_bytes() - before


def rank(number: int, port: str, folder: Path, cells: list[str]) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    deepspeed.init_distributed("gloo")
    counted = {cell: count(folder, cell) for cell in cells}
    if number == 0:
        (folder / "counted.json").write_text(json.dumps(counted))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, *cells = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank, args=(number, port, Path(folder), cells)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    sys.exit(any(process.exitcode for process in ranks))
