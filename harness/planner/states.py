"""Weights, constants, adapter, gradients, optimiser and buffers of one GPU, in closed form; a teacher and a reference beside them.

The formulas of DeepSpeed 0.19, Accelerate 1.15 and PEFT 0.21 were read in their code; tests/planner/test_ranks.py counts the bytes under
real ZeRO ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness.errors import RecipeError
from harness.planner.activations import adapter_weights, is_adapted
from harness.planner.architecture import Architecture, load_architecture, read_adapter
from harness.planner.setting import BYTES, NOTHING, Range, Setting
from harness.recipe import Recipe
from harness.recipe.schema import Lora, Quantization

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which Accelerate leaves as it is: ZeRO-1, 2 and 3 allocate all of it, however small the adapter."""
REUSE_ELEMENTS, LIVE_ELEMENTS, SUBGROUP_ELEMENTS, PREFETCH_ELEMENTS, PERSISTENT_ELEMENTS = 10**9, 10**9, 10**9, 5 * 10**7, 10**5
"""DeepSpeed's stage3_max_reuse_distance, stage3_max_live_parameters, sub_group_size, stage3_prefetch_bucket_size and
stage3_param_persistence_threshold."""


def trained_adapter(recipe: Recipe) -> Lora | None:
    """The recipe's own; or the earlier one that is trained further, as its adapter_config.json says. None: all weights are trained."""
    if recipe.model.lora or not recipe.model.trains_adapter:
        return recipe.model.lora
    return read_adapter(recipe.model.adapter)


@dataclass(frozen=True)
class Parameters:
    trained: int
    adapter: int
    in_4bit: int
    whole: int
    """Frozen or trained, in the model and not in 4 bits; without the adapter."""
    matrices_4bit: int


def count_parameters(shape: Architecture, recipe: Recipe) -> Parameters:
    """Raises RecipeError for a target of the adapter that the model does not have."""
    lora, quantization = trained_adapter(recipe), recipe.model.quantization
    in_4bit = shape.layers * shape.layer_linears if quantization else 0
    matrices = shape.layers * sum(matrix.is_linear for matrix in shape.matrices) if quantization else 0
    adapter = 0
    if lora:
        _check_targets(shape, lora.target_modules)
        adapter = shape.layers * sum(adapter_weights(matrix, lora) for matrix in shape.matrices if is_adapted(matrix, lora))
        adapter += sum(_saved_whole(shape, name) for name in lora.modules_to_save)
    trained = adapter if lora else shape.parameters if recipe.task != "generate" else 0
    return Parameters(trained, adapter, in_4bit, shape.parameters - in_4bit, matrices)


def _check_targets(shape: Architecture, targets) -> None:
    names = [matrix.name for matrix in shape.matrices if matrix.is_linear]
    for target in () if targets == "all-linear" else targets:
        if target.split(".")[-1] not in names:
            raise RecipeError(f"model.lora.target_modules holds {target}; the linear layers of {shape.name} are {', '.join(names)}")


def _saved_whole(shape: Architecture, module: str) -> int:
    leaf = module.split(".")[-1]
    if leaf == "embed_tokens":
        return shape.embedding
    return shape.layers * sum(matrix.weights for matrix in shape.matrices if matrix.name == leaf) or shape.hidden


@dataclass(frozen=True)
class States:
    always: dict[str, Range]
    """From the first step on."""
    in_backward: dict[str, Range]
    """From the first of a backward pass to its end."""
    gradients: Range
    """At the end of the last backward pass of a step."""
    gradients_before: Range
    """At its beginning."""
    step: Range


