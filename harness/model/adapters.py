"""An adapter that was trained earlier: found, checked against the base, put on it, kept as the reference, and exported as one with its
successor.

A policy may carry, by PEFT's names:

    default      the adapter that is trained; the only one that `save_pretrained` writes
    earlier      with `adapter_mode: stack` the adapter beneath it, frozen and active
    reference    a frozen copy of `default` as it began (add_reference_adapter), active inside `reference_of` alone
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.embedded import resolve
from harness.errors import ModelError
from harness.model.export import MANIFEST, digest_base, digest_file, verify_export
from harness.recipe import Recipe
from harness.recipe.rules import HEADS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIVE, EARLIER, REFERENCE = "default", "earlier", "reference"
ON_A_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "eva_pissa")
"""Initialisations that take something out of the base, which such an adapter needs again wherever it is loaded."""
NOT_TWO_AS_ONE = (
    "use_dora modules_to_save lora_bias layer_replication target_parameters trainable_token_indices alora_invocation_tokens kasa_config"
).split()
"""Settings of PEFT with which an adapter is more than B A x, so that two of them are not one of the sum of their ranks."""


# ---- found and checked


def find_adapter(name: str) -> Path:
    """The folder with PEFT's files that `model.adapter` means. Raises ModelError when it means none."""
    folder = Path(name).expanduser().resolve()
    inside = next((place for place in (folder, folder / "final") if (place / CONFIG).is_file()), None)
    if inside is None:
        what = "there is no such folder" if not folder.is_dir() else f"holds no {CONFIG}, itself or in final/"
        remedy = "a whole model is given as model.name_or_path" if (folder / "config.json").is_file() else "give the folder of an adapter"
        raise ModelError(f"model.adapter = {name}; {what}; {remedy}, such as runs/first/final")
    if (inside / "manifest.json").is_file():
        raise ModelError(
            f"model.adapter = {name}; is a checkpoint, which may hold a part of what the run's model is; give the run's folder, whose "
            "final/ is whole"
        )
    return inside


def check_is_no_adapter(name: str, source: str) -> None:
    """Raises ModelError when the base of a run is an adapter: what would be trained is neither the adapter nor the base."""
    config = Path(source) / CONFIG
    if config.is_file():
        base = json.loads(config.read_text()).get("base_model_name_or_path")
        raise ModelError(
            f"model.name_or_path = {name}; holds an adapter; give it as model.adapter, and the base that it was trained on ({base}) as "
            "model.name_or_path"
        )


@dataclass(frozen=True)
class Earlier:
    """An adapter that a run begins from; small and picklable."""

    folder: Path
    digest: str
    """Of its weights and its settings."""
    manifest: dict[str, Any] | None
    """harness.json, of an export of ours."""
    base: str | None
    """What it says that it was trained on."""


def load_earlier(recipe: Recipe, source: str) -> Earlier:
    """The recipe's adapter, whole, and of the base at `source` (a folder or a hub id). Reads files alone; rank 0 calls it.

    Raises ModelError for an adapter that is damaged, of another base, or of a kind that cannot be used so.
    """
    folder = find_adapter(recipe.model.adapter)
    manifest = verify_export(folder) if (folder / MANIFEST).is_file() else None
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder}: holds no {WEIGHTS}; weights are read from safetensors alone")
    try:
        settings = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG}: is no JSON ({error}); copy the adapter again") from error
    _check_base(recipe, source, folder, settings, manifest)
    _check_kind(recipe, folder, settings)
    return Earlier(folder, digest_adapter(folder), manifest, (manifest or {}).get("base") or settings.get("base_model_name_or_path"))


def digest_adapter(folder: Path) -> str:
    """Of its weights and its settings, wherever its base lies."""
    about = {key: value for key, value in json.loads((folder / CONFIG).read_text()).items() if key != "base_model_name_or_path"}
    return hashlib.sha256(f"{digest_file(folder / WEIGHTS)} {json.dumps(about, sort_keys=True)}".encode()).hexdigest()


def _check_base(recipe: Recipe, source: str, folder: Path, settings: dict, manifest: dict | None) -> None:
    """By the digest of its weights where both are known, else by its name."""
    asked, manifest = recipe.model.name_or_path, manifest or {}
    said = manifest.get("base") or settings.get("base_model_name_or_path")
    wanted, found = manifest.get("base_digest"), digest_base(source)
    if wanted and found:
        if wanted == found:
            return
        raise ModelError(
            f"model.adapter = {folder}; was trained on {said}, and the weights of model.name_or_path = {asked} are not those (their digest "
            "differs); give the base that it was trained on"
        )
    names = [_place(name) for name in (said, settings.get("base_model_name_or_path")) if name]
    if names and _place(source) not in names:
        raise ModelError(
            f"model.adapter = {folder}; was trained on {said}, and model.name_or_path is {asked}; give that base; where they are the same "
            f"weights in two places, write this place as base_model_name_or_path into {folder / CONFIG}"
        )


