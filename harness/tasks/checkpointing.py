"""How a trainer of transformers is saved, stopped and continued: a mixin, with a method per seam of transformers.Trainer 5.23.

_get_train_sampler             the order that no number of ranks changes
_run_epoch                     leaves before the first step when a stop is asked for, or nothing is left to train; an evaluation still owed
training_step                  data that a rollback passes over
_get_grad_norm, engine.step    the vote before the optimiser: is the step sound, is a stop or a save asked for, is a save due
_determine_best_metric         transformers would take back a save that was asked for where the metric has not improved
_evaluate                      an evaluation leaves no trace in the random numbers, and ends early when a stop is asked for

What is written is in harness.tasks.saving, what is read back in harness.tasks.restoring.
"""

import math
import os
import signal
import threading
import time
from functools import partial

from transformers import TrainerCallback

from harness import distributed
from harness.checkpoint.door import SIGNALS
from harness.errors import CheckpointError, ModelError
from harness.guard import local_gradient_norm, skip_engine_step, skip_update
from harness.tasks.lives import Lives, RolledBack
from harness.tasks.restoring import RestoringTrainer
from harness.tasks.saving import SavingTrainer


class _EvaluationStopped(Exception):
    """A stop is asked for in the middle of an evaluation, which the next life makes from its beginning."""


