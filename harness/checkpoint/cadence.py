"""When a run is saved: every so many steps, every so many minutes, or at the interval that loses the least time.

`auto`: an interruption costs on average half an interval of work, a save costs its time. With a save of d seconds and one interruption
every M seconds the loss is least at an interval of sqrt(2dM) (Young, CACM 17(9), 1974); Daly (FGCS 22(3), 2006) gives the next terms.
"""

import math

from harness.recipe.schema import Checkpoint

FIRST_AFTER_S = 300.0
"""Under `auto` the first save comes early, because it is the one that measures what a save takes."""
SHORTEST_S = 30.0
"""Saves that follow each other more closely than this gain nothing: a restart takes longer."""
JOB_INTERRUPTION_S = 24 * 3600.0
"""Assumed: a job is preempted, requeued or stopped by a person once a day ..."""
RANK_FAILURE_S = 50_000 * 3600.0
"""... and each GPU brings it down once in 50,000 hours (Llama 3, arXiv 2407.21783, 3.3: 419 interruptions in 54 days on 16,384 GPUs)."""


def interruption_interval_s(world_size: int) -> float:
    """Mean time between two interruptions that is assumed for a job of so many ranks."""
    return 1 / (1 / JOB_INTERRUPTION_S + world_size / RANK_FAILURE_S)


def best_interval_s(save_s: float, interruption_s: float) -> float:
    """Seconds of work between two saves (Daly's higher-order estimate); as long as the interruptions are apart when a save takes longer."""
    if save_s >= 2 * interruption_s:
        return interruption_s
    ratio = save_s / (2 * interruption_s)
    return math.sqrt(2 * save_s * interruption_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


class Cadence:
    """Asked after each step on rank 0; told of each save. `now` is a monotonic clock in seconds."""

    def __init__(self, section: Checkpoint, world_size: int, now: float):
        self._section, self._world_size = section, world_size
        self._last, self._save_s = now, None

    @property
    def is_on(self) -> bool:
        return bool(self._section.every_steps or self._section.every_minutes or self._section.auto is not False)

    @property
    def interval_s(self) -> float | None:
        """None when steps are counted, or nothing is saved."""
        if self._section.every_steps or not self.is_on:
            return None
        if self._section.every_minutes:
            return 60 * self._section.every_minutes
        if self._save_s is None:
            return FIRST_AFTER_S
        return max(SHORTEST_S, best_interval_s(self._save_s, interruption_interval_s(self._world_size)))

    def is_due(self, step: int, now: float) -> bool:
        if self._section.every_steps:
            return step % self._section.every_steps == 0
        return self.interval_s is not None and now - self._last >= self.interval_s

    def failed(self, now: float) -> None:
        """A save has failed, which measures nothing; the next is tried after the next interval."""
        self._last = now

    def saved(self, save_s: float, now: float) -> bool:
        """A save has been made. True when `auto` has measured its first and now has an interval."""
        first = self._save_s is None and self.is_on and not (self._section.every_steps or self._section.every_minutes)
        self._last, self._save_s = now, save_s
        return first

    def describe(self) -> str:
        """What it does from here on, for the line that is printed at the start and whenever `auto` has measured a save."""
        if self._section.every_steps:
            return f"a checkpoint every {self._section.every_steps} steps"
        if not self.is_on:
            return "no checkpoints, but when it is told to stop"
        if self._section.every_minutes:
            return f"a checkpoint every {self._section.every_minutes:g} minutes"
        if self._save_s is None:
            return f"the first checkpoint after {FIRST_AFTER_S / 60:g} minutes, then as often as its time suggests"
        hours = interruption_interval_s(self._world_size) / 3600
        return (
            f"a checkpoint every {self.interval_s / 60:.1f} minutes: a save takes {self._save_s:.2f} s, "
            f"and one interruption in {hours:.0f} h is assumed (Young and Daly)"
        )
