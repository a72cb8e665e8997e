"""What the planner forecasts for a run as it was started, beside what the run measured.

The planner's sum for the fullest moment is of a whole card: tensors, what the allocator cannot use, and the CUDA context. The run measures
the first (memory/peak_gib) and the first two (memory/peak_reserved_gib), so each is set beside the same part of the forecast. On a CPU it
measures the resident memory of a process, which no forecast here is of.
"""

import contextlib
import json
from dataclasses import dataclass

from harness.cluster.schema import load_cluster
from harness.errors import HarnessError, first_line
from harness.planner import Place, plan_recipe
from harness.planner.gpus import GIB
from harness.planner.setting import Range
from harness.recipe import Recipe
from harness.run import RunDir

CONTEXT, SLACK = "CUDA context", "allocator slack"


@dataclass(frozen=True)
class Memory:
    """GiB. Each forecast is (low, expected, high); None where there is none."""

    measured: float | None = None
    reserved: float | None = None
    """Measured on GPUs alone."""
    tensors: tuple[float, float, float] | None = None
    with_slack: tuple[float, float, float] | None = None
    whole: tuple[float, float, float] | None = None
    card: float | None = None
    """What a GPU of the run's cluster file holds."""
    card_name: str = ""
    most_of_it: str = ""
    missing: str = ""
    """Why there is no forecast."""

    @property
    def is_compared(self) -> bool:
        return self.measured is not None and self.reserved is not None and self.tensors is not None


def forecast(run: RunDir, recipe: Recipe | None, manifest: dict, measured: float | None, reserved: float | None) -> Memory:
    if recipe is None:
        return Memory(measured, reserved, missing="the recipe cannot be read by this version")
    try:
        plan = plan_recipe(recipe, _place(run, manifest))
    except HarnessError as error:
        return Memory(measured, reserved, missing=first_line(error))
    except Exception as error:  # a run of another version is shown without a forecast
        return Memory(measured, reserved, missing=f"the planner cannot read it: {type(error).__name__}: {first_line(error)}")
    components = plan.memory.moments[plan.memory.deciding]

    def without(*names: str) -> tuple[float, float, float]:
        total = Range.exact(0)
        for name, size in components.items():
            if name not in names:
                total = total + size
        return total.low / GIB, total.expected / GIB, total.high / GIB

    gpu = plan.place.gpu
    return Memory(
        measured,
        reserved,
        tensors=without(CONTEXT, SLACK),
        with_slack=without(CONTEXT),
        whole=without(),
        card=gpu.bytes / GIB if gpu else None,
        card_name=gpu.name if gpu else "",
        most_of_it=plan.memory.dominant,
    )


def _place(run: RunDir, manifest: dict) -> Place:
    """Ranks as run.json says them, nodes as its job was sent, the card as its cluster file says it."""
    nodes, gpu, world = 1, None, int(manifest.get("world_size") or 1)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        nodes = int(json.loads((run.path / "job.json").read_text()).get("nodes") or 1)
    cluster = run.path / "cluster.yaml"
    if cluster.is_file():
        with contextlib.suppress(HarnessError):
            gpu = load_cluster(str(cluster)).gpu
    nodes = nodes if world % nodes == 0 else 1
    return Place(world // nodes, nodes, gpu)
