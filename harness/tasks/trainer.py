"""What our trainers do beyond TRL's: a mixin over transformers.Trainer, one method per seam.

get_batch_samples    measures the wait for data
training_step        counts tokens; checks isolation before the first step, and gradients before the optimiser first uses them
evaluation_loop      a held-out loss that is the mean over tokens (or whatever items_of counts), whatever the batches and ranks; and
                     the rates of tool calls
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness import distributed
from harness.attention import check_isolation
from harness.model import check_gradients

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from harness.tasks.calls import HeldOutCalls


class HarnessTrainer:
    """Mixed in before a trainer of TRL. `configure` must follow construction."""

    keeps_means_of_batches = True
    """As TRL's trainers do with what they log."""
    calls: "HeldOutCalls | None" = None
    """Questions that are answered at each evaluation."""

    def configure(self, *, throughput, isolates: bool = False) -> None:
        """throughput: counts tokens and waits (harness.tracking). isolates: batches are flattened, so samples must not see each other."""
        self._throughput = throughput
        self._checks_isolation = isolates
        self._first_step = self._gradients_unchecked = True
        self._eval_sums: list[torch.Tensor] = []
        self._eval_items: list[torch.Tensor] = []

    # ---- training

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        return super().get_batch_samples(self._throughput.watch(epoch_iterator), *args, **kwargs)

    def _count_micro_batch(self, inputs) -> None:
        self._throughput.count(inputs)

    def training_step(self, model, inputs, *args, **kwargs):
        self._count_micro_batch(inputs)
        if self._first_step:
            self._first_step = False
            if self._checks_isolation:
                check_isolation(model, self.model.config.get_text_config().vocab_size, self.args.device)
            if self.is_deepspeed_enabled:
                self._gradients_unchecked = False
                self._check_gradients_before_engine_step()
        loss = super().training_step(model, inputs, *args, **kwargs)
        # After the first step's last micro-batch: before it FSDP2 keeps what it accumulates where `.grad` does not show it.
        if self._gradients_unchecked and self.accelerator.sync_gradients:
            self._gradients_unchecked = False
            check_gradients(self.model, finite=self._must_be_finite())
        return loss

    def _must_be_finite(self) -> bool:
        """In a run's first step; later ones, and the loss scaler's search under fp16, are the guard's."""
        return not self.args.fp16 and self.state.global_step == 0

    def _check_gradients_before_engine_step(self) -> None:
        """DeepSpeed steps inside `backward` and leaves `.grad` empty: look between the two, once."""
        from deepspeed.utils import safe_get_full_grad

        engine = self.accelerator.deepspeed_engine_wrapped.engine
        step = engine.step
        # ZeRO-1 and 2 hold zeros for a tensor without a gradient, and a LoRA's A rightly has zeros in the first step: so note who gets one.
        reached: set[str] = set()
        trainable = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        notes = [parameter.register_hook(lambda _, name=name: reached.add(name)) for name, parameter in trainable]

        def checked_step(*args, **kwargs):
            engine.step = step
            # A collective under ZeRO-3, called on every rank for every trainable tensor in the same order.
            check_gradients(self.model, gradient_of=safe_get_full_grad, reached=reached, finite=self._must_be_finite())
            for note in notes:
                note.remove()
            return step(*args, **kwargs)

        engine.step = checked_step

    # ---- evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        import torch

        items = self.items_of(inputs)
        # Loss only, whatever was asked: logits are never kept.
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        # Rows that only fill a batch have none, and their mean loss is 0 / 0.
        items = items.to(loss.device)
        self._eval_sums.append(torch.where(items > 0, loss.detach().float() * items, 0.0))
        self._eval_items.append(items)
        return loss, None, None

    def items_of(self, inputs: dict) -> "torch.Tensor":
        """How many a micro-batch's loss is the mean of: its trained tokens."""
        return (inputs["labels"][:, 1:] != -100).sum()

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        self._eval_sums.clear()
        self._eval_items.clear()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        batches = len(self._eval_items)
        sums = distributed.all_reduce_sum([float(value) for value in (*self._eval_sums, *self._eval_items)])
        losses, items = sums[:batches], sums[batches:]
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / max(sum(items), 1)
        # TRL keeps one value per batch, already over all ranks; their plain mean would weigh a short last batch like a full one.
        for values in self._metrics["eval"].values() if self.keeps_means_of_batches else ():
            if len(values) == batches:
                values[:] = [sum(value * count for value, count in zip(values, items, strict=True)) / max(sum(items), 1)]
        if self.calls is not None:
            output.metrics.update({f"{metric_key_prefix}_{key}": rate for key, rate in self.calls.measure_in_training(self).items()})
        return output

    def after_evaluation_batch(self) -> None:
        """Called on every rank, as often on each, while an evaluation goes on."""


@contextlib.contextmanager
def without_checkpointing(model: "torch.nn.Module") -> Iterator[None]:
    """Inside, layers keep nothing to recompute. By their flags: transformers' own switch adds a hook to the embedding whenever it is put
    on again, and TRL's around it as well; in every micro-batch that is a run that grows slower."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


def row_lengths(rows: "Dataset") -> list[int]:
    """Tokens of each row; a pack has as many as its samples together."""
    return list(rows["length"]) if "length" in rows.column_names else [sum(lengths) for lengths in rows["seq_lengths"]]


def padding_share(lengths: list[int], batch_size: int, seed: int = 0) -> float:
    """Share of tokens that would be padding in random batches of `batch_size` rows, padded to the longest of each."""
    import random

    order = random.Random(seed).sample(lengths, len(lengths))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def pad_for_ranks(dataset: "Dataset", multiple: int) -> "Dataset":
    """Held-out rows made up to a multiple: Accelerate fills the last batch with rows from the front, which would count twice."""
    return with_filler(dataset, -len(dataset) % multiple)


def with_filler(dataset: "Dataset", count: int) -> "Dataset":
    """The rows and, at their end, so many that count nothing: every label is -100, and no reference says anything of them."""
    from datasets import concatenate_datasets

    if not count:
        return dataset
    labels, of_reference = ([name for name in dataset.column_names if name.endswith(end)] for end in ("labels", "reference"))
    shortest = min(range(len(dataset)), key=list(dataset["length"]).__getitem__) if "length" in dataset.column_names else 0
    filler = dataset.select([shortest] * count).map(
        lambda row: {name: [-100] * len(row[name]) for name in labels} | {name: [] for name in of_reference},
        features=dataset.features,
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    return concatenate_datasets([dataset, filler])
