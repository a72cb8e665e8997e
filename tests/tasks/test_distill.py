"""Distillation through real trainers: what a student learns from a cache and from a resident teacher, on one process and on two."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import STORIES, needs_shared
from datasets import Dataset

from harness.checkpoint.cadence import Cadence
from harness.checkpoint.door import Door, Signals
from harness.data.order import EpochOrder
from harness.data.packing import pack
from harness.data.store import SAMPLE_FEATURES
from harness.errors import ModelError, TeacherError
from harness.guard import Guard
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.schema import Checkpoint
from harness.run import RankReport
from harness.tasks import distill, on_policy, sft
from harness.tasks.arguments import training_arguments
from harness.tasks.lives import Lives
from harness.tasks.trainer import pad_for_ranks
from harness.teacher.resident import Asked, ResidentTeacher
from harness.tracking.throughput import Throughput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "teacher"))
from dense import capture, whole  # noqa: E402

pytestmark = needs_shared

VOCABULARY = 512


def rows_of(lengths, seed=0) -> Dataset:
    """Rows of random tokens in which a random part is trained; uneven on purpose."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < (index + 1) / len(lengths), ids, -100)
        labels[0], labels[-1] = -100, ids[-1]
        row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length}
        rows.append({**row, "sample": str(index), "location": f"rows:{index}"})
    return Dataset.from_list(rows, features=SAMPLE_FEATURES)


def stories():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


def quarter():
    """A student a quarter of the teacher's size, of the same tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(quarter_config(AutoConfig.from_pretrained(STORIES)), dtype=torch.float32)


def quarter_config(config):
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 96, 3
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return config


@pytest.fixture
def cache_of(tmp_path):
    """cache_of(teacher, rows, settings) -> a cache of these rows, from the teacher's plain logits."""

    def cache_of(teacher, rows, settings=None, name="cache"):
        def logits_of(ids):
            with torch.no_grad():
                return teacher(input_ids=torch.tensor(ids)[None].long()).logits[0]

        samples = [(row["input_ids"], row["labels"]) for row in rows]
        return capture(tmp_path / name, samples, logits_of, VOCABULARY, settings or whole(255))

    return cache_of


@pytest.fixture
def build(tmp_path):
    """build(student, teacher, rows, held-out rows, *overrides) -> trainer. teacher: a cache, or a model that is resident. writing:
    what on_policy.build_trainer takes besides."""

    def build(student, teacher, train, held_out=None, *overrides, flattens=False, **writing):
        from transformers import AutoTokenizer

        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"""
task: distill
model: {{name_or_path: "{STORIES}"}}
teacher: {{name_or_path: "{STORIES}", source: {"resident" if isinstance(teacher, torch.nn.Module) else "cache"}}}
data: {{train: rows.jsonl, eval: held-out.jsonl}}
train: {{per_device_train_batch_size: 4, max_steps: 2, logging_steps: 1, eval_steps: 1, learning_rate: 1e-3}}
"""
        )
        recipe = load(str(file), overrides)
        arguments = training_arguments(recipe, load_backend("single"), tmp_path / "run", 1, has_gpu=False, bf16_hardware=False)
        args = sft.build_arguments(recipe, arguments, flattens=flattens)
        if isinstance(teacher, torch.nn.Module):
            resident = ResidentTeacher(teacher, "float32", "0" * 32, torch.device("cpu"), Asked(teacher, is_sharded=False))
            teaches = distill.Beside(resident, VOCABULARY, recipe.distill)
        else:
            teaches = distill.FromCache(teacher, recipe.distill)
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
        make = distill.build_trainer
        if recipe.distill.on_policy:
            make = partial(on_policy.build_trainer, on_policy=recipe.distill.on_policy, **{"by_vllm": False, "fills": False, **writing})
        trainer = make(args, student, tokenizer, train, held_out, [], teacher=teaches)
        trainer.configure(throughput=Throughput(), isolates=flattens)
        rows_of_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        trainer.live(
            Lives(
                committer=None,
                cadence=Cadence(Checkpoint(auto=False), 1, now=0),
                door=Door(Signals(), None),
                guard=Guard(recipe.guard, fp16=False),
                order=EpochOrder(len(train), rows_of_a_step, args.seed),
                report=RankReport(0),
                facts={},
                tracking=None,
            )
        )
        return trainer

    return build


