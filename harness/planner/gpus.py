"""What a GPU holds, by the name that people give it."""

import re
from dataclasses import dataclass

from harness.errors import RecipeError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes: int
    """What the driver reports as its memory."""
    flops_name: str | None = None
    """As harness.planner.flops knows it."""
    has_bf16: bool = True


# Memory: the total that nvidia-smi reports (rocm-smi for MI300X), in MiB; with ECC on, where it can be switched.
GPUS = {
    "h100": Gpu("h100", 81559 * MIB, "H100"),
    "h200": Gpu("h200", 143771 * MIB, "H200"),
    "b200": Gpu("b200", 183359 * MIB, "B200"),
    "a100-80g": Gpu("a100-80g", 81920 * MIB, "A100"),
    "a100-40g": Gpu("a100-40g", 40960 * MIB, "A100"),
    "l40s": Gpu("l40s", 46068 * MIB, "L40S"),
    "a6000": Gpu("a6000", 49140 * MIB, "RTX A6000"),
    "rtx4090": Gpu("rtx4090", 24564 * MIB, "RTX 4090"),
    "rtx3090": Gpu("rtx3090", 24576 * MIB, "RTX 3090"),
    "a10": Gpu("a10", 23028 * MIB, "A10"),
    "l4": Gpu("l4", 23034 * MIB, "L4"),
    "v100-32g": Gpu("v100-32g", 32768 * MIB, "V100", has_bf16=False),
    "v100-16g": Gpu("v100-16g", 16384 * MIB, "V100", has_bf16=False),
    "t4": Gpu("t4", 15360 * MIB, "T4", has_bf16=False),
    "mi300x": Gpu("mi300x", 196592 * MIB, "MI300X"),
}
SAME = {"a100": "a100-80g", "h100-80g": "h100", "4090": "rtx4090", "3090": "rtx3090", "v100": "v100-16g", "a100_80g": "a100-80g"}


def parse_gpu(text: str) -> Gpu:
    """`h100`, or a size: `24GiB`, `80GB`. Raises RecipeError for anything else."""
    name = text.lower()
    if name in GPUS or name in SAME:
        return GPUS[SAME.get(name, name)]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb)", name)
    if size and float(size[1]) > 0:
        return Gpu(text, round(float(size[1]) * (GIB if size[2] == "gib" else 10**9)))
    raise RecipeError(f"--gpu {text}: no such card; give a size (24GiB), or one of {', '.join(GPUS)}")
