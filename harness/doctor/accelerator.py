"""What costs an import of seconds: torch and its GPUs, attention kernels, DeepSpeed's operators, 4-bit weights, W&B's login.

    python -m harness.doctor.accelerator '{"names": ["torch", "attention"], "recipe": null}'

Such a process says a JSON object per line: {"checking": NAME} before each check and {"name": NAME, "checks": [...]} after it; of one that
died or hangs it is known in what. The pre-flight's probe (harness.cluster.probe) makes the same checks in its own process.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from harness.attention import asked_attention, choose_attention
from harness.doctor.check import Check
from harness.doctor.machine import NO_COMPILER, find_compiler
from harness.errors import HarnessError, first_line
from harness.launcher import check_device
from harness.recipe import Recipe
from harness.recipe.backend import load_backend
from harness.sizes import gib
from harness.watchdog import follow_parent

AREA = "accelerator"
GPU_SHARE_IN_USE = 0.15
"""More than CUDA's own context takes of the smallest GPU that anyone trains on."""
LARGE = 1e9
"""Parameters above which nobody means to train on a CPU."""
MATRIX = 2048
NVIDIA = Path("/proc/driver/nvidia")


# ---- torch and its GPUs


def check_torch(recipe: Recipe | None) -> list[Check]:
    import torch

    built_for, driver = torch.version.cuda or torch.version.hip, cuda_driver()
    parts = [
        torch.__version__,
        f"for CUDA {built_for}" if torch.version.cuda else f"for ROCm {built_for}" if built_for else "for CPUs alone",
    ]
    if torch.version.cuda and torch.cuda.is_available():
        parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    if driver != "none":
        parts.append(f"driver {driver}")
    there, visible = count_gpus(), torch.cuda.device_count()
    found = [Check(AREA, "torch", "ok", ", ".join(parts))]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    if there and not visible and not (hidden and built_for):
        return [judge_count(visible, there, built_for, ", ".join(parts))]
    if recipe:
        try:
            check_device(recipe, load_backend(recipe.backend), has_gpu=visible > 0)
        except HarnessError as error:
            what, _, remedy = str(error).rpartition("; ")
            found.append(Check(AREA, "device", "fail", what, remedy))
    if not visible:
        found.append(judge_no_gpu(count_parameters(recipe) if recipe else 0, hides_some=there > 0))
    return found


def count_parameters(recipe: Recipe) -> int:
    """Of the model that is trained; 0 where its shapes are not here."""
    from harness.planner.architecture import load_architecture

    try:
        return load_architecture(recipe.model.init or recipe.model.name_or_path, recipe.model.revision).parameters
    except HarnessError:
        return 0


def judge_no_gpu(parameters: int, *, hides_some: bool) -> Check:
    hidden = " (CUDA_VISIBLE_DEVICES hides some)" if hides_some else ""
    if parameters < LARGE:
        return Check(AREA, "GPU", "ok", f"none; recipes run on the CPU{hidden}")
    what = f"none{hidden}; on the CPU a model of {parameters / 1e9:.1f} billion parameters takes months where a GPU takes hours"
    return Check(AREA, "GPU", "warn", what, "run it where there is a GPU: `harness submit` sends it to a cluster's")


def check_gpus(recipe: Recipe | None) -> list[Check]:
    import torch

    return [check for index in range(torch.cuda.device_count()) for check in judge_gpu(index, try_gpu(index))]


def count_gpus(nvidia: Path = NVIDIA) -> int:
    """GPUs that the kernel's driver has, whatever torch sees of them."""
    return len(list((nvidia / "gpus").glob("*")))


def cuda_driver(version: Path = NVIDIA / "version") -> str:
    """The version of the kernel's module, which decides what CUDA may ask of it."""
    try:
        match = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]*)", version.read_text())
    except OSError:
        return "none"
    return match[1] if match else "none"


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


def judge_count(visible: int, wanted: int, built_for: str | None, shown: str = "") -> Check:
    """Of a machine on which torch sees fewer GPUs than there should be."""
    if built_for is None:
        return Check(AREA, "torch", "fail", "built for CPUs alone", "install the build of torch for these GPUs")
    remedy = "`dmesg` there may say why"
    if shown and not visible:
        remedy += f", and `nvidia-smi` which CUDA its driver is for (this is {shown})"
    return Check(AREA, "GPU", "fail", f"{visible} of {wanted} GPUs are visible", remedy)


