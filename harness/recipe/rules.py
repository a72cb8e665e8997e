"""What no single field can say: combinations that cannot work, each refused with its reason and the remedy.

A rule yields `dotted.key = value; reason; remedy`. Those of single tasks are in `harness.recipe.task_rules`. What depends on the machine
(ranks, GPUs) is checked where the machine is known, in `harness.launcher`.
"""

from collections.abc import Iterator

from harness.errors import RecipeError
from harness.recipe.backend import Backend, load_backend
from harness.recipe.rlhf_rules import rlhf_backend_rules, rlhf_rules
from harness.recipe.schema import Checkpoint, Recipe
from harness.recipe.task_rules import (
    compute_type_rules,
    format_rules,
    generate_rules,
    no_teacher_rules,
    other_task_rules,
    preference_rules,
    teacher_rules,
)
from harness.resources import find_config

HEADS = ("lm_head", "embed_out", "output")
"""What the layer from hidden states to logits is called."""
METRICS = {
    "sft": ("eval/loss", "eval/mean_token_accuracy", "eval/entropy"),
    "distill": ("eval/loss", "eval/kl", "eval/top1_agreement", "eval/overlap"),
    "dpo": ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/accuracies"),
    "kto": ("eval/loss", "eval/rewards/margins"),
    "reward": ("eval/loss", "eval/accuracy"),
    "rlhf": ("eval/reward",),
}
CALL_METRICS = ("eval/exact_match", "eval/valid_json", "eval/valid_schema")
"""Of `train.eval_tool_calls`. Without right_abstention, which a model that never calls has whole."""
SCHEDULER_KEYS = {
    "cosine": {"num_cycles"},
    "cosine_with_min_lr": {"num_cycles", "min_lr", "min_lr_rate"},
    "warmup_stable_decay": {"num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"},
    "polynomial": {"power", "lr_end"},
}
TASK_RULES = {"distill": (teacher_rules,), "rlhf": (no_teacher_rules, rlhf_rules)}
TASK_RULES |= dict.fromkeys(("dpo", "kto", "reward"), (no_teacher_rules, preference_rules))
_NO_EVAL_DATA = "there is nothing to evaluate on; give data.eval, data.eval_fraction or data.eval_rows"


def check_rules(recipe: Recipe) -> list[str]:
    """Every rule that the recipe breaks, in the order of its sections; empty when all hold."""
    if recipe.task == "generate":
        rules = (_type_rules, _data_rules, format_rules, generate_rules, other_task_rules)
    else:
        rules = (
            _model_rules,
            _earlier_adapter_rules,
            _type_rules,
            _lora_rules,
            _data_rules,
            format_rules,
            *TASK_RULES.get(recipe.task, (no_teacher_rules,)),
            other_task_rules,
            _schedule_rules,
            _batch_rules,
            _precision_rules,
            _evaluation_rules,
            _checkpoint_rules,
        )
    problems = [problem for rule in rules for problem in rule(recipe)]
    try:
        backend = load_backend(recipe.backend)
    except RecipeError as error:
        return [*problems, f"backend = {error}"]
    return problems + check_backend_rules(recipe, backend)


def check_backend_rules(recipe: Recipe, backend: Backend) -> list[str]:
    """Every rule that the recipe breaks under this backend, which a launcher's own config may have put in place of the recipe's."""
    return [problem for rule in BACKEND_RULES for problem in rule(recipe, backend)]


