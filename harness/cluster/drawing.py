"""How a pipeline stands, for people: a line for each stage."""

from collections import Counter
from pathlib import Path

from harness.cluster.pipeline import PIPELINE, Pipeline, Stage, load_pipeline
from harness.cluster.status import RunStatus, read_statuses
from harness.run import RunDir
from harness.share import units_of


def draw_pipeline(folder: Path) -> str:
    """The stages in the order in which they can begin, a line for each: state, step, jobs, what it needs, and why it is so. An array's runs
    are counted by their states."""
    pipeline = load_pipeline(folder / PIPELINE)
    runs = {name: _runs_of(pipeline, name) for name in pipeline.order}
    statuses = {status.run: status for status in read_statuses(run for of_stage in runs.values() for run in of_stage)}
    lines = [_line(name, pipeline.stages[name], [statuses[run.path] for run in of_stage]) for name, of_stage in runs.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([str(pipeline.folder), *(f"  {line}" for line in drawn)])


def _runs_of(pipeline: Pipeline, name: str) -> list[RunDir]:
    folder, stage = pipeline.folder / name, pipeline.stages[name]
    return [RunDir(folder / element) for element in stage.elements] or [RunDir(folder)]


def _line(name: str, stage: Stage, statuses: list[RunStatus]) -> tuple[str, ...]:
    counts = Counter(status.state for status in statuses)
    state = ", ".join(f"{count} {state}" for state, count in counts.items()) if stage.elements else statuses[0].state
    one = statuses[0] if not stage.elements else None
    step = f"step {one.step}" + (f"/{one.steps}" if one.steps else "") if one and one.step is not None else ""
    if stage.shares:
        units = next(filter(None, (units_of(RunDir(status.run)) for status in statuses)), None)
        step = f"units {units.there}/{units.count}" if units else ""
        if units and units.are_all_there and "done" in counts:
            # The others may have failed, or never have begun.
            state, statuses = "done", [status for status in statuses if status.state == "done"]
    jobs = dict.fromkeys(status.job.partition("_")[0] for status in statuses if status.job)
    needs = f"<- {', '.join(stage.all_needs)}" if stage.all_needs else ""
    why = next((status.reason or status.phase for status in statuses if status.state != "done" and (status.reason or status.phase)), "")
    return name, state, step, f"job {', '.join(jobs)}" if jobs else "", needs, why
