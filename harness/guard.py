"""The guard against steps that are not a number, and spikes: what makes a step bad, what is done about it, and how a step is left out.

    observe         every micro-batch: adds its loss up, on the device
    local_verdict   once per optimiser step, when the gradients are whole and the optimiser has not seen them: one copy to the host
    (all ranks vote: harness.distributed.vote)
    decide          from the votes alone, so the same on every rank: step, skip, roll_back or stop
    skip_update, skip_engine_step   leave the update out

A step that is left out changes no weight, no moment, no count of the optimiser's own and no loss scale. It still counts as a step, its data
is consumed, and the learning-rate schedule goes on: a step and its place in the data stay one to one.

Steps are named by the number that they have once they are done: step 1 is the first, and checkpoint-N holds step N.

Under fp16 a gradient that is infinite or not a number is the loss scaler's ordinary business (torch's GradScaler, DeepSpeed's
DynamicLossScaler): it leaves the step out and shrinks the scale, every few hundred steps. There only the loss counts.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from harness.recipe.schema import Guard as Settings

if TYPE_CHECKING:
    import torch

WINDOW, ENOUGH = 64, 16
"""A spike is judged by the last so many good losses, once there are enough of them."""

Window = tuple[int, int]
"""The first and the last step that a run passes over: both without forward, backward and update."""


class Guard:
    def __init__(self, settings: Settings, *, fp16: bool, rolled_back: Sequence[Window] = ()):
        """rolled_back: what each rollback of this run so far passes over (`windows_of` its ledger)."""
        self._settings = settings
        self._fp16 = fp16
        self._rolled_back = list(rolled_back)
        self._good_losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_in_a_row, self._last_bad_step = 0, 0
        self._loss: torch.Tensor | None = None
        self.why = ""
        """What was wrong with the step that was decided last; empty when nothing was."""

    def passes_over(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self._rolled_back)

    # ---- on one rank

    def observe(self, loss: "torch.Tensor") -> None:
        """Add a micro-batch's loss to its step's, without waiting for the device."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def local_verdict(self, gradient_norm: "torch.Tensor | float") -> tuple[bool, float]:
        """(this rank finds the step bad, the sum of its losses), after the step's last micro-batch.

        gradient_norm: of the gradients of all ranks, or of this rank's part of them: the vote joins the parts.

        The mean of the sums over all ranks is the loss of the step. Each micro-batch's loss comes divided by what the whole step divides by
        (transformers 5.23, Trainer.compute_loss and training_step): by the tokens of all ranks and micro-batches, times the number of ranks
        (average_tokens_across_devices), or, for a loss that is a mean over its own batch, by the number of micro-batches.
        """
        import torch

        values, self._loss = [self._loss], None
        if not self._fp16:
            if hasattr(gradient_norm, "to_local"):
                # FSDP2's, which mixes with no plain tensor.
                gradient_norm = gradient_norm.to_local()
            values.append(torch.as_tensor(gradient_norm, dtype=torch.float32, device=values[0].device))
        values = torch.stack(values).tolist()
        return not all(map(math.isfinite, values)), values[0]

    # ---- on all ranks alike

    def decide(self, bad_votes: float, mean_loss: float, step: int) -> Literal["step", "skip", "roll_back", "stop"]:
        """What happens to a step, from what all ranks agree on: how many found it bad, and its loss."""
        self.why = self._what_is_wrong(bad_votes, mean_loss)
        if not self.why:
            self._good_losses.append(mean_loss)
            return "step"
        self.bad_in_a_row = self.bad_in_a_row + 1 if step == self._last_bad_step + 1 else 1
        self._last_bad_step = step
        if self.bad_in_a_row <= self._settings.max_skips:
            return "skip"
        return "roll_back" if len(self._rolled_back) < self._settings.max_rollbacks else "stop"

    def _what_is_wrong(self, bad_votes: float, mean_loss: float) -> str:
        if not math.isfinite(mean_loss):
            return f"its loss is {mean_loss}"
        if bad_votes:
            return f"a gradient is not finite on {bad_votes:.0f} rank{'s' if bad_votes > 1 else ''}"
        factor = self._settings.spike_factor
        if factor is None or len(self._good_losses) < ENOUGH:
            return ""
        usual = statistics.median(self._good_losses)
        # A loss about zero or below it, as preference and policy losses are, has no multiple that would be far away.
        if usual <= 0 or mean_loss <= factor * usual:
            return ""
        return f"its loss is {mean_loss:.4g}, more than {factor:g} times {usual:.4g}, the median of the last {len(self._good_losses)}"

    def state(self) -> dict:
        """What a resumed run needs to decide as the uninterrupted one would; JSON keeps it whole."""
        return {"good_losses": list(self._good_losses), "bad_in_a_row": self.bad_in_a_row, "last_bad_step": self._last_bad_step}

    def load_state(self, state: dict) -> None:
        self._good_losses = deque(state["good_losses"], maxlen=WINDOW)
        self.bad_in_a_row, self._last_bad_step = state["bad_in_a_row"], state["last_bad_step"]