def _place(name: str) -> str:
    path = Path(resolve(name)).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def check_revision(earlier: Earlier, revision: str | None) -> None:
    """Raises ModelError when the adapter's base was read from another commit of the hub than `revision`, the one that is loaded."""
    manifest = earlier.manifest or {}
    trained_on = manifest.get("base_revision")
    if trained_on and revision and not manifest.get("base_digest") and trained_on != revision:
        raise ModelError(
            f"model.adapter = {earlier.folder}; was trained on commit {trained_on} of {earlier.base}, and {revision} is loaded; "
            f"set model.revision: {trained_on}"
        )


def _check_kind(recipe: Recipe, folder: Path, settings: dict) -> None:
    where, mode = f"model.adapter = {folder}", recipe.model.adapter_mode
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{where}; is of PEFT's kind {settings.get('peft_type')}; only LoRA can be gone on from")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(ON_A_CHANGED_BASE):
        raise ModelError(
            f"{where}; was begun with init_lora_weights = {begun}, which changes the base too; convert it to a plain LoRA with PEFT "
            "(save_pretrained, path_initial_model_for_weight_conversion), and give that"
        )
    if (settings.get("bias") or "none") != "none":
        raise ModelError(f"{where}; has bias = {settings['bias']}, so it is the base's own biases too; it cannot be gone on from")
    if mode == "merge":
        return
    whole = set(settings.get("modules_to_save") or ())
    for name in _tensor_names(folder):
        parts = set(name.split("."))
        if parts & set(HEADS):
            raise ModelError(f"{where}; holds {name}, and the fused loss reads the frozen head; set model.adapter_mode: merge")
        if ".lora_" not in name and not parts & whole:
            raise ModelError(f"{where}; holds {name}, a weight of its base; set model.adapter_mode: merge")
    if recipe.model.quantization and settings.get("use_dora"):
        raise ModelError(f"{where}; is DoRA, whose norms need whole weights; remove model.quantization")
    if mode == "stack":
        for key in NOT_TWO_AS_ONE:
            if settings.get(key):
                raise ModelError(
                    f"{where}; has {key} = {settings[key]}, and such a one cannot be made one LoRA with another; "
                    "set model.adapter_mode: merge"
                )


def _tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        return list(tensors.keys())


# ---- put on the base


def earlier_config(folder: Path) -> "LoraConfig":
    """PEFT's settings of an adapter whose weights are about to be loaded."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode, config.init_lora_weights = False, True
    return config


def load_weights(model: "PeftModel", folder: Path, name: str) -> None:
    """Into the adapter of this name. Raises ModelError unless every tensor of the file has its place and every place its tensor."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        found = set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{folder / WEIGHTS}: does not fit the base: {' '.join(str(error).split())[:300]}") from error
    lacking = [key for key in found.missing_keys if name in key.split(".")]
    if lacking or found.unexpected_keys:
        raise ModelError(
            f"{folder / WEIGHTS}: does not fit the base: {len(found.unexpected_keys)} tensors have no place "
            f"({', '.join(found.unexpected_keys[:2])}), {len(lacking)} places no tensor ({', '.join(lacking[:2])})"
        )


def stack_beneath(model: "PeftModel", folder: Path, *, float32: bool) -> None:
    """Put the adapter in `folder` beneath the one that is trained: frozen, and active together with it."""
    _add_frozen(model, EARLIER, earlier_config(folder), float32=float32)
    load_weights(model, folder, EARLIER)
    # The one that is trained first: transformers loads a checkpoint into the first that is active.
    model.base_model.set_adapter([LIVE, EARLIER])


def save_the_live_alone(model: "PeftModel") -> None:
    """PEFT's `save_pretrained` would write every adapter, which a resume would read back, and the base's own embedding beside one on it."""
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[LIVE], save_embedding_layers=False)


@contextlib.contextmanager
def live_alone(model) -> Iterator[None]:
    """Inside, a loader that asks which adapter is active hears of the trained one alone: a checkpoint holds that, and the first of several
    is taken with a warning. Forward passes are as before."""
    tuner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    if tuner is None:
        yield
        return
    before, tuner.active_adapter = tuner.active_adapter, LIVE
    try:
        yield
    finally:
        tuner.active_adapter = before


@contextlib.contextmanager
def trained_as_they_are(model) -> Iterator[None]:
    """Around the construction of a trainer: TRL casts an adapter on a 4-bit base to bfloat16, where AdamW rounds updates away, and with it
    what an earlier adapter has learnt. Afterwards each tensor that is trained is again what it was, where the trainer has put it."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    if not hasattr(model, "peft_config"):
        before = []
    yield
    for parameter, data in before:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def _add_frozen(model: "PeftModel", name: str, config: "LoraConfig", *, float32: bool) -> None:
    """Add an adapter that stays frozen, also where PEFT makes adapters active, or switches them off and on again, which thaws others."""
    model.add_adapter(name, config, autocast_adapter_dtype=float32)
    for layer in _switchable(model):
        if hasattr(layer, "frozen_peft_weight_names"):
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, name: layer.adapter_layer_names}
    for key, parameter in model.named_parameters():
        if name in key.split("."):
            parameter.requires_grad_(False)


def _switchable(model) -> list:
    """The modules that have an active adapter, of a model that may be wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


