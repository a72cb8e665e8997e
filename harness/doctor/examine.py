"""Which checks are made, for a machine or for a recipe, and how: side by side, each within its time, the light ones shown at once."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from harness.doctor import machine, network, places
from harness.doctor.check import Check
from harness.doctor.places import Place
from harness.errors import first_line
from harness.hub.cache import hub_cache
from harness.recipe import Recipe
from harness.recipe.backend import load_backend
from harness.resources import cache_root

AREAS = (machine.AREA, places.AREA, "cluster", network.AREA, "accelerator", "recipe")
"""In the order in which they are shown; those that need seconds come last."""
LIGHT_S, HEAVY_S = 8.0, 60.0
"""So long may a check take; a disk that hangs and a cold one take that long."""


@dataclass(frozen=True)
class Task:
    """A check, or several of one process (`names`, of harness.doctor.accelerator)."""

    area: str
    name: str
    run: Callable[[], list[Check]] | None = None
    names: tuple[str, ...] = ()


def plan_checks(recipe: Recipe | None) -> list[Task]:
    """For a machine everything; for a recipe what it needs."""
    tasks = [
        Task(machine.AREA, "Python", machine.check_python),
        Task(machine.AREA, "libraries", machine.check_libraries),
        Task(machine.AREA, "compiler", machine.check_compiler),
        *(Task(places.AREA, place.name, partial(places.check_place, place)) for place in list_places(recipe)),
        Task(places.AREA, "shm", places.check_shared_memory),
        Task(network.AREA, "W&B", names=("wandb",)),
    ]
    if recipe is None:
        tasks.append(Task(network.AREA, "hub", network.check_hub))
    else:
        tasks += [
            Task("recipe", "packages", partial(check_packages, recipe)),
            Task("recipe", "hub", partial(network.check_inputs, recipe)),
        ]
    heavy = plan_heavy(recipe)
    # 4-bit alone takes as long as all the others together.
    alone = tuple(name for name in heavy if name == "four_bit")
    others = tuple(name for name in heavy if name != "four_bit")
    tasks += [Task("accelerator", ", ".join(names), names=names) for names in (others, alone) if names]
    return sorted(tasks, key=lambda task: AREAS.index(task.area))


def plan_heavy(recipe: Recipe | None) -> list[str]:
    """Names of harness.doctor.accelerator, besides W&B's."""
    names = ["torch", "gpus", "attention"]
    if recipe is None or load_backend(recipe.backend).kind == "deepspeed":
        names.append("operators")
    if recipe is None or uses_bitsandbytes(recipe):
        names.append("four_bit")
    return names


def uses_bitsandbytes(recipe: Recipe) -> bool:
    quantised = recipe.model.quantization or (recipe.teacher and recipe.teacher.quantization)
    return bool(quantised) or recipe.train.optim.startswith(("paged", "lion")) or recipe.train.optim.endswith("8bit")


def list_places(recipe: Recipe | None) -> list[Place]:
    runs = Path(recipe.output_dir if recipe else "runs").expanduser()
    cache = cache_root(recipe.data.cache_dir if recipe else None)
    found = [
        Place("runs folder", runs.absolute(), 10 * 2**30, "checkpoints go there; another disk: output_dir=FOLDER"),
        Place("cache", cache, 5 * 2**30, "prepared data go there; another disk: HARNESS_CACHE=FOLDER"),
        Place("hub cache", hub_cache(), 5 * 2**30, "models go there; another disk: HF_HOME=FOLDER"),
        places.temp_place(),
    ]
    return list({place.path.resolve(): place for place in found}.values())


def check_packages(recipe: Recipe) -> list[Check]:
    """What no harness brings and this recipe asks for."""
    asked = {
        "liger_kernel": ("train.use_liger_kernel", "pip install 'harness[liger]'") if recipe.train.use_liger_kernel else None,
        "vllm": ("rlhf.use_vllm", "pip install 'trl[vllm]'") if recipe.task == "rlhf" and recipe.rlhf.use_vllm is True else None,
    }
    if recipe.distill.on_policy and recipe.distill.on_policy.use_vllm is True:
        asked["vllm"] = ("distill.on_policy.use_vllm", "pip install 'trl[vllm]'")
    checks = []
    for package, found in asked.items():
        if found:
            there = find_spec(package) is not None
            what = f"{package} is {'' if there else 'not '}installed, which {found[0]} asks for"
            checks.append(Check("recipe", "packages", "ok" if there else "fail", what, found[1]))
    return checks


