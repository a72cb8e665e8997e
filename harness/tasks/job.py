"""What every rank does, from top to bottom: join, choose a checkpoint, prepare, load, train, export.

`train_recipe` is the whole job; harness.rank calls it. Each step is a phase, whose name stands in the report of a rank that fails.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from harness import distributed
from harness.checkpoint import resume
from harness.checkpoint.door import Signals
from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.selection import Selected
from harness.embedded import resolve
from harness.errors import LaunchError, Stopped
from harness.launcher import RuledBackend, check_world, rule_backend
from harness.logs import open_log
from harness.operators import announce_compiling, release_abandoned_locks
from harness.recipe import Recipe, recipe_digest
from harness.recipe.backend import Backend
from harness.run import RankReport, RunDir, rank_reports, replace_folder, write_outcome, write_text_atomically
from harness.tasks.lineage import build_lineage
from harness.tasks.lives import RolledBack, build_lives, continue_from, end_life, facts_of, is_exact, leave_early
from harness.watchdog import register_stack_dump

PREPARED_POLL_S = 0.5
WORTH_GROUPING = 0.2
"""Share of padding from which batches of like length are made. Length tells much of what a row is (an abstention is short), so
grouped batches are of one kind and less is learnt: the quickstart's exact match fell from 1.00 to 0.73, to save 13 % of padding."""


@dataclass
class Job:
    """What the steps hand to each other on one rank."""

    recipe: Recipe
    run: RunDir
    ruled: RuledBackend
    report: RankReport
    signals: Signals
    smoke: bool = False
    allowed: tuple[str, ...] = ()
    """What may differ from the checkpoint that the run is continued from."""

    @property
    def backend(self):
        return self.ruled.backend

    @property
    def attempt(self) -> int:
        return int(self.report.attempt.name.removeprefix("attempt-"))


def train_recipe(
    recipe: Recipe,
    report: RankReport,
    signals: Signals,
    *,
    smoke: bool = False,
    fresh: bool = False,
    must_resume: bool = False,
    allowed: tuple[str, ...] = (),
) -> None:
    """Run a recipe on this rank, from its newest whole checkpoint if there is one. Raises HarnessError for whatever has a name, Stopped
    when the run left early and can be continued. `report` is told of each phase."""
    try:
        job = join(recipe, report, signals, smoke=smoke, fresh=fresh, allowed=allowed)
        _train(job, continue_from(job, must_resume=must_resume))
    except Stopped:
        # All leave together: a launcher ends the others when it sees the first one go.
        distributed.barrier()
        raise
    finally:
        distributed.shutdown()


def join(recipe: Recipe, report: RankReport, signals: Signals, *, smoke: bool, fresh: bool, allowed: tuple[str, ...]) -> Job:
    """Join the group under the backend that rules, and the run folder that rank 0 (or the parent command) has made."""
    import torch

    report.enter("joining the other ranks")
    has_gpu = torch.cuda.is_available()
    ruled = rule_backend(recipe, os.environ, has_gpu=has_gpu)
    if has_gpu:
        torch.cuda.set_device(distributed.local_rank())
    if ruled.backend.kind == "deepspeed" and distributed.local_rank() == 0:
        release_abandoned_locks(offloads=ruled.backend.offloads, say=say)
    if ruled.backend.kind == "deepspeed" and distributed.is_main():
        announce_compiling(offloads=ruled.backend.offloads, say=say)
    patience_s = max(recipe.train.ddp_timeout, recipe.watchdog.start_s, recipe.watchdog.save_s)
    distributed.start(recipe.train.ddp_timeout, decisions_s=patience_s, group_of_one=ruled.backend.kind in ("deepspeed", "fsdp"))
    check_world(recipe, ruled.backend, distributed.world_size())
    check_one_recipe(recipe, smoke=smoke)
    run, attempt = RunDir.of(recipe), report.attempt
    if distributed.is_main() and attempt is None:
        if not fresh:
            resume.check_continuation(run, recipe, ruled.backend, allowed)
        run = RunDir.create(recipe, fresh=fresh)
        attempt = run.open_attempt()
    run, attempt = distributed.broadcast_object((run, attempt))
    report.enter("opening the run folder", attempt)
    open_log(report.log, to_terminal=distributed.is_main())
    register_stack_dump(report.log)
    if distributed.is_main():
        run.write_manifest(
            recipe,
            backend=ruled.backend.name,
            backend_ruled_by=ruled.ruled_by,
            world_size=distributed.world_size(),
            attempt=int(attempt.name.removeprefix("attempt-")),
            smoke=smoke,
        )
    return Job(recipe, run, ruled, report, signals, smoke, allowed)


