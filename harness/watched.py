"""What a process that does units of work (harness.share) owes to whoever watches over its life; nothing where nobody does.

    logs/attempt-K/rank-R.log          its log; rank 0 also speaks to the terminal
    logs/attempt-K/alive/rank-R.json   its heart; its step is how many units it has done in this life
    logs/attempt-K/errors/rank-R.json  its error, when it fails
    logs/attempt-K/outcome.json        `done`, by the first that finds all units there; `stopped`, by the first that was told to leave
    STOP                               heeded between two units, and put into the life's folder; the others heed it there too

A person's `harness capture` has no such folder: it hears signals, and that is all.
"""

import contextlib
import os
import time
from pathlib import Path

from harness import distributed
from harness.checkpoint.door import Signals
from harness.errors import Stopped
from harness.logs import open_log
from harness.recipe import Recipe
from harness.run import ATTEMPT_VARIABLE, RankReport, RunDir, StopRequest, write_outcome
from harness.watchdog import register_stack_dump

BEAT_EVERY_S = 1.0


class Watched:
    """A context around all that the process does, from its first second on."""

    def __init__(self, recipe: Recipe):
        folder = os.environ.get(ATTEMPT_VARIABLE)
        self.attempt = Path(folder) if folder else None
        self._recipe, self._run = recipe, RunDir.of(recipe)
        # Before it is told that it is on its own: beside others it is known by its number.
        self._report = RankReport(distributed.rank(), self.attempt)
        self._signals, self._units, self._beaten = Signals(), 0, float("-inf")

    def __enter__(self) -> "Watched":
        self._signals.install()
        if self.attempt:
            open_log(self._report.log, to_terminal=self._report.rank == 0)
            register_stack_dump(self._report.log)
        return self

    def enter(self, phase: str) -> None:
        self._report.enter(phase)

    def begun(self, folder: Path, units: int) -> None:
        """So many units are to lie in that folder. Said by all that are on their own: any of them may be killed before the others."""
        if self.attempt and distributed.is_main():
            self._run.write_manifest(self._recipe, units={"folder": str(folder.resolve()), "count": units})

    def beat(self, done: int = 0) -> None:
        """It comes on; `done` units are there that were not."""
        self._units += done
        if done or time.monotonic() - self._beaten > BEAT_EVERY_S:
            self._beaten = time.monotonic()
            self._report.beat(self._units)

    def stop(self) -> str | None:
        """Why it is to leave after the unit that it does; None when it is not."""
        if self._signals.got:
            return self._signals.got.name
        # There, when another process has heeded it already.
        files = (self._run.stop, self.attempt / "STOP") if self.attempt else ()
        requests = filter(None, map(StopRequest.read, files))
        return next((request.reason for request in requests), None)

    def __exit__(self, kind, error, trace) -> None:
        if self.attempt is None:
            return
        if isinstance(error, Stopped):
            self._leave(str(error))
        elif error is not None:
            self._report.failed(error)
        else:
            # Of those that share a teacher the first one has the last word.
            if distributed.is_main():
                write_outcome(self.attempt, "done", step=None, checkpoint=None, reason="")
            self._report.enter("finished")

    def _leave(self, said: str) -> None:
        # Of those that share a teacher some may leave for a signal that another one has heard.
        if reason := self.stop():
            write_outcome(self.attempt, "stopped", step=None, checkpoint=None, reason=reason)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._run.stop, self.attempt / "STOP")
        self._report.stopped(said)
