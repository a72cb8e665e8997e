"""Memory of one GPU, by component and by moment, in closed form.

A run is fullest in one of a few moments, and each has a sum of its own:

    loading     4-bit weights that will be sharded are whole on every rank first, because they are quantised before they are cut
    forward     the end of the last micro-batch's forward, where autocast's copies of all weights still stand
    loss        the first of its backward: all that was kept, and the loss's tile; gradients only where earlier micro-batches left some
    backward    one layer's recomputation at its begin, or all gradients and one layer at its end
    step        no activations; what the optimiser makes
    writing     answers of the model: weights, and the cache of keys and values

Each component is low / expected / high. Weights, gradients and states are exact, so the three are one number; what depends on the data is
lowest with short rows; what cannot be known without a measurement says in RUNTIME or SLACK what was assumed.

The formulas of DeepSpeed 0.19, Accelerate 1.15, PEFT 0.21 and TRL 1.16 were read in their code, and counted: tests/planner counts the bytes
under real ZeRO ranks, and benchmarks/planner.py the peaks of whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.errors import RecipeError
from harness.planner.activations import NORM_BACKWARD_WIDTHS, Kept, Types, adapter_weights, is_adapted, layer_activations, tail_bytes
from harness.planner.architecture import Architecture
from harness.planner.gpus import GIB
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.precision import autocasts_bf16, choose_dtype
from harness.recipe.schema import Quantization

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, which Accelerate leaves as it is: ZeRO-1, 2 and 3 allocate all of it, however small the adapter."""
REUSE_ELEMENTS, LIVE_ELEMENTS, SUBGROUP_ELEMENTS, PREFETCH_ELEMENTS, PERSISTENT_ELEMENTS = 10**9, 10**9, 10**9, 5 * 10**7, 10**5
"""DeepSpeed's stage3_max_reuse_distance, stage3_max_live_parameters, sub_group_size, stage3_prefetch_bucket_size and
stage3_param_persistence_threshold."""
TRL_TILE_TOKENS, TRL_TILE_VOCABULARY = 4096, 32768
"""trl.kernels.chunked_logprob: logits exist for so many tokens times so many entries."""
DIVERGENCE_TILE_BYTES = 1 << 30
"""harness.losses.chunks.TILE_BYTES."""
VLLM_SHARE = 0.3
"""Of the GPU, which vLLM takes beside the trainer (harness.tasks.on_policy)."""
SHORT_ROWS = 1 / 8
"""Of max_length, for the low estimate of batches that are not packed: rows may be that short."""


@dataclass(frozen=True)
class Range:
    """Bytes."""

    low: float
    expected: float
    high: float

    @classmethod
    def exact(cls, size: float) -> Range:
        return cls(size, size, size)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def at_least(self, other: Range) -> Range:
        return Range(max(self.low, other.low), max(self.expected, other.expected), max(self.high, other.high))

    def times(self, low: float, expected: float, high: float) -> Range:
        return Range(self.low * low, self.expected * expected, self.high * high)


NOTHING = Range.exact(0)
RUNTIME = Range(0.3 * GIB, 0.6 * GIB, 1.2 * GIB)
"""The CUDA context, cuBLAS's workspaces and NCCL's buffers; assumed, not measured here."""
SLACK = (0.0, 0.02, 0.08)
"""Of all else: what torch's allocator rounds up and cannot use in between; assumed, not measured here."""


