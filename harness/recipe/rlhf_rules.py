"""The rules of `task: rlhf`, as harness.recipe.rules has those of every recipe."""

from collections.abc import Iterator

from harness.recipe.backend import Backend
from harness.recipe.schema import Recipe, RewardPart
from harness.recipe.task_rules import given

OF_TYPE = {
    "tool_calls": ("exact", "abstention", "right_tool", "valid_schema", "malformed"),
    "json_schema": ("json_schema",),
    "length": ("target_tokens", "limit_tokens"),
    "reward_model": ("model",),
    "function": ("function",),
}
"""What each type of reward reads, besides its weight."""
REQUIRED = {
    "length": ("target_tokens", "how long an answer may be at no cost"),
    "reward_model": ("model", "which folder holds it"),
    "function": ("function", "which: module:function"),
}
OF_ALGORITHM = {
    "grpo": ("loss_type", "scale_rewards", "tools", "environment", "max_tool_calling_iterations"),
    "rloo": ("normalize_advantages",),
}


def rlhf_rules(recipe: Recipe) -> Iterator[str]:
    for rules in (_reward_rules, _algorithm_rules, _batch_rules, _writing_rules, _vllm_rules, _unfit_rules):
        yield from rules(recipe)


def rlhf_backend_rules(recipe: Recipe, backend: Backend) -> Iterator[str]:
    if recipe.task != "rlhf":
        return
    if backend.kind == "fsdp":
        yield (
            f"task = rlhf; under backend {backend.name} all weights would be gathered anew for every token that is written; use ddp or "
            "zero2, or zero3, which gathers them once a step"
        )
    for key, value in given(recipe.rlhf, "tools", "environment") if backend.zero_stage == 3 else ():
        yield (
            f"rlhf.{key} = {value}; backend {backend.name} gathers the weights on all ranks at once, and answers of different ranks take "
            "different numbers of turns: they would wait for each other for ever; use zero2 or ddp"
        )


def _reward_rules(recipe: Recipe) -> Iterator[str]:
    rlhf = recipe.rlhf
    if not rlhf.rewards and not rlhf.environment:
        yield "rlhf.rewards: is required with task = rlhf; say what an answer is paid for: [{type: tool_calls}]"
    for place, part in enumerate(rlhf.rewards):
        yield from _part_rules(f"rlhf.rewards.{place}", part, recipe)


def _part_rules(key: str, part: RewardPart, recipe: Recipe) -> Iterator[str]:
    others = [name for owner, names in OF_TYPE.items() if owner != part.type for name in names]
    for name, value in given(part, *others):
        yield f"{key}.{name} = {value}; a reward of type {part.type} does not read it; remove it, or choose the type that does"
    if part.type in REQUIRED and getattr(part, REQUIRED[part.type][0]) is None:
        name, what = REQUIRED[part.type]
        yield f"{key}.{name}: is required with type = {part.type}; say {what}"
    if part.weight == 0:
        yield f"{key}.weight = 0; nothing would be paid; give another, or remove the reward"
    limit = part.limit_tokens or recipe.rlhf.max_completion_length
    if part.target_tokens and part.target_tokens >= limit:
        yield f"{key}.target_tokens = {part.target_tokens}; must be below limit_tokens = {limit}, up to which the reward falls"
    if part.type == "tool_calls" and part.malformed >= part.exact:
        yield (
            f"{key}.malformed = {part.malformed}; a call that cannot be read would be paid as well as the right one; make "
            "it less than exact"
        )


def _algorithm_rules(recipe: Recipe) -> Iterator[str]:
    rlhf = recipe.rlhf
    for algorithm, names in OF_ALGORITHM.items():
        for name, value in given(rlhf, *names) if algorithm != rlhf.algorithm else ():
            yield f"rlhf.{name} = {value}; TRL has it for {algorithm} alone; set rlhf.algorithm: {algorithm}, or remove this"
    if rlhf.max_tool_calling_iterations and not (rlhf.tools or rlhf.environment):
        yield (
            f"rlhf.max_tool_calling_iterations = {rlhf.max_tool_calling_iterations}; no tool is run; say which: rlhf.tools or "
            "rlhf.environment"
        )
    if recipe.train.eval_tool_calls and (rlhf.tools or rlhf.environment):
        yield (
            f"train.eval_tool_calls = {recipe.train.eval_tool_calls}; it asks for one turn, and here an answer is several, with tools that "
            "run; remove it: eval/reward is measured on the held-out rows"
        )