def logged(trainer, key) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def plain_losses(student, teacher, rows) -> tuple[float, float]:
    """(KL from the teacher, cross-entropy) per trained token, one row at a time from plain logits in float64."""
    divergence, nll, tokens = 0.0, 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        trained = labels != -100
        with torch.no_grad():
            log_q, log_p = (model(input_ids=ids).logits[0, :-1][trained].double().log_softmax(-1) for model in (student, teacher))
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        nll -= log_q.gather(1, labels[trained][:, None]).sum().item()
        tokens += int(trained.sum())
    return divergence / tokens, nll / tokens


# ---- teacher = student


@pytest.mark.parametrize("flattens", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("source", ["cache", "resident"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(build, cache_of, source, flattens):
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    teacher = cache_of(stories(), rows, whole(255)) if source == "cache" else stories()
    packed = pack(rows, capacity=64, seed=1) if flattens else rows
    trainer = build(stories(), teacher, packed, None, "train.eval_steps=null", "data.eval=[]", "distill.weight=1", flattens=flattens)
    trainer.train()
    # What was kept of 512 entries misses the tail's shape, and its numbers are rounded to 16 bits.
    assert abs(logged(trainer, "distill/kl")[0]) < 1e-5
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "distill/kl")[0], abs=1e-7)
    assert logged(trainer, "distill/top1_agreement")[0] == pytest.approx(1, abs=1e-3)
    assert logged(trainer, "grad_norm")[0] < 0.05


# ---- what is learnt, and what is said of it


@pytest.mark.parametrize(("source", "accepts"), [("cache", True), ("resident", True), ("resident", False)])
def test_what_is_logged_is_per_trained_token_over_the_whole_step(build, cache_of, source, accepts):
    """accepts: whether the model's own forward takes the number of tokens of a step."""
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    student, teacher = quarter(), stories()
    student.accepts_loss_kwargs = accepts
    divergence, nll = plain_losses(student, teacher, rows)
    # 255 of 512 entries, and the rest as one: a lower bound that is tight.
    trainer = build(
        *(student, cache_of(teacher, rows) if source == "cache" else teacher, rows, None),
        *("train.eval_steps=null", "data.eval=[]", "distill.weight=0.7", "train.gradient_accumulation_steps=2", "train.max_steps=1"),
    )
    trainer.train()
    near = 2e-3 if source == "cache" else 1e-5
    assert logged(trainer, "distill/kl")[0] == pytest.approx(divergence, rel=near)
    assert logged(trainer, "distill/cross_entropy")[0] == pytest.approx(nll, rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(0.7 * divergence + 0.3 * nll, rel=near)
    # A mean of the micro-batches' means would be another number.
    means = [plain_losses(quarter(), teacher, rows.select(range(start, start + 4)))[1] for start in (0, 4)]
    assert abs(sum(means) / 2 - nll) > 1e-3


@pytest.mark.parametrize("source", ["cache", "resident"])
def test_held_out_rows_have_the_same_metrics_over_all_their_tokens(build, cache_of, source):
    rows, held_out = rows_of([9, 40, 5, 33]), rows_of([12, 21, 60, 8, 30, 5, 17], seed=5)
    student, teacher = quarter(), stories()
    divergence, nll = plain_losses(student, teacher, held_out)
    source = cache_of(teacher, [*rows, *held_out]) if source == "cache" else teacher
    measured = build(student, source, rows, pad_for_ranks(held_out, 8), "distill.weight=0.25").evaluate()
    assert measured["eval_kl"] == pytest.approx(divergence, rel=2e-3)
    assert measured["eval_cross_entropy"] == pytest.approx(nll, rel=1e-5)
    assert measured["eval_loss"] == pytest.approx(0.25 * divergence + 0.75 * nll, rel=2e-3)
    assert 0 <= measured["eval_top1_agreement"] < 1 and 0 < measured["eval_overlap"] < 1


def test_a_cache_that_keeps_everything_teaches_what_the_resident_teacher_does(build, cache_of, monkeypatch):
    """K = V: the heads' 512 entries do not fit the format's byte, so a vocabulary of 200 tokens, which is what both heads are cut to."""
    monkeypatch.setattr(sys.modules[__name__], "VOCABULARY", 200)
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    curves = []
    for teacher in (stories(), cache_of(stories(), rows, whole(200))):
        trainer = build(quarter(), teacher, rows, None, "train.eval_steps=null", "data.eval=[]", "train.max_steps=12")
        trainer.train()
        curves.append([logged(trainer, key) for key in ("loss", "distill/kl", "distill/top1_agreement", "distill/overlap")])
    resident, cached = map(torch.tensor, curves)
    assert (resident - cached).abs().max() < 1e-4
    assert resident[0, 0] - resident[0, -1] > 0.1


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_resident_teacher_can_be_followed_otherwise_and_at_another_temperature(build, divergence):
    rows = rows_of([9, 40, 5, 33])
    settings = [f"distill.divergence={divergence}", "distill.temperature=2", "distill.weight=1"]
    trainer = build(quarter(), stories(), rows, None, "train.eval_steps=null", "data.eval=[]", *settings, "train.max_steps=1")
    expected, tokens = 0.0, 0
    for row in rows:
        trained = torch.tensor(row["labels"][1:]) != -100
        logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][trained].double() for model in (quarter(), stories())]
        log_q, log_p = (each.div(2).log_softmax(-1) for each in logits)
        q, p = log_q.exp(), log_p.exp()
        if divergence == "reverse_kl":
            each = (q * (log_q - log_p)).sum()
        else:
            log_m = ((p + q) / 2).log()
            each = ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2
        expected, tokens = expected + 4 * each.item(), tokens + int(trained.sum())
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected / tokens, rel=1e-4)


