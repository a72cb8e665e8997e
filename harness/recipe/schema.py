"""The sections of a recipe. Leaf keys are the names that TrainingArguments, TRL, PEFT and bitsandbytes use for the same thing.

Every section is frozen and refuses unknown keys; a field's docstring says its meaning, unit and consequence.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy takes as well as torch."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_min_length=1, use_attribute_docstrings=True
    )


class Quantization(Section):
    """4-bit weights by bitsandbytes (QLoRA); the frozen base only, so a recipe with it needs `model.lora`."""

    load_in_4bit: Literal[True] = True
    """Written out because everyone looks for it; 8-bit bases are not supported (no backend shards them)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    """Quantise the constants too: 0.37 bit per weight less, at no measurable loss."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Matrix products run in this type; `model.dtype` when left out."""
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] | None = None
    """The type that packs the 4-bit weights. Left out: the compute dtype under ZeRO-3 and FSDP2, which shard no other; else uint8."""


class Lora(Section):
    """A low-rank adapter by PEFT; only the adapter is trained and saved."""

    r: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by alpha / r (by alpha / sqrt(r) with `use_rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names. `all-linear` is every linear layer but the head; PEFT's own default for Llama is q_proj and v_proj alone."""
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and saved whole, beside the adapter. Makes the adapter large and keeps it out of most servers."""


Attention = Literal[
    "auto", "varlen", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention", "sdpa", "eager"
]


class Model(Section):
    name_or_path: str | None = None
    """A folder or a hub id. Exactly one of `name_or_path` and `init` is given."""
    init: str | None = None
    """A config.json or its folder: weights are drawn from it with the run's seed and kept in the run folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """A folder or a hub id, when the tokenizer does not lie beside the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which weights are loaded. `auto` is bfloat16 where the accelerator has it and float32 on a CPU.
    Full fine-tuning in bfloat16 without DeepSpeed rounds small updates away: there `auto` is float32, with bf16 autocast."""
    attn_implementation: Attention = "auto"
    """`auto` is the fastest that this machine has and that keeps packed samples apart; `varlen` is torch's own (CUDA);
    `kernels-community/flash-attn2` comes from the hub, with the package `kernels`."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Off: a model is data."""
    quantization: Quantization | None = None
    lora: Lora | None = None
    adapter: str | None = None
    """An adapter that was trained earlier on `name_or_path`, to begin from: a run's folder, its `final`, or a LoRA folder of PEFT."""
    adapter_mode: Literal["continue", "stack", "merge"] = "continue"
    """`continue`: it is trained further. `stack`: it stays as it is beneath a new one (`model.lora`), and both are exported as one.
    `merge`: it becomes part of the base, on which a new one is trained, or without `model.lora` all weights."""

    @property
    def trains_adapter(self) -> bool:
        """An adapter is trained and exported, not a whole model."""
        return self.lora is not None or (self.adapter is not None and self.adapter_mode == "continue")


class Server(Section):
    """An OpenAI-compatible server that scores the tokens it is given: vLLM, or another whose completions take `echo`."""

    url: str
    """Up to the version: http://host:8000/v1."""
    model: str | None = None
    """What the server calls the teacher; left out: `teacher.name_or_path`."""
    scores: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    """How it is asked for scores: vLLM's `prompt_logprobs`, or `echo` with `logprobs`. `auto`: the first of them that it answers."""
    api_key_variable: str | None = None
    """The name of the environment variable that holds the key, on every machine that asks; never the key itself."""
    concurrency: PositiveInt = 8
    """Questions under way at once, of each process that asks; the server makes its batches of them."""
    timeout_s: Annotated[float, Field(gt=0)] = 120
    """So long may one answer take."""


class Teacher(Section):
    """Who teaches, and how what it says reaches the student: written down once (`harness capture`), or computed beside it in every step."""

    name_or_path: str
    """A folder or a hub id. Its token ids must be the student's; rows of its head beyond the tokenizer's are left out. Of a teacher with a
    `server` only the tokenizer is read from there."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which weights are loaded. `auto` is bfloat16 where the accelerator has it and float32 on a CPU."""
    attn_implementation: Attention = "auto"
    """As of the model."""
    quantization: Quantization | None = None
    """The teacher in 4 bits: a quarter of the memory, and distributions that are a little off (the report of a capture does not see it)."""
    trust_remote_code: bool = False
    """Run Python code from the teacher's repository. Off: a model is data."""
    server: Server | None = None
    """Where the teacher is asked: by `harness capture` with `source: cache`, in every step with `served`. Left out: it is loaded."""
    source: Literal["cache", "resident", "served"] = "cache"
    """`cache`: its distributions are read from the disk, and it need not be there. `resident`: it runs beside the student. `served`: the
    server is asked about each batch."""
    cache: str | None = None
    """The folder of the cache. Left out: a folder of its own below $HARNESS_CACHE/teachers for whatever decides its content."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Of each distribution the most probable entries are kept until they hold this mass; of the rest its sum."""
    floor: PositiveInt = 8
    """So many entries are kept at least."""
    cap: Annotated[int, Field(gt=0, le=255)] = 64
    """So many entries are kept at most."""
    draws: Annotated[int, Field(ge=0, le=255)] = 0
    """So many ids are drawn from what is not kept, for `distill.tail: draws`; 8 or 16 where the teacher is unsure (pretraining text)."""
    unit_tokens: PositiveInt = 262_144
    """Tokens that a capture does and commits at once: what a kill costs, and what workers share out."""
    device_map: Literal["auto"] | None = None
    """`auto`: one process of a capture spreads the layers over all GPUs of its machine. Left out: a whole teacher in each process, or a
    share where the backend is zero3."""


class OnPolicy(Section):
    """The student writes and the teacher scores: of some micro-batches the prompts are kept (all before the first trained token; of several
    turns the first answer alone), and what follows is drawn from the student as it is in that step. Rows are not packed."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the micro-batches that the student writes, drawn by `train.seed`; the others are of the data (GKD's lmbda)."""
    max_new_tokens: PositiveInt = 256
    """The student writes until it ends its turn, or so many tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """At which it writes. Another one than `distill.temperature`, which is of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Drawn from the most probable tokens that hold this mass together."""
    top_k: NonNegativeInt = 0
    """Drawn from so many of the most probable tokens; 0: from all, 1: always the most probable."""
    use_vllm: Literal["auto"] | bool = "auto"
    """Write by vLLM, on the GPU that trains, which takes 0.3 of its memory. `auto`: where the package and a GPU are there, and all weights
    are trained; else by transformers. A run by vLLM that is killed and continued is not bit for bit the same."""


class Distill(Section):
    """The loss: weight * divergence from the teacher + (1 - weight) * cross-entropy with the gold token, per trained token."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: cover what the teacher says; `reverse_kl`: say only what it says; `jsd`: between them (`beta`)."""
    beta: Fraction | None = None
    """Of `jsd`: towards 0 it is the forward KL, towards 1 the reverse. Left out: 0.5."""
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the divergence. 1: the gold tokens count nothing, and only the teacher is followed."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both distributions are flattened by it, and the divergence is multiplied by its square. From a cache it is 1."""
    tail: Literal["ghost", "draws"] = "ghost"
    """What a cache did not keep. `ghost`: one entry that holds all of its mass. `draws`: what was drawn from it; noisy, and right on
    average."""
    on_policy: OnPolicy | None = None
    """Learn from what the student itself writes, of which there is no gold: there the loss is weight * divergence alone. Needs a resident
    teacher."""


PreferenceLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
"""Of TRL's, all that a pair has by itself: `aot` sorts the pairs of a micro-batch, and would be another loss on other ranks."""


class Dpo(Section):
    """The loss of `task: dpo`, over pairs of a better and a worse answer; names and meanings are TRL's."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to move away from the reference; of `ipo` its tau."""
    loss_type: PreferenceLoss | Annotated[tuple[PreferenceLoss, ...], Field(strict=False, min_length=1)] = "sigmoid"
    """One, or several that are added up. `sigmoid_norm` and `ipo` divide by the length of an answer; `sft` is the cross-entropy of the
    chosen answer per token, to be added to another where what is chosen becomes less probable."""
    loss_weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """Of several losses, in their order; left out: 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round; of `robust` and `exo_pair`."""
    reference: Literal["auto", "cached", "resident"] = "auto"
    """What the policy is compared with: always the model that the run begins from. `auto`: with an adapter the policy without it (or the
    adapter that it began as), without one `cached`. `cached`: its log-probabilities are computed once, before the policy is loaded, and
    kept below $HARNESS_CACHE/references for later runs. `resident`: a second model beside the policy, in every step."""


class Kto(Section):
    """The loss of `task: kto`, over answers that are good or bad, each by itself (arXiv 2402.01306); names and meanings are TRL's."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How dear it is to move away from the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`apo_zero_unpaired` has no estimate of the KL divergence, and costs a third of the forward passes less."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of good answers. KTO wants weight times number, of good against bad, between 1 and 4/3."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Of bad answers."""
    reference: Literal["auto", "cached", "resident"] = "auto"
    """As `dpo.reference`."""


class Reward(Section):
    """The loss of `task: reward`: a score for each answer, the better one's above the worse one's (Bradley and Terry)."""

    center_rewards_coefficient: Annotated[float, Field(gt=0)] | None = None
    """Adds this times the squared sum of a pair's two scores, so that scores stay around 0 (0.01 is usual). Left out: not added."""


class RewardPart(Section):
    """One reward among those that an answer is paid. What stands below `weight` belongs to one type each, and is refused with another."""

    type: Literal["tool_calls", "json_schema", "length", "reward_model", "function"]
    """`tool_calls`: the scorer of harness against the row's gold calls. `json_schema`: 1 where the answer is JSON that the row's
    `json_schema` allows, else 0. `length`: 0, and less for answers that are too long. `reward_model`: what `task: reward` has trained.
    `function`: any Python function."""
    weight: float = 1.0
    """The rewards are added up, each times its weight."""
    exact: float = 1.0
    """Of `tool_calls`: the gold calls, none more and none fewer."""
    abstention: float = 1.0
    """Of `tool_calls`: words and no call, where none is wanted."""
    right_tool: float = 0.3
    """Of `tool_calls`: valid calls of the right tools with other arguments."""
    valid_schema: float = 0.1
    """Of `tool_calls`: calls that their tools' schemas allow, of other tools or too many or too few."""
    malformed: float = -0.5
    """Of `tool_calls`: a call that cannot be read, and silence, which would otherwise be the safe way out. Words where a call is wanted,
    a call where none is, and a call that breaks its schema are paid 0."""
    json_schema: str | None = None
    """Of `json_schema`: a file that holds the schema of every answer. Left out: each row's own; rows without one are not scored."""
    target_tokens: PositiveInt | None = None
    """Of `length`, required: up to so many tokens an answer costs nothing."""
    limit_tokens: PositiveInt | None = None
    """Of `length`: from the target to this the reward falls to -1. Left out: `rlhf.max_completion_length`."""
    model: str | None = None
    """Of `reward_model`, required: the folder of a sequence classifier with one label, whose tokenizer is the policy's."""
    function: str | None = None
    """Of `function`, required: `module:function`, installed or in the current directory. It is called as TRL calls one:
    `(prompts, completions, completion_ids, **columns) -> list[float | None]`; None leaves an answer unscored."""


def not_ppo(value):
    """Whoever looks for PPO is told where it went."""
    if value == "ppo":
        raise PydanticCustomError(
            "no_ppo", "rloo or grpo, of task: rlhf; PPO is not in TRL any more, and RLOO does what it did without a value model"
        )
    return value


class Rlhf(Section):
    """Reinforcement learning of `task: rlhf`: to each prompt the policy writes several answers, and learns from which of them are paid
    more. Batch sizes count answers, as TRL's do. In every step all answers are new, so nothing is clipped."""

    algorithm: Annotated[Literal["rloo", "grpo"], BeforeValidator(not_ppo)] = "rloo"
    """Each answer is compared with the others to its prompt: by leave-one-out (RLOO), or by their mean and deviation (GRPO). TRL has no PPO
    any more."""
    rewards: Annotated[tuple[RewardPart, ...], Field(strict=False)] = ()
    """What an answer is paid for; at least one, unless the environment has a `get_reward`."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt. `train.global_batch_size` divided by it is the number of prompts in a step."""
    max_completion_length: PositiveInt = 256
    """In tokens, of all turns and tool results together. Prompts have what it leaves of `data.max_length`; longer ones are dropped."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """At which answers are written and scored."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Drawn from the most probable tokens that hold this mass together. Below 1 the policy is not quite what writes."""
    top_k: NonNegativeInt = 0
    """Drawn from so many of the most probable tokens; 0: from all."""
    beta: Annotated[float, Field(ge=0)] | None = None
    """What moving away from the reference costs: of the KL divergence to it, in the reward (RLOO) or in the loss (GRPO). The reference
    is the model that the run begins from: with an adapter the base without it, else a second model in memory. 0: none is held.
    Left out: TRL's, 0.05 for RLOO and 0 for GRPO."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] | None = None
    """Of `grpo`: what sums are divided by. Left out: TRL's, `dapo` (all tokens of the step)."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Of `grpo`: by whose deviation an advantage is divided. Left out: `group`."""
    normalize_advantages: bool = False
    """Of `rloo`: advantages are divided by their deviation over the step."""
    mask_truncated_completions: bool = False
    """Answers that did not come to their end are left out of the loss."""
    tools: str | None = None
    """Of `grpo`, `module:attribute`: a list of Python functions, which really run when the policy calls them. What they return comes
    back to it as the next message, and is not trained."""
    environment: str | None = None
    """Of `grpo`, `module:factory`: makes an object with a `reset`, whose other public methods are the tools (TRL's environment_factory)."""
    max_tool_calling_iterations: PositiveInt | None = None
    """So often may tools be called in one answer. Left out: until `max_completion_length`."""
    use_vllm: Literal["auto"] | bool = "auto"
    """Write by vLLM. `auto`: where the package and a GPU are there, and all weights are trained; else by transformers. A run by vLLM
    that is killed and continued is not bit for bit the same."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: on the GPUs that train. `server`: on GPUs of its own, behind `trl vllm-serve`."""
    vllm_server_base_url: str | None = None
    """Of a server: http://host:8000."""
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of each GPU, of `colocate`."""


class Generate(Section):
    """How `harness generate` has the model answer the rows of `data.train`."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: the most probable token each time. Above it tokens are drawn, with `data.seed`."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Tokens are drawn from the most probable ones that hold this mass together."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt; those that are equal are kept once."""
    max_new_tokens: PositiveInt = 512
    """An answer that has not come to its end by then is dropped. Prompts have what it leaves of `data.max_length`."""
    batch_rows: PositiveInt = 32
    """Answers that are written at the same time. May be changed between two starts; what is there stays as it was written."""
    unit_rows: PositiveInt = 256
    """Prompts that are answered and committed at once: what a kill costs, and what workers share out."""
    device_map: Literal["auto"] | None = None
    """`auto`: one process spreads the layers over all GPUs of its machine. Left out: a whole model in each process."""


class Source(Section):
    """One file, folder, glob or hub data set."""

    path: str
    """A file (.jsonl, .json, .parquet, .jsonl.gz), a folder, a glob, or a hub id. Relative paths start where the command is run."""
    format: Literal[
        "auto", "messages", "prompt_completion", "text", "xlam", "hammer", "sharegpt", "hermes", "toolace", "glaive", "sealtools",
        "apibench", "apibench_api", "bfcl", "when2call", "kto", "rollouts", "retrieval", "questions", "preference", "toolpref",
    ] = "auto"  # fmt: skip
    """The layout of its rows, where their keys do not tell it. `preference`, `sharegpt`, `kto`, `toolpref` and `when2call` are read by
    `task: dpo`, `kto` and `reward`; all but `preference` and `toolpref` by the others."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How many times an epoch sees each row: 2 is twice, 0.5 is a seeded half."""
    max_rows: PositiveInt | None = None
    license: str | None = None
    """Under which the rows may be used, as the hub names licences (`apache-2.0`, `cc-by-4.0`). Decides nothing; the model card that
    `harness push` writes says it. Left out: unknown, and the card says that."""


def as_sources(value):
    """`train: rows.jsonl` and `train: {path: rows.jsonl}` mean a list of one."""
    if isinstance(value, str):
        value = {"path": value}
    return [value] if isinstance(value, dict) else value


Sources = Annotated[tuple[Source, ...], BeforeValidator(as_sources), Field(strict=False)]


class Data(Section):
    train: Annotated[Sources, Field(min_length=1)]
    """A path, or a list of sources."""
    eval: Sources = ()
    """Held-out files. Alternatives: `eval_fraction` or `eval_rows`, taken from `train`."""
    eval_fraction: Fraction | None = None
    """Share of `train` that is held out, chosen by the content of a row: the same rows in any order, and duplicates never on both sides."""
    eval_rows: PositiveInt | None = None
    """The same, as a number of rows; duplicates stay together, so it may be a few more."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """In tokens."""
    too_long: Literal["drop_turns", "drop_row", "fail"] = "drop_turns"
    """A row over `max_length` loses whole turns from its end (a pair as many on both sides), or goes; it never keeps half a call. An answer
    with a label goes."""
    train_on: Literal["assistant", "all"] = "assistant"
    """`assistant`: only what the assistant says is trained. `all`: every token, tool results too."""
    packing: Literal["auto"] | bool = "auto"
    """Several samples in one sequence, kept apart by the attention. `auto`: on a GPU with a kernel for it; elsewhere
    not, but rows of like length share a batch where random batches would be more than a fifth padding."""
    on_error: Literal["fail", "skip"] = "fail"
    """A row that cannot be read: stop and name it, or skip it, count it and list it."""
    chat_template: str | None = None
    """A Jinja file (or a shipped one: templates/llama3-tools.jinja) that takes the place of the tokenizer's own template; with
    {% generation %} marks it also says what is trained."""
    num_proc: PositiveInt | None = None
    """Processes that tokenise; left out: one per core, at most 8."""
    cache_dir: str | None = None
    """Left out: $HARNESS_CACHE, else ~/.cache/harness."""
    seed: Seed = 42
    """Of the draws for source weights, held-out rows and packing; apart from `train.seed`, so that a seed sweep sees the same data."""


Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit", "adafactor", "sgd"
]
Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt", "polynomial"
]


class SchedulerKwargs(Section):
    """What the scheduler takes beyond warm-up; a key that the chosen scheduler does not know is refused."""

    num_cycles: Annotated[float, Field(gt=0)] | None = None
    min_lr: Annotated[float, Field(ge=0)] | None = None
    min_lr_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    num_decay_steps: PositiveInt | None = None
    num_stable_steps: NonNegativeInt | None = None
    min_lr_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    power: Annotated[float, Field(gt=0)] | None = None
    lr_end: Annotated[float, Field(ge=0)] | None = None


class CheckpointingKwargs(Section):
    use_reentrant: bool | None = None
    """Left out: what the backend needs (reentrant for an adapter under ZeRO-3, non-reentrant elsewhere)."""


class Train(Section):
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """One, when neither this nor `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimiser steps, in place of epochs."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows (packs, with packing) that one rank takes through the model at once."""
    per_device_eval_batch_size: PositiveInt | None = None
    """Left out: as in training."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimiser step; 1, or what `global_batch_size` asks for."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimiser step over all ranks. The accumulation follows from it, so the run is the same on any number of ranks."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    lr_scheduler_type: Scheduler = "cosine"
    lr_scheduler_kwargs: SchedulerKwargs = SchedulerKwargs()
    warmup_steps: NonNegativeInt | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of all steps, in place of `warmup_steps`."""
    optim: Optimizer = "adamw_torch_fused"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    loss_type: Literal["nll", "dft"] = "nll"
    """`dft` weighs each token's loss by its probability (arXiv 2508.05629)."""
    bf16: Literal["auto"] | bool = "auto"
    """bf16 autocast; `auto` is on where the accelerator has it."""
    fp16: bool = False
    tf32: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, for models that would not fit otherwise."""
    gradient_checkpointing_kwargs: CheckpointingKwargs = CheckpointingKwargs()
    use_liger_kernel: bool = False
    """Liger's fused layers (RMSNorm, RoPE, SwiGLU); needs a GPU and the `liger` extra."""
    torch_compile: bool = False
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    logging_steps: PositiveInt = 10
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """Left out: `steps` when `eval_steps` is given, else `epoch` when there is held-out data, else `no`."""
    eval_steps: PositiveInt | None = None
    eval_on_start: bool = False
    eval_tool_calls: PositiveInt | None = None
    """At each evaluation the model also answers so many of the held-out rows that offer tools, and its calls are scored:
    `eval/exact_match`, `eval/valid_json`, `eval/valid_schema`, `eval/right_abstention`. Costs what writing so many answers costs."""
    metric_for_best_model: str | None = None
    """Such as `eval/loss`, or `eval/exact_match` with `eval_tool_calls`. The best model by it is kept and exported in place of the last."""
    greater_is_better: bool | None = None
    """Left out: false for a metric that ends in `loss` or `kl`, true for others."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations without a better `metric_for_best_model`."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    dataloader_num_workers: NonNegativeInt = 0
    ddp_timeout: PositiveInt = 1800
    """Seconds that a collective waits for a missing rank."""
    seed: Seed = 42
    """Of weights, adapter, order and dropout."""
    full_determinism: bool = False


class Checkpoint(Section):
    """When a run is saved whole, so that it can be continued exactly. Besides, it is saved at its end, when it is told to stop, and
    whenever `metric_for_best_model` improves."""

    every_steps: PositiveInt | None = None
    """Optimiser steps between two checkpoints."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between two checkpoints, by rank 0's clock."""
    auto: bool | None = None
    """An interval from the measured time of a save and an assumed rate of failures (Young and Daly). Left out: true, unless one of the two
    above is given. `auto: false` alone: none but when it is told to stop, so a run that is cut off begins again."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay. The best one always does."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps stay for good."""
    verify: Literal["digests", "sizes"] = "digests"
    """What a checkpoint must have right before a run continues from it: every byte, or only every file's size (faster, and blind to flipped
    bits)."""


class Guard(Section):
    """What happens when a loss or a gradient is not a number, or far from what it was. All ranks vote on each step before the
    optimiser sees it."""

    max_skips: NonNegativeInt = 3
    """So many bad steps in a row are passed over: no update, and the schedule goes on."""
    max_rollbacks: NonNegativeInt = 1
    """After that the run goes back to its last checkpoint and passes over the data since, so many times; then it stops and names
    the rows."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A step is bad, too, when its loss is more than so many times the median of the last 64. Left out: only what is not finite
    is bad."""


class Watchdog(Section):
    """How long a rank may go without a sign of life before `harness run` shows every rank's stack, ends them all and continues from the
    last checkpoint. In seconds."""

    start_s: Annotated[float, Field(gt=0)] = 3600
    """Joining, loading data and model."""
    first_step_s: Annotated[float, Field(gt=0)] = 1800
    """The first step compiles kernels."""
    step_s: Annotated[float, Field(gt=0)] | None = None
    """Between two steps, or two batches of an evaluation. Left out: 20 times the median step, but at least 300."""
    save_s: Annotated[float, Field(gt=0)] = 1800
    """Saving, verifying and exporting."""


class Tracking(Section):
    """Weights & Biases, and metrics.jsonl beside it with the same keys and steps."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when this machine has a W&B key, offline otherwise."""
    project: str = "harness"
    entity: str | None = None
    name: str | None = None
    """Left out: the name of the run folder."""
    group: str | None = None
    tags: tuple[str, ...] = ()


class Recipe(Section):
    task: Annotated[Literal["sft", "distill", "dpo", "kto", "reward", "rlhf", "generate"], BeforeValidator(not_ppo)] = "sft"
    model: Model
    """What is trained: with `task: distill` the student. With `task: generate`, which trains nothing, who answers."""
    data: Data
    teacher: Teacher | None = None
    """Of `task: distill`."""
    distill: Distill = Distill()
    """Of `task: distill`."""
    dpo: Dpo = Dpo()
    """Of `task: dpo`."""
    kto: Kto = Kto()
    """Of `task: kto`."""
    reward: Reward = Reward()
    """Of `task: reward`."""
    rlhf: Rlhf = Rlhf()
    """Of `task: rlhf`."""
    generate: Generate = Generate()
    """Of `task: generate`."""
    train: Train = Train()
    backend: str = "single"
    """How the run is sharded: single, ddp, zero1, zero2, zero3, zero3-offload, fsdp2, or the path of an Accelerate config file."""
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    watchdog: Watchdog = Watchdog()
    tracking: Tracking = Tracking()
    output_dir: str | None = None
    """The run folder. Left out: runs/<name of the recipe file>."""
