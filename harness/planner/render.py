"""A plan for people, and for programs."""

from harness.planner.fit import Fitting
from harness.planner.gpus import GIB
from harness.planner.plan import Plan
from harness.planner.setting import Range
from harness.planner.states import trained_adapter

FORMAT = 1


def gib(size: float) -> str:
    """In GiB, with three digits that count."""
    value = size / GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def render_plan(plan: Plan, changes: list[Fitting]) -> str:
    setting, memory = plan.setting, plan.memory
    shape, world = setting.shape, setting.world
    what = "whole" if trained_adapter(setting.recipe) is None else "an adapter"
    if setting.recipe.task == "generate":
        what = "nothing"
    lines = [
        f"{shape.name}: {shape.parameters:,} parameters ({shape.source})",
        f"{setting.recipe.task}, trained: {what}; {setting.backend.name} on {world} GPU{'s' * (world > 1)}"
        + (f" of {setting.nodes} nodes" if setting.nodes > 1 else ""),
        "",
        f"memory of each GPU, in GiB, in its fullest moment ({memory.deciding})",
    ]
    rows = [(name, size) for name, size in memory.moments[memory.deciding].items()]
    lines += _table([*rows, ("together", memory.total(memory.deciding))])
    others = [f"{moment} {gib(memory.total(moment).expected)}" for moment in memory.moments if moment != memory.deciding]
    if others:
        lines.append(f"  other moments, expected: {', '.join(others)}")
    lines += ["", *_verdict(plan), *(f"not counted: the reward model {name}, which is not there (yet)" for name in plan.not_counted), ""]
    if setting.recipe.task != "generate" and changes:
        lines += ["the cheapest changes with which it fits (times by arithmetic, for an order):", *map(_change, changes), ""]
    lines += ["host memory of a node, in GiB", *_table([*plan.host.items(), ("together", _sum(plan.host))]), ""]
    if plan.disk:
        lines += ["disk, in GiB", *_table(list(plan.disk.items())), ""]
    return "\n".join(lines + _work(plan)).rstrip() + "\n"


def _sum(parts: dict[str, Range]) -> Range:
    total = Range.exact(0)
    for part in parts.values():
        total = total + part
    return total