class CheckpointedTrainer(RestoringTrainer, SavingTrainer):
    """Mixed in before a trainer of TRL. `live` must follow construction."""

    def live(self, lives: Lives) -> None:
        self.lives = lives
        self._epoch = self._steps_in_epoch = 0
        self._write_errors: list[Exception] = []
        self._evaluation_owed = bool(lives.resumed and lives.resumed.manifest["evaluation_owed"])
        self._epoch_ends_with_save = self._begun = self._skipped = self._within_step = False
        self._left_out_of_log, self._loss_before_step, self._counts_before_step = 0, 0.0, {}
        self._random_numbers_restored = lives.resumed is None
        self.add_callback(_StepEnd(self))
        backward = self.accelerator.backward

        def observed(loss, **kwargs):
            lives.guard.observe(loss)
            return backward(loss, **kwargs)

        self.accelerator.backward = observed

    @property
    def stopped(self) -> bool:
        """Training ended because a stop was asked for, with steps or an evaluation left to make."""
        return self.lives.stopping and not self._is_complete()

    def _is_complete(self) -> bool:
        if self._evaluation_owed:
            return False
        return self._stopped_early() or self.state.global_step >= self.state.max_steps

    def _stopped_early(self) -> bool:
        """This life begins where early stopping has ended the run, and patience is as it was."""
        resumed = self.lives.resumed
        if resumed is None or resumed.manifest["reason"] != "end" or self.state.global_step != resumed.step:
            return False
        patience = {"train.early_stopping_patience", "train.early_stopping_threshold"}
        return resumed.step < resumed.manifest["max_steps"] and not patience & self.lives.changed

    # ---- data

    def _get_train_sampler(self, train_dataset=None):
        return self.lives.order

    def _get_dataloader(self, *args, **kwargs):
        import torch

        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        # It draws the seed of its workers when it is first gone through: from the model's random numbers, were it not given its own.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        if inner.num_workers:
            inner.worker_init_fn = partial(_shield_worker, inner.worker_init_fn)
        return loader

    # ---- training

    def _run_epoch(self, *args, epoch, trial, ignore_keys_for_eval, **kwargs):
        lives = self.lives
        if epoch != self._epoch:
            self._epoch, self._steps_in_epoch = epoch, 0
        # Accelerate 1.15 hands the epoch to the sampler, but not through its own wrapper of skipped batches.
        lives.order.epoch = epoch
        if not self._begun:
            self._begun = True
            self._stop_if_asked()
            if self._evaluation_owed and not lives.stopping:
                self._make_owed_evaluation(trial, ignore_keys_for_eval)
            if lives.stopping or self._is_complete() or self.control.should_training_stop:
                self.control.should_training_stop = True
                return
        lives.report.enter("training")
        super()._run_epoch(*args, epoch=epoch, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        import torch

        if not self._random_numbers_restored:
            raise CheckpointError(f"{self.lives.resumed.path}: its random numbers were not restored; this transformers has another order")
        if self._is_first_micro_batch():
            if self.state.global_step == self._globalstep_last_logged:
                # transformers takes the sum off itself when it has logged it, and what is not a number stays so.
                self._tr_loss.zero_()
            self._loss_before_step = self._tr_loss.clone()
            self._counts_before_step = {key: len(values) for key, values in self._metrics["train"].items()}
        step = self.state.global_step + 1
        self.lives.report.beat(step)
        if not self.lives.guard.passes_over(step):
            return super().training_step(model, inputs, *args, **kwargs)
        loss = torch.zeros((), device=self.args.device)
        if self.accelerator.scaler is not None:
            # Clipping asks for a scale, which only the first loss of a life makes.
            self.accelerator.scaler.scale(loss)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._may_update()
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            engine.global_steps += 1
            engine.global_samples += engine.train_batch_size()
            if hasattr(engine.optimizer, "overflow"):
                # Left over from the step before, it would hold back the schedule.
                engine.optimizer.overflow = False
        return loss

    def _is_first_micro_batch(self) -> bool:
        first = not self._within_step
        self._within_step = not self.accelerator.sync_gradients
        return first

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed has made its step inside `backward`.
        if not self.is_deepspeed_enabled and not self._may_update(grad_norm):
            skip_update(self.optimizer)
        return grad_norm

    def _vote_before_engine_step(self, engine) -> None:
        step = engine.step

        def voted(*args, **kwargs):
            if self._may_update(local_gradient_norm(engine)):
                return step(*args, **kwargs)
            return skip_engine_step(engine)

        engine.step = voted

    def _may_update(self, gradient=None) -> bool:
        """The one vote of a step: whether all ranks find it sound, and whether one wants the run saved or stopped."""
        lives, step = self.lives, self.state.global_step + 1
        passed = lives.guard.passes_over(step)
        bad, loss = (False, 0.0) if passed else lives.guard.local_verdict(gradient)
        stop, save = lives.door.look()
        due = distributed.is_main() and lives.cadence.is_due(step, time.monotonic())
        bad_votes, losses, stops, saves, dues = distributed.vote([bad, loss, stop, save, due])
        lives.stopping |= stops > 0
        lives.reasons |= {name for name, votes in (("stop", stops), ("asked", saves), ("interval", dues)) if votes}
        verdict = "step" if passed else lives.guard.decide(bad_votes, losses / distributed.world_size(), step)
        self._skipped = passed or verdict != "step"
        if verdict == "skip" and step >= self.state.max_steps and lives.guard.bad_in_a_row > 1:
            # There is no sound step to come that would show the weights to be sound, and they would be exported.
            verdict = "stop"
        if verdict == "skip" and distributed.is_main():
            rows = self._rows_of(step, step)
            self._record("skipped_step", step=step, why=lives.guard.why, rows=rows)
            self._say(f"warning: step {step} is passed over: {lives.guard.why}; rows: {rows}")
        elif verdict in ("roll_back", "stop"):
            self._leave_bad_data(verdict, step)
        return not self._skipped

    def _leave_bad_data(self, verdict: str, step: int) -> None:
        """Raises RolledBack or ModelError, on every rank."""
        why, back = self.lives.guard.why, self.lives.committer.last_step or 0
        first = step - self.lives.guard.bad_in_a_row + 1
        rows = self._rows_of(first, step)
        if verdict == "roll_back":
            self._record("rolled_back", step=step, to_step=back, passes_over=[back + 1, step], why=why, rows=rows)
            where = f"checkpoint-{back}" if back else "the beginning"
            raise RolledBack(f"step {step}: {why}; back to {where}, and the data of steps {back + 1} to {step} is passed over")
        raise ModelError(
            f"step {step}: {why}, as in each step from {first} on; none of them has reached the weights. Rows of these steps: {rows}. "
            "Look at them (harness preview), lower train.learning_rate, or allow more with guard.max_skips and guard.max_rollbacks"
        )

    def _rows_of(self, first: int, last: int) -> str:
        """Where the rows of these steps stand, the last of which is being made."""
        order = self.lives.order
        of_epoch = len(order) // order.global_batch
        place = self._epoch * of_epoch + self._steps_in_epoch
        places = range(place - (last - first), place + 1)
        indices = [index for place in places for index in order.of_step(*divmod(place, of_epoch))]
        named = [self.train_dataset[index].get("location", index) for index in indices[:8]]
        return ", ".join(map(str, named)) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")

    def _step_ended(self, control) -> None:
        """After each step, when transformers has settled what it is going to log, evaluate and save."""
        lives, step = self.lives, self.state.global_step
        self._steps_in_epoch += 1
        self._leave_out_of_log(control.should_log)
        if step >= self.state.max_steps and lives.cadence.is_on:
            lives.reasons.add("end")
        if lives.guard.bad_in_a_row and lives.guard.why:
            # A rollback goes back to before the bad steps: none of them makes a checkpoint that would take the place of an older one.
            lives.reasons -= {"interval", "asked"}
        if lives.stopping:
            control.should_training_stop = True
            self._evaluation_owed |= control.should_evaluate
            control.should_evaluate = False
        if lives.reasons:
            # The evaluation of an epoch comes after its last step, and belongs into this checkpoint.
            self._epoch_ends_with_save = self.args.eval_strategy == "epoch" and self._at_end_of_epoch()
            control.should_save = not self._epoch_ends_with_save

    def _epoch_ended(self, control) -> None:
        if self.lives.stopping:
            self._evaluation_owed |= control.should_evaluate and self._at_end_of_epoch()
            control.should_evaluate = False
        control.should_save |= self._epoch_ends_with_save
        self._epoch_ends_with_save = False

    def _at_end_of_epoch(self) -> bool:
        """Also where the last step falls into the middle of one."""
        if self.state.global_step >= self.state.max_steps:
            return True
        return self._steps_in_epoch * self.lives.order.global_batch >= len(self.lives.order)

    def _leave_out_of_log(self, logs_now: bool) -> None:
        """The logged loss and metrics are the means of the steps with an update since the last line; without any, the loss is not a
        number."""
        if self._skipped:
            self._left_out_of_log += 1
            self._tr_loss.copy_(self._loss_before_step)
            metrics = self._metrics["train"]
            for key in metrics.keys() - {"num_tokens"}:
                del metrics[key][self._counts_before_step.get(key, 0) :]
                if not metrics[key]:
                    del metrics[key]
        if logs_now and self._left_out_of_log:
            steps = self.state.global_step - self._globalstep_last_logged
            others = steps - self._left_out_of_log
            self._tr_loss.mul_(steps / others) if others else self._tr_loss.fill_(math.nan)
            self._left_out_of_log = 0

    # ---- stopping

    def _stop_if_asked(self) -> bool:
        """Between two steps: every rank asks at the same place."""
        lives = self.lives
        if distributed.vote([lives.door.look()[0]])[0]:
            lives.stopping = True
            lives.reasons.add("stop")
        return lives.stopping

    def _evaluate(self, *args, **kwargs):
        import torch

        self.lives.report.enter("evaluating")
        self._evaluation_owed = False
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=devices):
                return super()._evaluate(*args, **kwargs)
        except _EvaluationStopped:
            self._evaluation_owed = True
            self._metrics["eval"].clear()
            self.control.should_save = self.control.should_training_stop = True
            return None
        finally:
            self.lives.report.enter("training")

    def prediction_step(self, *args, **kwargs):
        self.after_evaluation_batch()
        return super().prediction_step(*args, **kwargs)

    def after_evaluation_batch(self) -> None:
        self.lives.report.beat()
        if self._stop_if_asked():
            raise _EvaluationStopped

    def _make_owed_evaluation(self, trial, ignore_keys_for_eval) -> None:
        """Of the checkpoint that this life began from."""
        self._determine_best_metric(self._evaluate(trial, ignore_keys_for_eval), trial)
        self.lives.reasons.discard("best")
        if self.state.best_global_step is not None:
            self.state.best_model_checkpoint = self._path_of_best()

    def _determine_best_metric(self, metrics, trial):
        state = self.state
        self._best_before = state.best_metric, state.best_global_step, state.best_model_checkpoint
        if metrics is not None and super()._determine_best_metric(metrics, trial):
            self.lives.reasons.add("best")
        if self.control.should_training_stop and not self.lives.stopping and self.lives.cadence.is_on:
            self.lives.reasons.add("end")
        return bool(self.lives.reasons)

    def _finalize_training(self, *args, **kwargs):
        if self.stopped:
            # It logs what has gathered since the last line, which belongs to the next life's first line.
            self._metrics["train"].clear()
        return super()._finalize_training(*args, **kwargs)


class _StepEnd(TrainerCallback):
    """Added last, so that it has the last word on what happens after a step."""

    def __init__(self, trainer: CheckpointedTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin()

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._step_ended(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer._epoch_ended(control)


def _shield_worker(initialise, worker: int) -> None:
    """In a data worker: a SIGTERM that a scheduler sends to every process of a job would end it, and with it the rank that is about to
    save. Only its own rank's counts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def leave_with_the_rank() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=leave_with_the_rank, daemon=True).start()
    if initialise:
        initialise(worker)