def judge_gpu(number: int, facts: dict) -> list[Check]:
    """What is wrong with a GPU that `try_gpu` has tried; one line where nothing is."""
    name, total, free = f"GPU {number}", facts["gpu_total_bytes"], facts["gpu_free_bytes"]
    checks = []
    if total - free > GPU_SHARE_IN_USE * total:
        what = f"{facts['gpu']}: {gib(total - free)} of {gib(total)} are in use by others"
        checks.append(Check(AREA, name, "fail", what, "a process of an earlier job may have been left there; `nvidia-smi` shows it"))
    if not facts["multiplies"]:
        checks.append(Check(AREA, name, "fail", f"{facts['gpu']}: multiplies wrongly", "tell those who run the machine"))
    return checks or [Check(AREA, name, "ok", f"{facts['gpu']}, {gib(free)} of {gib(total)} free, multiplies rightly")]


# ---- kernels


def check_attention(recipe: Recipe | None) -> list[Check]:
    import torch

    from harness.recipe.precision import autocasts_bf16, choose_dtype

    has_gpu = torch.cuda.is_available()
    bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    asked, dtype = "auto", "bfloat16" if bf16 else "float32"
    if recipe:
        asked = asked_attention(recipe)
        loaded = choose_dtype(recipe, load_backend(recipe.backend), bf16_hardware=bf16)
        dtype = "float16" if recipe.train.fp16 else "bfloat16" if autocasts_bf16(recipe, bf16) else loaded
    try:
        chosen = choose_attention(asked, dtype, has_gpu)
    except HarnessError as error:
        what, _, remedy = str(error).rpartition("; ")
        return [Check(AREA, "attention", "fail", what, remedy)]
    return [Check(AREA, "attention", "ok", f"{chosen} in {dtype}" + (", which `auto` chooses here" if asked == "auto" else ""))]


def check_operators(recipe: Recipe | None) -> list[Check]:
    if not _has_gpu():
        # Said here, so that DeepSpeed does not look for every accelerator there is and warn that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from harness.operators import is_compiled, needed_operators

    offloads = recipe is None or load_backend(recipe.backend).offloads
    wanted = [name for name in needed_operators() if offloads or name != "CPUAdamBuilder"]
    missing = [name.removesuffix("Builder") for name in wanted if not is_compiled(name)]
    names = ", ".join(name.removesuffix("Builder") for name in wanted)
    if not missing:
        return [Check(AREA, "DeepSpeed", "ok", f"operators compiled: {names}" if wanted else "needs no operators of its own here")]
    if find_compiler() is None:
        return [
            Check(AREA, "DeepSpeed", "fail", f"operators not compiled ({', '.join(missing)}), and there is no C++ compiler", NO_COMPILER)
        ]
    remedy = "`python -m harness.operators` compiles them now; else the first run does, about a minute each"
    return [Check(AREA, "DeepSpeed", "warn", f"operators not compiled yet: {', '.join(missing)}", remedy)]


def check_four_bit(recipe: Recipe | None) -> list[Check]:
    from harness.model.four_bit import try_four_bit

    device = "cuda" if _has_gpu() else "cpu"
    try:
        found = try_four_bit(device)
    except Exception as error:  # noqa: BLE001 - a library of kernels: whatever it raises is the finding
        what = f"bitsandbytes cannot quantise on {device}: {type(error).__name__}: {first_line(error)}"
        return [Check(AREA, "4-bit", "fail", what, "`python -m bitsandbytes` says what it looked for; recipes without 4 bits run")]
    errs = f"error {found.error:.3f}, product off by {found.product_error:.1%}"
    if not found.is_right:
        remedy = "expected 0.073 and less than 2 %; install another build of bitsandbytes, or leave model.quantization out"
        return [Check(AREA, "4-bit", "fail", f"bitsandbytes {found.version} computes wrongly on {device}: {errs}", remedy)]
    return [Check(AREA, "4-bit", "ok", f"bitsandbytes {found.version} on {device}: quantised, brought back, multiplied ({errs})")]


def check_login(recipe: Recipe | None) -> list[Check]:
    from harness.doctor.network import check_wandb

    return check_wandb(recipe.tracking.mode if recipe else "auto")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


CHECKS: dict[str, Callable[[Recipe | None], list[Check]]] = {
    "torch": check_torch,
    "gpus": check_gpus,
    "attention": check_attention,
    "operators": check_operators,
    "four_bit": check_four_bit,
    "wandb": check_login,
}


# ---- a process of them


def run_checks(names: Iterable[str], recipe: Recipe | None, tell: Callable[..., None]) -> None:
    for name in names:
        tell(checking=name)
        tell(name=name, checks=[asdict(check) for check in CHECKS[name](recipe)])


def main(argument: str) -> None:
    follow_parent(signal.SIGKILL)
    plan = json.loads(argument)
    recipe = Recipe.model_validate_json(json.dumps(plan["recipe"])) if plan["recipe"] else None
    run_checks(plan["names"], recipe, lambda **facts: print(json.dumps(facts), flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
