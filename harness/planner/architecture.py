"""A model by its shapes alone: read from config.json, counted in safetensors headers where the weights are there, never by loading it.

Known are the decoders of MODELS. Another architecture is planned only where a folder holds its weights, whose headers say every tensor's
shape; else it is refused by name. Nothing here imports torch or transformers.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import ModelError
from harness.planner.known import KNOWN
from harness.recipe.schema import Lora


@dataclass(frozen=True)
class Matrix:
    """The weights of one linear layer of each decoder layer, [rows, columns]: rows come out, columns go in."""

    name: str
    """The module's own name, as an adapter's target_modules say it."""
    columns: int
    rows: int
    bias: bool = False
    copies: int = 1
    """Experts."""
    is_linear: bool = True
    """An nn.Linear, which adapters and 4 bits reach. transformers 5 stacks experts into one tensor, which neither does."""

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class Architecture:
    name: str
    source: str
    """Where the shapes come from, for people."""
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP; of a mixture, of one expert."""
    vocabulary: int
    tied: bool
    matrices: tuple[Matrix, ...]
    """Of each layer."""
    block_norms: int = 2
    """Of each layer, as wide as `hidden`."""
    qk_norms: bool = False
    """Queries and keys are normalised, head by head."""
    experts: int = 0
    experts_per_token: int = 0
    has_head: bool = True
    """Hidden states become logits; a reward model has one score in place of them."""
    counted: int | None = None
    """Parameters in the headers of the weights, where those are at hand."""

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Weights of the head as a tensor of its own."""
        return 0 if self.tied or not self.has_head else self.embedding

    @property
    def layer_matrices(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def layer_linears(self) -> int:
        """Weights of a layer that are held in 4 bits, where the base is."""
        return sum(matrix.weights for matrix in self.matrices if matrix.is_linear)

    @property
    def layer_parameters(self) -> int:
        biases = sum(matrix.rows * matrix.copies for matrix in self.matrices if matrix.bias)
        return self.layer_matrices + biases + self.block_norms * self.hidden + 2 * self.head_dim * self.qk_norms

    @property
    def parameters(self) -> int:
        """Each tensor once: a tied head is the embedding."""
        computed = self.layers * self.layer_parameters + self.embedding + self.head + self.hidden + (0 if self.has_head else self.hidden)
        return self.counted if self.counted is not None and self.has_head else computed

    @property
    def visited(self) -> float:
        """Weights of the layers that one token is multiplied with."""
        share = self.experts_per_token / self.experts if self.experts else 1
        return self.layers * sum(matrix.weights * (share if matrix.copies > 1 else 1) for matrix in self.matrices)


# ---- from a config


@dataclass(frozen=True)
class _Kind:
    """How an architecture differs from Llama."""

    block_norms: int = 2
    qk_norms: bool = False
    bias: tuple[str, ...] = ()
    """Matrices that always have one."""
    fused: bool = False
    """One matrix for queries, keys and values, and one for gate and up."""
    tied: bool = False
    """Where config.json says nothing."""
    head_dim: int | None = None
    experts: bool = False
    shared_expert: bool = False


MODELS = {
    "llama": _Kind(),
    "mistral": _Kind(),
    "qwen2": _Kind(bias=("q_proj", "k_proj", "v_proj")),
    "qwen3": _Kind(qk_norms=True, head_dim=128),
    "gemma": _Kind(tied=True, head_dim=256),
    "gemma2": _Kind(tied=True, head_dim=256, block_norms=4),
    "gemma3_text": _Kind(tied=True, head_dim=256, block_norms=4, qk_norms=True),
    "phi3": _Kind(fused=True),
    "mixtral": _Kind(experts=True),
    "qwen2_moe": _Kind(experts=True, bias=("q_proj", "k_proj", "v_proj"), shared_expert=True),
    "qwen3_moe": _Kind(experts=True, qk_norms=True),
}
"""model_type -> shape; tests/planner holds each against the modules that transformers builds."""


def load_architecture(name: str, revision: str | None = None) -> Architecture:
    """Of a folder, a config.json or a hub id. Raises ModelError, with the remedy, where no shapes are to be found."""
    config, folder, source = find_config_of(name, revision)
    shapes = dict(tensor_shapes(folder)) if folder else {}
    kind = config.get("model_type")
    if kind in MODELS:
        shape = read_config(config, name, source)
        # Some that are tied were saved with a head (Qwen 3's small ones); it is not loaded.
        loaded = {tensor: size for tensor, size in shapes.items() if not (shape.tied and tensor == "lm_head.weight")}
        return replace(shape, counted=parameters_in(loaded))
    if shapes:
        return read_headers(config, shapes, name, f"{source} and its safetensors headers")
    inner = " (a model of text and images; only its text part could be planned)" if "text_config" in config else ""
    raise ModelError(
        f"{name}: no plan is known for model_type {kind!r}{inner}; known are {', '.join(MODELS)}. For another one give a folder that holds "
        "its weights, whose headers say their shapes"
    )


def find_config_of(name: str, revision: str | None = None) -> tuple[dict, Path | None, str]:
    """(the content of config.json, the folder that it lies in, where that is). Raises ModelError."""
    path = Path(name).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else _hub_folder(name, revision)
    if folder is not None and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        # An adapter: what is loaded is its base.
        return find_config_of(_read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    file = path if path.is_file() else folder / "config.json" if folder else None
    if file is not None and file.is_file():
        return _read_json(file), folder, str(file)
    if name in KNOWN:
        return KNOWN[name], None, "shapes known to harness, no config.json at hand"
    if folder is not None or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name}: holds no config.json, or is not there; give the folder of a model, or an id on the hub")
    raise ModelError(
        f"{name}: there is no config.json of it on this machine, neither as a folder nor in the hub's cache; give a local folder, or "
        f"download its config.json first (hf download {name} config.json)"
    )


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no object")
    return content


def _hub_folder(name: str, revision: str | None) -> Path | None:
    """Where the hub's cache keeps a model, by its documented layout; huggingface_hub itself takes a sixth of a second to import."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser() / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = cache / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() else None


