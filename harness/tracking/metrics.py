"""metrics.jsonl (format: see the package) and the names of metrics: `area/name`, units in the name."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import HarnessError

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
# Keys that begin with one of these are ours already. TRL's own `rewards/chosen` is not, and becomes train/rewards/chosen.
AREAS = ("train", "eval", "distill", "run", "speed", "memory", "tools")


def metric_key(key: str) -> str:
    """The `area/name` of a key of transformers or TRL: loss -> train/loss, eval_loss -> eval/loss, train_runtime -> run/runtime_s."""
    if key.partition("/")[0] in AREAS and "/" in key:
        return key
    if key.startswith("eval_"):
        area, name = "eval", key.removeprefix("eval_")
    elif key == "train_loss":  # the mean over the run, in the trainer's last line; not the loss of a step
        area, name = "run", "mean_train_loss"
    elif key.startswith("train_") or key == "total_flos":
        area, name = "run", key.removeprefix("train_")
    else:
        area, name = "train", key
    if name == "runtime":
        name = "runtime_s"
    return f"{area}/{name.removesuffix('_per_second') + '_per_s' if name.endswith('_per_second') else name}"


def metric_values(logs: dict[str, Any]) -> dict[str, Any]:
    """The trainer's logs under our names, as plain Python values (a 0-d tensor or a NumPy scalar becomes its number)."""
    return {metric_key(key): _plain(value) for key, value in logs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # tensors and NumPy, of any shape
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def name_non_finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` and, if any of them is not finite, the key that says which and how."""
    found = [f"{key}={value}" for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**values, "non_finite": " ".join(found)} if found else values


def finite(value: Any) -> Any:
    """`value` as it stands in the file: JSON has no NaN, so what is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


class MetricsFile:
    """Appends lines to a run folder's metrics.jsonl, each one flushed.

    `rows` counts the lines of all lives, torn ones too; `earlier` are the whole lines that stood there when it was opened.
    """

    def __init__(self, run_folder: Path, now: Callable[[], float] = time.time):
        self._now = now
        path = Path(run_folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _read(path) if path.exists() else ""
        self.earlier = list(_parse(before, path).values())
        self.rows = len(before.splitlines())
        self._file = path.open("ab", buffering=0)  # every line reaches the system when it is written
        # A life that was killed in mid-line must not spoil the next one's first line.
        self._waiting = b"\n" if before and not before.endswith("\n") else b""

    def append(self, step: int, values: dict[str, Any], repeated: Sequence[str] = ()) -> None:
        """One line. `repeated`: the keys that an earlier life has logged at this step already."""
        line = {"step": step, "time": round(self._now(), 3), **finite(values), **({"replays": list(repeated)} if repeated else {})}
        self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        self.rows += 1
        self._write()

    def _write(self) -> None:
        """What a full disk does not take is kept, and written with the next line: a training does not end for it."""
        start, data = os.fstat(self._file.fileno()).st_size, self._waiting
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), start)
            logger.warning("%s: cannot be written (%s); kept until it can", self._file.name, error.strerror)
            return
        self._waiting = b""

    def close(self) -> None:
        self._file.close()


def read_metrics(run_folder: Path | str) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl, in the order in which they were written.

    A torn line (a life of the run was killed while it wrote) is left out, and a warning in the log says so.
    Raises HarnessError where there is no metrics.jsonl.
    """
    return list(read_rows(run_folder).values())


def read_rows(run_folder: Path | str) -> dict[int, dict[str, Any]]:
    """`read_metrics`, each line under its number in the file, from 0, which is W&B's counter."""
    path = Path(run_folder) / FILE_NAME
    if not path.is_file():
        raise HarnessError(f"{path}: not there; expected the folder of a run that has logged at least once")
    return _parse(_read(path), path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str, path: Path) -> dict[int, dict[str, Any]]:
    rows = {}
    for row, written in enumerate(text.splitlines()):
        try:
            line = json.loads(written)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict):
            rows[row] = line
        elif written.strip():
            logger.warning("%s:%d: torn line, left out (the run was stopped while it wrote): %.60s", path, row + 1, written)
    return rows


def loss_curve(lines: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, by rising step. A step that was trained again after a resume counts as it went the last time."""
    latest = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    return sorted(latest), [latest[step] for step in sorted(latest)]


def smooth(values: Sequence[float], places: Iterable[int] | None = None) -> list[float]:
    """Mean over a window around each point, a twentieth of the curve wide (a running average lags, and draws a falling loss too high).
    places: of these points alone."""
    reach = len(values) // 40
    smoothed = []
    for index in range(len(values)) if places is None else places:
        near = min(reach, index, len(values) - 1 - index)  # as far to the left as to the right, also at the ends
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def plot_losses(run_folders: Path | str | Iterable[Path | str], path: Path | str) -> Path:
    """Draw train and eval loss over steps, one colour per run, into a PNG at `path`; returns the path. Works without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    folders = [run_folders] if isinstance(run_folders, str | Path) else list(run_folders)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no window
    axes = figure.add_subplot()
    for index, folder in enumerate(folders):
        lines, colour = read_metrics(folder), f"C{index}"
        prefix = f"{Path(folder).resolve().name}: " if len(folders) > 1 else ""
        steps, losses = loss_curve(lines, "train/loss")
        if len(steps) > 60:
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=f"{prefix}train (smoothed)")
        else:
            axes.plot(steps, losses, color=colour, linewidth=1.8, label=f"{prefix}train")
        steps, losses = loss_curve(lines, "eval/loss")
        if steps:
            eval_colour = colour if len(folders) > 1 else "C1"
            axes.plot(steps, losses, color=eval_colour, linestyle="--", marker="o", markersize=4, linewidth=1.2, label=f"{prefix}held out")
    drawn = [value for line in axes.get_lines() for value in line.get_ydata() if value > 0]
    if drawn and max(drawn) > 100 * min(drawn):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=Path(folders[0]).resolve().name if len(folders) == 1 else "loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
