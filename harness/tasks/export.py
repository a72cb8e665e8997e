"""The end of a run: final/, in plain Hugging Face or PEFT layout, which is there whole and verified or not at all."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from harness import distributed
from harness.errors import ModelError
from harness.model.adapters import concatenate_adapters
from harness.model.export import MANIFEST, adapter_shapes, check_export
from harness.run import replace_folder
from harness.tasks.lineage import lineage_at

if TYPE_CHECKING:
    from harness.model.adapters import Earlier
    from harness.tasks.job import Job


def export(job: "Job", trainer, dtype: str, tracking, earlier: "Earlier | None" = None) -> None:
    """final/: gathered by all ranks, written beside its place, reopened and compared, and only then renamed to `final`.

    earlier: what the run began from; with `adapter_mode: stack` it and the adapter above it are exported as one.
    """
    staging = job.run.path / "final.incomplete"
    if distributed.is_main():
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    # A collective under ZeRO and FSDP: every rank calls it, rank 0 writes.
    trainer.save_model(str(staging))
    adapter, files, problem = job.recipe.model.trains_adapter, {}, None
    if distributed.is_main():
        expected, tied = (adapter_shapes(trainer.model), frozenset()) if adapter else whole_shapes(trainer.model)
        try:
            files = check_export(staging, expected, tied=tied, adapter=adapter, moved=trainer.state.global_step > 0)
            if earlier and job.recipe.model.adapter_mode == "stack":
                files = check_export(staging, concatenate_adapters(earlier.folder, staging), adapter=True)
        except ModelError as error:
            problem = error
    # All ranks leave together: one that waited for a rank that has gone would wait for as long as a collective may.
    if distributed.agree(problem is not None):
        raise problem or ModelError("the export is not what was trained; rank 0 says what is wrong with it")
    if distributed.is_main():
        publish(job, trainer, staging, files, dtype, tracking)
    distributed.barrier()


def publish(job: "Job", trainer, staging: Path, files: dict[str, str], dtype: str, tracking) -> None:
    """Say in the manifest what the export was made from, and give it its name."""
    state, args, facts = trainer.state, trainer.args, trainer.lives.facts
    # Of the weights that are exported: the best model's, where there is one.
    step = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else state.global_step
    manifest = {
        "task": job.recipe.task,
        "base": facts["base"]["name"],
        # For a hub id the commit that was read: its branch may be elsewhere on the day of the merge.
        "base_revision": facts["base"]["revision"],
        "base_digest": facts["base"]["digest"],
        "adapter": job.recipe.model.trains_adapter,
        # Of the base while it was trained against: who loads the adapter to score, loads it so.
        "quantization": job.recipe.model.quantization.model_dump() if job.recipe.model.quantization else None,
        "data": facts["data"]["digest"],
        "recipe_digest": facts["recipe_digest"],
        "dtype": dtype,
        "step": step,
        "best_metric": state.best_metric,
        "lineage": lineage_at(facts["lineage"], step),
        "files": files,
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    replace_folder(staging, job.run.final)
    job.run.add_to_manifest(lineage=manifest["lineage"])
    about = {key: manifest[key] for key in ("base", "base_revision", "base_digest", "data", "recipe_digest", "step", "lineage")}
    tracking.log_artifact(job.run.final, about)
    print(f"exported {len(files)} files to {job.run.final} (reopened and verified)", flush=True)


def whole_shapes(model) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Tensor name -> whole shape of what a full export must hold, and the names that are tied to another tensor."""
    tied = frozenset(model.all_tied_weights_keys)
    saved = model.state_dict().keys()
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    whole = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors if name in saved and name not in tied}
    return whole, tied
