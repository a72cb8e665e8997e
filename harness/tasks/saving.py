"""How a trainer of transformers is saved: the commit (harness.checkpoint.commit) around its own `_save_checkpoint`, whose parts remember
their errors for the vote. A mixin, with a method per seam of transformers.Trainer 5.23."""

import contextlib
import time
from functools import partial
from pathlib import Path

from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from transformers.trainer import TRAINER_STATE_NAME, get_fsdp_ckpt_kwargs
from transformers.trainer_callback import ExportableState

from harness import distributed
from harness.checkpoint import state as carried
from harness.checkpoint import zero
from harness.tasks.lineage import lineage_at

REASONS = ("stop", "end", "asked", "best", "interval")
"""Why a checkpoint is made; of several the first is the one that its manifest tells."""


class SavingTrainer:
    """The half of CheckpointedTrainer that writes."""

    _staging: Path | None = None
    """Where the commit that is under way writes; None when none is."""

    def _save_checkpoint(self, model, trial):
        lives, step = self.lives, self.state.global_step
        reason = min(lives.reasons or {"interval"}, key=REASONS.index)
        lives.reasons.clear()
        if lives.committer.last_step == step:
            return
        started = time.monotonic()
        kept = lives.committer.commit(step, reason, partial(self._write, model, trial), self._describe, self.state.best_global_step)
        now = time.monotonic()
        found_interval = lives.cadence.saved(now - started, now) if kept else lives.cadence.failed(now)
        lives.door.saved()
        lives.report.enter("training")
        lives.tracking.log(step, {"run/save_s": round(time.monotonic() - started, 3)} if kept else {"run/save_failed": 1})
        if not kept and self.state.best_global_step == step:
            # What is not saved cannot be exported as the best.
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best_before
        if kept:
            self._say(f"checkpoint-{step} ({reason}) in {time.monotonic() - started:.2f} s")
        if found_interval and reason not in ("end", "stop"):
            self._say(f"from here on {lives.cadence.describe()}")

    def _write(self, model, trial, folder: Path) -> list[Exception]:
        self._staging, self._write_errors = folder, []
        for callback in (*self.callback_handler.callbacks, self.control):
            # transformers fails for a callback that the checkpoint which this life began from did not have.
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        try:
            with self._remembering("saving: trainer state"):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step is not None:
                    self.state.best_model_checkpoint = self._path_of_best()
                if self.args.should_save:
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            with self._remembering("saving: rank state"):
                carried.save_rank_state(folder, self, self.lives.guard.state())
        finally:
            self._staging = None
        return self._write_errors

    @contextlib.contextmanager
    def _remembering(self, phase: str):
        """Inside a commit an error is kept for the vote: a rank that left here would leave the others waiting for it in a collective."""
        if self._staging is None:
            yield
            return
        self.lives.report.enter(phase)
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch.distributed.checkpoint's CheckpointException is no Exception
            self._write_errors.append(error)

    def _get_output_dir(self, trial):
        return str(self._staging.parent) if self._staging else super()._get_output_dir(trial)

    def _save(self, output_dir=None, state_dict=None):
        with self._remembering("saving: weights"):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                # A pickle of our own settings, which the recipe already holds as text; an empty form by PEFT.
                for name in ("training_args.bin", "README.md"):
                    (Path(output_dir or self.args.output_dir) / name).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir):
        import torch

        with self._remembering("saving: optimiser"):
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                super()._save_optimizer_and_scheduler(output_dir)
                return
            if self.is_deepspeed_enabled:
                adapter_only = hasattr(self.model, "peft_config")
                self._write_errors += zero.save_engine(self.model_wrapped, Path(output_dir), adapter_only=adapter_only)
            else:
                plugin, options = self.accelerator.state.fsdp_plugin, get_fsdp_ckpt_kwargs()
                # Each gathers from all ranks before rank 0 writes: one that fails to write must still come to the other.
                with self._remembering("saving: FSDP's model"):
                    save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **options)
                with self._remembering("saving: FSDP's optimiser"):
                    save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_scaler(self, output_dir):
        with self._remembering("saving: loss scale"):
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir):
        with self._remembering("saving: random numbers"):
            super()._save_rng_state(output_dir)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL writes one into every checkpoint; an export has its manifest instead."""

    def _describe(self) -> dict:
        lives, order = self.lives, self.lives.order
        cursor = min(self._steps_in_epoch * order.global_batch, order.rows)
        data = {"rows": order.rows, "order": order.name, "seed": order.seed, "epoch": self._epoch, "cursor": cursor}
        return {
            **lives.facts,
            "epoch": self.state.epoch,
            "max_steps": self.state.max_steps,
            "lineage": lineage_at(lives.facts["lineage"], self.state.global_step),
            "samples": self._epoch * order.rows + cursor,
            "tokens": self._total_train_tokens,
            "data": lives.facts["data"] | data,
            "scheduler_step": self.lr_scheduler.last_epoch,
            "has_moments": bool(carried.optimizer_state(self)),
            "evaluation_owed": self._evaluation_owed,
            "wandb": {"id": lives.tracking.wandb_id, "last_step": self._globalstep_last_logged},
        }

    def _path_of_best(self) -> str | None:
        """transformers looks for it beside the checkpoint that is being written, which is not there."""
        best = self.state.best_global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{best}"
        return str(folder) if best == self.state.global_step or folder.is_dir() else None

    def _record(self, event: str, step: int, **facts) -> None:
        if distributed.is_main():
            self.lives.committer.ledger.append(event, step=step, **facts)
            self.lives.tracking.log(step, {f"run/{event}": 1})

    def _say(self, text: str) -> None:
        if distributed.is_main():
            print(text, flush=True)
