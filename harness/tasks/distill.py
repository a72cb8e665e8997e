"""Distillation by TRL's SFTTrainer with another loss: weight * divergence from a teacher + (1 - weight) * cross-entropy, per trained token.

The loss is a lesson (harness.tasks.lessons) of the student's hidden states. Sums over tokens are divided by the trained tokens of the whole
step on all ranks, so that accumulation, ranks and uneven masks change nothing.

Logged beside train/loss, per trained token: distill/kl (of the student from the teacher, at temperature 1), distill/cross_entropy,
distill/top1_agreement, distill/overlap (mass that both give to the same tokens); on held-out rows eval/kl and so on.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate.utils import patch_environment
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from harness import distributed
from harness.attention import check_isolation
from harness.losses import DivergenceLoss, Head, dense_divergence, sparse_divergence
from harness.model.head import head_of
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.schema import Distill
from harness.tasks import sft
from harness.tasks.job import Stage, TaskPlan
from harness.tasks.lessons import Lesson, add_lessons, check_router_has_no_loss
from harness.tasks.sft import HarnessSFTTrainer
from harness.teacher import resident, served
from harness.teacher.probe import check_same_distribution, check_two_ways, find_cache
from harness.teacher.reader import TeacherCache, open_cache
from harness.teacher.resident import ResidentTeacher
from harness.teacher.served import ServedTeacher
from harness.teacher.targets import UNTRAINED, TargetsCollator
from harness.teacher.vocabulary import true_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.data.store import Prepared

# ---- teachers


class FromCache:
    """What a teacher has said of these rows is read with them; or a server is asked when they become a batch."""

    whole_model = None

    def __init__(self, teacher: TeacherCache | ServedTeacher, distill: Distill):
        self.vocabulary, self.digest, self._teacher, self._distill = teacher.vocabulary, teacher.digest, teacher, distill

    def collator(self, collate: Callable[[list[dict]], dict]) -> TargetsCollator:
        """A trainer's own, with targets."""
        return TargetsCollator(collate, self._teacher)

    def lesson(self, inputs: dict) -> Lesson:
        """For this micro-batch, whose targets are taken out of it."""
        targets = inputs.pop("targets").sparse
        return lambda hidden, head, gold: sparse_divergence(
            hidden,
            head,
            targets,
            gold,
            tail=self._distill.tail,
            cross_entropy_weight=1 - self._distill.weight,
            divergence_weight=self._distill.weight,
            vocabulary=self.vocabulary,
        )

    def check(self, inputs: dict, *, isolates: bool) -> None:
        """Whether targets and rows fit was checked before the student was loaded (load_teacher)."""


