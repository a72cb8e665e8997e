"""Host memory of a node and bytes on its disks, in closed form."""

from harness.planner.architecture import Architecture
from harness.planner.gpus import GIB
from harness.planner.setting import BYTES, NOTHING, Range, Setting
from harness.planner.states import Parameters, count_parameters, has_resident_reference, moment_bytes, trained_adapter
from harness.recipe.schema import Quantization

PROCESS = Range(1 * GIB, 2.5 * GIB, 4 * GIB)
"""A rank without its model: Python, torch, the CUDA driver's share, a mapped data set. Assumed, not measured on a GPU's node."""
WORKER = Range(0.1 * GIB, 0.3 * GIB, 0.6 * GIB)
"""A data loader's worker; assumed."""


def plan_host(setting: Setting) -> dict[str, Range]:
    """Component -> bytes of one node while its ranks load, or while they train where that is more.

    Every rank reads the whole model before anything is sharded: measured with transformers 5.23, with ZeRO-3's zero.Init and with
    `fsdp_cpu_ram_efficient_loading` as well (transformers#43749). 4-bit weights are quantised one after another on the GPU: of those the
    host holds pages of the files, which it can drop.
    """
    recipe, loaded = setting.recipe, BYTES[setting.dtype]
    # device_map: auto is one process for all GPUs.
    ranks = 1 if recipe.task == "generate" and recipe.generate.device_map else setting.gpus_per_node
    components = {
        "processes": PROCESS.times(ranks, ranks, ranks),
        "data workers": WORKER.times(*[ranks * recipe.train.dataloader_num_workers] * 3),
    }
    loading = _read(setting.shape, loaded, recipe.model.quantization)
    if setting.teacher is not None:
        loading = loading + _read(setting.teacher, 2, recipe.teacher.quantization)
    if has_resident_reference(recipe):
        loading = loading + _read(setting.shape, loaded, None)
    loading = loading.times(ranks, ranks, ranks)
    offload = _offloaded(setting)
    if offload.expected > loading.expected:
        components["offload"] = offload
    else:
        components["loading"] = loading
    return {name: size for name, size in components.items() if size.high > 0}


def _read(shape: Architecture, width: int, quantization: Quantization | None) -> Range:
    whole = shape.parameters * width
    return Range(0, 2 * max(matrix.weights for matrix in shape.matrices), whole) if quantization else Range.exact(whole)


def _offloaded(setting: Setting) -> Range:
    """Masters, moments and gradients of a node's ranks, and their shares of the weights."""
    backend, counts = setting.backend, count_parameters(setting.shape, setting.recipe)
    if not backend.offloads:
        return NOTHING
    share, width = setting.gpus_per_node / setting.world, 2 if setting.halves else 4
    size = counts.trained * (4 + moment_bytes(setting, width) + width) * share
    if backend.offloads_parameters:
        size += (counts.whole + counts.adapter) * width * share + counts.in_4bit / 2 * share
    # Pinned buffers are rounded up to powers of two by torch's host allocator.
    return Range(size, 1.1 * size, 2 * size)


# ---- disk


def plan_disk(setting: Setting, tokens: float | None, trained_tokens: float | None) -> dict[str, Range]:
    """Thing -> bytes: checkpoints that lie there at once, the export, the caches. tokens: of one epoch, if known."""
    recipe = setting.recipe
    counts = count_parameters(setting.shape, recipe)
    found = {}
    if recipe.task != "generate":
        one = checkpoint_bytes(setting, counts)
        kept = recipe.checkpoint.keep + (recipe.train.metric_for_best_model is not None) + 1
        found["one checkpoint"] = one
        # One is whole before an old one goes.
        found[f"checkpoints, {kept} at once"] = one.times(kept, kept, kept)
        found["export"] = Range.exact(_export(setting, counts))
        if trained_adapter(recipe):
            found["merged, if asked for"] = Range.exact(2 * setting.shape.parameters)
    if tokens:
        # input_ids and labels, int32.
        found["prepared data"] = Range(8 * tokens, 8.5 * tokens, 10 * tokens)
    if recipe.teacher and recipe.teacher.source == "cache" and trained_tokens:
        found["teacher's cache"] = teacher_cache_bytes(setting, trained_tokens)
    return found


def checkpoint_bytes(setting: Setting, counts: Parameters) -> Range:
    """The model as it is exported, and what the optimiser needs to go on; of ZeRO-1 and 2 DeepSpeed keeps the weights once more."""
    backend, width = setting.backend, _trained_width(setting)
    weights = counts.trained * width
    moments = counts.trained * moment_bytes(setting, width)
    if backend.kind == "deepspeed":
        size = weights * (1 if backend.zero_stage == 3 else 2) + 4 * counts.trained + moments
        return Range.exact(size)
    return Range(weights + moments, weights + moments, weights * (2 if backend.kind == "fsdp" else 1) + moments)


def _trained_width(setting: Setting) -> int:
    if setting.backend.kind == "deepspeed" and setting.halves:
        return 2
    if trained_adapter(setting.recipe) or setting.backend.kind == "fsdp":
        return 4
    return BYTES[setting.dtype]


def _export(setting: Setting, counts: Parameters) -> float:
    return counts.trained * _trained_width(setting)


def teacher_cache_bytes(setting: Setting, trained_tokens: float) -> Range:
    """By the cache's format (docs/teacher-cache.md): 7 bytes for a distribution, 2 for each entry that is kept and the bits of its id.
    Between `floor` and `cap` entries; a teacher that is sure keeps few: 40 to 60 bytes were measured on tool calls."""
    teacher, bits = setting.recipe.teacher, max(setting.shape.vocabulary - 1, 1).bit_length()

    def of(entries: int) -> float:
        return trained_tokens * (7 + 2 * entries + (entries + teacher.draws) * bits / 8)

    return Range(of(teacher.floor), of(min(teacher.cap, teacher.floor + 4)), of(teacher.cap))

