"""Memory of one GPU, by component and by moment, in closed form.

A run is fullest in one of a few moments, and each has a sum of its own:

    loading     4-bit weights that will be sharded are whole on every rank first, because they are quantised before they are cut
    forward     the end of the last micro-batch's forward, where autocast's copies of all weights still stand
    loss        the first of its backward: all that was kept, and the loss's tile; gradients only where earlier micro-batches left some
    backward    one layer's recomputation at its begin, or all gradients and one layer at its end
    step        no activations; what the optimiser makes
    writing     answers of the model: weights, the cache of keys and values, prompts as they are read

Each component is low / expected / high. Weights, gradients and states are exact, so the three are one number; what depends on the data is
lowest with short rows; what cannot be known without a measurement says in RUNTIME or SLACK what was assumed.

The formulas of DeepSpeed 0.19, Accelerate 1.15, PEFT 0.21 and TRL 1.16 were read in their code, and counted: tests/planner counts the bytes
under real ZeRO ranks, and benchmarks/planner.py the peaks of whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.planner.activations import NORM_BACKWARD_WIDTHS, Kept, Types, layer_activations, tail_bytes
from harness.planner.setting import BYTES, NOTHING, SHORT_ROWS, Range, Setting
from harness.planner.states import (
    LIVE_ELEMENTS,
    PREFETCH_ELEMENTS,
    REUSE_ELEMENTS,
    States,
    constant_bytes,
    count_parameters,
    others_beside,
    plan_states,
    trained_adapter,
)
from harness.recipe import Recipe

TRL_TILE_TOKENS, TRL_TILE_VOCABULARY = 4096, 32768
"""trl.kernels.chunked_logprob: logits exist for so many tokens times so many entries."""
DIVERGENCE_TILE_BYTES = 1 << 30
"""harness.losses.chunks.TILE_BYTES."""
VLLM_SHARE = 0.3
"""Of the GPU, which vLLM takes beside the trainer (harness.tasks.on_policy)."""


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
        moments = {"writing": _spread(setting, states.always) | writing(setting)}
    else:
        moments = _training(setting, states)
    if loading := _loading(setting):
        moments["loading"] = loading
    return GpuMemory({moment: _with_runtime(setting, components) for moment, components in moments.items()})


def _spread(setting: Setting, components: dict[str, Range]) -> dict[str, Range]:
    """With `generate.device_map: auto` each GPU of a node holds so many layers; at the most one more than is even."""
    layers, gpus = setting.shape.layers, setting.gpus_per_node
    if setting.recipe.generate.device_map is None or gpus == 1:
        return components
    most = min(1, 1 / gpus + 1 / layers)
    return {name: size.times(1 / gpus, 1 / gpus, most) for name, size in components.items()}


def _with_runtime(setting: Setting, components: dict[str, Range]) -> dict[str, Range]:
    present = {name: size for name, size in components.items() if size.high > 0}
    total = NOTHING
    for size in present.values():
        total = total + size
    rest = {"CUDA context": setting.runtime, "allocator slack": total.times(*setting.slack)}
    return present | {name: size for name, size in rest.items() if size.high > 0}


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
    adapter = 4 if trained_adapter(recipe) and setting.backend.zero_stage != 3 else loaded
    return Types(loaded, loaded, compute, compute, adapter, autocast)


def layer_of(setting: Setting) -> Kept:
    asked, length = setting.recipe.model.attn_implementation, setting.recipe.data.max_length
    return layer_activations(
        setting.shape,
        activation_types(setting),
        trained_adapter(setting.recipe),
        masked=asked == "sdpa" or setting.writes and asked != "eager",
        eager_length=length if asked == "eager" else 0,
    )


def _training(setting: Setting, states: States) -> dict[str, dict[str, Range]]:
    recipe, shape, tokens = setting.recipe, setting.shape, setting.tokens
    types, layer = activation_types(setting), layer_of(setting)
    checkpoints, trained = recipe.train.gradient_checkpointing, trained_adapter(recipe) is None

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
        moments["writing"] = common | writing(setting)
    return moments


def _weight_gradient(setting: Setting) -> Range:
    """Of the largest matrix, before it is added to what is there; of a 4-bit one what it is unpacked to."""
    shape, recipe = setting.shape, setting.recipe
    largest = max(matrix.weights for matrix in shape.matrices)
    if trained_adapter(recipe) and not recipe.model.quantization:
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
        trained = layer * (trained_adapter(setting.recipe) is None)
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
    trains_head = trained_adapter(recipe) is None
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


def writing(setting: Setting) -> dict[str, Range]:
    """What stands beside the weights while a model writes: keys and values of every token of every answer that is written at once; of one
    layer what its prompts are in while they are read; logits of one token of each. What vLLM takes, where it writes."""
    recipe, shape = setting.recipe, setting.shape
    if (share := _vllm_share(recipe)) is not None and (setting.gpu_bytes or not share):
        return {"vLLM": Range.exact(share * (setting.gpu_bytes or 0))}
    rows, prompt, answer = _writes_at_once(setting)
    width = 2 if setting.halves or setting.dtype != "float32" else 4
    size = rows * (prompt + answer) * shape.layers * 2 * shape.keys * width
    # What the MLP multiplies, its two factors, its input and what it is added to.
    inner = 3 * shape.intermediate * (shape.experts_per_token or 1) + 2 * shape.hidden
    read = rows * prompt * inner * width
    cache = {"generation cache": Range(size * SHORT_ROWS, size, size)}
    return {
        # transformers' cache grows by concatenation: one layer's old and new stand at once.
        "generation cache": _spread(setting, cache)["generation cache"] + Range(0, 0, size / shape.layers),
        "prompts as they are read": Range(read * SHORT_ROWS, read, read),
        # As they come, at the temperature, their logarithms and probabilities, in float32.
        "logits of one token": Range.exact(4 * 4 * rows * shape.vocabulary),
    }


def _writes_at_once(setting: Setting) -> tuple[int, int, int]:
    """(answers, tokens of a prompt, of an answer) at the most. In reinforcement learning a rank writes all its answers of a step at once,
    on-policy distillation those of a micro-batch."""
    recipe, length = setting.recipe, setting.recipe.data.max_length
    if recipe.task == "generate":
        return recipe.generate.batch_rows, length - recipe.generate.max_new_tokens, recipe.generate.max_new_tokens
    rows = recipe.train.per_device_train_batch_size
    if recipe.distill.on_policy:
        return rows, length, recipe.distill.on_policy.max_new_tokens
    answer = recipe.rlhf.max_completion_length
    return rows * setting.accumulation, length - answer, answer


def _vllm_share(recipe: Recipe) -> float | None:
    """Of the GPU; None where transformers writes, 0 where a server does."""
    if recipe.task == "rlhf":
        if recipe.rlhf.use_vllm is not True:
            return None
        return 0.0 if recipe.rlhf.vllm_mode == "server" else recipe.rlhf.vllm_gpu_memory_utilization
    on_policy = recipe.distill.on_policy
    return VLLM_SHARE if on_policy and on_policy.use_vllm is True else None


def _loading(setting: Setting) -> dict[str, Range]:
    recipe, backend = setting.recipe, setting.backend
    if recipe.model.quantization is None or not backend.shards_parameters:
        return {}
    counts = count_parameters(setting.shape, recipe)
    return {
        "weights": Range.exact(counts.in_4bit / 2 + counts.whole * BYTES[setting.dtype]),
        "4-bit constants": Range.exact(constant_bytes(counts, recipe.model.quantization)),
    } | others_beside(setting, BYTES[setting.dtype])