@dataclass(frozen=True)
class Setting:
    """All that decides how much memory a run takes."""

    recipe: Recipe
    backend: Backend
    shape: Architecture
    gpus_per_node: int = 1
    nodes: int = 1
    bf16_hardware: bool = True
    teacher: Architecture | None = None
    """Of a resident teacher."""
    gpu_bytes: int | None = None
    runtime: Range = field(default=RUNTIME)
    """Nothing where tensors alone are counted."""
    slack: tuple[float, float, float] = SLACK

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def dtype(self) -> str:
        return choose_dtype(self.recipe, self.backend, bf16_hardware=self.bf16_hardware)

    @property
    def halves(self) -> bool:
        """Trained in bfloat16 or float16, by autocast or by an engine."""
        return self.recipe.train.fp16 or autocasts_bf16(self.recipe, self.bf16_hardware)

    @property
    def engine_casts(self) -> bool:
        """DeepSpeed casts every weight that is not in 4 bits; FSDP2 casts what it gathers."""
        return self.backend.kind in ("deepspeed", "fsdp") and self.halves

    @property
    def is_packed(self) -> bool:
        """Batches are filled up to max_length (harness.tasks.job.settle, on a GPU that has a kernel for it)."""
        recipe = self.recipe
        if recipe.data.packing != "auto":
            return recipe.data.packing
        return self.flattens and recipe.task not in ("dpo", "kto", "reward", "rlhf")

    @property
    def flattens(self) -> bool:
        """Samples lie one after another, without padding and a mask of it."""
        has_kernel = self.bf16_hardware and self.halves and self.recipe.model.attn_implementation not in ("sdpa", "eager")
        return has_kernel and not self.writes

    @property
    def writes(self) -> bool:
        """Its model writes what it learns from."""
        return self.recipe.distill.on_policy is not None or self.recipe.task == "rlhf"

    @property
    def accumulation(self) -> int:
        """Micro-batches per step. Raises RecipeError where the global batch cannot be made."""
        train = self.recipe.train
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps or 1
        at_once = train.per_device_train_batch_size * self.world
        if train.global_batch_size % at_once:
            raise RecipeError(
                f"train.global_batch_size = {train.global_batch_size}; {self.world} ranks with per_device_train_batch_size = "
                f"{train.per_device_train_batch_size} take {at_once} rows at once, which does not divide it"
            )
        return train.global_batch_size // at_once

    @property
    def tokens(self) -> Range:
        """Of a micro-batch."""
        rows = self.recipe.train.per_device_train_batch_size * (2 if self.recipe.task in ("dpo", "reward") else 1)
        most = rows * self.recipe.data.max_length
        return Range(most * (0.9 if self.is_packed else SHORT_ROWS), most, most)


@dataclass(frozen=True)
class GpuMemory:
    moments: dict[str, dict[str, Range]]
    """Moment -> component -> bytes."""

    def total(self, moment: str) -> Range:
        total = NOTHING
        for size in self.moments[moment].values():
            total = total + size
        return total

    @property
    def deciding(self) -> str:
        return max(self.moments, key=lambda moment: self.total(moment).expected)

    @property
    def peak(self) -> Range:
        """The fullest moment, each of the three by itself."""
        totals = [self.total(moment) for moment in self.moments]
        return Range(*(max(getattr(total, name) for total in totals) for name in ("low", "expected", "high")))

    @property
    def dominant(self) -> str:
        components = self.moments[self.deciding]
        return max(components, key=lambda name: components[name].expected)


def plan_memory(setting: Setting) -> GpuMemory:
    recipe = setting.recipe
    states = plan_states(setting)
    if recipe.task == "generate":
        moments = {"writing": states.always | {"generation cache": generation_cache(setting)}}
    else:
        moments = _training(setting, states)
    if loading := _loading(setting):
        moments["loading"] = loading
    return GpuMemory({moment: _with_runtime(setting, components) for moment, components in moments.items()})


def _with_runtime(setting: Setting, components: dict[str, Range]) -> dict[str, Range]:
    present = {name: size for name, size in components.items() if size.high > 0}
    total = NOTHING
    for size in present.values():
        total = total + size
    rest = {"CUDA context": setting.runtime, "allocator slack": total.times(*setting.slack)}
    return present | {name: size for name, size in rest.items() if size.high > 0}


# ---- weights, gradients, states


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
    lora, quantization = recipe.model.lora, recipe.model.quantization
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
        "adapter": Range.exact(_adapter_bytes(setting, counts, trained_type) if recipe.model.lora else 0),
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
    always |= _others(setting, loaded)
    return states


def _weight_types(setting: Setting, loaded: int) -> tuple[int, int]:
    """Bytes of (a weight of the model that is not in 4 bits, one that is trained), at rest."""
    recipe, backend = setting.recipe, setting.backend
    if backend.kind == "deepspeed" and setting.halves:
        return 2, 2
    if recipe.model.quantization and recipe.model.lora:
        # prepare_model_for_kbit_training: embedding, norms and head in float32, where nothing shards them.
        return (loaded if backend.shards_parameters else 4), 4
    if recipe.model.lora:
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


def _adapter_bytes(setting: Setting, counts: Parameters, width: int) -> float:
    backend, lora, shape = setting.backend, setting.recipe.model.lora, setting.shape
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
    largest = max(setting.shape.embedding if not setting.recipe.model.lora else 0, 0) * width
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


def _others(setting: Setting, loaded: int) -> dict[str, Range]:
    """A teacher or a reference beside the model."""
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
        # TRL runs it as a whole copy under ZeRO-1 and 2; FSDP2 gathers all of it in its forward.
        share = 1 / setting.world if backend.zero_stage == 3 else 1
        others["reference"] = Range.exact(setting.shape.parameters * loaded * share)
    return others


def has_resident_reference(recipe: Recipe) -> bool:
    section = {"dpo": recipe.dpo, "kto": recipe.kto}.get(recipe.task)
    return section is not None and section.reference == "resident"


