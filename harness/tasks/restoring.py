"""How a trainer of transformers is continued: what is read back from a commit, and compared with what it says. A mixin, with a method per
seam of transformers.Trainer 5.23.

_init_training_state   the position in the data, from the manifest
create_scheduler       comes after the engine and before the checkpoint is read: DeepSpeed's shards are to be opened as data
_load_rng_state        each rank's random numbers, or new ones for ranks that did not exist
_load_best_model       the best checkpoint is verified before it is exported
"""

import contextlib
import pickle
from pathlib import Path

from transformers import EarlyStoppingCallback

from harness import distributed
from harness.checkpoint import state as carried
from harness.checkpoint import zero
from harness.checkpoint.selection import check_checkpoint
from harness.errors import CheckpointError
from harness.model.adapters import live_alone


class RestoringTrainer:
    """The half of CheckpointedTrainer that reads."""

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        resumed, order = self.lives.resumed, self.lives.order
        if resumed is None:
            return super()._init_training_state(*args, **kwargs)
        asked = [vars(callback) for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
        super()._init_training_state(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                # transformers makes it anew from the checkpoint. How long it has waited is carried over; how long it may is the recipe's.
                callback.early_stopping_patience = asked[0]["early_stopping_patience"]
                callback.early_stopping_threshold = asked[0]["early_stopping_threshold"]
        # transformers would log and evaluate as often as the checkpoint's run did.
        self.state.compute_steps(self.args, self.state.max_steps)
        self.args.eval_on_start = False
        if {"train.metric_for_best_model", "train.greater_is_better"} & self.lives.changed:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = self._path_of_best()
            if self.state.best_model_checkpoint is None:
                self._say(
                    f"warning: checkpoint-{self.state.best_global_step}, the best so far, is gone; the next evaluation counts as the best"
                )
                self.state.best_metric = self.state.best_global_step = None
        at = resumed.manifest["data"]
        # After the last step the epoch is entered once more, for the evaluation that may be owed.
        if at["cursor"] >= order.rows and resumed.step < self.state.max_steps:
            self._epoch = at["epoch"] + 1
            return self._epoch, 0
        self._epoch, self._steps_in_epoch = at["epoch"], at["cursor"] // order.global_batch
        return self._epoch, self._steps_in_epoch * self.args.gradient_accumulation_steps

    # ---- what is read back

    def create_scheduler(self, *args, **kwargs):
        scheduler = super().create_scheduler(*args, **kwargs)
        # What the recipe asks for, before a checkpoint's own takes its place.
        self._asked_rates = list(scheduler.base_lrs)
        self._asked_groups = [{key: group[key] for key in group if key not in ("params", "lr")} for group in self.optimizer.param_groups]
        if self.is_deepspeed_enabled:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self._vote_before_engine_step(engine)
            if self.lives.resumed:
                self.lives.report.enter("resuming: loading DeepSpeed's shards")
                zero.prepare_loading(engine, self.lives.resumed.path, self.lives.resumed.manifest, distributed.world_size())
        return scheduler

    def _load_from_checkpoint(self, *args, **kwargs):
        self.lives.report.enter("resuming: loading weights")
        with live_alone(self.model):
            return super()._load_from_checkpoint(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result):
        # A tied weight is in the checkpoint under the other name.
        if load_result.unexpected_keys or set(load_result.missing_keys) - set(self.model.all_tied_weights_keys):
            super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self.lives.report.enter("resuming: loading the optimiser")
        with self._naming_what_is_no_data("optimizer.pt", "scheduler.pt"):
            return super()._load_optimizer_and_scheduler(checkpoint)

    @contextlib.contextmanager
    def _naming_what_is_no_data(self, *names):
        """torch's error for a pickle that asks for code does not say in which file it stands."""
        try:
            yield
        except pickle.UnpicklingError:
            for name in names:
                if (self.lives.resumed.path / name).is_file():
                    zero.load_as_data(str(self.lives.resumed.path / name), "cpu")
            raise

    def _load_rng_state(self, checkpoint):
        resumed = self.lives.resumed
        if checkpoint is None or resumed is None:
            return
        if resumed.manifest["world_size"] == distributed.world_size():
            file = Path(checkpoint) / ("rng_state.pth" if distributed.world_size() == 1 else f"rng_state_{distributed.rank()}.pth")
            if not file.is_file():
                raise CheckpointError(f"{file}: is not there, so the random numbers of this rank cannot go on")
            with self._naming_what_is_no_data(file.name):
                super()._load_rng_state(checkpoint)
            carried.restore_cuda_random_numbers(Path(checkpoint))
        else:
            carried.seed_for_other_ranks(self.args.seed, resumed.step)
        self._random_numbers_restored = True

    def _begin(self) -> None:
        """Called when the training loop has set up its counters."""
        resumed = self.lives.resumed
        if resumed is None:
            return
        self.lives.report.enter("resuming: comparing")
        carried.check_loaded(self, resumed.manifest, resumed.path)
        if any(name.startswith("train.") for name in self.lives.changed):
            self._apply_changed_settings()
        state = carried.load_rank_state(resumed.path, resumed.manifest["world_size"])
        carried.restore_rank_state(state, self)
        self.lives.guard.load_state(state["guard"])

    def _apply_changed_settings(self) -> None:
        """Rates, decay and the like lie in the checkpoint too, and would rule there although they were changed with leave."""
        scheduler = self.lr_scheduler
        scheduler.base_lrs = self._asked_rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, asked, rate, factor in zip(self.optimizer.param_groups, self._asked_groups, self._asked_rates, factors, strict=True):
            group.update(asked, lr=rate * factor)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_best_model(self):
        if self.stopped:
            # It exports nothing.
            return
        best = Path(self.state.best_model_checkpoint)

        def verify() -> dict:
            self.lives.report.enter(f"verifying {best.name}")
            try:
                return check_checkpoint(self.state.best_global_step, best, self.lives.committer.section.verify)
            except CheckpointError as error:
                advice = "begin again, or leave metric_for_best_model out"
                raise CheckpointError(f"the best model cannot be exported: {error}; {advice}") from error

        manifest = distributed.on_main(verify)
        if self.is_deepspeed_enabled:
            zero.prepare_loading(self.model_wrapped, best, manifest, distributed.world_size())
        with live_alone(self.model):
            super()._load_best_model()
