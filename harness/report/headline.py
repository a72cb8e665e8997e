"""The sentence that a report begins with, and the one line that the command prints."""

from __future__ import annotations

from harness.report.story import Story
from harness.report.words import counted, duration, interruptions, number, percent

BEGINS = {
    "done": "Finished",
    "running": "Running",
    "ending": "Being ended by Slurm",
    "pending": "Waits for Slurm",
    "requeued": "Waits to go on",
    "held": "Held in the queue",
    "stopped": "Stopped, and can go on",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "lost": "Ended, and nobody could say how",
    "new": "Not begun",
    "unknown": "State unknown",
}


def headline(story: Story) -> str:
    """`Finished after 4 lives (2 preemptions and 1 death): eval loss 0.7298 → 0.0421 in 320 steps; goodput 61 % of 9 min 5 s; …`"""
    parts = [part for part in (_measured(story), _goodput(story), _peak(story)) if part]
    return f"{_state(story)}: {'; '.join(parts)}." if parts else f"{_state(story)}."


def _state(story: Story) -> str:
    status, lives = story.status, len(story.lives)
    said = BEGINS.get(status.state, status.state)
    between = interruptions(story.lives)
    if status.state == "done":
        said += f" after {counted(lives, 'life', 'lives')}" if lives > 1 else " in one life" if lives else ""
    elif lives > 1:
        said += f", in life {lives}" if status.state == "running" else f" after {counted(lives, 'life', 'lives')}"
    if between:
        said += f" ({between})"
    if status.counted == "units":
        return said + (f", {status.step:,} of {status.steps:,} units" if status.step is not None and status.steps else "")
    if status.state != "done":
        reached = f"{story.last_step:,}" + (f" of {status.steps:,}" if status.steps else "")
        said += f", step {reached}" if story.last_step else ", no step yet" if lives else ""
        if status.left_s is not None and story.last_step:
            said += f", about {duration(status.left_s)} left"
    return said


def _measured(story: Story) -> str:
    curve = story.measure
    if curve is None:
        return ""
    name = curve.key.replace("/", " ").replace("_", " ")
    steps = f" in {counted(story.last_step, 'step')}" if story.status.state == "done" else ""
    if curve.count == 1:
        return f"{name} {number(curve.last)}{steps}"
    asked = story.setting("train.greater_is_better") if curve.key == story.setting("train.metric_for_best_model") else None
    falls = curve.key.endswith(("loss", "kl")) if asked is None else not asked
    step, best = curve.low if falls else curve.high
    better = f" (best {number(best)} at step {step:,})" if number(best) != number(curve.last) and step != story.last_step else ""
    return f"{name} {number(curve.first)} → {number(curve.last)}{better}{steps}"


def _goodput(story: Story) -> str:
    spent = story.account
    if spent is None or spent.goodput is None or not spent.wall_s or not any(life.trains for life in story.lives):
        return ""
    lost = f", {counted(story.lost_steps, 'step')} made again or lost" if story.lost_steps else ""
    return f"goodput {percent(spent.goodput)} of {duration(spent.wall_s)}{lost}"


def _peak(story: Story) -> str:
    memory = story.memory
    if memory.measured is None:
        return ""
    if memory.is_compared:
        return f"peak {number(memory.reserved, 3)} of {number(memory.with_slack[1], 3)} GiB forecast"
    return f"peak {number(memory.measured, 3)} GiB" + ("" if memory.reserved is not None else " resident")