# ---- what a step adds


def activation_types(setting: Setting) -> Types:
    recipe, loaded = setting.recipe, BYTES[setting.dtype]
    if setting.engine_casts:
        return Types(2, 2, 2, 2, 2, autocast=False)
    compute = 2 if setting.halves else loaded
    autocast = setting.halves and setting.backend.kind in ("single", "ddp")
    if recipe.model.quantization and not setting.backend.shards_parameters:
        # The stream is float32, as the norms are, and bitsandbytes' layers return what they are given.
        return Types(4, 4, 4, compute, 4, autocast)
    adapter = 4 if recipe.model.lora and setting.backend.zero_stage != 3 else loaded
    return Types(loaded, loaded, compute, compute, adapter, autocast)


def layer_of(setting: Setting) -> Kept:
    asked, length = setting.recipe.model.attn_implementation, setting.recipe.data.max_length
    return layer_activations(
        setting.shape,
        activation_types(setting),
        setting.recipe.model.lora,
        masked=asked == "sdpa" or setting.writes and asked != "eager",
        eager_length=length if asked == "eager" else 0,
    )


def _training(setting: Setting, states: States) -> dict[str, dict[str, Range]]:
    recipe, shape, tokens = setting.recipe, setting.shape, setting.tokens
    types, layer = activation_types(setting), layer_of(setting)
    checkpoints, trained = recipe.train.gradient_checkpointing, recipe.model.lora is None

    def of_tokens(per_token: float, margin: float = 1.1) -> Range:
        return tokens.times(per_token, per_token, per_token * margin)

    one_layer = of_tokens(layer.per_token + layer.transient) + Range.exact(layer.copies)
    copies = Range.exact(shape.layers * layer.copies)
    if checkpoints:
        kept = of_tokens(shape.layers * types.stream * shape.hidden)
    else:
        kept = of_tokens(shape.layers * layer.per_token) + copies
    kept = kept + of_tokens(tail_bytes(shape, types, trained=trained))
    if setting.teacher is not None:
        kept = kept + of_tokens(2 * setting.teacher.hidden)
    gathered = gathered_bytes(setting, types)
    tile_forward, tile_loss = loss_tile(setting, types)
    norm = of_tokens(NORM_BACKWARD_WIDTHS * shape.hidden)
    common = states.always | {"gathered weights": gathered}
    before, after = {"gradients": states.gradients_before}, {"gradients": states.gradients}
    if "gradients" in states.always:
        before = after = {}
    moments = {
        "loss": common | states.in_backward | before | {"activations kept": kept, "loss tile": tile_loss.at_least(norm)},
        "step": states.always | after | {"optimiser's step": states.step},
    }
    if checkpoints and layer.copies:
        moments["forward"] = common | before | {"activations kept": kept, "autocast's weights": copies, "loss tile": tile_forward}
    fetching = common | states.in_backward | {"weights on their way": fetched_bytes(setting, types)}
    begin = fetching | before | {"activations kept": kept, "activations of one layer": one_layer}
    end = fetching | after | {"activations of one layer": one_layer + _weight_gradient(setting)}
    fullest = GpuMemory({"begin": begin, "end": end}).deciding if checkpoints else "end"
    moments["backward"] = {"begin": begin, "end": end}[fullest]
    if setting.writes:
        moments["writing"] = common | {"generation cache": generation_cache(setting)}
    return moments


def _weight_gradient(setting: Setting) -> Range:
    """Of the largest matrix, before it is added to what is there; of a 4-bit one what it is unpacked to."""
    shape, recipe = setting.shape, setting.recipe
    largest = max(matrix.weights for matrix in shape.matrices)
    if recipe.model.lora and not recipe.model.quantization:
        return NOTHING
    return Range(0, 2 * largest, 6 * largest)


def gathered_bytes(setting: Setting, types: Types) -> Range:
    """Weights that are whole for a while, under ZeRO-3 and FSDP2.

    ZeRO-3 keeps what it will use again within stage3_max_reuse_distance weights: at the turn from forward to backward that is half as many,
    on both sides of it; besides the layer at hand and the head, which the loss gathers. A small model is never let go. FSDP2: two layers
    and the root (embedding, norm, head), and a layer's whole gradients on their way out.
    """
    backend, shape = setting.backend, setting.shape
    if not backend.shards_parameters:
        return NOTHING
    everything, per_weight = _sharded(setting, types)
    layer = shape.layer_parameters * per_weight
    head = shape.embedding * types.base if shape.has_head else 0
    if backend.kind == "fsdp":
        root = (shape.embedding + shape.head) * 2
        trained = layer * (setting.recipe.model.lora is None)
        return Range(2 * layer + root, 2 * layer + root + 2 * trained, 3 * layer + root + 3 * trained + 4 * shape.embedding)
    reuse = int(backend.zero.get("stage3_max_reuse_distance", REUSE_ELEMENTS)) / 2 * per_weight
    live = int(backend.zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)) * per_weight
    expected = min(everything, reuse + layer + head)
    return Range(min(everything, layer + head), expected, max(expected, min(everything, max(live, reuse) + layer + head)))


