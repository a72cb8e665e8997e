"""The plan in the header of every recipe in configs/, one line that begins with the place that it is for:

    # Plan for 2 nodes of 8 x a100-80g: 38.1 GiB of each GPU (37.1 to 41.9; most of it: weights), ...

`python -m harness.planner.headers` writes the lines anew, for the place that each names (for one GPU of 24 GiB where there is no line yet);
a test holds them to what the planner says.
"""

import re
import sys
from pathlib import Path

from harness.errors import HarnessError
from harness.planner.gpus import GIB, MIB, parse_gpu
from harness.planner.host import checkpoint_bytes
from harness.planner.plan import Place, plan_recipe
from harness.planner.render import gib
from harness.planner.setting import NOTHING
from harness.planner.states import count_parameters
from harness.recipe import load
from harness.recipe.load import NO_RECIPES
from harness.resources import shipped, shipped_names

LINE = re.compile(r"# Plan for (?:(\d+) nodes of )?(\d+) x (\S+): .*")


def recipes() -> list[str]:
    return [name for name in shipped_names("") if not name.startswith(NO_RECIPES)]


def read_place(text: str) -> tuple[int, int, str]:
    """(nodes, GPUs of each, card) that a recipe's header names."""
    found = next((match for line in text.splitlines() if (match := LINE.fullmatch(line))), None)
    return (int(found[1] or 1), int(found[2]), found[3]) if found else (1, 1, "24GiB")


def render_header(name: str) -> str:
    """The line, for the place that the recipe's present one names."""
    nodes, gpus, card = read_place(_file(name).read_text(encoding="utf-8"))
    plan = plan_recipe(load(name), Place(gpus, nodes, parse_gpu(card)))
    peak, host = plan.memory.peak, sum((size.expected for size in plan.host.values()), NOTHING.expected)
    place = f"{f'{nodes} nodes of ' if nodes > 1 else ''}{gpus} x {card}"
    parts = [
        f"{gib(peak.expected)} GiB of each GPU ({gib(peak.low)} to {gib(peak.high)}; most of it: {plan.memory.dominant}), {plan.verdict}",
        f"host {gib(host)} GiB a node",
    ]
    if plan.work is not None:
        size = checkpoint_bytes(plan.setting, count_parameters(plan.setting.shape, plan.setting.recipe)).expected
        parts.append(f"a checkpoint {gib(size)} GiB" if size >= GIB / 10 else f"a checkpoint {size / MIB:.2f} MiB")
    return f"# Plan for {place}: {'; '.join(parts)}"


def _file(name: str) -> Path:
    return shipped("configs", f"{name}.yaml")


def save_header(name: str) -> bool:
    """Whether the file had another line, or none; it goes before the first line that is no comment."""
    file, line = _file(name), render_header(name)
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [each for each in lines if not LINE.fullmatch(each)]
    at = next((number for number, each in enumerate(lines) if LINE.fullmatch(each)), None)
    if at is None:
        at = next(number for number, each in enumerate(kept) if not each.startswith("#"))
    text = "\n".join([*kept[:at], line, *kept[at:]]) + "\n"
    changed = text != file.read_text(encoding="utf-8")
    if changed:
        file.write_text(text, encoding="utf-8")
    return changed


def main() -> int:
    failed = False
    for name in recipes():
        try:
            if save_header(name):
                print(f"{name}: written")
        except HarnessError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
