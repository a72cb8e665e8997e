"""What our RLOO and GRPO trainers do beyond TRL's: a mixin with a method per seam of TRL 1.16.

_get_train_sampler                prompts in our order, each as often as it is answered, so that any number of ranks sees the same ones
_prepare_inputs                   what is drawn follows from (seed, step, rank): a run that is continued writes the same answers again
_tokenize_prompts                 prompts as a server would ask them (harness.data.questions), not as TRL would render them
_generate_single_turn             writes by transformers' generate, without dropout, and notes what it thought of each token; or by vLLM
_calculate_rewards                rewards of harness.tasks.rewards; rows that only fill an evaluation's batches have none
_compute_loss                     the gap between what the generator and the trainer think of the same tokens
prediction_step, evaluation_loop  held-out prompts are answered once each, as in training; the means are over rows, whatever the batches

Every step writes anew (TRL's steps_per_generation is the accumulation, its num_iterations is 1), so between two steps nothing is left to
carry over, and a checkpoint holds all of a run. Nothing is clipped by that: in a step the policy that learns is the one that wrote.

Logged, besides what TRL logs: sampling/sampling_logp_difference/mean and /max (per token, under TRL's names of it), tools/* of the samples
where the tool-call scorer pays, speed/generation_s per step. Not logged: TRL's clip_ratio, which has nothing to say.
"""

import contextlib
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import pad

from harness import distributed
from harness.data.order import EpochOrder
from harness.data.templates import Renderer
from harness.errors import DataError
from harness.model.adapters import reference_of
from harness.tasks.on_policy import as_writer, until_end, words_of_answer
from harness.tasks.rewards import Answer, Reward
from harness.tasks.trainer import HarnessTrainer

Tokens = list[int]
BEAT_EVERY_S = 1.0
COLUMNS = ("answer", "tool_calls", "tools", "json_schema")
OF_EVALUATION = ("kl", "entropy", "completions/mean_length", "completions/clipped_ratio", "sampling/")
"""What TRL measures batch by batch and is logged of an evaluation; deviations of groups of one, and the loss, say nothing there."""


# ---- data


@dataclass(frozen=True)
class Question:
    """One prompt, as a data set hands it to the trainer: no list or dict, which Accelerate would walk through."""

    ids: Tokens
    row: dict
    location: str
    counts: bool = True


class PromptOrder(EpochOrder):
    """The order of an epoch's prompts; as many of its end as make no whole step are left out, other ones in each epoch. (A group that
    counts nothing in their place would still be written, and weigh in means over a step.)"""

    def __init__(self, prompts: int, per_step: int, seed: int):
        super().__init__(prompts - prompts % per_step, per_step, seed)
        self.prompts = prompts
        if not self.rows:
            raise DataError(f"data.train: {prompts} prompts, and each step takes {per_step}; give more, or lower train.global_batch_size")

    def of_epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.prompts, generator=generator)[: self.rows].tolist()

    def of_step(self, epoch: int, step: int) -> list[int]:
        return self.of_epoch(epoch)[step * self.global_batch : (step + 1) * self.global_batch]


class Repeated(torch.utils.data.Sampler[int]):
    """An order as TRL's data loader takes it: a step's prompts, each `answers` times in a row; and this `micro_batches` times, of which it
    reads the first and lets the others go by."""

    def __init__(self, order: PromptOrder, answers: int, micro_batches: int):
        self.order, self.answers, self.micro_batches = order, answers, micro_batches

    def __len__(self) -> int:
        return len(self.order) * self.answers * self.micro_batches

    def __iter__(self) -> Iterator[int]:
        order, size = list(self.order), self.order.global_batch
        for start in range(0, len(order), size):
            step = [index for index in order[start : start + size] for _ in range(self.answers)]
            for _ in range(self.micro_batches):
                yield from step


# ---- writing


