"""Real DeepSpeed ranks on gloo, for test_zero.py: `python zero_ranks.py SCENARIO FOLDER CELL...`; what they saw is left in FOLDER.

Ranks are forked from one process that has loaded DeepSpeed, so that a world costs about two seconds.
"""

import errno
import json
import multiprocessing
import os
import socket
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from harness.checkpoint import zero
from harness.errors import CheckpointError

GLOBAL_BATCH, STEPS, FURTHER = 8, 3, 5


class Net(torch.nn.Module):
    """2119 parameters in odd sizes; with `adapter` only 190 of them are trained."""

    def __init__(self, adapter: bool):
        super().__init__()
        self.inward, self.norm, self.outward = torch.nn.Linear(17, 53), torch.nn.LayerNorm(53), torch.nn.Linear(53, 19)
        self.register_buffer("scale", torch.tensor([0.5]))
        self.down, self.up = None, None
        if adapter:
            self.requires_grad_(False)
            self.down, self.up = torch.nn.Linear(17, 3, bias=False), torch.nn.Linear(3, 53)

    def forward(self, x):
        hidden = self.inward(x) + (self.up(self.down(x)) if self.down is not None else 0)
        return self.outward(torch.tanh(self.norm(hidden))) * self.scale


class Cell:
    """Such as `zero2-bf16-lora`: a stage, a type, and what is trained: all (`full`), an adapter, an adapter and `more`; or all, with
    parameters dealt to the ranks in turn (`robin`), or with the optimiser on the host (`offload`)."""

    def __init__(self, name: str):
        stage, self.dtype, variant = name.split("-")
        self.name, self.stage, self.robin, self.offload = name, int(stage[-1]), variant == "robin", variant == "offload"
        self.adapter, self.more = variant in ("lora", "more"), variant == "more"

    def engine(self, optimizer=torch.optim.AdamW):
        torch.manual_seed(0)
        net = Net(self.adapter)
        if self.more:
            net.norm.requires_grad_(True)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
        ]
        sharding = {"stage": self.stage, "round_robin_gradients": self.robin}
        if self.stage == 3:
            # Several flat tensors for each group, another number of them on another number of ranks; and only the smallest stay whole.
            sharding |= {"sub_group_size": 60, "stage3_param_persistence_threshold": 30}
        if self.offload:
            sharding["offload_optimizer"] = {"device": "cpu"}
            optimizer = DeepSpeedCPUAdam
        config = {
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
            "zero_optimization": sharding,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
        }
        if self.dtype == "fp16":
            get_accelerator().is_fp16_supported = lambda: True  # torch computes it on a CPU; DeepSpeed does not offer it there
            config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
        elif self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(groups, lr=0.01), config=config)
        return engine


def train(engine, first: int, steps: int) -> list[float]:
    """The losses of the global batches `first`, `first + 1`...; each is the same rows on any number of ranks."""
    rank, ranks, losses = engine.global_rank, engine.dp_world_size, []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(GLOBAL_BATCH, 17, generator=generator), torch.randn(GLOBAL_BATCH, 19, generator=generator)
        share = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
        loss = (engine(x[share].to(engine.get_data_types()[0])).float() - y[share]).pow(2).mean()
        engine.backward(loss)
        engine.step()
        loss = loss.detach().clone()
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks)
    return losses


def inspect(engine) -> dict:
    """Everything that must be carried over, gathered whole by DeepSpeed's own functions."""
    optimizer, stage, kinds = engine.optimizer, engine.zero_optimization_stage(), ("exp_avg", "exp_avg_sq")
    base = optimizer.optimizer if stage else optimizer
    if 0 < stage < 3:
        # DeepSpeed links parameters and moments after the first group's first step, when the other groups have no moments yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    tensors, unequal = {}, []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage:
            found = [safe_get_full_fp32_param(parameter)] + [safe_get_full_optimizer_state(parameter, kind) for kind in kinds]
        else:
            found = [parameter.detach()] + [base.state[parameter][kind] for kind in kinds]
        tensors[name] = [tensor.clone() for tensor in found]
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            if not torch.equal(parameter.data, found[0].to(parameter.dtype)):
                unequal.append(name)
    steps = [state["step"] for state in base.state.values() if "step" in state]
    counters = [id(step) for step in steps if isinstance(step, torch.Tensor)]
    return {
        "tensors": tensors,
        "weights_that_are_not_their_masters": unequal,
        "steps": sorted({float(step) for step in steps}),
        "counters_are_apart": len(set(counters)) == len(counters),
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups],
        "engine": [engine.global_steps, engine.skipped_steps, engine.global_samples],
        "scale": [optimizer.loss_scaler.cur_scale, getattr(optimizer.loss_scaler, "cur_iter", None)] if stage else [],
    }


# ---- scenarios; each is what every rank of one world does


def begin(folder: Path, cells: list[Cell]) -> None:
    """Train and save; then go on in three ways that must not differ."""
    for cell in cells:
        engine = cell.engine()
        train(engine, 0, STEPS)
        assert save(engine, folder / cell.name, cell) == []
        saved = inspect(engine)
        keep(folder, cell, "uninterrupted", saved | {"losses": train(engine, STEPS, FURTHER), "end": inspect(engine)})
        # None: no number of ranks is equal to it, so that what 2 ranks saved is cut for 2 ranks.
        for how, ranks in (("native", 2), ("cut for as many", None)):
            engine = load(cell, folder / cell.name, 2, ranks)
            keep(folder, cell, how, inspect(engine) | {"losses": train(engine, STEPS, FURTHER), "end": inspect(engine)})


