"""Reinforcement learning by TRL's RLOOTrainer and GRPOTrainer: what the policy writes is paid (harness.tasks.rewards), and it learns
from which of its own answers to a prompt were paid more. How that is brought together with our data, ranks and lives:
harness.tasks.reinforced.

The reference is the model that the run begins from. With an adapter: the policy with the adapter off, or with the earlier one that it
continues (harness.model.adapters). Full fine-tuning: TRL's second model beside the policy; none where beta is 0. With `rlhf.tools` or
`rlhf.environment` an answer is several turns: what the policy calls really runs, and what comes back goes into its context but not into
the loss (TRL's tool_mask).
"""

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.chat_template_utils import supports_tool_calling
from trl.trainer import grpo_trainer, rloo_trainer

from harness import distributed
from harness.data.questions import acts, load_environment, load_tools
from harness.data.templates import Renderer
from harness.errors import ModelError
from harness.recipe import Recipe
from harness.tasks.checkpointing import CheckpointedTrainer
from harness.tasks.job import Stage, TaskPlan, say
from harness.tasks.on_policy import words_of_answer
from harness.tasks.reinforced import PromptOrder, Question, Reinforced
from harness.tasks.reward_models import load_reward_model
from harness.tasks.rewards import Reward, build_rewards, check_rows
from harness.tasks.trainer import HarnessTrainer
from harness.teacher.vocabulary import true_vocabulary
from harness.tools import parse_calls

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

GRPO_ONLY = ("loss_type", "scale_rewards", "max_tool_calling_iterations")
VLLM = ("vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization")


class HarnessRLOOTrainer(Reinforced, CheckpointedTrainer, HarnessTrainer, RLOOTrainer):
    trl = rloo_trainer


class HarnessGRPOTrainer(Reinforced, CheckpointedTrainer, HarnessTrainer, GRPOTrainer):
    trl = grpo_trainer

    def _generate(self, prompts):
        # Here, where those of an environment stand beside the functions.
        for tools in (*self._sync_tool_dicts, *self._async_tool_dicts) if self.tools else ():
            tools.update({name: answering(tool) for name, tool in tools.items()})
        written = super()._generate(prompts)
        self._tool_masks = written[2]
        return written


# ---- arguments


def build_arguments(recipe: Recipe, arguments: dict, *, flattens: bool, writes_by_vllm: bool = False) -> RLOOConfig | GRPOConfig:
    rlhf = recipe.rlhf
    same = "num_generations max_completion_length temperature top_p top_k mask_truncated_completions".split()
    asked = {name: getattr(rlhf, name) for name in same}
    if rlhf.beta is not None:
        asked["beta"] = rlhf.beta
    if rlhf.algorithm == "grpo":
        asked |= {name: value for name in GRPO_ONLY if (value := getattr(rlhf, name)) is not None}
    else:
        asked["normalize_advantages"] = rlhf.normalize_advantages
    if writes_by_vllm:
        asked |= {"use_vllm": True, "vllm_max_model_length": recipe.data.max_length}
        asked |= {name: value for name in VLLM if (value := getattr(rlhf, name)) is not None}
    # A held-out prompt is answered once. What drops out would make the policy that learns another one than wrote.
    ours = {"num_generations_eval": 1, "disable_dropout": True, "shuffle_dataset": False}
    kind = GRPOConfig if rlhf.algorithm == "grpo" else RLOOConfig
    revision = recipe.model.revision and not recipe.model.trains_adapter
    return kind(**arguments, **asked, **ours, model_init_kwargs={"revision": recipe.model.revision} if revision else None)


def beta_of(recipe: Recipe) -> float:
    defaults = GRPOConfig if recipe.rlhf.algorithm == "grpo" else RLOOConfig
    return defaults.beta if recipe.rlhf.beta is None else recipe.rlhf.beta


