"""Throughput: speed, utilisation, memory and data wait on every line that the trainer logs while it trains.

    speed/tokens_per_s           tokens of all ranks, padding excluded
    speed/trained_tokens_per_s   those of them that have a label
    speed/samples_per_s          sequences of all ranks; packed ones count one by one
    speed/step_s                 wall-clock seconds per optimizer step, evaluation and saving excluded
    speed/data_wait_s            of these, seconds in which the slowest rank's loader kept it waiting
    speed/data_wait_fraction     the same as a share of the step
    speed/mfu                    model FLOP utilisation of all cards together, 0 to 1; only on cards in flops.PEAK_FLOPS
    memory/peak_gib              of the fullest rank, since the start: CUDA memory in tensors, or on a CPU resident memory of the process
    memory/peak_reserved_gib     CUDA only: with what torch's allocator holds besides, which is what runs out

What it costs: a few sums over [B, T] integers per micro-batch, left on the device, and per *log* one copy to the host and one all-reduce.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, TrainerCallback

from harness.planner.flops import FlopCount, peak_flops
from harness.tracking.flops import count_model_flops

GIB = 2**30


class Throughput(TrainerCallback):
    """Add it on every rank, before every callback that reads the logs. The trainer has to call two things:

        def get_batch_samples(self, epoch_iterator, *args): return super().get_batch_samples(throughput.watch(epoch_iterator), *args)
        def training_step(self, model, inputs, *args): throughput.count(inputs); return super().training_step(model, inputs, *args)

    `flops` None: no utilisation. `all_reduce_sum` adds a list of floats over all ranks; by default harness.distributed's.
    """

    def __init__(
        self,
        *,
        world_size: int = 1,
        rank: int = 0,
        flops: FlopCount | None = None,
        peak_flops_per_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        all_reduce_sum: Callable[[list[float]], list[float]] | None = None,
    ):
        self._world_size, self._rank = world_size, rank
        self._flops, self._peak = flops, peak_flops_per_s
        self._clock, self._all_reduce_sum = clock, all_reduce_sum
        self._mark: float | None = None  # when training last did something that is not evaluation or saving
        self._reset()

    @classmethod
    def for_model(cls, model: torch.nn.Module, *, world_size: int = 1, rank: int = 0) -> "Throughput":
        """With utilisation where this machine's card is known and the architecture is one of transformers' own."""
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        countable = peak is not None and type(model.config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING
        return cls(world_size=world_size, rank=rank, flops=count_model_flops(model) if countable else None, peak_flops_per_s=peak)

    def _reset(self) -> None:
        self._counts: torch.Tensor | None = None  # [4] int64 on the batch's device: tokens, trained tokens, samples, attention pairs
        self._start = self._clock()
        self._steps, self._wait_s, self._excluded_s = 0, 0.0, 0.0

    def count(self, inputs: dict[str, Any]) -> None:
        """Add a micro-batch: input_ids and, if there are any, attention_mask, position_ids, labels (or TRL's completion_mask): [B, T].

        Does not wait for the device. With position_ids a sample begins at each 0 (packing); otherwise each row is one.
        """
        ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        real = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
        if positions is None or positions.shape != ids.shape:
            positions = real.long().cumsum(-1) - 1
        if inputs.get("labels") is not None:
            trained = inputs["labels"] != -100
        else:
            trained = inputs.get("completion_mask", real)
        counts = torch.stack([real.sum(), trained.sum(), ((positions == 0) & real).sum(), ((positions + 1) * real).sum()])
        self._counts = counts if self._counts is None else self._counts + counts

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        since = self._clock()
        try:
            yield
        finally:
            self._wait_s += self._clock() - since

    def watch(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """`iterator`, with every `next` of it counted as waiting for data.

        On CUDA let the loader pin memory and accelerate copy with `non_blocking=True`: a blocking copy waits until the card has done
        all that was queued before, and that would count as waiting for data.
        """
        while True:
            with self.waiting():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()
        self._mark = self._start

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
        self._mark = self._clock()

    def on_evaluate(self, args, state, control, **kwargs):
        self._exclude_since_mark()

    def on_save(self, args, state, control, **kwargs):
        self._exclude_since_mark()

    def _exclude_since_mark(self) -> None:
        """The trainer evaluates and saves after a step's end and its log, and before it fetches the next batch."""
        if self._mark is not None:
            now = self._clock()
            self._excluded_s += now - self._mark
            self._mark = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Only lines about training steps. The trainer logs on every rank, with the same keys: all take part in the all-reduce, or none.
        if logs is not None and "loss" in logs and self._steps > 0:
            logs.update(self.measure())

    def measure(self) -> dict[str, float]:
        """The metrics since the last call, summed over ranks; starts the next window. Every rank has to call it."""
        counts = self._counts.tolist() if self._counts is not None else [0, 0, 0, 0]  # waits for the device, so the clock is read after it
        now = self._clock()
        elapsed_s = now - self._start - self._excluded_s
        local = {"speed/data_wait_s": self._wait_s, **peak_memory()}
        counts, slowest = self._over_ranks(counts, local)
        tokens, trained_tokens, samples, pairs = counts
        wait_s, steps = slowest.pop("speed/data_wait_s"), self._steps
        self._reset()
        self._mark = self._start
        if elapsed_s <= 0:  # a clock that did not tick between two logs
            return slowest
        speed = {
            "speed/tokens_per_s": tokens / elapsed_s,
            "speed/trained_tokens_per_s": trained_tokens / elapsed_s,
            "speed/samples_per_s": samples / elapsed_s,
            "speed/step_s": elapsed_s / max(steps, 1),
            "speed/data_wait_s": wait_s / max(steps, 1),
            "speed/data_wait_fraction": min(wait_s / elapsed_s, 1.0),
        }
        if self._flops is not None and self._peak is not None:
            speed["speed/mfu"] = self._flops.total(tokens, trained_tokens, pairs) / (elapsed_s * self._peak * self._world_size)
        return {**speed, **slowest}

    def _over_ranks(self, counts: list[float], local: dict[str, float]) -> tuple[list[float], dict[str, float]]:
        """Sums of `counts`, maxima of `local`, in one all-reduce: where every rank has slots of its own, a sum tells each one's value."""
        if self._world_size == 1:
            return counts, dict(local)
        if self._all_reduce_sum is None:
            from harness.distributed import all_reduce_sum

            self._all_reduce_sum = all_reduce_sum
        slots = [0.0] * (len(local) * self._world_size)
        slots[self._rank * len(local) : (self._rank + 1) * len(local)] = local.values()
        summed = self._all_reduce_sum([*map(float, counts), *slots])
        slots = summed[len(counts) :]
        return summed[: len(counts)], {name: max(slots[index :: len(local)]) for index, name in enumerate(local)}


def peak_memory() -> dict[str, float]:
    """Highest use by this process since it started, in GiB."""
    if torch.cuda.is_available():
        return {
            "memory/peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
