"""One life of a run among its others: what it continues from, what its checkpoints say of it, and how it ends."""

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness import distributed
from harness.checkpoint import resume
from harness.checkpoint.cadence import Cadence
from harness.checkpoint.commit import Committer
from harness.checkpoint.door import Door
from harness.checkpoint.ledger import Ledger
from harness.checkpoint.retention import clean
from harness.checkpoint.selection import Selected, name_run, run_name, select_checkpoint
from harness.errors import HarnessError, LaunchError, Stopped
from harness.guard import Guard, windows_of
from harness.model.adapters import check_revision
from harness.model.export import digest_base
from harness.recipe import Recipe, recipe_digest
from harness.run import RankReport, git_commit, library_versions, write_outcome

if TYPE_CHECKING:
    from harness.data.order import EpochOrder
    from harness.model.adapters import Earlier
    from harness.tasks.job import Job
    from harness.tracking.callback import TrackingCallback


class RolledBack(Stopped):
    """This life ends so that the next one goes back to the last checkpoint."""


@dataclass
class Lives:
    """What a trainer has to do with the run's other lives."""

    committer: Committer
    cadence: Cadence
    door: Door
    guard: Guard
    order: "EpochOrder"
    report: RankReport
    facts: dict[str, Any]
    """What every manifest of this life says alike."""
    tracking: "TrackingCallback"
    resumed: Selected | None = None
    changed: frozenset[str] = frozenset()
    """The recipe's fields that are otherwise than at the checkpoint that this life began from."""
    stopping: bool = False
    reasons: set[str] = field(default_factory=set)
    """Why the next checkpoint is made."""


def continue_from(job: "Job", *, must_resume: bool) -> Selected | None:
    """The checkpoint that this life begins from, None for the beginning. Rank 0 chooses and verifies, and all hear of it."""
    found, problem = None, None
    if distributed.is_main() and not job.smoke:
        ledger = Ledger(job.run.ledger, job.attempt)
        try:
            for error in clean(job.run):
                print(f"warning: {error}", flush=True)
            name_run(job.run, ledger)
            found = select_checkpoint(job.run, ledger, verify=job.recipe.checkpoint.verify, on_progress=job.report.enter)
            if found:
                resume.check_recipe(found.manifest, job.recipe, job.allowed)
                resume.check_engine(found.manifest, job.backend)
            elif must_resume:
                raise LaunchError(f"{job.run.path}: holds no checkpoint to continue from; leave --resume out to begin")
            elif job.allowed:
                raise LaunchError(
                    f"--allow-change {job.allowed[0]}: there is no checkpoint that it could differ from; leave it out to begin"
                )
        except HarnessError as error:
            problem = error
    found, problem = distributed.broadcast_object((found, problem))
    if problem:
        raise problem
    return found


def facts_of(
    job: "Job", recipe: Recipe, args, data_digest: str, source: str, model, resumed: Selected | None, earlier: "Earlier | None" = None
) -> dict[str, Any]:
    """What every manifest of this life says alike; `recipe` is the one that is trained, the job's the one that was asked for."""
    asked = job.recipe.model
    merged = asked.adapter_mode == "merge"
    base, revision = (source, None) if merged else (asked.name_or_path or asked.init, asked.revision)
    revision = getattr(model.config, "_commit_hash", None) or revision
    if earlier and not merged:
        check_revision(earlier, revision)
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * distributed.world_size()
    return {
        "run": run_name(job.run) if distributed.is_main() else None,
        "global_batch": global_batch,
        "accumulation": args.gradient_accumulation_steps,
        "micro_batch": args.per_device_train_batch_size,
        "world_size": distributed.world_size(),
        "backend": job.backend.name,
        "engine": resume.engine_of(job.backend),
        "seed": recipe.train.seed,
        "recipe_digest": recipe_digest(job.recipe),
        "recipe": job.recipe.model_dump(mode="json"),
        "allowed_changes": sorted({*(resumed.manifest["allowed_changes"] if resumed else ()), *job.allowed}),
        "versions": library_versions(),
        "python": sys.version.split()[0],
        "git_commit": git_commit() if distributed.is_main() else None,
        "base": distributed.broadcast_object(
            {
                "name": base,
                "revision": revision,
                "digest": digest_base(source) if distributed.is_main() else None,
            }
        ),
        "adapter": earlier and {"folder": str(earlier.folder), "mode": asked.adapter_mode, "digest": earlier.digest},
        "data": {"digest": data_digest},
    }


def build_lives(job: "Job", recipe: Recipe, model, order, facts: dict, history: list[dict], resumed: Selected | None, tracking):
    """history: the run's ledger before this life."""
    ledger, world_size = Ledger(job.run.ledger, job.attempt), distributed.world_size()
    if distributed.is_main() and not job.smoke:
        resumed_from = resumed.step if resumed else None
        ledger.append("life_began", world_size=world_size, backend=job.backend.name, resumed_from=resumed_from, allowed=list(job.allowed))
    # Weights and two moments, under DeepSpeed with a master, all in 32 bit; the last commit is a better guess.
    sharded = 12 if job.backend.kind == "deepspeed" else 0
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    guess = sum(getattr(weight, "ds_numel", weight.numel()) * (sharded or 2 * weight.element_size()) for weight in trained)
    guess += sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in trained)
    return Lives(
        committer=Committer(
            job.run,
            recipe.checkpoint,
            ledger,
            job.attempt,
            job.report.enter,
            expected_bytes=[guess, *(event["bytes"] for event in history if event["event"] == "committed")][-1],
            last_step=resumed.step if resumed else None,
        ),
        cadence=Cadence(recipe.checkpoint, world_size, time.monotonic()),
        door=Door(job.signals, job.run if distributed.is_main() else None),
        guard=Guard(recipe.guard, fp16=recipe.train.fp16, rolled_back=windows_of(history)),
        order=order,
        report=job.report,
        facts=facts,
        tracking=tracking,
        resumed=resumed,
        changed=frozenset(resume.changed_fields(resumed.manifest, job.recipe) if resumed else ()),
    )


def is_exact(job: "Job", manifest: dict) -> bool:
    """Whether the steps since the checkpoint come out to the last bit as they did before."""
    import torch

    same = (
        manifest["world_size"] == distributed.world_size()
        and manifest["backend"] == job.backend.name
        and manifest["micro_batch"] == job.recipe.train.per_device_train_batch_size
        and manifest["versions"] == library_versions()
    )
    # Kernels on a GPU add in whichever order they come to.
    return same and not job.allowed and (job.recipe.train.full_determinism or not torch.cuda.is_available())


def leave_early(job: "Job", trainer) -> None:
    """Raises Stopped, after saying how far the run came."""
    step, kept = trainer.state.global_step, trainer.lives.committer.last_step
    reason = next(filter(None, distributed.gather_objects(trainer.lives.door.reason)))
    job.report.enter("leaving")
    if distributed.is_main():
        trainer.lives.door.stopped(job.report.attempt)
    end_life(job, "stopped", "stopped", step, kept, reason)
    saved = f"checkpoint-{kept} is whole" if kept else "nothing was saved" if step else "nothing was trained yet"
    raise Stopped(f"stopped at step {step} ({reason}); {saved}; the same command continues")


def end_life(job: "Job", outcome: str, event: str, step: int, checkpoint: int | None, reason: str) -> None:
    if distributed.is_main():
        Ledger(job.run.ledger, job.attempt).append(event, step=step, reason=reason)
        write_outcome(job.report.attempt, outcome, step=step, checkpoint=checkpoint, reason=reason)