def windows_of(events: Iterable[dict]) -> list[Window]:
    """What each rollback in a ledger passes over, the oldest first. All of them count: a later life must not meet an earlier one's data."""
    return [tuple(event["passes_over"]) for event in events if event["event"] == "rolled_back"]


# ---- leaving an update out, without DeepSpeed


def skip_update(optimizer) -> None:
    """Make the next `step()` of Accelerate's optimizer (Trainer.optimizer) do nothing; the one after it is as ever.

    The gradients stay: the Trainer clears them after every step. They are not taken away here instead, because a GradScaler that finds
    none fails, and one that finds some counts the step.
    """
    step = optimizer.step

    def leave_out(closure=None):
        optimizer.step = step

    optimizer.step = leave_out
    # What Trainer and schedule ask: a step that the scaler skips holds the schedule back, and this one does not.
    optimizer._is_overflow = False
    if optimizer.scaler is not None:
        # Clipping has unscaled the gradients; forget that, and leave scale and growth as they are.
        optimizer.scaler.update(optimizer.scaler.get_scale())


# ---- DeepSpeed, whose engine updates the weights inside `backward`


def local_gradient_norm(engine) -> "torch.Tensor":
    """The norm of the gradients in this rank's partition, before clipping. To be asked between the last micro-batch's backward and
    `engine.step`; no copy to the host, no collective."""
    import torch

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    elif optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload:
        # The gradients are on their way to the host; DeepSpeed has taken each one's norm before.
        gradients = list(optimizer.norm_for_param_grads.values())
    else:
        gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    return torch.nn.utils.get_total_norm(gradients)


def skip_engine_step(engine) -> None:
    """`engine.step()` without the update: gradients are cleared and steps counted, as always.

    `overflow` stays false, by which Trainer and schedule take the step for one that was made. The norm that the engine reports is infinite,
    or of the step before at stage 0. To be called in place of the engine's own step, also where that has been wrapped.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()

    def overflowed(*args, **kwargs) -> None:
        optimizer.overflow = True

    def discard(*args, **kwargs) -> None:
        # DeepSpeed's own way with gradients that have overflowed (`step` in stage_1_and_2.py and stage3.py); the loss scaler is not told.
        # At stage 0 the engine itself clears the gradients afterwards.
        if stage == 3:
            forced = {"_overflow_check_and_loss_scale_update": overflowed}
        else:
            forced = {"check_grad_overflow": True, "check_overflow": overflowed}
        if stage > 0:
            with replaced(optimizer, _update_scale=lambda overflow: None, **forced):
                type(optimizer).step(optimizer)
        if hasattr(optimizer, "overflow"):
            optimizer.overflow = False

    with replaced(optimizer, step=discard):
        type(engine).step(engine)


@contextmanager
def replaced(target, **attributes) -> Iterator[None]:
    """Attributes of this object alone, for as long as the context lasts; harness.checkpoint.zero does the same to an engine."""
    own = {name: vars(target)[name] for name in attributes if name in vars(target)}
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(target)[name]
        vars(target).update(own)
