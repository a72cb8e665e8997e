"""Tokenizer, base, 4-bit, adapter: built from the recipe, and checked when loaded and after the first backward. export.py has the way out.

The only package that imports peft and bitsandbytes (the latter through transformers). Weights are read from safetensors alone, and code
from a model's repository runs only where the recipe says `trust_remote_code: true`.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from harness.embedded import resolve
from harness.errors import ModelError, first_line
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.schema import Quantization
from harness.resources import find_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- tokenizer


def tokenizer_source(recipe: Recipe) -> str:
    model = recipe.model
    if model.tokenizer:
        return resolve(model.tokenizer)
    if model.init:
        path = Path(resolve(model.init)).expanduser()
        return str(path if path.is_dir() else path.parent)
    return resolve(model.name_or_path)


def load_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase":
    """The tokenizer, with the recipe's chat template in it if there is one, and a pad token.

    Raises ModelError when it cannot be loaded or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source, model = tokenizer_source(recipe), recipe.model
    revision = None if model.tokenizer else model.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model: no tokenizer at {source}: {_first_line(error)}; set model.tokenizer to a folder or hub id that has one"
        ) from error
    if recipe.data.chat_template:
        path = find_config(recipe.data.chat_template)
        if path is None:
            raise ModelError(f"data.chat_template = {recipe.data.chat_template}; no such file; give the path of a Jinja file")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizer.chat_template_file = str(path)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer at {source} has no end-of-sequence token, so nothing would teach the model to stop; set eos_token in it"
        )
    if tokenizer.pad_token_id is None:
        # Safe here: what is trained is decided by the template, never by token ids, so eos as pad masks no real eos.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    """The beginning of a library's message, with our remedy for the ones whose own names a Python argument, or a network."""
    first = first_line(error)
    if "cached files" in first or "offline mode" in first:
        return f"{first.rstrip('.')}; `harness fetch` of the recipe, where there is a network, brings it to the cache"
    return f"{first}; set model.trust_remote_code: true if you have read and trust it" if "custom code" in first else first


# ---- base

SCORE = "score"
"""What transformers calls the layer from a causal model's hidden states to classes, of which a reward model has one."""


def has_score(recipe: Recipe) -> bool:
    """Whether the model ends in a score, and not in logits over its vocabulary."""
    return recipe.task == "reward"


def auto_class(*, scores: bool):
    """(transformers' loader of a model that ends in a score, or in logits; what it is told besides)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})


def quantization_config(recipe: Recipe, dtype: str, *, shards: bool = False):
    """bitsandbytes' config for the recipe's model, or None."""
    # A new head is trained, which 4-bit weights cannot be.
    whole = [SCORE] if has_score(recipe) else None
    return four_bit_config(recipe.model.quantization, dtype, shards=shards, whole=whole) if recipe.model.quantization else None


def four_bit_config(asked: Quantization, dtype: str, *, shards: bool = False, whole: list[str] | None = None):
    """Unless `asked` says otherwise, weights that are sharded (shards) are stored in the compute type, because ZeRO-3 and FSDP2 shard no
    other, and the rest as bytes, which nothing that casts a model to another type touches. whole: modules that stay as they are."""
    import torch
    from transformers import BitsAndBytesConfig

    compute = asked.bnb_4bit_compute_dtype or dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        bnb_4bit_quant_storage=getattr(torch, asked.bnb_4bit_quant_storage or (compute if shards else "uint8")),
    )


def draw_weights(recipe: Recipe, folder: Path) -> None:
    """For `model.init`: draw weights from the config with the run's seed and keep them in `folder`: every backend starts from the same.

    Only rank 0 calls this, before anything is sharded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    if (folder / "config.json").is_file():
        return
    source = Path(resolve(recipe.model.init)).expanduser()
    if not (source / "config.json" if source.is_dir() else source).is_file():
        raise ModelError(f"model.init = {recipe.model.init}; holds no config.json; give a config file or its folder")
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=recipe.model.trust_remote_code)
    set_seed(recipe.train.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)


