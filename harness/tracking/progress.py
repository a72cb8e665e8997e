"""ProgressCallback: one line that moves on a terminal, one plain line per log everywhere else.

step 120/2000  loss 1.234  lr 2.0e-4  grad 0.91  18,204 tok/s  eta 0:12:33
step 200/2000  eval loss 1.301  in 4.2 s
"""

import atexit
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from transformers import TrainerCallback
from transformers.trainer_utils import has_length


def format_duration(seconds: float) -> str:
    """12:33 minutes as 0:12:33; days are hours above 24."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_small(value: float) -> str:
    """2.0e-4 where Python has 2.0e-04."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def training_facts(logs: dict[str, Any], eta_s: float | None) -> list[str]:
    facts = [f"loss {logs['loss']:#.4g}"]
    if "learning_rate" in logs:
        facts.append(f"lr {format_small(logs['learning_rate'])}")
    if "grad_norm" in logs:
        facts.append(f"grad {logs['grad_norm']:.2f}")
    if "speed/tokens_per_s" in logs:
        facts.append(f"{logs['speed/tokens_per_s']:,.0f} tok/s")
    if eta_s is not None:
        facts.append(f"eta {format_duration(eta_s)}")
    return facts


def evaluation_facts(logs: dict[str, Any]) -> list[str]:
    facts = [f"eval loss {logs['eval_loss']:#.4g}"]
    if "eval_exact_match" in logs:
        facts.append(f"calls exactly right {logs['eval_exact_match']:.1%}")
    if "eval_runtime" in logs:
        facts.append(f"in {logs['eval_runtime']:.1f} s")
    return facts


class ProgressCallback(TrainerCallback):
    """Add it last, in place of transformers' own (`trainer.remove_callback(PrinterCallback)`); other ranks than the main one say nothing.

    `interactive` None: a bar if `stream` is a terminal.
    """

    def __init__(
        self,
        is_main: bool,
        *,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._is_main = is_main
        self._stream = stream or sys.stdout
        self._interactive = self._stream.isatty() if interactive is None else interactive
        self._clock = clock
        self._progress: Progress | None = None
        self._facts: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = self._first = (self._clock(), state.global_step)
        if self._is_main and self._interactive:
            self._open(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self._first is self._begun:
            # From the end of the first step: it may compile kernels for a minute, which the others will not do again.
            self._first = (self._clock(), state.global_step)
        if self._progress is not None:
            eta = self._eta_s(state)
            note = "  ".join([*self._facts, *([f"eta {format_duration(eta)}"] if eta is not None else [])])
            self._progress.update(self._training, completed=state.global_step, note=note)

    def _eta_s(self, state) -> float | None:
        """Seconds to the end at this life's pace so far, evaluation and saving included."""
        since, step = self._first if state.global_step > self._first[1] else self._begun
        if state.global_step <= step:
            return None
        return (self._clock() - since) / (state.global_step - step) * (state.max_steps - state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._is_main or not logs:
            return
        if "loss" in logs:
            self._facts = training_facts(logs, None)
            if self._progress is None:
                self._say(state, training_facts(logs, self._eta_s(state)))
        elif "eval_loss" in logs:
            self._say(state, evaluation_facts(logs))
        elif "train_runtime" in logs:
            ends = "done" if state.global_step >= state.max_steps else "ended"
            self._say(state, [ends, f"in {format_duration(logs['train_runtime'])}"])

    def _say(self, state, facts: list[str]) -> None:
        line = "  ".join([f"step {state.global_step}/{state.max_steps}", *facts])
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)  # above the bar
        else:
            print(line, file=self._stream, flush=True)

    def _open(self, state) -> None:
        one_line = Column(no_wrap=True, overflow="ellipsis")  # a narrow terminal cuts the note; a second line would make the bar jump
        note = TextColumn("{task.fields[note]}", markup=False, table_column=one_line)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), note
        self._progress = Progress(*columns, console=Console(file=self._stream, force_terminal=True), refresh_per_second=4)
        self._training = self._progress.add_task("train", total=state.max_steps, completed=state.global_step, note="")
        self._evaluation = self._progress.add_task("eval", total=None, visible=False, note="")
        self._progress.start()
        atexit.register(self.close)  # a training that fails must give the terminal its cursor back

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._progress is None:
            return
        if not self._progress.tasks[1].visible:  # the one line shows the evaluation while it lasts
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._progress.reset(self._evaluation, total=total, visible=True)
            self._progress.update(self._training, visible=False)
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._evaluation, visible=False)
            self._progress.update(self._training, visible=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.close)
