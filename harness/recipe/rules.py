"""What no single field can say: combinations that cannot work, each refused with its reason and the remedy.

A rule yields `dotted.key = value; reason; remedy`. What depends on the machine (ranks, GPUs) is checked where the machine is known, in
`harness.launcher`.
"""

import re
from collections.abc import Iterator

from harness.errors import RecipeError
from harness.recipe.backend import Backend, load_backend
from harness.recipe.schema import Checkpoint, Data, Distill, Generate, Recipe, Teacher
from harness.resources import find_config

HEADS = ("lm_head", "embed_out", "output")
"""What the layer from hidden states to logits is called."""
METRICS = {
    "sft": ("eval/loss", "eval/mean_token_accuracy", "eval/entropy"),
    "distill": ("eval/loss", "eval/kl", "eval/top1_agreement", "eval/overlap"),
}
CALL_METRICS = ("eval/exact_match", "eval/valid_json", "eval/valid_schema")
"""Of `train.eval_tool_calls`. Without right_abstention, which a model that never calls has whole."""
SCHEDULER_KEYS = {
    "cosine": {"num_cycles"},
    "cosine_with_min_lr": {"num_cycles", "min_lr", "min_lr_rate"},
    "warmup_stable_decay": {"num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"},
    "polynomial": {"power", "lr_end"},
}
_NO_EVAL_DATA = "there is nothing to evaluate on; give data.eval, data.eval_fraction or data.eval_rows"


def check_rules(recipe: Recipe) -> list[str]:
    """Every rule that the recipe breaks, in the order of its sections; empty when all hold."""
    rules = (
        _GENERATE_RULES
        if recipe.task == "generate"
        else (
            _model_rules,
            _compute_type_rules,
            _lora_rules,
            _data_rules,
            _teacher_rules if recipe.task == "distill" else _no_teacher_rules,
            _no_generate_rules,
            _schedule_rules,
            _batch_rules,
            _precision_rules,
            _evaluation_rules,
            _checkpoint_rules,
        )
    )
    problems = [problem for rule in rules for problem in rule(recipe)]
    try:
        backend = load_backend(recipe.backend)
    except RecipeError as error:
        return [*problems, f"backend = {error}"]
    return problems + check_backend_rules(recipe, backend)


def check_backend_rules(recipe: Recipe, backend: Backend) -> list[str]:
    """Every rule that the recipe breaks under this backend, which a launcher's own config may have put in place of the recipe's."""
    return [problem for rule in (_sharded_4bit_rules, _zero3_rules, _optimizer_rules, _engine_rules) for problem in rule(recipe, backend)]


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
    if model.quantization and not model.lora:
        yield (
            "model.quantization: 4-bit weights cannot be trained; add a `model.lora` section (QLoRA), or remove this for full fine-tuning"
        )