def check_one_recipe(recipe: Recipe, *, smoke: bool) -> None:
    """Raises LaunchError, on every rank, unless all ranks were started with the same recipe, run folder and mode."""
    mine = (recipe_digest(recipe), str(RunDir.of(recipe).path), smoke)
    theirs = distributed.broadcast_object(mine)
    if distributed.agree(mine != theirs):
        differs = [what for what, a, b in zip(("recipe", "output_dir", "--smoke"), mine, theirs, strict=True) if a != b]
        raise LaunchError(
            f"the ranks were started with different settings ({', '.join(differs) or 'another rank differs from rank 0'}); "
            "give every machine the same recipe and overrides"
        )


def _train(job: Job, resumed: Selected | None) -> None:
    job.report.enter("importing libraries")
    from harness.model import check_positions, load_tokenizer
    from harness.model.adapters import add_reference_adapter
    from harness.tasks.arguments import eval_strategy, training_arguments
    from harness.tasks.calls import FAILING_COLUMNS, load_held_out_calls, measure_teacher
    from harness.tasks.export import export
    from harness.tasks.smoke import report_smoke, smoke_test
    from harness.tracking.progress import ProgressCallback

    recipe, backend, world_size = job.recipe, job.backend, distributed.world_size()
    if resumed:
        recipe, said = resume.keep_global_batch(resumed.manifest, recipe, world_size, job.allowed)
        if distributed.is_main():
            say(f"continues from {resumed.path.name}" + (f"; {said}" if said else ""))
    settled = settle(recipe, backend)

    job.report.enter("loading data")
    tokenizer = load_tokenizer(recipe)
    prepared = load_data(job, tokenizer, settled.packing)
    train_rows, eval_rows = prepared.train, prepared.eval if eval_strategy(recipe) != "no" else None
    if job.smoke:
        recipe, train_rows, eval_rows = smoke_test(recipe, train_rows, world_size)

    source, earlier = base_source(job, prepared, settled)
    plan = plan_task(Stage(job, recipe, settled, source, tokenizer, prepared, train_rows, eval_rows))
    train_rows, eval_rows = plan.rows or (train_rows, eval_rows)

    # Before the model: under ZeRO-3 these make `from_pretrained` read weights straight into shards.
    arguments = training_arguments(recipe, backend, job.run.path, world_size, has_gpu=settled.has_gpu, bf16_hardware=settled.bf16_hardware)
    args = plan.build_arguments(recipe, arguments, flattens=settled.flattens)

    job.report.enter("loading model")
    model = load_model(recipe, backend, settled, source, tokenizer, args)
    if plan.copies_adapter:
        add_reference_adapter(model)
    check_positions(model, prepared.report.train.length_percentiles["max"])
    facts = facts_of(job, recipe, args, prepared.digest, source, model, resumed, earlier) | {"teacher": None} | plan.facts
    facts["lineage"] = build_lineage(recipe.task, job.recipe.model, facts, earlier)
    if resumed:
        resume.check_facts(resumed.manifest, facts, job.allowed)
    if distributed.is_main():
        job.run.add_to_manifest(lineage=facts["lineage"])

    job.report.enter("building trainer")
    trainer, tracking = build_trainer(job, recipe, settled, args, model, tokenizer, train_rows, eval_rows, facts, resumed, plan)
    trainer.calls = load_held_out_calls(recipe, tokenizer, args.per_device_eval_batch_size)
    if trainer.calls:
        trainer.calls.tell = lambda step, failing: tracking.log_table(step, "eval/failing_calls", FAILING_COLUMNS, failing)

    exit_code = 1
    try:
        if not resumed:
            measure_teacher(trainer, tracking)
        job.report.enter("training")
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
        if trainer.stopped:
            leave_early(job, trainer)
        job.report.enter("exporting")
        if job.smoke:
            report_smoke(recipe, train_rows)
        else:
            export(job, trainer, settled.dtype, tracking, earlier)
            if distributed.is_main():
                trainer.lives.committer.finish(trainer.state.best_global_step)
            end_life(job, "done", "finished", trainer.state.global_step, trainer.state.global_step, "")
        exit_code = 0
    except Stopped as stopped:
        exit_code = stopped.exit_code
        if distributed.is_main() and isinstance(stopped, RolledBack):
            committer = trainer.lives.committer
            write_outcome(
                job.report.attempt, "rolled_back", step=trainer.state.global_step, checkpoint=committer.last_step, reason=str(stopped)
            )
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.close()
        tracking.finish(exit_code)