def uses_vllm(recipe: Recipe, *, has_gpu: bool) -> bool:
    """Raises ModelError when it is asked for and cannot be had."""
    asked, has_both = recipe.rlhf.use_vllm, has_gpu and find_spec("vllm") is not None
    if asked is True and not has_both:
        raise ModelError(
            "rlhf.use_vllm = true; the package vllm or a GPU is not here; pip install 'trl[vllm]' on a machine with a GPU, or use auto, "
            "which writes by transformers until then"
        )
    return asked is True or asked == "auto" and has_both and not recipe.model.trains_adapter


# ---- data


def as_questions(rows: "Dataset", counted: int) -> "Dataset":
    """Prepared rows as the trainer takes them; those from `counted` on only fill batches."""
    rows = rows.add_column("counts", [index < counted for index in range(len(rows))])

    def read(batch: dict) -> dict:
        columns = zip(batch["input_ids"], batch["row"], batch["location"], batch["counts"], strict=True)
        questions = [Question(list(ids), json.loads(row), location, counts) for ids, row, location, counts in columns]
        return {"row": questions, "location": batch["location"]}

    return rows.with_transform(read)


def build_order(answers_each: int, rows: int, global_batch: int, seed: int) -> PromptOrder:
    return PromptOrder(rows, global_batch // answers_each, seed)


# ---- rewards and tools


class Paid:
    """A reward as TRL calls one; it pays the answers that the trainer has just put together."""

    def __init__(self, reward: Reward):
        self.reward, self.__name__ = reward, reward.name
        self.trainer: Reinforced | None = None

    def __call__(self, **columns) -> list[float | None]:
        self.trainer._beat_now_and_then()
        return self.reward.pay(self.trainer._answers)


def answering(tool: Callable) -> Callable:
    """The tool, with a result that is text: JSON where it is another value."""
    if inspect.iscoroutinefunction(tool):

        @functools.wraps(tool)
        async def called_later(*args, **kwargs):
            return _as_text(await tool(*args, **kwargs))

        return called_later

    @functools.wraps(tool)
    def called(*args, **kwargs):
        return _as_text(tool(*args, **kwargs))

    return called


def _as_text(result) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


class Reader:
    """The tokenizer, for TRL, with a parser of what the policy said that is our one parser: what the scorer takes for a call is what
    runs."""

    response_template = "read by harness.tools"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", ends: Collection[int]):
        self._tokenizer, self._ends = tokenizer, ends

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def parse_response(self, ids: list[int], **context) -> dict:
        text = words_of_answer(self._tokenizer, ids, self._ends)
        parsed = parse_calls(text)
        if parsed.malformed or not parsed.calls:
            return {"role": "assistant", "content": text}
        calls = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parsed.calls]
        return {"role": "assistant", "content": parsed.text, "tool_calls": calls}


# ---- trainer


def build_trainer(
    args,
    model,
    tokenizer,
    train_rows,
    eval_rows,
    callbacks: list,
    *,
    recipe: Recipe,
    rewards: list[Reward],
    counted: int = 0,
    fills: bool = False,
):
    """counted: of the held-out rows, before some were added to fill batches. fills: a smoke test, whose answers are all as long as
    they may be. Raises ModelError when there are not enough positions, or the chat template cannot do what tools need."""
    rlhf = recipe.rlhf
    check_room(model, max(max(rows["length"]) for rows in (train_rows, eval_rows) if rows is not None), rlhf.max_completion_length)
    args.generation_kwargs = generation_kwargs(recipe, model, tokenizer, by_vllm=args.use_vllm, fills=fills)
    paid = [Paid(reward) for reward in rewards]
    args.reward_weights = [reward.weight for reward in rewards] or None
    executed = {}
    if acts(recipe):
        if not supports_tool_calling(tokenizer):
            raise ModelError(
                "rlhf.tools: the chat template does not write calls and their results so that a model sees them; set data.chat_template to "
                "one that does (templates/plain-tools.jinja fits any tokenizer)"
            )
        executed = {"tools": load_tools(recipe) or None, "environment_factory": load_environment(recipe)}
    kind = HarnessGRPOTrainer if rlhf.algorithm == "grpo" else HarnessRLOOTrainer
    with warnings.catch_warnings(), _with_a_parser(tokenizer) if executed else warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(use_liger_kernel|experimental feature).*")
        trainer = kind(
            model=model,
            reward_funcs=paid,
            args=args,
            train_dataset=as_questions(train_rows, len(train_rows)),
            eval_dataset=None if eval_rows is None else as_questions(eval_rows, counted),
            processing_class=tokenizer,
            callbacks=callbacks,
            **executed,
        )
    if executed:
        trainer._tokenizer = Reader(tokenizer, trainer.eos_token_ids)
    if "ref" in getattr(model, "peft_config", ()):
        # TRL's copy of an adapter that is given to it. One that is fresh is the base, and of an earlier one ours is there already.
        model.delete_adapter("ref")
    if args.use_vllm:
        # RLOO asks for none, and without them the gap cannot be measured.
        trainer.vllm_generation.logprobs = 0
    for each in paid:
        each.trainer = trainer
    trainer.pay_by(rewards, renderer=Renderer(tokenizer), observes=bool(rlhf.environment))
    return trainer


