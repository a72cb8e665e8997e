"""The stop door: one way for a person, a signal, a test and a scheduler to have a run saved, and stopped.

A file STOP in the run folder: save and leave. A file SAVE: save and go on. SIGUSR1, SIGUSR2, SIGTERM or Ctrl-C to a rank: as STOP. What is
written in the file is the reason that the ledger and the screen repeat. One rank that sees it is enough: all agree at the next step (the
trainer's vote), save at the same step and leave with 75. Nothing is saved inside a signal handler; a handler only notes the signal.
"""

import os
import signal
import time
from pathlib import Path

from harness.run import RunDir, StopRequest

LOOK_EVERY_S = 0.5
"""Looking for a file on a shared disk can take milliseconds."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Signals:
    """Notes the signals that mean STOP. Install it in the main thread, before anything that takes long."""

    def __init__(self):
        self.got: signal.Signals | None = None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT == self.got:
            # Pressed again by somebody who does not want to wait.
            signal.default_int_handler(number, frame)
        self.got = self.got or signal.Signals(number)


class Door:
    """Looked at by every rank for signals, by rank 0 for files as well (`run` given)."""

    def __init__(self, signals: Signals, run: RunDir | None):
        self._signals, self._run, self._looked = signals, run, -LOOK_EVERY_S
        self._stop: str | None = None
        self._save: str | None = None

    def look(self) -> tuple[bool, bool]:
        """(stop, save) as asked for by now. Cheap enough for every step."""
        if self._signals.got and not self._stop:
            self._stop = self._signals.got.name
        if self._run and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._stop = self._stop or _reason(self._run.stop)
            self._save = self._save or _reason(self._run.save)
        return self._stop is not None, self._save is not None

    @property
    def reason(self) -> str | None:
        """Why to stop; None on a rank that has seen no reason itself."""
        return self._stop

    def saved(self) -> None:
        """SAVE is honoured: take the file away."""
        if self._save and self._run:
            self._run.save.unlink(missing_ok=True)
        self._save = None

    def stopped(self, attempt: Path) -> None:
        """STOP is honoured: put the file into this life's folder, so that the next life is not stopped by it."""
        if self._run and self._run.stop.exists():
            os.replace(self._run.stop, attempt / "STOP")


def _reason(file: Path) -> str | None:
    """What stands in it, its name if nothing does, None if it is not there."""
    request = StopRequest.read(file)
    return request and request.reason
