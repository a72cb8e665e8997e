"""The points that a later life of a run logs a second time: told apart on W&B, and compared with what they were the first time.

A life that was killed, or rolled back, has logged steps after its last commit; the next one trains them again. On W&B the first value
stands under its key and the second under `replay/<key>`, so that no chart has a step twice. Where everything was carried over exactly, the
two are the same number: a difference says that the run did not continue as if it had not been stopped, long before a loss curve would.

Repeated is what a life logs under a key at a step that an earlier life had reached under that key. By key, and not by line: a life that
dies between the training line and the evaluation of one step has logged one of them.
"""

import math
from collections.abc import Iterable
from typing import Any

from harness.tracking.metrics import finite

PREFIX = "replay/"
COMPARED = ("train/loss", "train/grad_norm", "train/learning_rate")
TIMES = ("_s", "_per_s")
TOLERANCE = 1e-3
"""Relative, where ranks or backend differ from the checkpoint's, so that sums are rounded in another order."""


class Replay:
    """What the earlier lives logged (`earlier`, lines of metrics.jsonl), and how a life that begins now compares with it.

    resumed_from: the checkpoint's step, None for a beginning. exact: it was written by as many ranks under the same backend, so that
    repeated values are equal bit for bit. compare_until: the last step that sees the data that it saw before; None: all do.
    """

    def __init__(self, earlier: Iterable[dict], *, resumed_from: int | None, exact: bool, compare_until: int | None):
        self._exact, self._until = exact, math.inf if compare_until is None else compare_until
        self._reached: dict[str, int] = {}
        self._values: dict[tuple[int, str], Any] = {}
        for line in earlier:
            for key, value in line.items():
                if "/" not in key:
                    continue
                self._reached[key] = max(line["step"], self._reached.get(key, 0))
                if _is_compared(key) and line["step"] >= (resumed_from or 0):
                    self._values[line["step"], key] = value

    def repeated(self, step: int, values: dict[str, Any]) -> list[str]:
        return [key for key in values if step <= self._reached.get(key, -1)]

    def differences(self, step: int, values: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """(key, what it was, what it is) of each compared value that is not what it was."""
        if step > self._until:
            return []
        pairs = [(key, self._values[step, key], finite(value)) for key, value in values.items() if (step, key) in self._values]
        return [(key, was, now) for key, was, now in pairs if not self._same(was, now)]

    def _same(self, was: Any, now: Any) -> bool:
        if self._exact or not all(isinstance(value, int | float) for value in (was, now)):
            return was == now
        return math.isclose(was, now, rel_tol=TOLERANCE)


def _is_compared(key: str) -> bool:
    return key in COMPARED or (key.startswith("eval/") and not key.endswith(TIMES))


def wandb_values(values: dict[str, Any], repeated: Iterable[str]) -> dict[str, Any]:
    """A line's values under the keys that W&B has them under."""
    return {PREFIX + key if key in repeated else key: value for key, value in values.items()}