@dataclass(frozen=True)
class Stage:
    """What a task finds when it plans its trainer: everything but the model, which is loaded after it."""

    job: Job
    recipe: Recipe
    """As it is trained: of a smoke test, and at the global batch of the checkpoint."""
    settled: "Settled"
    source: str
    """Where the base lies."""
    tokenizer: Any
    prepared: Any
    train_rows: Any
    eval_rows: Any


@dataclass(frozen=True)
class TaskPlan:
    """How a task's trainer is made."""

    build: Callable
    """(args, model, tokenizer, train rows, eval rows, callbacks) -> trainer."""
    build_arguments: Callable
    """(recipe, training arguments, flattens) -> the config of TRL's trainer."""
    facts: dict = field(default_factory=dict)
    """What its manifests say besides what those of every task do; of them a teacher must be the same when the run is continued."""
    rows: tuple | None = None
    """(train, eval), where they are other than the prepared ones: with what a reference says of them."""
    copies_adapter: bool = False
    """The policy is compared with the adapter that it continues, so it carries a frozen copy of it."""
    build_order: Callable | None = None
    """(rows, global batch, seed) -> EpochOrder, where a step does not take a row of the data for each of its global batch."""


def plan_task(stage: Stage) -> TaskPlan:
    """By the recipe's task; whatever must be loaded and let go before the model is (a teacher, a reference) is loaded here."""
    module = import_module(f"harness.tasks.{stage.recipe.task}")
    return module.plan(stage)


@dataclass(frozen=True)
class Settled:
    """What the recipe leaves to the machine, decided."""

    has_gpu: bool
    bf16_hardware: bool
    dtype: str
    """Of the weights."""
    computes: str
    """Of products: the autocast's, where there is one."""
    attention: str
    packing: bool
    flattens: bool
    """Batches are one row of several samples, without padding."""


def settle(recipe: Recipe, backend: Backend) -> Settled:
    import torch

    from harness.attention import PACKING_KERNELS, asked_attention, choose_attention, pads_rows
    from harness.recipe.precision import autocasts_bf16, choose_dtype

    has_gpu = torch.cuda.is_available()
    # Cards before Ampere emulate it, slowly, and refuse TF32.
    bf16_hardware = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = choose_dtype(recipe, backend, bf16_hardware=bf16_hardware)
    computes = "float16" if recipe.train.fp16 else "bfloat16" if autocasts_bf16(recipe, bf16_hardware) else dtype
    pads = pads_rows(recipe)
    attention = choose_attention(asked_attention(recipe), computes, has_gpu)
    compares = recipe.task in ("dpo", "kto")
    # Answers that are compared are not packed, but laid one after the other where a kernel keeps them apart.
    apart = attention in PACKING_KERNELS and not pads
    packing = apart and not compares if recipe.data.packing == "auto" else recipe.data.packing
    return Settled(has_gpu, bf16_hardware, dtype, computes, attention, packing, packing or attention == "varlen" or (compares and apart))


# ---- data


def load_data(job: Job, tokenizer, packing: bool):
    """The prepared data set, memory-mapped. Where `harness run` or `harness prepare` has not made it, one rank per machine does, and the
    others wait without a collective, so that no watchdog runs while a CPU tokenises."""
    from harness.data import prepare_recipe
    from harness.data.store import load_prepared
    from harness.tasks.templates import training_template

    # By the first rank of this machine, because two machines may have one name.
    marker = job.report.attempt / f"prepared-{distributed.rank() - distributed.local_rank()}.json"
    if distributed.local_rank() == 0:
        prepared = prepare_recipe(job.recipe, tokenizer, packing=packing, training_template=training_template)
        write_text_atomically(marker, json.dumps({"folder": str(prepared.folder)}))
    else:
        while not marker.is_file():
            if rank_reports(job.report.attempt, "errors"):
                raise LaunchError("the rank that prepares the data failed; its own error says why")
            time.sleep(PREPARED_POLL_S)
    distributed.barrier()
    return load_prepared(json.loads(marker.read_text())["folder"])


