"""One process of the pre-flight: per GPU where there are GPUs, else per node. It tries its device, then an all-reduce with all the others.

    python -m harness.cluster.probe \
        '{"rank": 0, "world": 4, "device": 0, "address": "10.0.0.1", "port": 29500, "timeout_s": 30, "folder": ".", "checks_for": null}'

`device` is null on a CPU. The first process of each node is given a recipe as `checks_for`: when the sum is done it makes the checks of
`harness doctor` that cost torch, because it has the GPU already, and some clusters let only one process have it. How far it has come, and
what it found, goes to stdout as JSON objects, one per line; the last value of each key counts. `stage` is the last of STAGES that it has
reached, so that of many that failed together the one that kept the others waiting is known (harness.cluster.preflight).
"""

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

from harness.doctor.accelerator import CHECKS, try_gpu
from harness.doctor.examine import plan_heavy
from harness.recipe import load

STAGES = ("begun", "loaded", "tried", "connected", "joined", "reduced")
"""Python runs; torch is loaded; the device has computed; rank 0 was reached; all ranks are there; their sum was right."""
GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
"""What is summed: enough that bandwidth counts and not latency, little enough for a second on a slow network."""
REPEATS = 5


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
    if plan["checks_for"]:
        check_environment(Path(plan["checks_for"]))


def check_environment(recipe: Path) -> None:
    """The last `checking` without its checks is the one in which this process died."""
    asked, checks = load(recipe), []
    for name in plan_heavy(asked):
        # Each process tries its own GPU, above.
        if name != "gpus":
            tell(checking=name)
            checks += [asdict(check) for check in CHECKS[name](asked)]
            tell(checks=checks)
    tell(checking=None)


def tell(**facts) -> None:
    print(json.dumps(facts), flush=True)


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
