"""Ranks and what they agree on: the only file that calls torch.distributed.

A rank is what a launcher started; its numbers come from the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK), and `start` checks that
the process group really has that many ranks: Accelerate makes one process out of many, and says nothing, when it believes it should use
the CPU.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

from harness.errors import HarnessError, LaunchError

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def start(timeout_s: int, *, decisions_s: float, group_of_one: bool = False) -> None:
    """Join the process group, on CPU with gloo where there is no accelerator. Raises LaunchError unless its size is the launcher's.

    timeout_s: of a collective over gradients. decisions_s: of one over what all ranks decide, while one may be reading a checkpoint.
    group_of_one: make a group even for a single rank, which DeepSpeed wants (it would ask MPI for one).
    """
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # With cpu=True Accelerate asks the launcher's variables for the world; without it, on a machine without a GPU, it assumes one rank.
    on_cpu = not torch.cuda.is_available()
    if group_of_one and world_size() == 1 and not os.environ.get("MASTER_ADDR"):
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s))
    if state.num_processes != world_size():
        raise LaunchError(
            f"the launcher started {world_size()} ranks (WORLD_SIZE) but the process group has {state.num_processes}; "
            "do not set use_cpu, ACCELERATE_USE_CPU or `accelerate launch --cpu`: the rank program chooses the device itself"
        )

    _open_control_group(decisions_s)


_CONTROL = None


def _open_control_group(timeout_s: float) -> None:
    """A gloo group of all ranks for decisions: apart from the one that carries gradients, so that neither can be taken for the other's, and
    on the host, so that a vote does not wait for the GPU."""
    global _CONTROL
    from datetime import timedelta

    dist = _group()
    if dist and _CONTROL is None:
        _CONTROL = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def vote(values: list[float]) -> list[float]:
    """The sum over all ranks, element by element, on the control group. A yes is 1.0, so a positive sum means that some rank said yes."""
    dist = _group()
    if not dist:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=_CONTROL)
    return tensor.tolist()


def gather_objects(value) -> list:
    """Every rank's value, in the order of ranks, on every rank. Small picklable values from our own code only."""
    dist = _group()
    if not dist:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_CONTROL)
    return values


def free_port() -> int:
    """Of this machine, for this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _group():
    """torch.distributed when a group of several ranks exists, else None."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def barrier() -> None:
    dist = _group()
    if dist:
        dist.barrier()


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sum over all ranks, element by element; every rank must call it with the same number of values."""
    dist = _group()
    if not dist:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(values: list[float]) -> list[float]:
    dist = _group()
    if not dist:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def agree(flag: bool) -> bool:
    """True on every rank when it is true on any: a decision that all ranks take at the same place."""
    return all_reduce_max([float(flag)])[0] > 0


def broadcast_object(value):
    """Rank 0's value, on every rank. Small picklable values from our own code only."""
    dist = _group()
    if not dist:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_CONTROL)
    return box[0]


def on_main(look: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; or its HarnessError, on every rank."""
    found, problem = None, None
    if is_main():
        try:
            found = look()
        except HarnessError as error:
            problem = error
    found, problem = broadcast_object((found, problem))
    if problem:
        raise problem
    return found


def _device():
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def measure_all_reduce(
    *,
    rank: int,
    world: int,
    address: str,
    port: int,
    timeout_s: float,
    device: int | None,
    size_bytes: int,
    repeats: int,
    reached: Callable[[str], None],
) -> dict:
    """Meet `world` processes at a port of rank 0's host, sum `size_bytes` over them `repeats` times, and leave. For the pre-flight of a
    cluster: it needs no launcher's variables, and its group is gone when it returns.

    device: of CUDA (then by NCCL); None: CPU, by gloo. timeout_s: of each thing that is waited for.
    reached: told "connected" when rank 0 was found, and "joined" when all were.
    Returns all_reduce_s (the median), all_reduce_bytes, and clock: this host's time at the end of the last, the same moment on all hosts.
    Raises LaunchError when a sum is wrong, and what torch raises when somebody does not come.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    reached("connected")
    place = torch.device("cpu" if device is None else f"cuda:{device}")
    dist.init_process_group("gloo" if device is None else "nccl", store=store, rank=rank, world_size=world, timeout=timeout)
    ones = torch.empty(size_bytes // 4, device=place)

    def sum_once() -> float:
        ones.fill_(1.0)
        begun = time.monotonic()
        dist.all_reduce(ones)
        if device is not None:
            torch.cuda.synchronize(place)
        took_s = time.monotonic() - begun
        low, high = float(ones.min()), float(ones.max())
        if (low, high) != (world, world):
            raise LaunchError(f"the sum of {world} ones over all ranks has elements from {low:g} to {high:g}")
        return took_s

    # The first makes the connections as well.
    sum_once()
    reached("joined")
    took_s = statistics.median(sum_once() for _ in range(repeats))
    clock = time.time()
    dist.destroy_process_group()
    return {"all_reduce_s": took_s, "all_reduce_bytes": ones.numel() * 4, "clock": clock}


def shutdown() -> None:
    global _CONTROL
    import torch.distributed as dist

    _CONTROL = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
