"""One process of the pre-flight: per GPU where there are GPUs, else per node. It tries its device, then an all-reduce with all the others.

    python -m harness.cluster.probe \
        '{"rank": 0, "world": 4, "device": 0, "address": "10.0.0.1", "port": 29500, "timeout_s": 30, "folder": "."}'

`device` is null on a CPU. How far it has come, and what it found, goes to stdout as JSON objects, one per line; the last value of each key
counts. `stage` is the last of STAGES that it has reached, so that of many that failed together the one that kept the others waiting is
known (harness.cluster.preflight).
"""

import json
import os
import re
import sys
from pathlib import Path

STAGES = ("begun", "loaded", "tried", "connected", "joined", "reduced")
"""Python runs; torch is loaded; the device has computed; rank 0 was reached; all ranks are there; their sum was right."""
GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
"""What is summed: enough that bandwidth counts and not latency, little enough for a second on a slow network."""
REPEATS = 5
MATRIX = 2048


def main(argument: str) -> None:
    plan = json.loads(argument)
    tell(stage="begun")
    nccl_log = Path(plan["folder"]) / f"nccl-{plan['rank']}.log"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,P2P,SHM,NET", "NCCL_DEBUG_FILE": str(nccl_log).replace("%", "%%")}
    import torch  # noqa: F401 - so that a disk which takes long to read it is told from a network

    from harness import distributed

    tell(stage="loaded")
    if plan["device"] is not None:
        found = try_gpu(plan["device"])
        tell(**found)
        if "gpu" not in found:
            sys.exit("there is no such GPU")
    tell(stage="tried")
    if plan["world"] > 1:
        measured = distributed.measure_all_reduce(
            rank=plan["rank"],
            world=plan["world"],
            address=plan["address"],
            port=plan["port"],
            timeout_s=plan["timeout_s"],
            device=plan["device"],
            size_bytes=CPU_BYTES if plan["device"] is None else GPU_BYTES,
            repeats=REPEATS,
            reached=lambda stage: tell(stage=stage),
        )
        tell(**measured, transport=gloo_transport() if plan["device"] is None else nccl_transport(nccl_log.read_text(errors="replace")))
    tell(stage="reduced")


def tell(**facts) -> None:
    print(json.dumps(facts), flush=True)


# ---- the device


def try_gpu(index: int) -> dict:
    """What this process sees of GPU `index`: how many there are, memory (before anything of ours but CUDA's context is on it), and whether
    it multiplies rightly."""
    import torch

    count, built_for = torch.cuda.device_count(), torch.version.cuda or torch.version.hip
    if index >= count:
        return {"visible": count, "built_for": built_for}
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info()
    return {
        "visible": count,
        "built_for": built_for,
        "gpu": torch.cuda.get_device_name(index),
        "gpu_free_bytes": free,
        "gpu_total_bytes": total,
        "multiplies": multiplies_rightly(f"cuda:{index}"),
    }


def multiplies_rightly(device: str) -> bool:
    """Whether A B equals what A (B 1) says of it, to the last bit: whole numbers this small are exact in TF32 as in float32."""
    import torch

    drawn = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (MATRIX, MATRIX), generator=drawn).float() for _ in range(2))
    sums = (left.to(device) @ right.to(device)).sum(dim=1)
    return torch.equal(sums.cpu().double(), left.double() @ right.double().sum(dim=1))


# ---- the transport


def nccl_transport(log: str) -> str:
    """How NCCL's channels go, by its own log (NCCL_DEBUG=INFO): `NET/IB, P2P`. The network comes first."""
    ways = set(re.findall(r" via (NET/[^/\s]+(?: \w+)?|\w+)", log))
    return ", ".join(sorted(ways, key=lambda way: (not way.startswith("NET"), way))) or "unknown"


def gloo_transport() -> str:
    """The interface that gloo listens on: the one that is named, else the one that this host's name leads to."""
    import socket

    import psutil

    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named:
        return f"gloo on {named}"
    try:
        mine = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "gloo on lo"
    interfaces = [name for name, found in psutil.net_if_addrs().items() if mine in [address.address for address in found]]
    return f"gloo on {(interfaces or [mine])[0]}"


if __name__ == "__main__":
    main(sys.argv[1])