def test_draws_from_the_tail_are_taken_from_the_cache(build, cache_of):
    from harness.teacher.format import Settings

    rows = rows_of([40] * 8)
    student, teacher = quarter(), stories()
    divergence, _ = plain_losses(student, teacher, rows)
    cache = cache_of(teacher, rows, Settings(p=0.5, floor=1, cap=8, draws=32, seed=0))
    shared = ["train.eval_steps=null", "data.eval=[]", "distill.weight=1", "train.per_device_train_batch_size=8", "train.max_steps=1"]
    found = {}
    for tail in ("ghost", "draws"):
        trainer = build(quarter(), cache, rows, None, *shared, f"distill.tail={tail}", "teacher.draws=32")
        trainer.train()
        found[tail] = logged(trainer, "distill/kl")[0]
    # Of 8 entries little is known: the ghost is a lower bound, the draws are right on average.
    assert found["ghost"] < 0.8 * divergence
    assert found["draws"] == pytest.approx(divergence, rel=0.1)


def test_an_adapter_learns_from_a_teacher_and_the_head_stays_as_it_is(build, cache_of):
    from peft import LoraConfig, get_peft_model

    rows = rows_of([9, 40, 5, 33])
    student = get_peft_model(quarter(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    head = student.get_output_embeddings().weight.clone()
    trainer = build(student, cache_of(stories(), rows), rows, None, "train.eval_steps=null", "data.eval=[]", "train.learning_rate=0.05")
    trainer.train()
    assert logged(trainer, "loss")[1] < logged(trainer, "loss")[0]
    assert torch.equal(head, student.get_output_embeddings().weight)


def test_a_student_learns_more_from_the_same_rows_and_steps_with_a_teacher_than_without(build, cache_of):
    """Stories that the teacher has written: each gold token is one draw of what a distribution says whole."""
    teacher = stories()
    torch.manual_seed(0)
    written = teacher.generate(torch.ones(48, 1, dtype=torch.long), do_sample=True, max_new_tokens=95, min_new_tokens=95, top_k=0)
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]], "length": 96, "sample": "", "location": ""} for ids in written.tolist()]
    rows, held_out = (Dataset.from_list(part, features=SAMPLE_FEATURES) for part in (rows[:24], rows[24:]))
    cache = cache_of(teacher, [*rows, *held_out])
    steps = ["train.max_steps=60", "train.learning_rate=1e-2", "train.per_device_train_batch_size=8", "train.eval_steps=60"]
    nll = {}
    for weight in (1e-9, 0.5):
        trainer = build(quarter(), cache, rows, held_out, *steps, f"distill.weight={weight}")
        trainer.train()
        nll[weight] = logged(trainer, "eval_cross_entropy")[-1]
        assert nll[weight] == pytest.approx(plain_losses(trainer.model.eval(), teacher, held_out)[1], rel=1e-5)
    assert nll[0.5] < nll[1e-9] - 0.2


