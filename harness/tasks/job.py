"""What every rank does, from top to bottom: join, prepare, load, train, export.

`train_recipe` is the whole job; harness.rank calls it. Each step is a phase, whose name stands in the report of a rank that fails.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass

from harness import distributed
from harness.embedded import resolve
from harness.errors import LaunchError
from harness.launcher import RuledBackend, check_world, rule_backend
from harness.logs import open_log
from harness.operators import announce_compiling
from harness.recipe import Recipe, recipe_digest
from harness.run import RankReport, RunDir, rank_reports, replace_folder, write_text_atomically

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
    smoke: bool = False

    @property
    def backend(self):
        return self.ruled.backend


def train_recipe(recipe: Recipe, report: RankReport, *, smoke: bool = False, fresh: bool = False) -> None:
    """Run a recipe on this rank. Raises HarnessError for whatever has a name. `report` is told of each phase."""
    try:
        _train(join(recipe, report, smoke=smoke, fresh=fresh))
    finally:
        distributed.shutdown()


def join(recipe: Recipe, report: RankReport, *, smoke: bool, fresh: bool) -> Job:
    """Join the group under the backend that rules, and the run folder that rank 0 (or the parent command) has made."""
    import torch

    report.enter("joining the other ranks")
    has_gpu = torch.cuda.is_available()
    ruled = rule_backend(recipe, os.environ, has_gpu=has_gpu)
    if has_gpu:
        torch.cuda.set_device(distributed.local_rank())
    if ruled.backend.kind == "deepspeed" and distributed.is_main():
        announce_compiling(offloads=ruled.backend.offloads, say=say)
    distributed.start(recipe.train.ddp_timeout, group_of_one=ruled.backend.kind == "deepspeed")
    check_world(recipe, ruled.backend, distributed.world_size())
    check_one_recipe(recipe, smoke=smoke)
    run, attempt = RunDir.of(recipe), report.attempt
    if distributed.is_main() and attempt is None:
        run = RunDir.create(recipe, fresh=fresh)
        attempt = run.open_attempt()
    run, attempt = distributed.broadcast_object((run, attempt))
    report.enter("opening the run folder", attempt)
    open_log(report.log, to_terminal=distributed.is_main())
    if distributed.is_main():
        run.write_manifest(
            recipe,
            backend=ruled.backend.name,
            backend_ruled_by=ruled.ruled_by,
            world_size=distributed.world_size(),
            attempt=int(attempt.name.removeprefix("attempt-")),
            smoke=smoke,
        )
    return Job(recipe, run, ruled, report, smoke)


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


def _train(job: Job) -> None:
    import torch
    from transformers import PrinterCallback

    from harness.attention import PACKING_KERNELS, choose_attention
    from harness.data.templates import end_of_turn_ids
    from harness.model import (
        attach_adapter,
        check_4bit_is_sharded,
        check_4bit_survives_the_engine,
        check_vocabulary,
        choose_dtype,
        describe_parameters,
        draw_weights,
        follow_tokenizer,
        load_base,
        load_tokenizer,
        settle_adapter_dtype,
    )
    from harness.tasks import sft
    from harness.tasks.arguments import eval_strategy, training_arguments
    from harness.tasks.trainer import pad_for_ranks, padding_share

    recipe, backend, world_size = job.recipe, job.backend, distributed.world_size()
    has_gpu = torch.cuda.is_available()
    # Cards before Ampere emulate it, slowly, and refuse TF32.
    bf16_hardware = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = choose_dtype(recipe, backend, bf16_hardware=bf16_hardware)
    attention = choose_attention(recipe.model.attn_implementation, dtype, has_gpu)
    packing = attention in PACKING_KERNELS if recipe.data.packing == "auto" else recipe.data.packing
    flattens = packing or attention == "varlen"

    job.report.enter("loading data")
    tokenizer = load_tokenizer(recipe)
    prepared = load_data(job, tokenizer, packing)
    train_rows, eval_rows = prepared.train, prepared.eval if eval_strategy(recipe) != "no" else None
    if job.smoke:
        recipe, train_rows, eval_rows = _smoke(recipe, train_rows, world_size)

    # Before the model: under ZeRO-3 these make `from_pretrained` read weights straight into shards.
    arguments = training_arguments(recipe, backend, job.run.path, world_size, has_gpu=has_gpu, bf16_hardware=bf16_hardware)
    args = sft.build_arguments(recipe, arguments, flattens=flattens)

    job.report.enter("loading model")
    source = str(job.run.init) if recipe.model.init else resolve(recipe.model.name_or_path)
    if recipe.model.init:
        if distributed.is_main():
            _without_zero_init(draw_weights, recipe, job.run.init)
        distributed.barrier()
    torch.manual_seed(recipe.train.seed)
    model = load_base(recipe, source, dtype, attention, backend, args.device)
    if backend.kind in ("deepspeed", "fsdp"):
        check_4bit_survives_the_engine(model, "bfloat16" if args.bf16 else "float16" if args.fp16 else None)
    check_vocabulary(model, tokenizer)
    missed = follow_tokenizer(model, tokenizer, end_of_turn_ids(tokenizer))
    if missed and recipe.model.lora and distributed.is_main():
        # An adapter is saved without a generation config: whoever loads it generates by the base's.
        words = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missed)))
        say(
            f"warning: the base's generation_config does not stop at {words}, which ends a turn here; pass eos_token_id={missed} to generate()"
        )
    if recipe.model.lora:
        torch.manual_seed(recipe.train.seed)
        model = attach_adapter(model, recipe, backend, dtype)

    job.report.enter("building trainer")
    if eval_rows is not None:
        eval_rows = pad_for_ranks(eval_rows, args.per_device_eval_batch_size * world_size)
    callbacks, tracking, throughput = build_callbacks(job, model, args, len(train_rows))
    trainer = sft.build_trainer(args, model, tokenizer, train_rows, eval_rows, callbacks)
    trainer.remove_callback(PrinterCallback)
    groups = not flattens and padding_share(row_lengths(train_rows), args.per_device_train_batch_size) > WORTH_GROUPING
    trainer.configure(throughput=throughput, isolates=flattens, group_by_length=groups)
    if recipe.model.lora:
        settle_adapter_dtype(model, backend, dtype)
    if distributed.is_main():
        say(
            f"{describe_parameters(model)}; {attention} attention, {dtype} weights, "
            + ("packed" if packing else "flattened" if flattens else "batches of like length" if groups else "batches in random order")
        )
    if recipe.model.quantization and backend.shards_parameters:
        trainer.add_callback(_on_train_begin(lambda: check_4bit_is_sharded(model, world_size)))

    exit_code = 1
    try:
        job.report.enter("training")
        trainer.train()
        job.report.enter("exporting")
        if job.smoke:
            report_smoke(train_rows)
        else:
            export(job, trainer, prepared.digest, source, dtype, tracking)
        exit_code = 0
    finally:
        tracking.finish(exit_code)


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


def _smoke(recipe: Recipe, rows, world_size: int):
    """Two steps on the longest rows: if they fit, every batch of the run does."""
    from harness.launcher import accumulation_steps

    needed = 2 * recipe.train.per_device_train_batch_size * accumulation_steps(recipe, world_size) * world_size
    lengths = row_lengths(rows)
    longest = sorted(range(len(rows)), key=lambda index: -lengths[index])[:needed]
    train = recipe.train.model_copy(
        update={
            "max_steps": 2,
            "num_train_epochs": None,
            "logging_steps": 1,
            "eval_strategy": "no",
            "eval_steps": None,
            "eval_on_start": False,
        }
        | {"metric_for_best_model": None, "early_stopping_patience": None, "warmup_steps": None, "warmup_ratio": None}
    )
    checkpoint = recipe.checkpoint.model_copy(update={"every_steps": None})
    return recipe.model_copy(update={"train": train, "checkpoint": checkpoint}), rows.select(longest), None


def row_lengths(rows) -> list[int]:
    """Tokens of each row; a pack has as many as its samples together."""
    return list(rows["length"]) if "length" in rows.column_names else [sum(lengths) for lengths in rows["seq_lengths"]]


def report_smoke(rows) -> None:
    """The last line of a smoke test: what was run, and the memory that the fullest rank took."""
    from harness.tracking.throughput import peak_memory

    names = {"memory/peak_gib": "peak", "memory/peak_reserved_gib": "reserved by torch"}
    measured = peak_memory()
    highest = distributed.all_reduce_max(list(measured.values()))
    memory = ", ".join(f"{names[key]} {value:.2f} GiB" for key, value in zip(measured, highest, strict=True))
    kind = "GPU memory" if "memory/peak_reserved_gib" in measured else "resident memory"
    if distributed.is_main():
        longest = max(row_lengths(rows))
        say(f"smoke: 2 steps on the {len(rows)} longest rows (longest {longest} tokens); {kind} of the fullest rank: {memory}")


# ---- trainer


def build_callbacks(job: Job, model, args, rows: int):
    """(callbacks, tracking, throughput); tracking last, so that it records what the others add to a log line."""
    from transformers import EarlyStoppingCallback

    from harness.tracking.callback import TrackingCallback
    from harness.tracking.progress import ProgressCallback
    from harness.tracking.throughput import Throughput

    recipe = job.recipe
    throughput = Throughput.for_model(model, world_size=distributed.world_size(), rank=distributed.rank())
    tracking = TrackingCallback(
        job.run.path,
        recipe.tracking.model_copy(update={"name": recipe.tracking.name or job.run.path.name}),
        recipe.model_dump(mode="json"),
        distributed.is_main(),
        backend=job.backend.name,
        world_size=distributed.world_size(),
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


# ---- export


def export(job: Job, trainer, data_digest: str, source: str, dtype: str, tracking) -> None:
    """final/: gathered by all ranks, written beside its place, reopened and compared, and only then renamed to `final`."""
    from harness.model import MANIFEST, adapter_shapes, check_export, digest_base

    staging = job.run.path / "final.incomplete"
    if distributed.is_main():
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    # A collective under ZeRO and FSDP: every rank calls it, rank 0 writes.
    trainer.save_model(str(staging))
    if not distributed.is_main():
        distributed.barrier()
        return
    adapter = bool(job.recipe.model.lora)
    expected, tied = (adapter_shapes(trainer.model), frozenset()) if adapter else _expected_shapes(trainer.model)
    files = check_export(staging, expected, tied=tied, adapter=adapter, moved=trainer.state.global_step > 0)
    base, state, args = job.recipe.model.name_or_path or job.recipe.model.init, trainer.state, trainer.args
    manifest = {
        "task": job.recipe.task,
        "base": base,
        "base_revision": job.recipe.model.revision,
        "base_digest": digest_base(source),
        "adapter": adapter,
        "data": data_digest,
        "recipe_digest": recipe_digest(job.recipe),
        "dtype": dtype,
        # Of the weights that are exported: the best model's, where there is one.
        "step": state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else state.global_step,
        "best_metric": state.best_metric,
        "files": files,
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    replace_folder(staging, job.run.final)
    lineage = {key: manifest[key] for key in ("base", "base_revision", "base_digest", "data", "recipe_digest", "step")}
    tracking.log_artifact(job.run.final, lineage)
    say(f"exported {len(files)} files to {job.run.final} (reopened and verified)")
    distributed.barrier()


def _expected_shapes(model) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Tensor name -> whole shape of what a full export must hold, and the names that are tied to another tensor."""
    tied = frozenset(model.all_tied_weights_keys)
    saved = model.state_dict().keys()
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    whole = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors if name in saved and name not in tied}
    return whole, tied


def say(text: str) -> None:
    print(text, flush=True)