# ---- the reference


def add_reference_adapter(model: "PeftModel") -> str:
    """Give the policy a frozen copy of its adapter as it is now, and return its name. A stacked policy has one: the adapter beneath.

    Call it before the model is prepared for DDP or DeepSpeed, and in every life of a run: no checkpoint and no export holds the copy.
    """
    if EARLIER in model.peft_config:
        return EARLIER
    _add_frozen(model, REFERENCE, copy.deepcopy(model.peft_config[LIVE]), float32=False)
    parameters = dict(model.named_parameters())
    for name, live in parameters.items():
        if LIVE in name.split("."):
            copied = parameters[".".join(REFERENCE if part == LIVE else part for part in name.split("."))]
            copied.data = live.data.clone()
    return REFERENCE


@contextlib.contextmanager
def reference_of(model) -> Iterator[None]:
    """Inside, a forward pass is the reference's: the copy's if there is one, of a stacked policy the earlier adapter's alone, else the
    base's. `model` may be wrapped by DDP, DeepSpeed or FSDP2; call it under `torch.no_grad`.

    Which adapters are active is written where the layers look it up: PEFT's own `set_adapter` and `disable_adapter` also change what
    requires a gradient, which DDP and ZeRO have long taken note of. Raises ModelError for a policy without an adapter.
    """
    layers = _switchable(model)
    if not layers:
        raise ModelError("a policy without an adapter is not its own reference; load the reference as a model of its own")
    there = {name for layer in layers for name in layer._get_available_adapters()}
    active = [name for name in (REFERENCE, EARLIER) if name in there][:1]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = list(active), not active
        yield
    finally:
        for layer, was_active, was_disabled in before:
            layer._active_adapter, layer._disable_adapters = was_active, was_disabled


# ---- two as one


def concatenate_adapters(beneath: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """Make of the adapter in `folder`, which was trained above the one in `beneath`, the one that does what both do together.

    B2 A2 s2 + B1 A1 s1 = s2 [B2 B1] [A2; A1 s1/s2]: of the sum of the ranks, and exact where s1/s2 is a power of two (mostly 1), else
    rounded once. In the type of the later one, in which both were trained. Returns tensor name -> shape.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    configs = [LoraConfig.from_pretrained(str(place)) for place in (folder, beneath)]
    later, earlier = (_by_module(load_file(place / WEIGHTS)) for place in (folder, beneath))
    dtype = next(iter(later.values()))["A"][1].dtype
    scale, tensors, ranks = _scaling(configs[0], "", configs[0].r), {}, {}
    for module in sorted(later.keys() | earlier.keys()):
        parts = [later[module]] if module in later else []
        if module in earlier:
            (name_a, a), (name_b, b) = earlier[module]["A"], earlier[module]["B"]
            ratio = _scaling(configs[1], module, a.shape[0]) / scale
            parts.append({"A": (name_a, (a.float() * ratio).to(dtype)), "B": (name_b, b.to(dtype))})
        for side, dimension in (("A", 0), ("B", 1)):
            tensors[parts[0][side][0]] = torch.cat([part[side][1] for part in parts], dim=dimension).contiguous()
        ranks[module] = tensors[parts[0]["A"][0]].shape[0]
    config = _config_of_both(*configs, ranks, scale)
    config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _by_module(tensors: dict) -> dict[str, dict]:
    """Module -> {"A": (name, tensor [r, in]), "B": (name, tensor [out, r])}."""
    modules: dict[str, dict] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if not found:
            raise ModelError(f"the tensor {name} of an adapter is no part of a plain LoRA, so two cannot be made one")
        modules.setdefault(found[1], {})[found[2]] = (name, tensor)
    return modules


def _scaling(config: "LoraConfig", module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _config_of_both(later: "LoraConfig", earlier: "LoraConfig", ranks: dict[str, int], scale: float) -> "LoraConfig":
    """Of the sum of the ranks where both are; modules that only one has are named with theirs."""
    config = copy.deepcopy(later)
    config.r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != config.r}
    config.use_rslora, config.lora_alpha = False, _whole(scale * config.r)
    config.rank_pattern, config.alpha_pattern = others, {module: _whole(scale * rank) for module, rank in others.items()}
    narrowed = any(getattr(each, key) for each in (later, earlier) for key in ("exclude_modules", "layers_to_transform"))
    if narrowed or any(isinstance(each.target_modules, str) for each in (later, earlier)):
        config.target_modules = set(ranks)
    else:
        config.target_modules = set(later.target_modules) | set(earlier.target_modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number