# ---- what is refused before the first step


def test_a_mixture_of_experts_is_no_student_because_its_router_would_go_untrained(build, cache_of):
    rows, student = rows_of([9, 40, 5, 33]), quarter()
    # As Mixtral's config says it.
    student.config.output_router_logits, student.config.router_aux_loss_coef = True, 0.01
    with pytest.raises(ModelError, match="router_aux_loss_coef: 0"):
        build(student, cache_of(stories(), rows), rows, None, "train.eval_steps=null", "data.eval=[]")


def test_a_student_whose_logits_are_not_head_times_hidden_states_is_refused_before_its_first_step(build, cache_of):
    rows, student = rows_of([9, 40, 5, 33]), stories()
    trainer = build(student, cache_of(stories(), rows), rows, None, "train.eval_steps=null", "data.eval=[]")
    student.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ModelError, match=r"nats more or less than its own logits"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("setting", [{"logit_scale": 0.5}, {"final_logit_softcapping": 3.0}, {"bias": True}])
def test_scale_cap_and_bias_of_a_head_are_what_the_loss_sees(build, cache_of, setting):
    """A Llama with the head of Cohere, of Gemma, and with a bias."""
    rows, student = rows_of([9, 40, 5, 33]), stories()
    if "bias" in setting:
        student.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, VOCABULARY))
    else:
        (name, value) = next(iter(setting.items()))
        setattr(student.config, name, value)
        change = (lambda logits: value * logits) if name == "logit_scale" else (lambda logits: value * torch.tanh(logits / value))
        student.lm_head.register_forward_hook(lambda module, inputs, logits: change(logits))
    divergence, nll = plain_losses(student, stories(), rows)
    trainer = build(student, cache_of(stories(), rows), rows, None, "train.eval_steps=null", "data.eval=[]")
    trainer.train()
    assert divergence > 0.05 and logged(trainer, "distill/cross_entropy")[0] == pytest.approx(nll, rel=1e-5)
    assert logged(trainer, "distill/kl")[0] == pytest.approx(divergence, rel=5e-3)


def test_a_resident_teacher_that_does_not_say_the_same_twice_is_refused(build):
    rows, teacher = rows_of([9, 40, 5, 33]), stories()
    noise = torch.Generator().manual_seed(0)
    teacher.model.norm.register_forward_hook(lambda module, inputs, hidden: hidden + torch.randn(hidden.shape, generator=noise))
    with pytest.raises(TeacherError, match="in the student's place it differs from itself by"):
        build(quarter(), teacher, rows, None, "train.eval_steps=null", "data.eval=[]").train()


def test_a_resident_teacher_whose_samples_see_each_other_in_a_pack_is_refused(build):
    rows, teacher = pack(rows_of([30] * 16), capacity=64), stories()
    # Positions are how a flattened batch says where a sample begins.
    teacher.model.register_forward_pre_hook(lambda module, args, inputs: (args, {**inputs, "position_ids": None}), with_kwargs=True)
    with pytest.raises(ModelError, match="with its neighbour in the pack"):
        build(quarter(), teacher, rows, None, "train.eval_steps=null", "data.eval=[]", flattens=True).train()