# ---- model


def base_source(job: Job, prepared, settled: Settled):
    """(where the base lies, the adapter that the run begins from if it does). The base is what rank 0 has put into the run folder for
    `model.init` (weights that it drew) and for `adapter_mode: merge`, so that every backend reads it as it reads any other."""
    from harness.model import draw_weights
    from harness.model.adapters import check_is_no_adapter, load_earlier

    model = job.recipe.model
    if model.init:
        distributed.on_main(lambda: _without_zero_init(draw_weights, job.recipe, job.run.init))
        return str(job.run.init), None
    source = resolve(model.name_or_path)
    check_is_no_adapter(model.name_or_path, source)
    if not model.adapter:
        return source, None
    earlier = distributed.on_main(lambda: load_earlier(job.recipe, source))
    if model.adapter_mode != "merge":
        return source, earlier
    distributed.on_main(lambda: _without_zero_init(merge_into_base, job, earlier, source, prepared, settled.dtype))
    return str(job.run.init), earlier


def merge_into_base(job: Job, earlier, source: str, prepared, dtype: str) -> None:
    """Write base and adapter into the run folder as one model, once; what is there is of an earlier life."""
    from harness.model.export import check_merge, ends_in_score, merge_adapter, rows_to_compare

    target = job.run.init
    if target.is_dir():
        return
    job.report.enter("merging the earlier adapter into the base")
    staging = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    scores = ends_in_score(earlier.folder)
    rows = rows_to_compare(prepared, pairs=scores)
    found = merge_adapter(earlier.folder, source, job.recipe, dtype, staging, rows, into=dtype)["adapter"]
    check_merge(found)
    replace_folder(staging, target)
    over, unit = (f"{len(rows)} pairs its scores", "pair") if scores else (f"{sum(map(len, rows))} tokens its logits", "token")
    say(
        f"merged {earlier.folder} into {source}, in {dtype}; over {over} differ from base + adapter by at most {found['max_abs']:.3g}, "
        f"KL {found['kl']:.3g} nats per {unit}"
    )
    job.report.enter("loading model")


def load_model(recipe: Recipe, backend: Backend, settled: Settled, source: str, tokenizer, args):
    """The base, checked against its tokenizer, with the adapter on it if the recipe has one."""
    import torch

    from harness import model as models
    from harness.data.templates import end_of_turn_ids

    torch.manual_seed(recipe.train.seed)
    model = models.load_base(recipe, source, settled.dtype, settled.attention, backend, args.device)
    if backend.kind in ("deepspeed", "fsdp"):
        models.check_4bit_survives_the_engine(model, "bfloat16" if args.bf16 else "float16" if args.fp16 else None)
    models.check_vocabulary(model, tokenizer)
    missed = models.follow_tokenizer(model, tokenizer, end_of_turn_ids(tokenizer))
    if not recipe.model.trains_adapter:
        return model
    if missed and distributed.is_main():
        # An adapter is saved without a generation config: whoever loads it generates by the base's.
        words = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missed)))
        say(f"warning: the base's generation_config does not stop at {words}, which ends a turn; pass eos_token_id={missed} to generate()")
    torch.manual_seed(recipe.train.seed)
    return models.attach_adapter(model, recipe, backend, settled.dtype)


# ---- trainer