def _batch_rules(recipe: Recipe) -> Iterator[str]:
    answers, each = recipe.train.global_batch_size, recipe.rlhf.num_generations
    if answers and answers % each:
        yield (
            f"rlhf.num_generations = {each}; global_batch_size counts answers, and {answers} are {answers // each} prompts with "
            f"{each} each and {answers % each} left over; make one a multiple of the other"
        )


def _writing_rules(recipe: Recipe) -> Iterator[str]:
    rlhf, model = recipe.rlhf, recipe.model
    if rlhf.max_completion_length >= recipe.data.max_length:
        yield (
            f"rlhf.max_completion_length = {rlhf.max_completion_length}; data.max_length = {recipe.data.max_length} is for prompt "
            "and answer together; raise it, or allow less"
        )
    if model.init:
        yield f"model.init = {model.init}; random weights write nothing that could be paid; begin from a model that was fine-tuned"
    if model.lora and model.lora.dropout:
        yield (
            f"model.lora.dropout = {model.lora.dropout}; with dropout what is trained is another model in every step than the one that "
            "writes; task = rlhf needs 0"
        )
    if model.attn_implementation in ("varlen", "flex_attention"):
        yield (
            f"model.attn_implementation = {model.attn_implementation}; answers are written from prompts that are padded at the left, which "
            "it does not read; use auto, sdpa or flash_attention_2"
        )


def _vllm_rules(recipe: Recipe) -> Iterator[str]:
    rlhf, wants = recipe.rlhf, recipe.rlhf.use_vllm
    for name, value in given(rlhf, "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization") if wants is False else ():
        yield f"rlhf.{name} = {value}; use_vllm is false; remove one of the two"
    if rlhf.vllm_mode == "server" and not rlhf.vllm_server_base_url:
        yield "rlhf.vllm_mode = server; say where it is asked: rlhf.vllm_server_base_url: http://host:8000"
    if rlhf.vllm_mode == "server" and wants == "auto":
        yield "rlhf.vllm_mode = server; whether it is used must not depend on what is installed; set use_vllm: true"
    if rlhf.vllm_mode == "server" and (rlhf.tools or rlhf.environment):
        yield (
            "rlhf.vllm_mode = server; all ranks ask it together, and answers of different ranks take different numbers of turns: "
            "they would wait for each other for ever; use colocate"
        )
    if rlhf.vllm_server_base_url and rlhf.vllm_mode != "server":
        yield f"rlhf.vllm_server_base_url = {rlhf.vllm_server_base_url}; vllm_mode is {rlhf.vllm_mode}; set vllm_mode: server"
    if rlhf.vllm_mode == "server" and next(given(rlhf, "vllm_gpu_memory_utilization"), None):
        yield f"rlhf.vllm_gpu_memory_utilization = {rlhf.vllm_gpu_memory_utilization}; a server was told when it was started; remove it"
    if recipe.model.trains_adapter and wants is True:
        yield (
            "rlhf.use_vllm = true; for vLLM TRL merges an adapter into its base and takes it out again, which rounds the base a little in "
            "every step; use auto or false, or train without an adapter"
        )


def _unfit_rules(recipe: Recipe) -> Iterator[str]:
    """What is of rows that are trained as they are."""
    data, train = recipe.data, recipe.train
    if data.packing is True:
        yield "data.packing = true; the rows of task = rlhf are prompts, to which the policy writes; use false or auto"
    if data.train_on == "all":
        yield "data.train_on = all; task = rlhf trains what the policy writes; remove it"
    if train.loss_type != "nll":
        yield f"train.loss_type = {train.loss_type}; the loss of task = rlhf stands in the section rlhf; remove this"
    if train.neftune_noise_alpha:
        yield (
            f"train.neftune_noise_alpha = {train.neftune_noise_alpha}; the policy that is trained would not be the one "
            "that writes; remove it"
        )
    if recipe.guard.spike_factor:
        yield f"guard.spike_factor = {recipe.guard.spike_factor}; the loss of task = rlhf lies about 0, which has no multiple; remove it"