def plan_states(setting: Setting) -> States:
    """Weights, constants, adapter, gradients, optimiser, buffers.

    ZeRO-1, 2 and 3 by N ranks, W bytes of an element as the engine computes: weights W (3: W/N), masters 4/N, moments 8/N (AdamW);
    gradients W/N after the last micro-batch (1: whole while micro-batches accumulate; 3: always there), and one bucket. FSDP2: all of it
    /N, in float32 where it is trained. single and ddp: all of it whole; ddp's buckets are a second copy of the gradients.
    """
    recipe, backend, shape, world = setting.recipe, setting.backend, setting.shape, setting.world
    counts = count_parameters(shape, recipe)
    share = 1 / world if backend.shards_parameters else 1
    loaded = BYTES[setting.dtype]
    base, trained_type = _weight_types(setting, loaded)
    on_gpu = not backend.offloads_parameters
    always = {
        "weights": Range.exact(counts.whole * base * share * on_gpu + counts.in_4bit / 2 * share * on_gpu),
        "4-bit constants": Range.exact(constant_bytes(counts, recipe.model.quantization)),
        "adapter": Range.exact(_adapter_bytes(setting, counts, trained_type) if trained_adapter(recipe) else 0),
        "adapter beneath": Range.exact(_stacked(setting) * trained_type),
        "reference's adapter": Range.exact(_adapter_bytes(setting, counts, trained_type) if copies_adapter(recipe) else 0),
    }
    if recipe.task == "generate":
        return States(always, {}, NOTHING, NOTHING, NOTHING)
    trained = counts.trained
    moments = moment_bytes(setting, trained_type)
    if backend.kind == "deepspeed" and backend.zero_stage:
        states = _deepspeed(setting, counts, trained_type, moments, always)
    elif backend.kind == "fsdp":
        gradients = Range.exact(trained * trained_type / world * on_gpu)
        always["optimiser"] = Range.exact(trained * moments / world * (not backend.offloads))
        states = States(always, {}, gradients, gradients if setting.accumulation > 1 else NOTHING, NOTHING)
    else:
        gradients = Range.exact(trained * trained_type)
        always["optimiser"] = Range.exact(trained * moments)
        if backend.kind == "ddp" or backend.kind == "deepspeed":
            always["communication buffers"] = gradients
        foreach = Range.exact(4 * trained if recipe.train.optim == "adamw_torch" else 0)
        states = States(always, {}, gradients, gradients if setting.accumulation > 1 else NOTHING, foreach)
    always |= others_beside(setting, loaded)
    return states


def _weight_types(setting: Setting, loaded: int) -> tuple[int, int]:
    """Bytes of (a weight of the model that is not in 4 bits, one that is trained), at rest."""
    recipe, backend = setting.recipe, setting.backend
    if backend.kind == "deepspeed" and setting.halves:
        return 2, 2
    if recipe.model.quantization and trained_adapter(recipe):
        # prepare_model_for_kbit_training: embedding, norms and head in float32, where nothing shards them.
        return (loaded if backend.shards_parameters else 4), 4
    if trained_adapter(recipe):
        return loaded, loaded if backend.zero_stage == 3 else 4
    # FSDP2 by Accelerate trains float32 masters whatever was loaded, if precision is mixed.
    stored = 4 if backend.kind == "fsdp" and setting.halves else loaded
    return stored, stored


def constant_bytes(counts: Parameters, quantization: Quantization | None) -> float:
    """bitsandbytes' scales: one float32 for 64 weights; or, quantised too, a byte for each, and a float32 for 256 of those. With each
    matrix come its code (16 float32) and that of its scales (256, and their offset). They are never sharded."""
    if quantization is None:
        return 0
    blocks = counts.in_4bit / 64
    if not quantization.bnb_4bit_use_double_quant:
        return 4 * blocks + 64 * counts.matrices_4bit
    return blocks + 4 * blocks / 256 + (64 + 1024 + 4) * counts.matrices_4bit


def _stacked(setting: Setting) -> int:
    """Weights of an earlier adapter that stays as it is beneath the new one."""
    model, shape = setting.recipe.model, setting.shape
    if model.adapter is None or model.adapter_mode != "stack":
        return 0
    earlier = read_adapter(model.adapter)
    return shape.layers * sum(adapter_weights(matrix, earlier) for matrix in shape.matrices if is_adapted(matrix, earlier))


def _adapter_bytes(setting: Setting, counts: Parameters, width: int) -> float:
    backend, lora, shape = setting.backend, trained_adapter(setting.recipe), setting.shape
    if not backend.shards_parameters:
        return counts.adapter * width
    whole = 0
    if backend.zero_stage == 3:
        # Small tensors stay gathered beside their shares.
        limit = int(backend.zero.get("stage3_param_persistence_threshold", PERSISTENT_ELEMENTS))
        sizes = [size for matrix in shape.matrices if is_adapted(matrix, lora) for size in (lora.r * matrix.columns, lora.r * matrix.rows)]
        whole = shape.layers * sum(size for size in sizes if size < limit)
    return (counts.adapter / setting.world + whole) * width


MOMENTS = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "paged_adamw_32bit": 8,
    # Two bytes, and a float32 for each block of 256 of both.
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "lion_32bit": 4,
    "lion_8bit": 1 + 4 / 256,
    # Rows and columns of factors; far below a byte for each weight.
    "adafactor": 0.01,
    "sgd": 0,
}


def moment_bytes(setting: Setting, trained_type: int) -> float:
    """Of an optimiser's states for each trained weight. torch's AdamW keeps them in the weight's own type."""
    optim = setting.recipe.train.optim
    if optim.startswith("adamw_torch") and trained_type == 2 and setting.backend.kind != "deepspeed":
        return 4
    return MOMENTS[optim]