def continue_from(saved_ranks: int, source: str, target: str):
    def go_on(folder: Path, cells: list[Cell]) -> None:
        for cell in cells:
            ranks = int(os.environ["WORLD_SIZE"])
            engine = load(cell, folder / source.format(cell.name), saved_ranks, ranks)
            keep(folder, cell, f"{saved_ranks} to {ranks}", inspect(engine))
            assert save(engine, folder / target.format(cell.name), cell) == []
            keep(folder, cell, f"{saved_ranks} to {ranks}, trained", {"losses": train(engine, STEPS, FURTHER)})

    return go_on


def save(engine, checkpoint: Path, cell: Cell) -> list[Exception]:
    return zero.save_engine(engine, checkpoint, adapter_only=cell.adapter)


def load(cell: Cell, checkpoint: Path, saved_ranks: int, ranks: int | None):
    engine = cell.engine()
    zero.prepare_loading(engine, checkpoint, {"world_size": saved_ranks}, ranks)
    path, _ = engine.load_checkpoint(str(checkpoint), load_module_strict=not cell.adapter, load_optimizer_states=True)
    assert path is not None
    return engine


def keep(folder: Path, cell: Cell, name: str, content: dict) -> None:
    if int(os.environ["RANK"]) == 0:
        torch.save(content, folder / f"{cell.name}, {name}.seen")


def fill_the_disk(folder: Path, cells: list[Cell]) -> None:
    """One rank's writes fail, at its first file and at its second; then all is well again."""
    rank = int(os.environ["RANK"])
    for cell in cells:
        engine = cell.engine()
        train(engine, 0, 1)
        for failing in (1, 0):
            for name in ("model_states", "optim_states"):
                if rank == failing:
                    engine.checkpoint_engine.save = partial(fail_at, name)
                note(folder, cell, f"rank {failing} fails at {name}", save(engine, folder / f"{cell.name}-full", cell))
                vars(engine.checkpoint_engine).pop("save", None)
        # A disk that is really full, of which torch says so in its own words.
        device = folder / f"{cell.name}-device"
        shard = Path(engine._get_zero_ckpt_name(str(device), f"global_step{engine.global_steps}"))
        if rank == 1:
            shard.parent.mkdir(parents=True)
            shard.symlink_to("/dev/full")
        torch.distributed.barrier()
        note(folder, cell, "the disk of rank 1 is full", save(engine, device, cell))
        note(folder, cell, "all is well", save(engine, folder / f"{cell.name}-well", cell))
        load(cell, folder / f"{cell.name}-well", 2, 2)


def fail_at(name: str, state_dict: dict, path: str) -> None:
    if name in path:
        raise OSError(errno.ENOSPC, "No space left on device", path)
    torch.save(state_dict, path)


def refuse(folder: Path, cells: list[Cell]) -> None:
    """What 2 ranks saved and cannot be cut for 1; for each, what is said."""
    for cell in cells:
        checkpoint = folder / cell.name
        said = {"other parameters": refusal(Cell(cell.name.replace("lora", "more")), checkpoint)}
        said["a shard is missing"] = refusal(cell, checkpoint, saved_ranks=3)
        said["moments of a whole part"] = refusal(cell, folder / f"{cell.name}-uncuttable")
        said["frozen weights"] = refusal(cell, folder / f"{cell.name}-frozen")
        (folder / f"{cell.name}, refusals.json").write_text(json.dumps(said))


def refusal(cell: Cell, checkpoint: Path, saved_ranks: int = 2) -> str:
    try:
        load(cell, checkpoint, saved_ranks, 1)
    except CheckpointError as error:
        return str(error)
    return ""


class Uncuttable(torch.optim.AdamW):
    """Keeps, as Adafactor and the 8-bit optimisers do, something that is neither a step nor a value for each element."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["absmax"] = torch.ones(2)


def save_what_cannot_be_cut(folder: Path, cells: list[Cell]) -> None:
    for cell in cells:
        engine = cell.engine(Uncuttable)
        train(engine, 0, 1)
        assert save(engine, folder / f"{cell.name}-uncuttable", cell) == []
        assert zero.save_engine(engine, folder / f"{cell.name}-frozen", adapter_only=False) == []


def note(folder: Path, cell: Cell, what: str, errors: list[Exception]) -> None:
    path = folder / f"{cell.name}, rank {os.environ['RANK']}.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(noted | {what: [str(error) for error in errors]}))


SCENARIOS = {
    "quick": [(2, [fill_the_disk, begin, save_what_cannot_be_cut]), (1, [continue_from(2, "{}", "{}-by-1"), refuse])],
    "every way": [
        (2, [begin]),
        (1, [continue_from(2, "{}", "{}-by-1")]),
        (4, [continue_from(2, "{}", "{}-by-4")]),
        (2, [continue_from(1, "{}-by-1", "{}-by-1-by-2"), continue_from(4, "{}-by-4", "{}-by-4-by-2")]),
    ],
    "failures": [(2, [fill_the_disk, begin, save_what_cannot_be_cut]), (1, [refuse])],
}
"""What is done by how many ranks, one world after the other."""


def run_world(ranks: int, deeds: list, *arguments) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        deepspeed.init_distributed("gloo")
        for deed in deeds:
            deed(*arguments)
        torch.distributed.destroy_process_group()

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    for process in processes:
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks, [process.exitcode for process in processes]


if __name__ == "__main__":
    scenario, folder, *cells = sys.argv[1:]
    for world_size, deeds in SCENARIOS[scenario]:
        run_world(world_size, deeds, Path(folder), [Cell(cell) for cell in cells])