class _with_a_parser:
    """For its constructor TRL wants a tokenizer that can read calls, and knows how for some models' templates only."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __enter__(self):
        self._own = getattr(self._tokenizer, "response_template", None)
        self._tokenizer.response_template = Reader.response_template

    def __exit__(self, kind, error, trace):
        self._tokenizer.response_template = self._own
        if kind is ValueError:
            raise ModelError(f"rlhf.tools: {error}; set data.chat_template to one whose earlier messages stay as they are") from error


def generation_kwargs(recipe: Recipe, model, tokenizer, *, by_vllm: bool, fills: bool) -> dict:
    """What TRL hands on to whoever writes."""
    least = recipe.rlhf.max_completion_length if fills else 0
    # Rows of the head that nobody has trained.
    unused = list(range(true_vocabulary(tokenizer), model.config.get_text_config().vocab_size))
    if by_vllm:
        ends = model.generation_config.eos_token_id
        # As good as never: what vLLM has in place of suppressed tokens.
        return {
            "stop_token_ids": [ends] if isinstance(ends, int) else ends,
            "min_tokens": least,
            "logit_bias": dict.fromkeys(unused, -100.0) or None,
        }
    return {"min_new_tokens": least, "suppress_tokens": unused, "use_cache": True}


def check_room(model, longest_prompt: int, max_completion_length: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest_prompt + max_completion_length > positions:
        raise ModelError(
            f"rlhf.max_completion_length = {max_completion_length}; after the longest prompt of {longest_prompt} tokens the model has "
            f"positions for {max(positions - longest_prompt, 0)} more; make it no larger, or lower data.max_length, which drops "
            "long prompts"
        )


def plan(stage: Stage) -> TaskPlan:
    recipe = stage.recipe
    rows, held_out = ([json.loads(row) for row in split["row"]] if split else [] for split in (stage.train_rows, stage.eval_rows))
    check_rows(recipe.rlhf.rewards, rows, held_out)
    by_vllm = uses_vllm(recipe, has_gpu=stage.settled.has_gpu)
    if by_vllm and distributed.is_main():
        say("answers are written by vLLM: a life that continues writes others than the one that was cut off would have")
    stage.job.report.enter("loading rewards")
    rewards = build_rewards(recipe, partial(load_reward_model, tokenizer=stage.tokenizer))
    build = partial(
        build_trainer,
        recipe=recipe,
        rewards=rewards,
        counted=len(stage.eval_rows) if stage.eval_rows is not None else 0,
        fills=stage.job.smoke,
    )
    digests = [reward.digest for reward in rewards if reward.digest]
    return TaskPlan(
        build,
        partial(build_arguments, writes_by_vllm=by_vllm),
        facts={"teacher": {"reward_models": digests} if digests else None},
        build_order=partial(build_order, recipe.rlhf.num_generations),
        copies_adapter=beta_of(recipe) > 0 and bool(recipe.model.adapter) and recipe.model.adapter_mode == "continue",
    )