def build_trainer(
    job: Job,
    recipe: Recipe,
    settled: Settled,
    args,
    model,
    tokenizer,
    train_rows,
    eval_rows,
    facts: dict,
    resumed: Selected | None,
    plan: TaskPlan,
):
    """(trainer, tracking), and a line that says what is about to be trained and how."""
    from transformers import PrinterCallback

    from harness.data.order import EpochOrder
    from harness.model import check_4bit_is_sharded, describe_parameters
    from harness.model.adapters import trained_as_they_are
    from harness.tasks.trainer import pad_for_ranks, padding_share, row_lengths, with_filler

    world_size, quantization = distributed.world_size(), recipe.model.quantization
    if eval_rows is not None:
        eval_rows = pad_for_ranks(eval_rows, args.per_device_eval_batch_size * world_size)
    lengths = row_lengths(train_rows)
    groups = not settled.flattens and not plan.build_order and padding_share(lengths, args.per_device_train_batch_size) > WORTH_GROUPING
    if plan.build_order:
        order = plan.build_order(len(train_rows), facts["global_batch"], args.seed)
    else:
        order = EpochOrder(len(train_rows), facts["global_batch"], args.seed, lengths if groups else None)
    if order.missing:
        train_rows = with_filler(train_rows, 1)
    history = distributed.broadcast_object(read_ledger(job.run.ledger) if distributed.is_main() else None)
    callbacks, tracking, throughput = build_callbacks(job, model, history, resumed)
    with trained_as_they_are(model):
        trainer = plan.build(args, model, tokenizer, train_rows, eval_rows, callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.configure(throughput=throughput, isolates=settled.flattens)
    trainer.live(build_lives(job, recipe, model, order, facts, history, resumed, tracking))
    if distributed.is_main():
        batches = "packed" if settled.packing else "flattened" if settled.flattens else "of like length" if groups else "in random order"
        autocast = ", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""
        say(f"{describe_parameters(model)}; {settled.attention} attention, {settled.dtype} weights{autocast}, batches {batches}")
        if not job.smoke:
            say(trainer.lives.cadence.describe())
    if quantization and job.backend.shards_parameters:
        trainer.add_callback(_on_train_begin(lambda: check_4bit_is_sharded(model, world_size)))
    return trainer, tracking


def build_callbacks(job: Job, model, history: list[dict], resumed: Selected | None):
    """(callbacks, tracking, throughput); tracking last, so that it records what the others add to a log line."""
    from transformers import EarlyStoppingCallback

    from harness.guard import windows_of
    from harness.tracking.callback import TrackingCallback
    from harness.tracking.progress import ProgressCallback
    from harness.tracking.throughput import Throughput

    recipe, ledger = job.recipe, Ledger(job.run.ledger, job.attempt)
    throughput = Throughput.for_model(model, world_size=distributed.world_size(), rank=distributed.rank())
    tracking = TrackingCallback(
        job.run.path,
        recipe.tracking.model_copy(update={"name": recipe.tracking.name or job.run.path.name}),
        recipe.model_dump(mode="json"),
        distributed.is_main(),
        backend=job.backend.name,
        world_size=distributed.world_size(),
        attempt=job.attempt,
        resumed_from=resumed.step if resumed else None,
        exact=resumed is not None and is_exact(job, resumed.manifest),
        # From the data on that this life passes over and the last one did not, it is another run.
        compare_until=min((first - 1 for first, last in windows_of(history) if last > (resumed.step if resumed else 0)), default=None),
        alarm=lambda step, key, was, now: ledger.append("replay_differs", step=step, key=key, was=was, now=now),
    )
    callbacks = [throughput, tracking, ProgressCallback(distributed.is_main())]
    if recipe.train.early_stopping_patience and not job.smoke:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping_patience, recipe.train.early_stopping_threshold))
    return callbacks, tracking, throughput


def _on_train_begin(act):
    from transformers import TrainerCallback

    class AfterPreparation(TrainerCallback):
        """Weights are sharded between the trainer's construction and this moment."""

        def on_train_begin(self, args, state, control, **kwargs):
            message = act()
            if distributed.is_main():
                say(message)

    return AfterPreparation()


def _without_zero_init(function, *arguments) -> None:
    """Call it with transformers' ZeRO-3 switch off: rank 0 draws whole weights alone."""
    from transformers.integrations.deepspeed import (
        HfDeepSpeedConfig,
        is_deepspeed_zero3_enabled,
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    if not is_deepspeed_zero3_enabled():
        function(*arguments)
        return
    from transformers.integrations import deepspeed as seam

    config: HfDeepSpeedConfig = seam._hf_deepspeed_config_weak_ref()
    unset_hf_deepspeed_config()
    try:
        function(*arguments)
    finally:
        set_hf_deepspeed_config(config)


def say(text: str) -> None:
    print(text, flush=True)