def _model_rules(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if (model.name_or_path is None) == (model.init is None):
        yield "model: give exactly one of `name_or_path` (weights that exist) and `init` (a config from which weights are drawn)"
    if model.init and model.lora:
        yield "model.lora: an adapter on random weights learns little and saves only itself; train `init` models in full"
    if model.init and model.quantization:
        yield "model.quantization: random weights must be trained, and 4-bit weights cannot be; remove it"
    if model.init and model.revision:
        yield f"model.revision = {model.revision}; `init` draws weights from a config, which has no revision; remove it"
    if model.quantization and not model.trains_adapter:
        yield (
            "model.quantization: 4-bit weights cannot be trained; add a `model.lora` section (QLoRA), or remove this for full fine-tuning"
        )


def _earlier_adapter_rules(recipe: Recipe) -> Iterator[str]:
    model, mode = recipe.model, recipe.model.adapter_mode
    if model.adapter is None:
        if mode != "continue":
            yield f"model.adapter_mode = {mode}; there is no earlier adapter; give its folder as model.adapter, or remove this"
        return
    if model.init:
        yield f"model.adapter = {model.adapter}; it was trained on weights that exist, and `init` draws others; give model.name_or_path"
    if mode == "continue" and model.lora:
        yield (
            "model.lora: the adapter that is continued has a rank and targets of its own; remove this, or set adapter_mode: stack to train "
            "a new one above it"
        )
    if mode == "stack" and not model.lora:
        yield "model.adapter_mode = stack; say what is trained above the earlier adapter: model.lora (or use adapter_mode: continue)"
    if mode == "stack" and model.lora:
        for key in ("use_dora", "modules_to_save"):
            if getattr(model.lora, key):
                yield (
                    f"model.lora.{key} = {getattr(model.lora, key)}; with adapter_mode: stack both are exported as one plain LoRA, which "
                    "cannot hold it; remove it, or use adapter_mode: merge"
                )
    if mode == "merge" and model.quantization:
        yield (
            "model.adapter_mode = merge; an adapter cannot be merged into 4-bit weights without rounding it away; use stack, "
            "which keeps it as it is above them, or remove model.quantization"
        )


def _type_rules(recipe: Recipe) -> Iterator[str]:
    yield from compute_type_rules("model", recipe.model)


def _lora_rules(recipe: Recipe) -> Iterator[str]:
    lora = recipe.model.lora
    if lora is None:
        return
    targets = () if lora.target_modules == "all-linear" else lora.target_modules
    if lora.target_modules == ():
        yield "model.lora.target_modules = []; an adapter on nothing trains nothing; name modules or write all-linear"
    for name in targets:
        if name.split(".")[-1] in HEADS:
            yield (
                f"model.lora.target_modules holds {name}; the fused loss multiplies by the head's own weight, so an adapter on it would "
                "never be trained; remove it"
            )
    for name in sorted(set(targets) & set(lora.modules_to_save)):
        yield f"model.lora.modules_to_save: {name} also stands in target_modules; a module is adapted or trained whole; keep it in one"
    for name in sorted(set(lora.modules_to_save) & set(HEADS)):
        yield f"model.lora.modules_to_save holds {name}; the fused loss reads the frozen head, so its copy would never train; remove it"
    if recipe.model.quantization and lora.use_dora:
        yield (
            "model.lora.use_dora = true; DoRA's norms need whole weights, and 4-bit ones would be unpacked at every step; "
            "use plain LoRA, or remove model.quantization"
        )


def _data_rules(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    given = [name for name, value in (("eval", data.eval), ("eval_fraction", data.eval_fraction), ("eval_rows", data.eval_rows)) if value]
    if len(given) > 1:
        yield f"data.{given[1]}: {' and '.join(given)} each say what is held out; keep one"
    if data.packing is True and recipe.model.attn_implementation == "eager":
        yield (
            "data.packing = true; with attn_implementation eager the whole [T, T] matrix of a pack stands in memory; "
            "use auto, varlen, sdpa or flash_attention_2"
        )
    if data.chat_template and find_config(data.chat_template) is None:
        yield f"data.chat_template = {data.chat_template}; no such file; give the path of a Jinja file, or the name of a shipped one"
    if data.chat_template and data.train_on == "all":
        yield "data.train_on = all; a chat_template of your own says what is trained by its {% generation %} marks; remove one of the two"


def _schedule_rules(recipe: Recipe) -> Iterator[str]:
    train, scheduler = recipe.train, recipe.train.lr_scheduler_type
    if train.max_steps and train.num_train_epochs:
        yield f"train.num_train_epochs = {train.num_train_epochs}; max_steps = {train.max_steps} already says when to stop; keep one"
    if train.warmup_steps is not None and train.warmup_ratio is not None:
        yield f"train.warmup_ratio = {train.warmup_ratio}; warmup_steps = {train.warmup_steps} says the same thing; keep one"
    if train.max_steps and train.warmup_steps and train.warmup_steps >= train.max_steps:
        yield (
            f"train.warmup_steps = {train.warmup_steps}; the run ends after max_steps = {train.max_steps}, before the rate has risen; "
            "make it smaller"
        )
    for key in ("warmup_steps", "warmup_ratio"):
        if getattr(train, key) and scheduler == "constant":
            yield f"train.{key} = {getattr(train, key)}; the scheduler constant has no warm-up; use constant_with_warmup"
    kwargs = {key: value for key, value in train.lr_scheduler_kwargs if value is not None}
    known = SCHEDULER_KEYS.get(scheduler, set())
    for key in sorted(kwargs.keys() - known):
        takes = ", ".join(sorted(known)) or "nothing here"
        yield f"train.lr_scheduler_kwargs.{key}: the scheduler {scheduler} takes {takes}; remove it or choose another scheduler"
    if scheduler == "cosine_with_min_lr" and not kwargs.keys() & {"min_lr", "min_lr_rate"}:
        yield "train.lr_scheduler_type = cosine_with_min_lr; say the floor: lr_scheduler_kwargs.min_lr_rate: 0.1"
    if {"min_lr", "min_lr_rate"} <= kwargs.keys():
        yield "train.lr_scheduler_kwargs.min_lr: min_lr_rate also says the floor; keep one"
    for key in ("min_lr", "lr_end"):
        if key in kwargs and kwargs[key] >= train.learning_rate:
            yield f"train.lr_scheduler_kwargs.{key} = {kwargs[key]}; must be below learning_rate = {train.learning_rate}"
    if scheduler == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        yield "train.lr_scheduler_type = warmup_stable_decay; say how long it decays: lr_scheduler_kwargs.num_decay_steps"


def _batch_rules(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.global_batch_size and train.gradient_accumulation_steps:
        yield (
            f"train.gradient_accumulation_steps = {train.gradient_accumulation_steps}; it follows from global_batch_size = "
            f"{train.global_batch_size} and the number of ranks; keep one"
        )
    if train.global_batch_size and train.global_batch_size % train.per_device_train_batch_size:
        yield (
            f"train.global_batch_size = {train.global_batch_size}; no number of ranks makes it from per_device_train_batch_size = "
            f"{train.per_device_train_batch_size}; make it a multiple"
        )


def _precision_rules(recipe: Recipe) -> Iterator[str]:
    train, model = recipe.train, recipe.model
    if train.fp16 and train.bf16 is True:
        yield "train.fp16 = true; bf16 is true as well; keep one (bf16 where the card has it)"
    if train.fp16 and model.dtype == "float16" and not model.trains_adapter:
        yield "model.dtype = float16; fp16 training needs float32 weights to scale its gradients; use float32 with fp16, or bfloat16"
    if train.fp16 and model.dtype == "bfloat16":
        yield "train.fp16 = true; model.dtype is bfloat16; use bf16: true"
    if train.bf16 is True and model.dtype == "float16":
        yield "train.bf16 = true; model.dtype is float16; make it bfloat16 or float32"
    if train.gradient_checkpointing_kwargs.use_reentrant is not None and not train.gradient_checkpointing:
        yield "train.gradient_checkpointing_kwargs.use_reentrant: gradient_checkpointing is off; switch it on or remove this"
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if train.optim in ("adafactor", "sgd") and getattr(train, key) != type(train).model_fields[key].default:
            yield f"train.{key} = {getattr(train, key)}; the optimiser {train.optim} has none; remove it"


def _evaluation_rules(recipe: Recipe) -> Iterator[str]:
    train, data = recipe.train, recipe.data
    held_out = bool(data.eval or data.eval_fraction or data.eval_rows)
    for key in ("eval_steps", "eval_on_start", "eval_tool_calls", "metric_for_best_model", "early_stopping_patience"):
        if getattr(train, key) and not held_out:
            yield f"train.{key} = {getattr(train, key)}; {_NO_EVAL_DATA}"
        elif getattr(train, key) and train.eval_strategy == "no":
            yield f"train.{key} = {getattr(train, key)}; eval_strategy is no, so nothing is ever measured; remove one of the two"
    if train.eval_strategy in ("steps", "epoch") and not held_out:
        yield f"train.eval_strategy = {train.eval_strategy}; {_NO_EVAL_DATA}"
    if train.eval_strategy == "steps" and not train.eval_steps:
        yield "train.eval_strategy = steps; say how often: eval_steps"
    if train.eval_steps and train.eval_strategy == "epoch":
        yield f"train.eval_steps = {train.eval_steps}; eval_strategy is epoch; make it steps, or remove one"
    if train.early_stopping_patience and not train.metric_for_best_model:
        yield "train.early_stopping_patience: say by which metric: metric_for_best_model: eval/loss"
    if train.early_stopping_threshold and not train.early_stopping_patience:
        yield "train.early_stopping_threshold: has no effect without early_stopping_patience; add it or remove this"
    if train.greater_is_better is not None and not train.metric_for_best_model:
        yield "train.greater_is_better: has no effect without metric_for_best_model; add it or remove this"
    metrics = METRICS[recipe.task] + (CALL_METRICS if recipe.task != "reward" else ())
    if train.metric_for_best_model in CALL_METRICS and not train.eval_tool_calls:
        yield f"train.metric_for_best_model = {train.metric_for_best_model}; nothing measures it; say on how many rows: eval_tool_calls: 99"
    if train.metric_for_best_model and train.metric_for_best_model not in metrics:
        yield f"train.metric_for_best_model = {train.metric_for_best_model}; must be {', '.join(metrics[:-1])} or {metrics[-1]}"


def _checkpoint_rules(recipe: Recipe) -> Iterator[str]:
    checkpoint = recipe.checkpoint
    given = [key for key in ("every_steps", "every_minutes", "auto") if getattr(checkpoint, key)]
    if len(given) > 1:
        yield f"checkpoint.{given[1]} = {getattr(checkpoint, given[1])}; checkpoint.{given[0]} is given as well; remove one of the two"
    if checkpoint.auto is False and not given and not recipe.train.metric_for_best_model:
        for key in ("keep", "keep_every"):
            if getattr(checkpoint, key) != getattr(Checkpoint(), key):
                yield f"checkpoint.{key} = {getattr(checkpoint, key)}; with auto: false no checkpoint is written; remove one of the two"


# ---- what the backend can and cannot


def _sharded_4bit_rules(recipe: Recipe, backend: Backend) -> Iterator[str]:
    model, quantization = recipe.model, recipe.model.quantization
    if quantization is None or not backend.shards_parameters:
        return
    storage = quantization.bnb_4bit_quant_storage
    compute = quantization.bnb_4bit_compute_dtype or (model.dtype if model.dtype != "auto" else None)
    if storage == "uint8":
        yield (
            f"model.quantization.bnb_4bit_quant_storage = uint8; backend {backend.name} cannot shard it and every GPU would hold the whole "
            "base; leave it out (it becomes the compute dtype)"
        )
    elif storage and compute and storage != compute:
        yield (
            f"model.quantization.bnb_4bit_quant_storage = {storage}; backend {backend.name} shards only weights of one type, and the "
            f"compute dtype is {compute}; leave it out"
        )
    if recipe.train.bf16 is True and model.dtype == "float32":
        yield (
            f"model.dtype = float32; backend {backend.name} casts what it shards to bfloat16 (train.bf16), which would destroy weights "
            "that are packed into float32; make it bfloat16"
        )
    if compute and model.dtype not in ("auto", compute):
        yield (
            f"model.quantization.bnb_4bit_compute_dtype = {compute}; backend {backend.name} needs it equal to model.dtype = {model.dtype}; "
            "leave it out"
        )


def _zero3_rules(recipe: Recipe, backend: Backend) -> Iterator[str]:
    if backend.zero_stage != 3:
        return
    if recipe.model.trains_adapter and recipe.train.gradient_checkpointing_kwargs.use_reentrant is False:
        yield (
            "train.gradient_checkpointing_kwargs.use_reentrant = false; an adapter under ZeRO-3 needs reentrant checkpointing "
            "(parameters are gathered anew); leave it out"
        )
    if not backend.saves_16bit:
        yield (
            f"backend = {recipe.backend}; {backend.name} does not gather weights when it saves, and the export would be empty (the 40-byte "
            "adapter); set zero3_save_16bit_model: true in it"
        )


def _optimizer_rules(recipe: Recipe, backend: Backend) -> Iterator[str]:
    optim = recipe.train.optim
    if backend.offloads and optim not in ("adamw_torch_fused", "adamw_torch"):
        yield f"train.optim = {optim}; backend {backend.name} keeps the optimiser on the host, where only AdamW runs; use adamw_torch"
    elif backend.kind == "fsdp" and ("bit" in optim):
        yield f"train.optim = {optim}; bitsandbytes' optimisers are not sharded by FSDP2; use adamw_torch_fused"


def _engine_rules(recipe: Recipe, backend: Backend) -> Iterator[str]:
    train = recipe.train
    if backend.kind == "deepspeed" and train.torch_compile:
        yield f"train.torch_compile = true; backend {backend.name} hooks into the model, which breaks every graph; use single, ddp or fsdp2"
    if backend.kind == "deepspeed" and train.full_determinism:
        yield "train.full_determinism = true; DeepSpeed's reductions are not bound to an order; use single or ddp"
    if backend.kind == "fsdp" and train.fp16:
        yield "train.fp16 = true; FSDP2 has no gradient scaler for shards; use bf16"
    if backend.kind == "fsdp" and train.eval_tool_calls:
        yield (
            f"train.eval_tool_calls = {train.eval_tool_calls}; under FSDP2 all shards would be gathered anew for every token; use ddp or "
            "ZeRO, or evaluate what is exported"
        )
    if backend.kind == "fsdp" and recipe.distill.on_policy:
        yield (
            f"distill.on_policy: under backend {backend.name} all weights would be gathered anew for every token that is written; use ddp "
            "or zero2, or zero3, which gathers them once a step"
        )


BACKEND_RULES = (_sharded_4bit_rules, _zero3_rules, _optimizer_rules, _engine_rules, rlhf_backend_rules)