def _deepspeed(setting: Setting, counts: Parameters, width: int, moments: float, always: dict[str, Range]) -> States:
    backend, world, trained = setting.backend, setting.world, counts.trained
    stage, part = backend.zero_stage, counts.trained / setting.world
    bucket = width * int(backend.zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    always["optimiser"] = Range.exact(0 if backend.offloads else part * (4 + moments))
    if stage == 3:
        always["gradients"] = Range.exact(0 if backend.offloads else part * width)
        always["communication buffers"] = Range.exact(bucket)
        subgroup = min(part, int(backend.zero.get("sub_group_size", SUBGROUP_ELEMENTS)))
        return States(always, {}, NOTHING, NOTHING, Range.exact(0 if backend.offloads else subgroup * (4 + width)))
    largest = max(setting.shape.embedding if not trained_adapter(setting.recipe) else 0, 0) * width
    beside = {"communication buffers": Range.exact(bucket * (1 + bool(backend.zero.get("overlap_comm"))) + (largest > bucket) * largest)}
    if backend.offloads:
        return States(always, beside, NOTHING, NOTHING, NOTHING)
    gradients = Range.exact(part * width)
    accumulated = NOTHING
    if setting.accumulation > 1:
        accumulated = Range.exact(trained * width if stage == 1 and world > 1 else part * width)
    # Flattened, and then in float32.
    step = Range.exact(part * (width + (4 if width != 4 else 0)))
    return States(always, beside, gradients.at_least(accumulated), accumulated, step)


def others_beside(setting: Setting, loaded: int) -> dict[str, Range]:
    """A teacher, a reference or reward models beside the model."""
    recipe, backend, others = setting.recipe, setting.backend, {}
    if setting.teacher is not None:
        asked, shape = recipe.teacher, setting.teacher
        dtype = asked.dtype if asked.dtype != "auto" else "bfloat16" if setting.bf16_hardware else "float32"
        share = 1 / setting.world if backend.zero_stage == 3 else 1
        in_4bit = shape.layers * shape.layer_linears if asked.quantization else 0
        counts = Parameters(0, 0, in_4bit, shape.parameters - in_4bit, shape.layers * len(shape.matrices))
        size = (counts.whole * BYTES[dtype] + in_4bit / 2) * share + constant_bytes(counts, asked.quantization)
        others["teacher"] = Range.exact(size)
    if has_resident_reference(recipe):
        # It is a whole copy under ZeRO-1 and 2; FSDP2 gathers all of it in its forward.
        share = 1 / setting.world if backend.zero_stage == 3 else 1
        others["reference"] = Range.exact(setting.shape.parameters * loaded * share)
    if recipe.task == "rlhf":
        # Whole on every rank (harness.tasks.reward_models).
        others["reward models"] = Range.exact(sum(reward_model_bytes(name) or 0 for name in reward_models(recipe)))
    return others


BETA = {"rloo": 0.05, "grpo": 0.0}
"""TRL's, where the recipe says none."""


def beta_of(recipe: Recipe) -> float:
    """What moving away from the reference costs in `task: rlhf`; without a cost there is none."""
    return BETA[recipe.rlhf.algorithm] if recipe.rlhf.beta is None else recipe.rlhf.beta


def has_resident_reference(recipe: Recipe) -> bool:
    """A second model: asked for, or in reinforcement learning of all weights whatever is asked."""
    if recipe.task == "rlhf":
        return not recipe.model.trains_adapter and beta_of(recipe) > 0
    section = {"dpo": recipe.dpo, "kto": recipe.kto}.get(recipe.task)
    return section is not None and section.reference == "resident"


def copies_adapter(recipe: Recipe) -> bool:
    """The policy goes on from an adapter and is compared with it, so it carries a frozen copy (harness.model.adapters)."""
    if not recipe.model.adapter or recipe.model.adapter_mode != "continue":
        return False
    return recipe.task in ("dpo", "kto") or (recipe.task == "rlhf" and beta_of(recipe) > 0)


def reward_models(recipe: Recipe) -> list[str]:
    return [part.model for part in recipe.rlhf.rewards if part.model]


def reward_model_bytes(name: str) -> float | None:
    """Weights as its files hold them, an adapter's with its base's; None for one that is not here (yet)."""
    path = Path(name).expanduser()
    folder = next((place for place in (path / "final", path) if any(place.glob("*.safetensors"))), None)
    if folder is None:
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not (folder / "adapter_config.json").is_file():
        return size
    base = load_architecture(str(folder))
    manifest = json.loads((folder / "harness.json").read_text(encoding="utf-8")) if (folder / "harness.json").is_file() else {}
    if not manifest.get("quantization"):
        return size + base.parameters * BYTES.get(manifest.get("dtype"), 2)
    in_4bit = base.layers * base.layer_linears
    return size + in_4bit / 2 + (base.parameters - in_4bit) * BYTES.get(manifest.get("dtype"), 2)
