"""Distillation from what the student itself writes: GKD's scheme (arXiv 2306.13649) inside of our own trainer.

Of some micro-batches only the prompts are kept, the student goes on from them, and the teacher says of each token that was written what it
would have said. Which ones is drawn by (seed, step, micro-batch), the same on all ranks. Why not TRL's trainers: GKD makes all logits of
both models and forgets its temperature, DistillationTrainer takes no padded vocabulary, and neither is saved and continued exactly. Their
way of generating is used, and on the same rows our loss is theirs (tests/tasks/test_on_policy.py).

All micro-batches of a step are written before its tokens are counted, so that sums are divided by what there is to learn in truth. What is
drawn follows from (seed, step, rank) and leaves no trace in the training's random numbers: a run that is continued writes the same again.

Logged: distill/on_policy_kl, on_policy_top1_agreement and on_policy_overlap (distill/kl and the like are of the other micro-batches),
distill/on_policy_share of the micro-batches, distill/completion_length in tokens, distill/ended (share of the completions that the student
ended itself), speed/generation_s per step that writes.
"""

import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig
from trl.models.utils import unwrap_model_for_generation

from harness import distributed
from harness.errors import ModelError
from harness.recipe import Recipe
from harness.recipe.schema import OnPolicy
from harness.tasks import distill, smoke
from harness.tasks.distill import Beside, HarnessDistillTrainer
from harness.tasks.lessons import Lesson
from harness.tasks.trainer import without_checkpointing
from harness.teacher.targets import UNTRAINED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

Tokens = list[int]
ROWS_AT_ONCE = 1000
VLLM_MEMORY = 0.3
"""Share of the GPU; what TRL leaves to a vLLM beside a training."""


# ---- prompts and rows


def is_written(fraction: float, seed: int, step: int, micro_batch: int) -> bool:
    """Whether the student writes this micro-batch."""
    return random.Random(f"{seed} {step} {micro_batch}").random() < fraction


def prompts_of(batch: dict) -> list[Tokens]:
    """Of each row [B, T] what stands before its first trained token. Of a row that only fills up, its first token: on every rank there is
    something to write."""
    first = (batch["labels"][:, 1:] != UNTRAINED).int().argmax(1) + 1
    return [ids[:length].tolist() for ids, length in zip(batch["input_ids"], first.tolist(), strict=True)]


def prompt_lengths(rows: "Dataset") -> np.ndarray:
    """Of each row of a data set, without reading one into Python."""
    lengths, arrow = [], rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        labels = arrow[start : min(start + ROWS_AT_ONCE, len(rows))]["labels"].combine_chunks()
        begins, ends = labels.offsets.to_numpy()[:-1], labels.offsets.to_numpy()[1:]
        # With an end for those that have none.
        trained = np.append(np.flatnonzero(labels.values.to_numpy() != UNTRAINED), ends[-1])
        first = trained[np.searchsorted(trained, begins + 1)]
        lengths.append(np.where(first < ends, first - begins, 1))
    return np.concatenate(lengths)


def written_row(prompt: Tokens, completion: Tokens, counts: bool) -> dict:
    """A row as a collator takes it, whose completion is trained if it counts."""
    labels = completion if counts else [UNTRAINED] * len(completion)
    return {"input_ids": prompt + completion, "labels": [UNTRAINED] * len(prompt) + labels}


# ---- writers