class Listener(LogitsProcessor):
    """Stands beside `generate`, changes nothing, and notes the log-probability of each token that was drawn. It sees the logits before
    top_p and top_k take some away, at the temperature at which the loss reads them too."""

    def __init__(self, temperature: float, beat: Callable[[], None]):
        self._temperature, self._beat = temperature, beat
        self._next: torch.Tensor | None = None
        self._noted: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._beat()
        self._note(input_ids[:, -1])
        self._next = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def _note(self, tokens: torch.Tensor) -> None:
        if self._next is not None:
            self._noted.append(self._next.gather(1, tokens.unsqueeze(1)).squeeze(1))

    def finish(self, ids: torch.Tensor) -> list[list[float]]:
        """ids: [B, T] with all that was drawn. Of each row the log-probabilities of the drawn tokens, as many as were drawn."""
        self._note(ids[:, -1])
        return torch.stack(self._noted, dim=1).tolist()


class Reinforced:
    """Mixed in before CheckpointedTrainer and HarnessTrainer. `pay_by` must follow construction."""

    trl: ModuleType
    """Where TRL's trainer stands."""

    def pay_by(self, rewards: Sequence[Reward], *, renderer: Renderer, observes: bool) -> None:
        """observes: an environment adds to the prompts, so that they are rendered when it has."""
        self._rewards, self._renderer, self._observes = rewards, renderer, observes
        self._questions: list[Question] = []
        self._answers: list[Answer] = []
        self._asked: list[Tokens] = []
        self._heard: list[list[float]] | None = None
        self._tool_masks: list[list[int]] | None = None
        self._generation_s = 0.0
        self._beaten = -math.inf
        # Of an evaluation: what each row was paid [rows, rewards], how many of a batch count, and notes on answers.
        self._paid: list[torch.Tensor] = []
        self._counted: list[int] = []
        self._notes: list[dict[str, float]] = []

    # ---- data

    def _get_train_sampler(self, dataset=None):
        return Repeated(self.lives.order, self.num_generations, self.args.steps_per_generation)

    def _count_micro_batch(self, inputs) -> None:
        """They are rows of the data set yet; `_compute_loss` counts what was written to them."""

    def _prepare_inputs(self, batch):
        training = self.model.training
        with self._random_numbers_of(f"{self.state.global_step + 1}" if training else f"evaluation {len(self._counted)}"):
            inputs = super()._prepare_inputs(batch)
        if training:
            self._total_train_tokens = self.state.num_input_tokens_seen
        return inputs

    @contextlib.contextmanager
    def _random_numbers_of(self, what: str) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(f"{self.args.seed} {what} rank {distributed.rank()}").getrandbits(63))
            yield

    # ---- writing

    def _generate_and_score_completions(self, inputs):
        self._questions = [each["row"] for each in inputs]
        self._generation_s, self._heard, self._tool_masks = 0.0, None, None
        columns = [{name: question.row.get(name) for name in COLUMNS} for question in self._questions]
        asked = [{"prompt": question.row["messages"], **row} for question, row in zip(self._questions, columns, strict=True)]
        with self._reference_is_ours():
            output = super()._generate_and_score_completions(asked)
        if self._heard is not None and "sampling_per_token_logps" not in output:
            heard = pad([torch.tensor(each) for each in self._heard], padding_value=0.0, padding_side="right")
            output["sampling_per_token_logps"] = heard.to(output["completion_ids"].device)
        (generation_s,) = distributed.all_reduce_max([self._generation_s])
        if self.model.training:
            self._metrics["train"]["speed/generation_s"].append(generation_s)
            # TRL's counts what the KL divergence makes of the rewards, too, after which no two are equal.
            self._metrics["train"]["frac_reward_zero_std"][-1] = self._equally_paid
        return output

    @contextlib.contextmanager
    def _reference_is_ours(self) -> Iterator[None]:
        """TRL asks the reference of an adapter inside of its `use_adapter`: in the place of that comes ours, which knows of earlier
        adapters and leaves alone what requires a gradient."""
        own, self.trl.use_adapter = self.trl.use_adapter, lambda model, adapter_name: reference_of(model)
        try:
            yield
        finally:
            self.trl.use_adapter = own

    def _tokenize_prompts(self, prompts):
        self._asked = [question.ids for question in self._questions]
        if self._observes:
            rows = [{**question.row, "messages": prompt} for question, prompt in zip(self._questions, prompts, strict=True)]
            self._asked = [
                self._renderer.render_prompt(row, question.location) for row, question in zip(rows, self._questions, strict=True)
            ]
        return [list(ids) for ids in self._asked], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations=None, **kwargs):
        began = time.perf_counter()
        self._beat_now_and_then()
        if self.use_vllm:
            completions, self._heard = self._write_by_vllm(prompt_ids, num_generations)
        else:
            completions, self._heard = self._write_plainly(prompt_ids)
        self._generation_s += time.perf_counter() - began
        return completions if num_generations is None else (completions, self._heard)

    def _write_plainly(self, prompts: list[Tokens]) -> tuple[list[Tokens], list[list[float]]]:
        """Completions, each with the token that ends it if it has one, and the log-probabilities of their tokens."""
        longest, device, config = max(map(len, prompts)), self.accelerator.device, self.generation_config
        ids = torch.tensor([[config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        listener, kwargs = Listener(self.temperature, self._beat_now_and_then), self.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, gradient_checkpointing_kwargs=kwargs) as model,
            as_writer(model, config),
            torch.no_grad(),
        ):
            # No rank waits for the others to end: none of them needs another's share of the weights.
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([listener]),
                synced_gpus=False,
            )[:, longest:]
        completions = [until_end(completion, self.eos_token_ids) for completion in written.tolist()]
        return completions, [heard[: len(completion)] for heard, completion in zip(listener.finish(written), completions, strict=True)]

    def _write_by_vllm(self, prompts: list[Tokens], num_generations: int | None) -> tuple[list[Tokens], list[list[float]] | None]:
        """num_generations: answers to each prompt, which stands there as often; left out: as in training or evaluation."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        each = num_generations or (self.num_generations if self.model.training else self.num_generations_eval)
        _, completions, heard, _ = self.vllm_generation.generate(prompts=prompts, images=None, num_generations=each)
        completions = [list(completion) for completion in completions]
        return completions, heard and [[token[0] for token in of_one] for of_one in heard]

    def _beat_now_and_then(self) -> None:
        if time.monotonic() - self._beaten > BEAT_EVERY_S:
            self._beaten = time.monotonic()
            self.lives.report.beat()

    # ---- rewards

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        masks, worlds = (each or [None] * len(inputs) for each in (self._tool_masks, getattr(self, "environments", None)))
        self._answers = [
            Answer(prompt, self._as_written(said, ids), asked, ids, len(ids) if mask is None else sum(mask), question.row, world)
            for question, prompt, said, asked, ids, mask, world in zip(
                self._questions, prompts, completions, self._asked, completion_ids_list, masks, worlds, strict=True
            )
        ]
        counts = [question.counts for question in self._questions]
        paid = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        notes = [self._notes_on(answer) if count else {} for answer, count in zip(self._answers, counts, strict=True)]
        if self.model.training:
            groups = self._join_rewards(paid).view(-1, self.num_generations).nan_to_num(nan=math.inf)
            self._equally_paid = float((groups == groups[:, :1]).all(1).float().mean())
            for name, value in (item for of_one in notes for item in of_one.items()):
                self._log_metric(name, value)
        else:
            # Of all ranks, in the order in which the rewards were gathered.
            of_all = [count for of_rank in distributed.gather_objects(counts) for count in of_rank]
            paid[~torch.tensor(of_all, device=paid.device)] = torch.nan
            self._paid.append(paid)
            self._counted.append(sum(of_all))
            self._notes += notes
        return paid

    def _as_written(self, said: list[dict], ids: Tokens) -> list[dict]:
        """TRL leaves special tokens out, by which some models say that a call begins (Llama 3, Mistral). What it has only decoded, and not
        parsed, is read as an evaluation would read it."""
        if len(said) > 1 or said[0].keys() > {"role", "content"}:
            return said
        return [{**said[0], "content": words_of_answer(self.processing_class, ids, self.eos_token_ids)}]

    def _notes_on(self, answer: Answer) -> dict[str, float]:
        return {name: value for reward in self._rewards for name, value in reward.notes(answer).items()}

    def _join_rewards(self, paid: torch.Tensor) -> torch.Tensor:
        """[rows, rewards] -> [rows]: the weighted sum of those that say something, NaN where none does."""
        total = (paid * self.reward_weights.to(paid.device)).nansum(1)
        return total.masked_fill(paid.isnan().all(1), torch.nan)

    # ---- the loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        counts = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if self.model.training:
            whole = torch.cat([torch.zeros_like(inputs["prompt_mask"]), counts], dim=1)
            ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
            self._throughput.count({"input_ids": ids, "attention_mask": mask, "completion_mask": whole})
        heard = inputs.get("sampling_per_token_logps")
        # TRL measures it itself where it corrects for it.
        if heard is not None and not (self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)):
            self._note_gap((self._last_logps - heard).abs(), counts.bool() & ~heard.isnan())
        return loss

    def _note_gap(self, gap: torch.Tensor, counts: torch.Tensor) -> None:
        gap = gap[counts].float()
        total, tokens = distributed.all_reduce_sum([float(gap.sum()), float(gap.numel())])
        (largest,) = distributed.all_reduce_max([float(gap.max()) if gap.numel() else 0.0])
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["sampling/sampling_logp_difference/mean"].append(total / max(tokens, 1))
        metrics["sampling/sampling_logp_difference/max"].append(largest)

    def log(self, logs, *args, **kwargs):
        for key in [key for key in self._metrics["train"] if key.startswith(("clip_ratio/", "step_time"))]:
            del self._metrics["train"][key]
        return super().log(logs, *args, **kwargs)

    # ---- evaluation

    def prediction_step(self, *args, **kwargs):
        self.after_evaluation_batch()
        # Past our own, which weighs losses by the tokens of labels.
        return super(HarnessTrainer, self).prediction_step(*args, **kwargs)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        for gathered in (self._paid, self._counted, self._notes):
            gathered.clear()
        output = super(HarnessTrainer, self).evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        self._metrics["eval"] = self._measured(rows=self.args.eval_batch_size * distributed.world_size())
        if reward := self._metrics["eval"].get("reward"):
            output.metrics[f"{metric_key_prefix}_reward"] = reward[0]
        if self.calls is not None:
            output.metrics.update({f"{metric_key_prefix}_{key}": rate for key, rate in self.calls.measure_in_training(self).items()})
        return output

    def _measured(self, rows: int) -> dict[str, list[float]]:
        """The metrics of an evaluation, in TRL's form: of rewards and calls means over all rows; of what TRL measures means over the
        batches, `rows` each, without those that some rows only fill up."""
        whole = [count == rows for count in self._counted]
        found = defaultdict(list)
        for key, values in self._metrics["eval"].items():
            if key.startswith(OF_EVALUATION) and len(values) == len(whole) and any(whole):
                kept = [value for value, counts in zip(values, whole, strict=True) if counts]
                found[key] = [sum(kept) / len(kept)]
        if self._paid:
            paid = torch.cat(self._paid)
            found["reward"] = [float(self._join_rewards(paid).nanmean())]
            for name, values in zip(self.reward_func_names, paid.T, strict=True):
                found[f"rewards/{name}/mean"] = [float(values.nanmean())]
        notes = [of_one for of_rank in distributed.gather_objects(self._notes) for of_one in of_rank]
        for name in sorted({name for of_one in notes for name in of_one}):
            values = [of_one[name] for of_one in notes if name in of_one]
            found[name] = [sum(values) / len(values)]
        return found