def _sharded(setting: Setting, types: Types) -> tuple[float, float]:
    """(bytes of all weights that are sharded, of one on average)."""
    counts = count_parameters(setting.shape, setting.recipe)
    everything = counts.in_4bit / 2 + counts.whole * types.base + counts.adapter * types.adapter
    return everything, everything / (setting.shape.parameters + counts.adapter)


def fetched_bytes(setting: Setting, types: Types) -> Range:
    """ZeRO-3 fetches several weights by one all-gather, whose buffer stands beside them until they are copied out of it."""
    backend = setting.backend
    if backend.zero_stage != 3:
        return NOTHING
    everything, per_weight = _sharded(setting, types)
    size = min(everything, int(backend.zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS)) * per_weight)
    return Range(0, size, size)


def loss_tile(setting: Setting, types: Types) -> tuple[Range, Range]:
    """(in the forward, in the backward) what the loss holds; no logits of all tokens exist anywhere.

    TRL's fused head: a tile of logits, and in the backward the gradients of the hidden states and, where it trains, of the head, in float32
    and then in their own type. Ours of distillation: a tile of TILE_BYTES at most, and both gradients already in the forward.
    """
    recipe, shape, tokens = setting.recipe, setting.shape, setting.tokens
    if not shape.has_head:
        return NOTHING, NOTHING
    trains_head = recipe.model.lora is None
    weight = shape.embedding * trains_head
    if recipe.task == "distill":
        # Logits in float32 and halves; of a resident teacher what dense_divergence holds at its peak.
        tiles = 6 + 2 * (recipe.distill.divergence == "jsd") + (recipe.distill.temperature != 1) if setting.teacher else 1
        tile = tokens.times(*[(4 * tiles + 2) * shape.vocabulary] * 3)
        cap = DIVERGENCE_TILE_BYTES
        tile = Range(min(cap, tile.low), min(cap, tile.expected), min(cap, tile.high))
        heads = 2 * setting.teacher.embedding if setting.teacher and setting.backend.zero_stage == 3 else 0
        gradients = tokens.times(*[4 * shape.hidden] * 3) + Range.exact(4 * weight)
        casts = tokens.times(*[types.stream * shape.hidden] * 3) + Range.exact(types.base * weight)
        return tile + gradients + Range.exact(heads), gradients + casts.at_least(tile + Range.exact(heads))
    rows = [min(count, TRL_TILE_TOKENS) for count in (tokens.low, tokens.expected, tokens.high)]
    tile = Range(*(row * TRL_TILE_VOCABULARY * types.compute for row in rows))
    gradients = tokens.times(*[(4 + types.stream) * shape.hidden] * 3) + Range.exact((4 + types.base * (types.base != 4)) * weight)
    return tile, tile + gradients


def generation_cache(setting: Setting) -> Range:
    """Keys and values of every token of every answer that is written at once; what vLLM takes where it writes."""
    recipe, shape = setting.recipe, setting.shape
    if recipe.task == "generate":
        rows, length = recipe.generate.batch_rows, recipe.data.max_length
    else:
        rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
        if recipe.distill.on_policy:
            if recipe.distill.on_policy.use_vllm is True and setting.gpu_bytes:
                return Range.exact(VLLM_SHARE * setting.gpu_bytes)
            length += recipe.distill.on_policy.max_new_tokens
    width = 2 if setting.halves or setting.dtype != "float32" else 4
    size = rows * length * shape.layers * 2 * shape.keys * width
    # transformers' cache grows by concatenation: one layer's old and new stand at once.
    return Range(size * SHORT_ROWS, size, size * (1 + 1 / shape.layers))


def _loading(setting: Setting) -> dict[str, Range]:
    recipe, backend = setting.recipe, setting.backend
    if recipe.model.quantization is None or not backend.shards_parameters:
        return {}
    counts = count_parameters(setting.shape, recipe)
    return {
        "weights": Range.exact(counts.in_4bit / 2 + counts.whole * BYTES[setting.dtype]),
        "4-bit constants": Range.exact(constant_bytes(counts, recipe.model.quantization)),
    } | _others(setting, BYTES[setting.dtype])