def load_base(
    recipe: Recipe, source: str, dtype: str, attention: str, backend: Backend, device: "torch.device", *, device_map: str | None = None
) -> "PreTrainedModel":
    """The base model of this rank; under ZeRO-3 its shard, if TrainingArguments were made before (they switch `zero.Init` on).

    device_map: `auto` spreads the layers over all devices of the machine; left out: as the trainer places them.
    Raises ModelError when there are no safetensors, no such model, or not enough of it.
    """
    import torch

    quantized = quantization_config(recipe, dtype, shards=backend.shards_parameters)
    loader, placed = auto_class(scores=has_score(recipe))
    placed |= {"device_map": device_map} if device_map else {}
    if not device_map and quantized is not None and not backend.shards_parameters:
        # bitsandbytes packs weights where they land; "auto" would spread one rank's model over all cards.
        placed["device_map"] = {"": device}
    try:
        model, loading = loader.from_pretrained(
            source,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            quantization_config=quantized,
            output_loading_info=True,
            **placed,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model: {source} cannot be loaded: {_first_line(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        several = "; a classifier of several classes is no reward model, begin from its base" if has_score(recipe) else ""
        raise ModelError(f"model: {source} has weights of other shapes than its config.json says{several}") from error
    missing = sorted(loading.get("missing_keys", ()))
    if has_score(recipe):
        check_score(model)
        missing = [name for name in missing if name != f"{SCORE}.weight"]
    if missing:
        raise ModelError(
            f"model: {source} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, …); they would be random; fetch it again"
        )
    if attention == "varlen" and not model._supports_flash_attn:
        # For a registered function transformers does not ask; masks of its own kind (chunks, prefixes) would be dropped in silence.
        raise ModelError(
            f"model.attn_implementation = varlen; {type(model).__name__} takes no flash kernels in transformers, and its masks would be "
            "lost; set model.attn_implementation to flex_attention or sdpa"
        )
    if quantized is not None:
        keep_4bit_weights_as_they_are(model)
    return model


def check_score(model: "PreTrainedModel") -> None:
    """Raises ModelError unless the model ends in one linear score, its own or a new one."""
    if not hasattr(getattr(model, SCORE, None), "weight"):
        raise ModelError(
            f"model: {type(model).__name__} has no layer `{SCORE}` over a causal model's hidden states, which task = reward trains; "
            "take a causal language model (Llama, Qwen, Mistral, Gemma, …)"
        )


def keep_4bit_weights_as_they_are(model: "PreTrainedModel") -> None:
    """Training and evaluation shall use the same weights.

    On a CPU with AVX512-BF16 bitsandbytes repacks a weight in place at its first evaluation, in a layout that neither a shard nor a width
    off the multiples of 32 survives, and computes in bfloat16 whatever the recipe says.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_4bit_survives_the_engine(model: "PreTrainedModel", engine_dtype: str | None) -> None:
    """Raises ModelError when packed 4-bit weights would be cast as if they were numbers: DeepSpeed and FSDP2 cast every floating-point
    tensor to `engine_dtype` (None: nothing is cast). On a GPU nothing else would say so."""
    for name, parameter in model.named_parameters():
        stored = str(parameter.dtype).removeprefix("torch.")
        if getattr(parameter, "quant_state", None) is not None and parameter.is_floating_point() and engine_dtype not in (None, stored):
            raise ModelError(
                f"model.quantization: {name} is packed into {stored}, and this backend casts what is floating-point to {engine_dtype}, "
                f"which destroys it; set model.dtype: {engine_dtype} and leave bnb_4bit_quant_storage out"
            )


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ModelError when a token has no row in the embedding, or pad and eos lie outside it."""
    rows, tokens = model.config.get_text_config().vocab_size, len(tokenizer)
    if tokens > rows:
        raise ModelError(
            f"model: the tokenizer has {tokens} tokens but the embedding has {rows} rows; token ids from {rows} up would fail or read "
            "foreign memory; use the tokenizer that belongs to this model"
        )
    if model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings() is not None:
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        if head is not embedding:
            raise ModelError(
                "model: config.json says that embeddings are tied, but head and embedding are two tensors; fix tie_word_embeddings"
            )


def check_positions(model: "PreTrainedModel", longest_row: int) -> None:
    """Raises ModelError when a row has more tokens than the model has positions for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest_row > positions:
        raise ModelError(
            f"data.max_length: the longest row has {longest_row} tokens and the model positions for {positions}; beyond them it was never "
            f"trained; set data.max_length: {positions}"
        )


def follow_tokenizer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", end_of_turn_ids: set[int] = frozenset()) -> list[int]:
    """Let the model stop where the tokenizer's turns end: configs and generation config name the same pad, eos and end of turn.

    Returns the ids at which the model as it was loaded would not have stopped.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is None:
        # A score is read at the last token that is no pad, by the id in the text model's config.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return []
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    added = [token for token in (tokenizer.eos_token_id, *sorted(end_of_turn_ids)) if token not in stops]
    stops = list(dict.fromkeys([*added, *stops]))
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return list(dict.fromkeys(added))


def settle_generation(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", end_of_turn_ids: set[int]) -> None:
    """Let a model that is asked stop where the tokenizer's turns end, and draw as whoever asks it says: its own penalties and cuts would
    count in silence."""
    from transformers import GenerationConfig

    follow_tokenizer(model, tokenizer, end_of_turn_ids)
    stops = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)


# ---- adapter


def attach_adapter(model: "PreTrainedModel", recipe: Recipe, backend: Backend, dtype: str):
    """The model with a LoRA adapter on it, a new one or the recipe's earlier one; the base is frozen, and so is an adapter beneath.

    The adapter is float32, except under ZeRO-3, whose gathers need one type for all persistent parameters (its masters are float32).
    Raises ModelError when a target does not exist, or the earlier one does not fit.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    from harness.model import adapters

    mode = recipe.model.adapter and recipe.model.adapter_mode
    earlier = adapters.find_adapter(recipe.model.adapter) if mode in ("continue", "stack") else None
    float32 = backend.zero_stage != 3
    if recipe.model.quantization:
        # Norms in float32 as in the QLoRA paper, except where one type must serve all; checkpointing is switched on by the trainer.
        if backend.shards_parameters:
            model.requires_grad_(False)
        else:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = adapters.earlier_config(earlier) if mode == "continue" else lora_config(recipe)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=float32)
    except ValueError as error:
        leaves = sorted({name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "weight")})
        what = "model.adapter" if mode == "continue" else "model.lora.target_modules"
        raise ModelError(f"{what}: {_first_line(error)}; modules with weights are: {', '.join(leaves)}") from error
    if mode == "continue":
        adapters.load_weights(adapted, earlier, adapters.LIVE)
    elif mode == "stack":
        adapters.stack_beneath(adapted, earlier, float32=float32)
    adapters.save_the_live_alone(adapted)
    settle_adapter_dtype(adapted, backend, dtype)
    if has_score(recipe):
        # Without autocast a float32 head would be handed the base's bfloat16.
        head = adapted.base_model.model.get_submodule(SCORE).modules_to_save[adapters.LIVE]
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))
    return adapted


def lora_config(recipe: Recipe):
    from peft import LoraConfig, TaskType

    lora = recipe.model.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.target_modules == "all-linear" else list(lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        # Of a classifier the head is trained whole and saved with the adapter.
        task_type=TaskType.SEQ_CLS if has_score(recipe) else TaskType.CAUSAL_LM,
    )


def settle_adapter_dtype(model, backend: Backend, dtype: str) -> None:
    """Give every trainable tensor the adapter's type; TRL casts them to bfloat16 for a 4-bit base, where AdamW would round updates away."""
    import torch

    wanted = getattr(torch, dtype) if backend.zero_stage == 3 else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def describe_parameters(model) -> str:
    """`Trained 33,280 of 293,312 parameters (11.3 %)`; counts whole tensors where this rank holds shares, and 4-bit weights as weights."""
    total = trained = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if getattr(parameter, "quant_state", None) is not None:
            count = math.prod(parameter.quant_state.shape)
        total += count
        trained += count if parameter.requires_grad else 0
    return f"trains {trained:,} of {total:,} parameters ({trained / max(total, 1):.2%})"


def check_4bit_is_sharded(model, world_size: int) -> str:
    """After preparation under ZeRO-3 or FSDP2: the bytes of 4-bit weights on this rank are a share of the whole.

    Raises ModelError when this rank holds (nearly) everything, which is what happens in silence when the storage type is uint8.
    """
    local = whole = 0
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ != "Params4bit" and not hasattr(parameter, "quant_state"):
            continue
        if ".lora_" in name:
            continue
        share = getattr(parameter, "ds_tensor", None)
        share = share if share is not None else parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local += share.numel() * share.element_size()
        whole += (getattr(parameter, "ds_numel", None) or parameter.numel()) * parameter.element_size()
    if whole == 0:
        raise ModelError(
            "model.quantization: after preparation no weight is in 4 bits; the base would be trained against in full precision"
        )
    # A share is rounded up so that it divides; 20 % is far above that and far below a whole copy on two ranks.
    if local > whole / world_size * 1.2 + 4096:
        raise ModelError(
            f"model.quantization: this rank holds {local:,} of {whole:,} bytes of 4-bit weights, not a share of 1/{world_size}; "
            "leave bnb_4bit_quant_storage out, so that it becomes the compute dtype"
        )
    return f"4-bit weights: {local:,} of {whole:,} bytes on this rank"


# ---- gradients


def check_gradients(model, *, gradient_of=lambda parameter: parameter.grad, reached: set[str] | None = None, finite: bool = True) -> None:
    """After the first backward: every trainable tensor has a finite gradient and no frozen one has.

    `gradient_of` looks a gradient up (under DeepSpeed `.grad` is empty). reached: names that the backward pass came to, where an absent
    gradient reads as zeros (DeepSpeed). finite: False under fp16, whose first scaled gradients may overflow, which its scaler handles.
    Raises ModelError that says which tensors.
    """
    import torch

    without, strange, frozen = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                frozen.append(name)
            continue
        # Looked up for each tensor even if it was not reached: under ZeRO that is a collective.
        gradient = gradient_of(parameter)
        if gradient is None or (reached is not None and name not in reached):
            without.append(name)
        elif finite and not torch.isfinite(gradient.to_local() if hasattr(gradient, "to_local") else gradient).all():
            strange.append(name)
    for names, what in (
        (without, "have no gradient, so they would never be trained"),
        (strange, "have a gradient that is not finite"),
        (frozen, "are frozen but have a gradient"),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ModelError(f"after the first backward {len(names)} tensors {what}: {shown}")