class Plain:
    """The student writes by transformers' generate, a micro-batch at a time; under ZeRO-3 its weights are gathered once for all of them."""

    def __init__(self, trainer: HarnessDistillTrainer, config: GenerationConfig):
        self._trainer, self._config = trainer, config

    def write(self, prompts: list[list[Tokens]]) -> list[list[Tokens]]:
        """Completions of micro-batches of prompts, each with the token that ends it if it has one. Every rank must call it."""
        trainer = self._trainer
        with (
            without_checkpointing(trainer.model),
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            as_writer(model, self._config),
        ):
            return [self._complete(model, rows) for rows in prompts]

    @torch.no_grad()
    def _complete(self, model: "PreTrainedModel", prompts: list[Tokens]) -> list[Tokens]:
        longest, device = max(map(len, prompts)), self._trainer.args.device
        ids = torch.tensor([[self._config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        # No rank waits for the others to end: none of them needs another's share of the weights.
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=self._config, synced_gpus=False)[:, longest:]
        return [until_end(completion, self._config.eos_token_id) for completion in written.tolist()]


def until_end(completion: Tokens, ends: list[int]) -> Tokens:
    """What was written up to and with the first token that ends it; padding comes after that."""
    return completion[: next((place + 1 for place, token in enumerate(completion) if token in ends), None)]


def words_of_answer(tokenizer, ids: Tokens, ends: Collection[int]) -> str:
    """Without the token that ends it, and with its other special tokens: Llama and Mistral mark calls by them."""
    said = ids[:-1] if ids and ids[-1] in ends else ids
    return tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def as_writer(model: "PreTrainedModel", config: GenerationConfig) -> Iterator[None]:
    """Without dropout, and without the model's own generation config, from which transformers takes what another leaves open: a penalty on
    repetitions would be of another distribution than the one that is scored."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    was_training, own = model.training, base.generation_config
    model.eval()
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own
        model.train(was_training)


class Vllm:
    """The student writes by vLLM on the same GPU, through TRL's VLLMGeneration (`colocate`), which is handed the weights of each step.
    Run against a small engine of the same calls in the tests, and not yet with vLLM itself on a GPU."""

    def __init__(self, trainer: HarnessDistillTrainer, config: GenerationConfig, longest: int):
        """longest: tokens of the longest prompt and its completion."""
        from trl.generation.vllm_generation import VLLMGeneration

        args = trainer.args
        self._ends = config.eos_token_id
        self._engine = VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode="colocate",
            gpu_memory_utilization=VLLM_MEMORY,
            max_model_length=longest,
            max_num_seqs=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_completion_length=config.max_new_tokens,
            logprobs=None,
            generation_kwargs={
                "stop_token_ids": config.eos_token_id,
                "min_tokens": config.min_new_tokens,
                # As good as never: what vLLM has in place of suppressed tokens.
                "logit_bias": dict.fromkeys(config.suppress_tokens, -100.0) or None,
            },
        )

    def write(self, prompts: list[list[Tokens]]) -> list[list[Tokens]]:
        """As Plain.write; all micro-batches at once."""
        self._engine.sync_weights()
        _, completions, _, _ = self._engine.generate([prompt for rows in prompts for prompt in rows], images=None, num_generations=1)
        remaining = iter(completions)
        return [[until_end(list(next(remaining)), self._ends) for _ in rows] for rows in prompts]


def uses_vllm(recipe: Recipe, *, has_gpu: bool) -> bool:
    """Raises ModelError when it is asked for and cannot be had."""
    asked, has_both = recipe.distill.on_policy.use_vllm, has_gpu and find_spec("vllm") is not None
    if asked is True and not has_both:
        raise ModelError(
            "distill.on_policy.use_vllm = true; the package vllm or a GPU is not here; pip install 'trl[vllm]' on a machine with a GPU, or "
            "use auto, which writes by transformers until then"
        )
    return asked is True or asked == "auto" and has_both and not recipe.model.trains_adapter


# ---- trainer


class OnPolicyTrainer(HarnessDistillTrainer):
    """`write_by` must follow construction."""

    def write_by(self, writer: Plain | Vllm, is_written: Callable[[int, int], bool], ends: list[int]) -> None:
        """is_written: of (step, micro-batch). ends: the tokens that end a completion."""
        self._writer, self._is_written, self._ends = writer, is_written, ends
        self._written: dict[str, float] | None = None
        self._tokens_of = {True: 0.0, False: 0.0}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step, own = self.state.global_step + 1, 0.0
        places = [place for place in range(len(batches)) if self._is_written(step, place)]
        if places and not self.lives.guard.passes_over(step):
            own = self._let_write(batches, places, step)
            num_items = self._get_num_items_in_batch(batches, device)
        gold = float(num_items) - own if batches else 0.0
        # On average over the micro-batches of a kind.
        self._tokens_of = {True: own / max(len(places), 1), False: gold / max(len(batches) - len(places), 1)}
        return batches, num_items

    def _let_write(self, batches: list[dict], places: list[int], step: int) -> float:
        """Put what the student writes now in the place of these micro-batches. Returns its tokens, of all ranks."""
        self.lives.report.beat()
        began = time.perf_counter()
        prompts = [prompts_of(batches[place]) for place in places]
        with self._random_numbers_of(step):
            completions = self._writer.write(prompts)
        counted: list[Tokens] = []
        for place, beginnings, endings in zip(places, prompts, completions, strict=True):
            counts = (batches[place]["labels"][:, 1:] != UNTRAINED).any(1).tolist()
            rows = [written_row(*row) for row in zip(beginnings, endings, counts, strict=True)]
            batches[place] = {**send_to_device(self.data_collator(rows), self.args.device), "written": {}}
            counted += [ending for ending, count in zip(endings, counts, strict=True) if count]
        ended = sum(completion[-1] in self._ends for completion in counted)
        tokens, ended, rows = distributed.all_reduce_sum([sum(map(len, counted)), ended, len(counted)])
        (generation_s,) = distributed.all_reduce_max([time.perf_counter() - began])
        batches[places[0]]["written"] = {
            "distill/completion_length": tokens / max(rows, 1),
            "distill/ended": ended / max(rows, 1),
            "speed/generation_s": generation_s,
        }
        return tokens

    @contextlib.contextmanager
    def _random_numbers_of(self, step: int) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(f"{self.args.seed} {step} rank {distributed.rank()}").getrandbits(63))
            yield

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        self._written = inputs.pop("written", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _lesson(self, inputs: dict) -> Lesson:
        return self._teacher.lesson(inputs, has_gold=self._written is None)

    def _note(self, *args) -> None:
        super()._note(*args)
        if self.model.training:
            metrics = self._metrics["train"]
            for key, value in {"distill/on_policy_share": float(self._written is not None), **(self._written or {})}.items():
                metrics[key].append(value)

    def _tokens_of_a_micro_batch(self, num_items_in_batch) -> float:
        return self._tokens_of[self._written is not None]

    def _named(self, measured: dict[str, float]) -> dict[str, float]:
        if self._written is None:
            return measured
        return {f"on_policy_{name}": value for name, value in measured.items() if name != "cross_entropy"}


def build_trainer(*arguments, teacher: Beside, on_policy: OnPolicy, by_vllm: bool, fills: bool) -> OnPolicyTrainer:
    """arguments: those of sft.build_trainer. fills: a smoke test, whose completions are all as long as they may be.
    Raises ModelError when a prompt and its completion are longer than the student or the teacher."""
    args, model, tokenizer, rows, *_ = arguments
    longest = int(prompt_lengths(rows).max())
    for name, reader in (("student", model), ("teacher", teacher.model)):
        check_room(name, reader, longest, on_policy.max_new_tokens)
    trainer = distill.build_trainer(*arguments, teacher=teacher, kind=OnPolicyTrainer)
    config = generation_config(on_policy, model, tokenizer, teacher.vocabulary, fills=fills)
    writer = Vllm(trainer, config, longest + on_policy.max_new_tokens) if by_vllm else Plain(trainer, config)
    chosen = partial(is_written, on_policy.fraction, args.seed)
    if fills and on_policy.fraction < 1:
        # By chance none or all of so few steps might be written.
        chosen = _after_gold
    trainer.write_by(writer, chosen, config.eos_token_id)
    return trainer


def _after_gold(step: int, micro_batch: int) -> bool:
    """Whether the student writes in a smoke test that has seen its rows as they are."""
    return step > smoke.STEPS


def check_room(name: str, model: "PreTrainedModel", longest: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and longest + max_new_tokens > positions:
        raise ModelError(
            f"distill.on_policy.max_new_tokens = {max_new_tokens}; after the longest prompt of {longest} tokens the {name} has positions "
            f"for {max(positions - longest, 0)} more; make it no larger, or shorten the prompts"
        )


def generation_config(on_policy: OnPolicy, model: "PreTrainedModel", tokenizer, vocabulary: int, *, fills: bool) -> GenerationConfig:
    """vocabulary: tokens of the tokenizer; a head may have more rows, which nobody has trained and the teacher may not have."""
    ends = model.generation_config.eos_token_id
    return GenerationConfig(
        max_new_tokens=on_policy.max_new_tokens,
        min_new_tokens=on_policy.max_new_tokens if fills else 0,
        do_sample=True,
        temperature=on_policy.temperature,
        top_p=on_policy.top_p,
        top_k=on_policy.top_k,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[ends] if isinstance(ends, int) else ends,
        suppress_tokens=list(range(vocabulary, model.config.get_text_config().vocab_size)),
        use_cache=True,
        # Every step has other lengths.
        disable_compile=True,
    )