def _table(rows: list[tuple[str, Range]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    lines = [f"  {'':{width}}      low  expected      high"]
    return lines + [f"  {name:{width}} {gib(size.low):>8} {gib(size.expected):>9} {gib(size.high):>9}" for name, size in rows]


def _verdict(plan: Plan) -> list[str]:
    memory, gpu = plan.memory, plan.place.gpu
    peak = memory.peak
    dominant = f"most of it: {memory.dominant}"
    if gpu is None:
        return [f"{dominant}. Whether it fits: say on what, with --gpu or --cluster"]
    said = {
        "fits": f"fits {gpu.name} ({gib(gpu.bytes)} GiB), even at its highest",
        "tight": f"is expected to fit {gpu.name} ({gib(gpu.bytes)} GiB), and may not at its highest ({gib(peak.high)})",
        "does not fit": f"is expected not to fit {gpu.name} ({gib(gpu.bytes)} GiB)",
        "cannot fit": f"cannot fit {gpu.name} ({gib(gpu.bytes)} GiB): its lowest is {gib(peak.low)}",
    }
    lines = [f"{said[plan.verdict]}; {dominant}"]
    host, has = _sum(plan.host), plan.place.host_bytes
    if has and host.expected > has:
        lines.append(f"host memory: {gib(host.expected)} GiB expected on a node that has {gib(has)}")
    return lines


def render_overrides(fitting: Fitting) -> str:
    words = [f"'{word}'" if "{" in word else word for word in fitting.change.overrides]
    return " ".join(words + ([f"(--nodes {fitting.change.nodes})"] if fitting.change.nodes else []))


def _change(fitting: Fitting) -> str:
    note = ", and is another run" if fitting.change.is_other_run else ""
    return (
        f"  {render_overrides(fitting)}\n      {fitting.change.what}: {gib(fitting.memory.peak.expected)} GiB, "
        f"{fitting.slower:.2f} times the step{note}"
    )


def render_fit(found: Fitting | None) -> str:
    if found is None:
        return "--fit: nothing fits at this global batch; more GPUs, or another model"
    peak = found.memory.peak
    note = ", and is another run" if found.change.is_other_run else ""
    return (
        f"--fit: the fastest that fits, by arithmetic, at the same global batch ({found.slower:.2f} times the step of the recipe as it is; "
        f"{gib(peak.low)} / {gib(peak.expected)} / {gib(peak.high)} GiB{note}):\n  {render_overrides(found)}"
    )


def _work(plan: Plan) -> list[str]:
    work, hours = plan.work, plan.hours
    if work is None:
        return []
    lines = [f"{work.flops_per_token:.3g} FLOP a token, up to {work.tokens_per_step:,.0f} tokens a step"]
    if work.flops is None:
        lines.append(work.basis)
    else:
        lines.append(f"{work.tokens:,.0f} tokens in about {work.steps:,} steps ({work.basis}): {work.flops:.3g} FLOP")
    if hours:
        lines.append(f"{hours.hours:,.2f} hours, {hours.gpu_hours:,.2f} GPU-hours, at {hours.tokens_per_s:,.0f} tokens/s ({hours.basis})")
    elif work.flops is not None:
        lines.append("hours: say how fast, with --tokens-per-s, or --measured RUN")
    return lines


# ---- for programs


def to_json(plan: Plan, changes: list[Fitting], found: Fitting | None = None) -> dict:
    """docs/plan.md has the schema. All sizes are bytes, all times seconds or hours as named."""

    def parts(sizes: dict[str, Range]) -> dict:
        return {name: _range(size) for name, size in sizes.items()}

    memory, place = plan.memory, plan.place
    return {
        "format": FORMAT,
        "model": {
            "name": plan.setting.shape.name,
            "parameters": plan.setting.shape.parameters,
            "source": plan.setting.shape.source,
        },
        "task": plan.setting.recipe.task,
        "backend": plan.setting.backend.name,
        "gpus_per_node": place.gpus_per_node,
        "nodes": place.nodes,
        "gpu": {"name": place.gpu.name, "bytes": place.gpu.bytes} if place.gpu else None,
        "verdict": plan.verdict,
        "fits": plan.fits if place.gpu else None,
        "not_counted": plan.not_counted,
        "gpu_bytes": {
            "peak": _range(memory.peak),
            "deciding": memory.deciding,
            "dominant": memory.dominant,
            "moments": {moment: parts(components) for moment, components in memory.moments.items()},
        },
        "host_bytes": parts(plan.host),
        "disk_bytes": parts(plan.disk),
        "work": plan.work
        and {
            "flops_per_token": plan.work.flops_per_token,
            "tokens_per_step": plan.work.tokens_per_step,
            "steps": plan.work.steps,
            "tokens": plan.work.tokens,
            "flops": plan.work.flops,
            "basis": plan.work.basis,
        },
        "hours": plan.hours
        and {
            "hours": plan.hours.hours,
            "gpu_hours": plan.hours.gpu_hours,
            "tokens_per_s": plan.hours.tokens_per_s,
            "basis": plan.hours.basis,
        },
        "changes": [_fitting(change) for change in changes],
        "fit": found and _fitting(found),
    }


def _range(size: Range) -> dict[str, int]:
    return {"low": round(size.low), "expected": round(size.expected), "high": round(size.high)}


def _fitting(fitting: Fitting) -> dict:
    return {
        "overrides": list(fitting.change.overrides),
        "nodes": fitting.change.nodes,
        "what": fitting.change.what,
        "is_other_run": fitting.change.is_other_run,
        "peak": _range(fitting.memory.peak),
        "step_ratio_by_arithmetic": round(fitting.slower, 3),
    }