def read_config(config: dict, name: str, source: str) -> Architecture:
    """Raises ModelError that names the key that is missing, or what of the config is not planned."""
    kind = MODELS[config["model_type"]]

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or value <= 0:
            raise ModelError(f"{source}: {key} = {value!r}; a plan needs it as a whole number above 0")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim = number("head_dim", kind.head_dim or hidden // heads)
    shape = Architecture(
        name=name,
        source=source,
        model_type=config["model_type"],
        hidden=hidden,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate=number("moe_intermediate_size" if kind.experts and "moe_intermediate_size" in config else "intermediate_size"),
        vocabulary=number("vocab_size"),
        tied=config.get("tie_word_embeddings", kind.tied),
        matrices=(),
        block_norms=kind.block_norms,
        qk_norms=kind.qk_norms,
        experts=number("num_experts", config.get("num_local_experts")) if kind.experts else 0,
        experts_per_token=number("num_experts_per_tok") if kind.experts else 0,
    )
    if kind.experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise ModelError(f"{source}: layers without experts (mlp_only_layers, decoder_sparse_step) among others; that is not planned")
    matrices = (*_attention(shape, kind, config), *(_experts(shape, kind, config) if kind.experts else _mlp(shape, kind, config)))
    return replace(shape, matrices=matrices)


def _attention(shape: Architecture, kind: _Kind, config: dict) -> Iterator[Matrix]:
    everywhere = bool(config.get("attention_bias", False))
    if kind.fused:
        yield Matrix("qkv_proj", shape.hidden, shape.queries + 2 * shape.keys)
    else:
        for name, rows in (("q_proj", shape.queries), ("k_proj", shape.keys), ("v_proj", shape.keys)):
            yield Matrix(name, shape.hidden, rows, everywhere or name in kind.bias)
    yield Matrix("o_proj", shape.queries, shape.hidden, everywhere)


def _mlp(shape: Architecture, kind: _Kind, config: dict, width: int | None = None) -> Iterator[Matrix]:
    width, bias = width or shape.intermediate, bool(config.get("mlp_bias", False))
    if kind.fused:
        yield Matrix("gate_up_proj", shape.hidden, 2 * width)
    else:
        yield Matrix("gate_proj", shape.hidden, width, bias)
        yield Matrix("up_proj", shape.hidden, width, bias)
    yield Matrix("down_proj", width, shape.hidden, bias)


def _experts(shape: Architecture, kind: _Kind, config: dict) -> Iterator[Matrix]:
    yield Matrix("gate", shape.hidden, shape.experts, is_linear=False)
    yield Matrix("experts.gate_up_proj", shape.hidden, 2 * shape.intermediate, copies=shape.experts, is_linear=False)
    yield Matrix("experts.down_proj", shape.intermediate, shape.hidden, copies=shape.experts, is_linear=False)
    if kind.shared_expert:
        yield from _mlp(shape, kind, config, config["shared_expert_intermediate_size"])
        yield Matrix("shared_expert_gate", shape.hidden, 1)


def as_reward_model(shape: Architecture) -> Architecture:
    """With a score in place of the head."""
    return replace(shape, has_head=False)


def read_adapter(name: str) -> Lora:
    """Of an earlier adapter what decides its size: a run's folder, its `final`, or a LoRA folder of PEFT. Raises ModelError."""
    path = Path(name).expanduser()
    file = next((folder / "adapter_config.json" for folder in (path, path / "final") if (folder / "adapter_config.json").is_file()), None)
    if file is None:
        raise ModelError(f"model.adapter = {name}; there is no adapter_config.json in it, which says how large it is; give a LoRA folder")
    config = _read_json(file)
    targets = config.get("target_modules") or "all-linear"
    return Lora(
        r=config["r"],
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=targets if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets),
        use_dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )


# ---- from the headers of weights


def tensor_shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor that a model or an adapter is loaded from; of a file that is none, nothing: loading it will say so."""
    for path in _weight_files(folder):
        with open(path, "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, path.stat().st_size)))
            except (struct.error, ValueError):
                continue
        yield from ((name, tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _weight_files(folder: Path) -> list[Path]:
    """As transformers chooses: model.safetensors, or the shards of its index; Mistral's repositories hold all weights a second time, in
    consolidated.safetensors. None of a model whose shards are not all there: a part of the weights would be taken for the whole."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    shards = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
    return shards if all(shard.is_file() for shard in shards) else []


def parameters_in(shapes: dict[str, list[int]]) -> int | None:
    """None where there are no weights, or they were quantised when they were saved, so that shapes are not those of the weights."""
    if not shapes or any(name.endswith(("absmax", "qweight", "quant_map", "_scale_inv")) or ".quant_state" in name for name in shapes):
        return None
    return sum(math.prod(shape) for shape in shapes.values())


def read_headers(config: dict, shapes: dict[str, list[int]], name: str, source: str) -> Architecture:
    """An architecture that is not known, by its tensors. Raises ModelError unless all layers are alike."""
    counted = parameters_in(shapes)
    if counted is None:
        raise ModelError(f"{name}: its weights are quantised, and model_type {config.get('model_type')!r} is not known by its config alone")
    keys = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [key for key in keys if not isinstance(config.get(key), int)]:
        raise ModelError(f"{name}: no plan is known for model_type {config.get('model_type')!r}, whose config has no {', '.join(missing)}")
    by_layer: dict[str, dict[str, list[int]]] = {}
    for tensor, shape in shapes.items():
        before, _, after = tensor.partition(".layers.")
        if after:
            number, _, rest = after.partition(".")
            by_layer.setdefault(f"{before}.{number}", {})[rest] = shape
    kinds = {json.dumps(sorted(layer.items())) for layer in by_layer.values()}
    if len(kinds) != 1:
        raise ModelError(f"{name}: its layers are of {len(kinds)} kinds, and model_type {config.get('model_type')!r} is not known here")
    layer = next(iter(by_layer.values()))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    matrices = tuple(
        Matrix(tensor.removesuffix(".weight").split(".")[-1], shape[1], shape[0], f"{tensor.removesuffix('.weight')}.bias" in layer)
        for tensor, shape in layer.items()
        if len(shape) == 2
    )
    return Architecture(
        name=name,
        source=source,
        model_type=str(config.get("model_type")),
        hidden=hidden,
        layers=len(by_layer),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=not any("lm_head" in tensor for tensor in shapes),
        matrices=matrices,
        block_norms=sum(shape == [hidden] and tensor.endswith("norm.weight") for tensor, shape in layer.items()) or 2,
        qk_norms=any("q_norm" in tensor for tensor in layer),
        counted=counted,
    )
