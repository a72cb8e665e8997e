"""The rules of single tasks, as harness.recipe.rules has those of every recipe: of a teacher and who learns from it, and of answers for a
student, whose recipe trains nothing."""

import re
from collections.abc import Iterator
from typing import Any

from harness.recipe.schema import Distill, Model, Recipe, Section, Teacher


def given(section: Section, *keys: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of these fields, or of all, that are not as they are when they are left out."""
    for key in keys or type(section).model_fields:
        if (value := getattr(section, key)) != type(section).model_fields[key].default:
            yield key, value


def compute_type_rules(name: str, section: Model | Teacher) -> Iterator[str]:
    """name: of the section that a model stands in."""
    if section.quantization and section.quantization.bnb_4bit_compute_dtype == "float16" and section.dtype == "bfloat16":
        yield (
            f"{name}.quantization.bnb_4bit_compute_dtype = float16; {name}.dtype is bfloat16 and the two would mix in every layer; "
            "make them equal"
        )


def no_teacher_rules(recipe: Recipe) -> Iterator[str]:
    if recipe.teacher:
        yield f"teacher.name_or_path = {recipe.teacher.name_or_path}; task = {recipe.task} learns from no teacher; set task: distill"
    for key, value in given(recipe.distill):
        yield f"distill.{key} = {value}; task = {recipe.task} learns from no teacher; set task: distill, or remove this"


def teacher_rules(recipe: Recipe) -> Iterator[str]:
    teacher, distill = recipe.teacher, recipe.distill
    if teacher is None:
        yield "teacher: is required with task = distill; say who teaches: teacher.name_or_path"
        return
    yield from compute_type_rules("teacher", teacher)
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
    for key, _ in given(teacher, "revision", "dtype", "attn_implementation", "quantization", "trust_remote_code", "device_map"):
        yield f"teacher.{key}: the server has loaded the teacher as it is; remove it"
    if teacher.draws:
        yield f"teacher.draws = {teacher.draws}; a server tells the most probable tokens, and what is left cannot be drawn from; remove it"
    if teacher.source == "served":
        for key, value in given(teacher, "cache", "unit_tokens"):
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
    for key, value in given(teacher, "cache", "top_p", "floor", "cap", "draws", "unit_tokens", "device_map"):
        yield f"teacher.{key} = {value}; a resident teacher is not captured; remove it, or set source: cache"
    if distill.tail != "ghost":
        yield f"distill.tail = {distill.tail}; a resident teacher leaves nothing out; remove it, or set teacher.source: cache"


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
    if recipe.model.trains_adapter and distill.on_policy.use_vllm is True:
        yield (
            "distill.on_policy.use_vllm = true; for vLLM TRL merges an adapter into its base and takes it out again, which rounds the base "
            "a little in every step; use auto or false, or train without an adapter"
        )


OF_ONE_TASK = {
    "generate": "writes no answers",
    "dpo": "compares no pairs with a reference",
    "kto": "learns from no good and bad answers",
    "reward": "learns no scores",
    "rlhf": "reinforces nothing",
}
"""Section, and what the tasks of other names do not do."""


def other_task_rules(recipe: Recipe) -> Iterator[str]:
    for section, what in OF_ONE_TASK.items():
        for key, value in given(getattr(recipe, section)) if recipe.task != section else ():
            yield f"{section}.{key} = {value}; task = {recipe.task} {what}; set task: {section}, or remove this"


# ---- preferences

PAIRED = ("dpo", "reward")
"""Tasks whose rows are pairs."""
COMPARED = ("dpo", "kto")
"""Tasks whose policy is compared with a reference."""
PREFERENCE_FORMATS = ("preference", "sharegpt", "kto", "toolpref", "when2call")
"""Values of a source's `format` whose rows say which answer is better (harness.data.pairs); the others have one answer, or none."""
PAIRS_ALONE = ("preference", "toolpref")
"""Those of them that supervised training does not read (harness.data.formats): of the others it takes the answer that is good."""


def format_rules(recipe: Recipe) -> Iterator[str]:
    prefers = recipe.task in (*PAIRED, *COMPARED)
    for part in ("train", "eval"):
        for source in getattr(recipe.data, part):
            wrong = f"data.{part}.format = {source.format}; such rows"
            if prefers and source.format not in ("auto", *PREFERENCE_FORMATS):
                yield f"{wrong} do not say which answer is better; task = {recipe.task} reads auto or {', '.join(PREFERENCE_FORMATS)}"
            elif not prefers and source.format in PAIRS_ALONE:
                yield f"{wrong} say which answer is better, which task = {recipe.task} does not read; set task: dpo, kto or reward"


def preference_rules(recipe: Recipe) -> Iterator[str]:
    """Of tasks whose rows are pairs of answers, or answers with labels."""
    data, train, task = recipe.data, recipe.train, recipe.task
    if data.packing is True:
        yield f"data.packing = true; the rows of task = {task} are compared with each other, and are not packed; use false or auto"
    if data.train_on == "all":
        yield f"data.train_on = all; task = {task} compares what the assistant says; remove it"
    if train.loss_type != "nll":
        yield f"train.loss_type = {train.loss_type}; the loss of task = {task} stands in the section {task}; remove this"
    if train.neftune_noise_alpha:
        yield f"train.neftune_noise_alpha = {train.neftune_noise_alpha}; noise on a policy that is compared is compared as well; remove it"
    if task in COMPARED:
        yield from _reference_rules(recipe)
    yield from _dpo_rules(recipe) if task == "dpo" else ()
    yield from _reward_rules(recipe) if task == "reward" else ()


def _reference_rules(recipe: Recipe) -> Iterator[str]:
    model, task = recipe.model, recipe.task
    if model.lora and model.lora.dropout:
        yield (
            f"model.lora.dropout = {model.lora.dropout}; with dropout the policy is another model in every step than the one that is "
            f"compared with the reference; task = {task} needs 0"
        )
    if model.init:
        yield f"model.init = {model.init}; random weights have no preferences to begin from; give model.name_or_path"
    asked = getattr(recipe, task).reference
    if model.adapter and model.adapter_mode != "merge" and asked != "auto":
        yield (
            f"{task}.reference = {asked}; the policy begins as the earlier adapter, which is its reference and which it carries, frozen; "
            "use auto"
        )
    elif model.lora and asked == "resident":
        yield (
            f"{task}.reference = resident; with an adapter the base is the reference when the adapter is off, and needs no second copy; "
            "use auto, or cached"
        )


def _dpo_rules(recipe: Recipe) -> Iterator[str]:
    dpo = recipe.dpo
    losses = (dpo.loss_type,) if isinstance(dpo.loss_type, str) else dpo.loss_type
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(losses):
        yield f"dpo.loss_weights = {list(dpo.loss_weights)}; loss_type has {len(losses)}; give one weight for each"
    if losses == ("sft",):
        yield "dpo.loss_type = sft; alone it compares nothing; add it to another ([sigmoid, sft]), or set task: sft"
    for name in sorted({name for name in losses if losses.count(name) > 1}):
        yield f"dpo.loss_type: {name} stands in it twice; weigh it with loss_weights"
    smoothed = {"robust", "exo_pair"} & set(losses)
    if dpo.label_smoothing and not smoothed:
        yield f"dpo.label_smoothing = {dpo.label_smoothing}; of these losses none takes it; use loss_type: robust, or remove it"
    if "exo_pair" in losses and not dpo.label_smoothing:
        yield "dpo.label_smoothing = 0; exo_pair is infinite there; set 0.001 (what its authors take)"


def _reward_rules(recipe: Recipe) -> Iterator[str]:
    model, lora, train = recipe.model, recipe.model.lora, recipe.train
    if model.attn_implementation == "varlen":
        yield "model.attn_implementation = varlen; it takes no padded batches, and a score is read at the end of each row; leave it out"
    if model.adapter and model.adapter_mode != "merge":
        yield (
            f"model.adapter_mode = {model.adapter_mode}; task = reward puts a score on top of what the earlier adapter makes of the base; "
            "set adapter_mode: merge"
        )
    if train.eval_tool_calls:
        yield f"train.eval_tool_calls = {train.eval_tool_calls}; a reward model gives scores and writes no calls; remove it"
    for key in ("target_modules", "modules_to_save") if lora else ():
        if "score" in getattr(lora, key):
            yield f"model.lora.{key} holds score; the score is always trained whole and saved with the adapter; remove it"


def generate_rules(recipe: Recipe) -> Iterator[str]:
    for rules in (_generate_model_rules, _generate_data_rules, _generate_only_rules):
        yield from rules(recipe)


def _generate_model_rules(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.init or not model.name_or_path:
        yield "model.name_or_path: is required with task = generate; random weights (`init`) have nothing to say; give who answers"
    if model.lora:
        yield (
            "model.lora: a new adapter has learnt nothing; remove it (for an adapter that was trained, model.name_or_path takes its folder)"
        )
    if model.adapter:
        yield f"model.adapter = {model.adapter}; task = generate trains nothing that begins from it; give its folder as model.name_or_path"
    if model.attn_implementation == "varlen":
        yield "model.attn_implementation = varlen; it takes no padded batches, and answers are written in such; leave it out"


def _generate_data_rules(recipe: Recipe) -> Iterator[str]:
    data, generate = recipe.data, recipe.generate
    for key, value in given(data, "eval", "eval_fraction", "eval_rows", "train_on", "packing", "num_proc", "cache_dir"):
        yield f"data.{key} = {value}; task = generate asks every row of data.train, and trains and holds out none; remove it"
    if generate.max_new_tokens >= data.max_length:
        yield (
            f"generate.max_new_tokens = {generate.max_new_tokens}; data.max_length = {data.max_length} is for prompt and answer together; "
            "raise it, or ask for less"
        )
    for key, value in given(generate, "samples_per_prompt", "top_p") if not generate.temperature else ():
        yield f"generate.{key} = {value}; at temperature 0 nothing is drawn; set generate.temperature, or remove this"


def _generate_only_rules(recipe: Recipe) -> Iterator[str]:
    if recipe.teacher:
        yield f"teacher.name_or_path = {recipe.teacher.name_or_path}; with task = generate the teacher is the model; set model.name_or_path"
    for name in ("distill", "train", "checkpoint", "guard", "watchdog", "tracking"):
        for key, value in given(getattr(recipe, name)):
            yield f"{name}.{key} = {value}; task = generate trains nothing; remove it"
    if recipe.backend != "single":
        yield (
            f"backend = {recipe.backend}; task = generate shards nothing: for every token all shards would be gathered anew; leave it out "
            "(a whole model in each of --processes), or use generate.device_map: auto or model.quantization for one that does not fit"
        )