def check_node(recipe: Recipe, *, trains: bool) -> list[Check]:
    """The light ones that may differ from node to node of a job; what costs torch its probe checks (harness.cluster.probe)."""
    tasks = [
        Task(machine.AREA, "libraries", machine.check_libraries),
        Task(places.AREA, "temp folder", partial(places.check_place, places.temp_place())),
        Task(places.AREA, "shm", places.check_shared_memory),
        Task("recipe", "packages", partial(check_packages, recipe)),
        Task("recipe", "hub", partial(network.check_inputs, recipe, trains=trains)),
    ]
    return [check for _, checks in examine(tasks, None) for check in checks]


# ---- side by side


def examine(tasks: list[Task], recipe: Recipe | None) -> Iterator[tuple[str, list[Check]]]:
    """(area, its checks) as soon as all of that area, and of those before it, are done."""
    found: queue.SimpleQueue = queue.SimpleQueue()
    begun = time.monotonic()
    for task in tasks:
        threading.Thread(target=_do, args=(task, recipe, found.put), daemon=True).start()
    done: dict[Task, list[Check]] = {}
    for area in dict.fromkeys(task.area for task in tasks):
        mine = [task for task in tasks if task.area == area]
        while missing := [task for task in mine if task not in done]:
            limit_s = max(HEAVY_S + 5 if task.names else LIGHT_S for task in missing)
            try:
                task, checks = found.get(timeout=max(begun + limit_s - time.monotonic(), 0.01))
            except queue.Empty:
                done |= {task: [_silent(task, LIGHT_S)] for task in missing}
                continue
            done.setdefault(task, checks)
        yield area, [check for task in mine for check in done[task]]


def _do(task: Task, recipe: Recipe | None, put: Callable[[tuple[Task, list[Check]]], None]) -> None:
    try:
        checks = run_apart(task, recipe) if task.names else task.run()
    except Exception as error:  # noqa: BLE001 - a check that fails is a finding, and no reason to say nothing of the others
        checks = [Check(task.area, task.name, "fail", f"the check failed: {type(error).__name__}: {first_line(error)}")]
    put((task, checks))


def _silent(task: Task, limit_s: float) -> Check:
    return Check(task.area, task.name, "fail", f"does not answer within {limit_s:.0f} s", _HANGS)


_HANGS = "a disk or a driver that hangs: `dmesg` may say more"


def run_apart(task: Task, recipe: Recipe | None) -> list[Check]:
    """The checks `task.names` in a process of their own: what crashes or hangs in a library does so there."""
    plan = {"names": task.names, "recipe": recipe and recipe.model_dump(mode="json")}
    argv = [sys.executable, "-m", "harness.doctor.accelerator", json.dumps(plan)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        try:
            output, code = process.communicate(timeout=HEAVY_S)[0], process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            output, code = process.communicate()[0], None
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    return read_told(output.splitlines(), task.area, code, next((line.strip() for line in reversed(lines) if line.strip()), ""))


def read_told(lines: Iterable[str], area: str, code: int | None, said: str) -> list[Check]:
    """What such a process has told. code: how it ended, None when it was killed for its time; said: its last other words."""
    told = [json.loads(line) for line in lines if line.startswith("{")]
    checks = [Check(**check) for each in told for check in each.get("checks", ())]
    if code != 0:
        begun = [each["checking"] for each in told if "checking" in each]
        how = f"does not answer within {HEAVY_S:.0f} s" if code is None else _how_ended(code)
        what = f"{how}{f': {said}' if said and code is not None else ''}"
        remedy = "it ended in that check; try the library by itself in Python" if code is not None else _HANGS
        checks.append(Check(area, begun[-1] if begun else "Python", "fail", what, remedy))
    return checks


def _how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else "does not work"
