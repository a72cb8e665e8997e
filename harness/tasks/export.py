"""The end of a run: final/, in plain Hugging Face or PEFT layout, which is there whole and verified or not at all."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from harness import distributed
from harness.errors import ModelError
from harness.model.export import MANIFEST, adapter_shapes, check_export, digest_base
from harness.recipe import recipe_digest
from harness.run import replace_folder

if TYPE_CHECKING:
    from harness.tasks.job import Job


def export(job: "Job", trainer, data_digest: str, source: str, dtype: str, tracking) -> None:
    """final/: gathered by all ranks, written beside its place, reopened and compared, and only then renamed to `final`."""
    staging = job.run.path / "final.incomplete"
    if distributed.is_main():
        shutil.rmtree(staging, ignore_errors=True)
    distributed.barrier()
    # A collective under ZeRO and FSDP: every rank calls it, rank 0 writes.
    trainer.save_model(str(staging))
    adapter, files, problem = bool(job.recipe.model.lora), {}, None
    if distributed.is_main():
        expected, tied = (adapter_shapes(trainer.model), frozenset()) if adapter else whole_shapes(trainer.model)
        try:
            files = check_export(staging, expected, tied=tied, adapter=adapter, moved=trainer.state.global_step > 0)
        except ModelError as error:
            problem = error
    # All ranks leave together: one that waited for a rank that has gone would wait for as long as a collective may.
    if distributed.agree(problem is not None):
        raise problem or ModelError("the export is not what was trained; rank 0 says what is wrong with it")
    if distributed.is_main():
        publish(job, trainer, staging, files, data_digest, source, dtype, tracking)
    distributed.barrier()


def publish(job: "Job", trainer, staging: Path, files: dict[str, str], data_digest: str, source: str, dtype: str, tracking) -> None:
    """Say in the manifest what the export was made from, and give it its name."""
    base, state, args = job.recipe.model.name_or_path or job.recipe.model.init, trainer.state, trainer.args
    manifest = {
        "task": job.recipe.task,
        "base": base,
        # For a hub id the commit that was read: its branch may be elsewhere on the day of the merge.
        "base_revision": getattr(trainer.model.config, "_commit_hash", None) or job.recipe.model.revision,
        "base_digest": digest_base(source),
        "adapter": bool(job.recipe.model.lora),
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
    print(f"exported {len(files)} files to {job.run.final} (reopened and verified)", flush=True)


def whole_shapes(model) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Tensor name -> whole shape of what a full export must hold, and the names that are tied to another tensor."""
    tied = frozenset(model.all_tied_weights_keys)
    saved = model.state_dict().keys()
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    whole = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors if name in saved and name not in tied}
    return whole, tied