def _compute_type_rules(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.quantization and model.quantization.bnb_4bit_compute_dtype == "float16" and model.dtype == "bfloat16":
        yield (
            "model.quantization.bnb_4bit_compute_dtype = float16; model.dtype is bfloat16 and the two would mix in every layer; "
            "make them equal"
        )


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


def _no_teacher_rules(recipe: Recipe) -> Iterator[str]:
    if recipe.teacher:
        yield f"teacher.name_or_path = {recipe.teacher.name_or_path}; task = {recipe.task} learns from no teacher; set task: distill"
    for key, value in recipe.distill:
        if value != Distill.model_fields[key].default:
            yield f"distill.{key} = {value}; task = {recipe.task} learns from no teacher; set task: distill, or remove this"


def _teacher_rules(recipe: Recipe) -> Iterator[str]:
    teacher, distill = recipe.teacher, recipe.distill
    if teacher is None:
        yield "teacher: is required with task = distill; say who teaches: teacher.name_or_path"
        return
    if teacher.quantization and teacher.quantization.bnb_4bit_compute_dtype == "float16" and teacher.dtype == "bfloat16":
        yield (
            "teacher.quantization.bnb_4bit_compute_dtype = float16; teacher.dtype is bfloat16 and the two would mix in every layer; "
            "make them equal"
        )
    if distill.beta is not None and distill.divergence != "jsd":
        yield f"distill.beta = {distill.beta}; {distill.divergence} has none; set divergence: jsd, or remove this"
    if recipe.train.loss_type != "nll":
        yield f"train.loss_type = {recipe.train.loss_type}; the loss of task = distill stands in the section distill; remove this"
    if teacher.server:
        yield from _server_rules(teacher)
    elif teacher.source == "served":
        yield "teacher.source = served; say where it is asked: teacher.server.url"
    yield from _resident_rules(teacher, distill) if teacher.source == "resident" else _head_rules(teacher, distill)
    yield from _on_policy_rules(recipe) if distill.on_policy else ()


def _server_rules(teacher: Teacher) -> Iterator[str]:
    server = teacher.server
    if not re.match("https?://.", server.url):
        yield f"teacher.server.url = {server.url}; must begin with http:// or https:// (http://host:8000/v1)"
    if server.api_key_variable and not re.fullmatch(r"[A-Za-z_]\w*", server.api_key_variable):
        # Not shown: it may be a key.
        yield "teacher.server.api_key_variable: is no name of a variable; export the key under a name such as TEACHER_KEY and write that"
    if teacher.source == "resident":
        yield "teacher.server: a resident teacher is loaded beside the student; remove it, or set source: served (or cache)"
    for key in ("revision", "dtype", "attn_implementation", "quantization", "trust_remote_code", "device_map"):
        if getattr(teacher, key) != Teacher.model_fields[key].default:
            yield f"teacher.{key}: the server has loaded the teacher as it is; remove it"
    if teacher.draws:
        yield f"teacher.draws = {teacher.draws}; a server tells the most probable tokens, and what is left cannot be drawn from; remove it"
    if teacher.source == "served":
        for key in ("cache", "unit_tokens"):
            if (value := getattr(teacher, key)) != Teacher.model_fields[key].default:
                yield f"teacher.{key} = {value}; with source: served nothing is written down; remove it, or set source: cache"


def _head_rules(teacher: Teacher, distill: Distill) -> Iterator[str]:
    """Of teachers of whose distributions a head is known: from a cache or a server."""
    if teacher.floor > teacher.cap:
        yield f"teacher.floor = {teacher.floor}; cap = {teacher.cap} is the most that is kept; make the floor no larger"
    if distill.divergence != "forward_kl":
        yield (
            f"distill.divergence = {distill.divergence}; it needs the teacher's probability of all that the student would say; a cache "
            "or a server tells what the teacher would say; use forward_kl, or teacher.source: resident"
        )
    if distill.temperature != 1:
        yield (
            f"distill.temperature = {distill.temperature}; a cache is of temperature 1, as a server's answers are, and what was left out "
            "cannot be taken to another; use 1, or teacher.source: resident"
        )
    if distill.tail == "draws" and teacher.server:
        yield "distill.tail = draws; nothing is drawn from a server's answers; use tail: ghost"
    elif distill.tail == "draws" and not teacher.draws:
        yield "distill.tail = draws; teacher.draws is 0, so the cache has none; set teacher.draws: 8, or tail: ghost"


def _resident_rules(teacher: Teacher, distill: Distill) -> Iterator[str]:
    for key in ("cache", "top_p", "floor", "cap", "draws", "unit_tokens", "device_map"):
        if (value := getattr(teacher, key)) != Teacher.model_fields[key].default:
            yield f"teacher.{key} = {value}; a resident teacher is not captured; remove it, or set source: cache"
    if distill.tail != "ghost":
        yield f"distill.tail = {distill.tail}; a resident teacher leaves nothing out; remove it, or set teacher.source: cache"


def _no_generate_rules(recipe: Recipe) -> Iterator[str]:
    for key, value in recipe.generate:
        if value != Generate.model_fields[key].default:
            yield f"generate.{key} = {value}; task = {recipe.task} writes no answers; set task: generate, or remove this"


def _generate_model_rules(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.init or not model.name_or_path:
        yield "model.name_or_path: is required with task = generate; random weights (`init`) have nothing to say; give who answers"
    if model.lora:
        yield (
            "model.lora: a new adapter has learnt nothing; remove it (for an adapter that was trained, model.name_or_path takes its folder)"
        )
    if model.attn_implementation == "varlen":
        yield "model.attn_implementation = varlen; it takes no padded batches, and answers are written in such; leave it out"


def _generate_data_rules(recipe: Recipe) -> Iterator[str]:
    data, generate = recipe.data, recipe.generate
    for key in ("eval", "eval_fraction", "eval_rows", "train_on", "packing", "num_proc", "cache_dir"):
        if (value := getattr(data, key)) != Data.model_fields[key].default:
            yield f"data.{key} = {value}; task = generate asks every row of data.train, and trains and holds out none; remove it"
    if generate.max_new_tokens >= data.max_length:
        yield (
            f"generate.max_new_tokens = {generate.max_new_tokens}; data.max_length = {data.max_length} is for prompt and answer together; "
            "raise it, or ask for less"
        )
    for key, without in (("samples_per_prompt", 1), ("top_p", 1.0)):
        if not generate.temperature and getattr(generate, key) != without:
            yield f"generate.{key} = {getattr(generate, key)}; at temperature 0 nothing is drawn; set generate.temperature, or remove this"


def _generate_only_rules(recipe: Recipe) -> Iterator[str]:
    if recipe.teacher:
        yield f"teacher.name_or_path = {recipe.teacher.name_or_path}; with task = generate the teacher is the model; set model.name_or_path"
    for name in ("distill", "train", "checkpoint", "guard", "watchdog", "tracking"):
        section = getattr(recipe, name)
        for key, value in section:
            if value != type(section).model_fields[key].default:
                yield f"{name}.{key} = {value}; task = generate trains nothing; remove it"
    if recipe.backend != "single":
        yield (
            f"backend = {recipe.backend}; task = generate shards nothing: for every token all shards would be gathered anew; leave it out "
            "(a whole model in each of --processes), or use generate.device_map: auto or model.quantization for one that does not fit"
        )


_GENERATE_RULES = (_generate_model_rules, _compute_type_rules, _data_rules, _generate_data_rules, _generate_only_rules)


def _on_policy_rules(recipe: Recipe) -> Iterator[str]:
    distill, attention = recipe.distill, recipe.model.attn_implementation
    if recipe.teacher.source != "resident":
        yield (
            f"distill.on_policy: with teacher.source = {recipe.teacher.source}; what the student will write is known to nobody beforehand; "
            "set teacher.source: resident, or remove on_policy"
        )
    if distill.on_policy.fraction == 1 and distill.weight != 1:
        yield (
            f"distill.weight = {distill.weight}; with on_policy.fraction = 1 no token is gold, and there is nothing to weigh the "
            "divergence against; set weight: 1, or a smaller fraction"
        )
    if recipe.data.train_on == "all":
        yield "data.train_on = all; on_policy wants prompts, and here all of a row is answer; use assistant"
    if recipe.data.packing is True:
        yield "data.packing = true; on_policy takes rows apart into prompts and pads them at the left; use false or auto"
    if attention in ("varlen", "flex_attention"):
        yield (
            f"model.attn_implementation = {attention}; on_policy writes from prompts that are padded at the left, which it does not read; "
            "use auto, sdpa or flash_attention_2"
        )
    if recipe.model.lora and distill.on_policy.use_vllm is True:
        yield (
            "distill.on_policy.use_vllm = true; for vLLM TRL merges an adapter into its base and takes it out again, which rounds the base "
            "a little in every step; use auto or false, or train without model.lora"
        )


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
    if train.fp16 and model.dtype == "float16" and not model.lora:
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
    metrics = METRICS[recipe.task] + CALL_METRICS
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
    if recipe.model.lora and recipe.train.gradient_checkpointing_kwargs.use_reentrant is False:
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