class Beside:
    """A teacher that answers beside the student: a whole one on every rank, or shares of one where the backend is ZeRO-3."""

    def __init__(self, teacher: ResidentTeacher, vocabulary: int, distill: Distill):
        self.vocabulary, self.digest, self._teacher, self._distill = vocabulary, teacher.digest, teacher, distill
        self._beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5 if distill.beta is None else distill.beta}[distill.divergence]

    @property
    def model(self) -> "PreTrainedModel":
        return self._teacher.model

    @property
    def whole_model(self) -> "PreTrainedModel | None":
        """The teacher, to be asked for answers of its own; None where ranks have shares of it."""
        is_shared = any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())
        return None if is_shared else self.model

    def collator(self, collate: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
        """A trainer's own: the rows are all that this teacher wants."""
        return collate

    def lesson(self, inputs: dict, *, has_gold: bool = True) -> Lesson:
        """For this micro-batch, about which the teacher is asked here, before the student. Without gold only the divergence counts."""
        trained = inputs["labels"][:, 1:] != UNTRAINED
        taught = self._ask(inputs, lambda hidden, head: hidden[:, :-1][trained])
        taught_head = head_of(self.model)

        def lesson(hidden: Tensor, head: Head, gold: Tensor) -> DivergenceLoss:
            with maybe_gather_lm_head_ctx(taught_head.weight, taught_head.bias):
                return dense_divergence(
                    hidden,
                    head,
                    taught,
                    taught_head,
                    gold,
                    beta=self._beta,
                    cross_entropy_weight=(1 - self._distill.weight) * has_gold,
                    divergence_weight=self._distill.weight,
                    temperature=self._distill.temperature,
                    vocabulary=self.vocabulary,
                )

        return lesson

    def _ask(self, inputs: dict, question):
        # What tells apart the samples of a flattened batch; of a padded one its mask is not needed, for the padding is at the right.
        return self._teacher.ask(inputs["input_ids"], question, **{key: inputs[key] for key in FLATTENED if key in inputs})

    def check(self, inputs: dict, *, isolates: bool) -> None:
        """Raises TeacherError when the teacher in the student's place is not found to be like itself, and when samples of a flattened batch
        (isolates) see each other in it."""
        gold, lesson = inputs["labels"][:, 1:], self.lesson(inputs)
        trained = gold != UNTRAINED
        losses = self._ask(inputs, lambda hidden, head: lesson(hidden[:, :-1][trained], head, gold[trained]))
        check_same_distribution(losses, int(trained.sum()))
        if isolates:
            check_isolation(_AsModel(self._teacher), self.vocabulary, inputs["input_ids"].device)


FLATTENED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class _AsModel:
    """A teacher where a model is wanted that returns logits."""

    training = False

    def __init__(self, teacher: ResidentTeacher):
        self._teacher = teacher
        self.parameters = teacher.model.parameters

    def __call__(self, *, input_ids: Tensor, use_cache: bool, **inputs):
        return CausalLMOutput(logits=self._teacher.logits(input_ids, **inputs))

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass


# ---- trainer


class HarnessDistillTrainer(HarnessSFTTrainer):
    """`teach` must follow construction."""

    def teach(self, teacher: FromCache | Beside) -> None:
        check_router_has_no_loss(self, "from a teacher")
        add_lessons(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)
        self._teacher, self._unchecked = teacher, True
        # What a step's loss is divided by is `compute_loss`'s to say, whatever the model's own forward takes.
        self.model_accepts_loss_kwargs = True
        self.whole_teacher = teacher.whole_model
        # TRL takes no other collator than its own for flattened batches.
        self.data_collator = teacher.collator(self.data_collator)

    def training_step(self, model, inputs, *args, **kwargs):
        if self._unchecked:
            self._unchecked = False
            self._teacher.check(dict(inputs), isolates=self._checks_isolation)
            check_two_ways(model, self._teacher.vocabulary, self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        lesson = self._lesson(inputs)
        losses: DivergenceLoss = model(**inputs, lesson=lesson)
        trained = (inputs["labels"][:, 1:] != UNTRAINED).sum()
        self._note(losses, trained, inputs, num_items_in_batch)
        if num_items_in_batch is None:
            return losses.loss / trained.clamp(min=1)
        # Whatever wraps the model takes the mean over the ranks.
        return losses.loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def _lesson(self, inputs: dict) -> Lesson:
        return self._teacher.lesson(inputs)

    def _note(self, losses: DivergenceLoss, trained: Tensor, inputs: dict, num_items_in_batch) -> None:
        """Keep what is logged: the mean of what a step's micro-batches leave here is the mean over the tokens of the step, of all ranks."""
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else trained.new_tensor(inputs["input_ids"].numel())
        logged = {"kl": losses.kl, "cross_entropy": losses.cross_entropy, "top1_agreement": losses.agreement, "overlap": losses.overlap}
        *sums, trained, read = distributed.all_reduce_sum(
            torch.stack([*(value.double() for value in (*logged.values(), trained, read))]).tolist()
        )
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        share = trained if num_items_in_batch is None else self._tokens_of_a_micro_batch(num_items_in_batch)
        for name, value in self._named(dict(zip(logged, sums, strict=True))).items():
            metrics[f"distill/{name}" if training else name].append(value / max(share, 1))
        if training:
            self._total_train_tokens += int(read)
        metrics["num_tokens"] = [self._total_train_tokens]

    def _tokens_of_a_micro_batch(self, num_items_in_batch) -> float:
        """Trained ones, of all ranks, on average over the step."""
        return float(num_items_in_batch) / self.current_gradient_accumulation_steps

    def _named(self, measured: dict[str, float]) -> dict[str, float]:
        return measured


def build_trainer(
    *arguments, teacher: FromCache | Beside, kind: type[HarnessDistillTrainer] = HarnessDistillTrainer
) -> HarnessDistillTrainer:
    """arguments: those of sft.build_trainer."""
    trainer = sft.build_trainer(*arguments, kind=kind)
    trainer.teach(teacher)
    return trainer


# ---- from the recipe


def plan(stage: Stage) -> TaskPlan:
    """With the teacher loaded, or found in its cache."""
    recipe, build = stage.recipe, build_trainer
    if recipe.distill.on_policy:
        from harness.tasks import on_policy

        by_vllm = on_policy.uses_vllm(recipe, has_gpu=stage.settled.has_gpu)
        build = functools.partial(on_policy.build_trainer, on_policy=recipe.distill.on_policy, by_vllm=by_vllm, fills=stage.job.smoke)
    stage.job.report.enter("loading teacher")
    teacher = load_teacher(recipe, stage.job.backend, stage.tokenizer, stage.prepared)
    return TaskPlan(functools.partial(build, teacher=teacher), sft.build_arguments, {"teacher": teacher.digest})


def load_teacher(recipe: Recipe, backend: Backend, tokenizer, prepared: "Prepared") -> FromCache | Beside:
    """The recipe's teacher, on every rank, before training's arguments are made: they say how all that is loaded after them is sharded.

    Raises TeacherError, on every rank, when a cache lacks rows or is not of them, or a teacher does not fit; ModelError when it cannot be
    loaded.
    """
    splits = [split for split in (prepared.report.train, prepared.report.eval) if split is not None]
    longest, say = max(split.length_percentiles["max"] for split in splits), functools.partial(print, flush=True)
    if recipe.teacher.source == "resident":
        # Under FSDP transformers reads weights on one rank alone, and leaves the others to whoever shards the model; this one stays whole.
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            teacher = resident.load_teacher(recipe, tokenizer, longest, sharded_by=backend if backend.zero_stage == 3 else None)
        return Beside(teacher, true_vocabulary(tokenizer), recipe.distill)
    if recipe.teacher.source == "served":
        return FromCache(distributed.on_main(lambda: served.connect(recipe, tokenizer, longest, say)), recipe.distill)
    return FromCache(open_cache(distributed.on_main(lambda: find_cache(recipe, tokenizer, prepared, say))), recipe.distill)
