"""Distillation from what the student writes: which words are its own, what they count, and that TRL would count them alike."""

import pytest
import small_vllm
import torch
from conftest import harness, needs_shared
from datasets import Dataset
from test_distill import VOCABULARY, build, logged, plain_losses, quarter, rows_of, stories  # noqa: F401
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from harness.data.store import SAMPLE_FEATURES
from harness.errors import ModelError
from harness.recipe import load
from harness.tasks.on_policy import OnPolicyTrainer, is_written, prompt_lengths, prompts_of, until_end, uses_vllm
from harness.tasks.smoke import smoke_test
from harness.tasks.trainer import with_filler
from harness.tracking.metrics import read_metrics

pytestmark = needs_shared

WRITES = ("distill.on_policy.max_new_tokens=12", "distill.weight=1")
ONE_STEP = ("train.eval_steps=null", "data.eval=[]", "train.max_steps=1")
SMALL = ("train.per_device_train_batch_size=1", "train.global_batch_size=1")
END = 2
"""Of the stories' tokenizer."""


def restless(chance=0.15):
    """A student that ends its turn after any token with about this probability, so that its completions have all lengths."""
    student = quarter()
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    student.config.tie_word_embeddings = False
    student.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with torch.no_grad():
        student.lm_head.bias[END] = torch.tensor(chance / (1 - chance) * VOCABULARY).log()
    return student


@pytest.fixture
def seen(monkeypatch):
    """The micro-batches that trainers make their steps of, as they come."""
    kept, training_step = [], OnPolicyTrainer.training_step

    def stepping(self, model, inputs, *args, **kwargs):
        kept.append({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()})
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(OnPolicyTrainer, "training_step", stepping)
    return kept


def as_rows(batches) -> list[dict]:
    """Rows of padded batches, without their padding."""
    rows = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            rows.append({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()})
    return rows


def completions(rows) -> list[list[int]]:
    return [[token for token in row["labels"] if token != -100] for row in rows]


def prompts(rows) -> list[list[int]]:
    return [row["input_ids"][: next(place for place, label in enumerate(row["labels"]) if label != -100)] for row in rows]


# ---- prompts


def test_the_prompt_is_all_before_the_first_trained_token_and_later_turns_go_with_the_first_answer():
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100, 9], [-100, 4, 5, 6, -100, -100, -100], [-100] * 7])
    ids = torch.arange(21).view(3, 7)
    assert prompts_of({"input_ids": ids, "labels": labels}) == [[0, 1], [7], [14]]


def test_lengths_of_prompts_are_those_of_the_rows_however_many_there_are_and_whatever_they_lack(monkeypatch):
    rows = with_filler(rows_of(range(2, 40)), 1)
    expected = [next((place for place, label in enumerate(row["labels"]) if label != -100), 1) for row in rows]
    assert max(expected) > 3
    for at_once in (1, 7, 1000):
        monkeypatch.setattr("harness.tasks.on_policy.ROWS_AT_ONCE", at_once)
        assert prompt_lengths(rows).tolist() == expected
        assert prompt_lengths(rows.select([38, 5, 17])).tolist() == [1, expected[5], expected[17]]


def test_a_completion_ends_with_the_token_that_ends_it():
    assert until_end([5, 6, 2, 9, 2], [2, 3]) == [5, 6, 2]
    assert until_end([3, 0, 0], [2, 3]) == [3]
    assert until_end([5, 6], [2]) == [5, 6]


# ---- which micro-batches, and what is written


def test_the_student_writes_the_asked_share_of_the_micro_batches_whoever_asks():
    drawn = [is_written(0.3, 1, step, place) for step in range(1000) for place in range(4)]
    assert sum(drawn) / 4000 == pytest.approx(0.3, abs=0.03)
    # Neither the same place in each step nor the same step for each place, and another seed draws others.
    assert len({tuple(drawn[step : step + 4]) for step in range(0, 4000, 4)}) == 16
    assert drawn != [is_written(0.3, 2, step, place) for step in range(1000) for place in range(4)]
    assert all(is_written(1.0, 1, step, 0) for step in range(100))


def test_what_is_written_begins_with_the_prompts_and_is_trained_up_to_its_end(build, seen):  # noqa: F811
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    trainer = build(restless(), stories(), rows, None, *ONE_STEP, *WRITES, "train.gradient_accumulation_steps=2")
    trainer.train()
    written = as_rows(seen)
    assert sorted(prompts(written)) == sorted(prompts(rows))
    lengths = [len(completion) for completion in completions(written)]
    assert min(lengths) < 6 and max(lengths) == 12
    for row, completion in zip(written, completions(written), strict=True):
        assert row["input_ids"][-len(completion) :] == completion == row["labels"][-len(completion) :]
        assert END not in completion[:-1] and (len(completion) == 12 or completion[-1] == END)
    assert logged(trainer, "distill/completion_length")[0] == pytest.approx(sum(lengths) / 8)
    assert logged(trainer, "distill/ended")[0] == sum(completion[-1] == END for completion in completions(written)) / 8
    assert logged(trainer, "distill/on_policy_share") == [1] and logged(trainer, "speed/generation_s")[0] > 0


def test_it_writes_what_gkd_writes_from_the_same_random_numbers(build, seen):  # noqa: F811
    rows = rows_of([9, 40, 5, 33])
    settings = ("distill.on_policy.temperature=0.8", "distill.on_policy.top_k=50", "distill.on_policy.top_p=0.9")
    trainer = build(restless(), stories(), rows, None, *ONE_STEP, *WRITES, *settings)
    order = [index for index in trainer.lives.order.of_step(0, 0)]
    trainer.train()
    starts = prompts([rows[index] for index in order])
    longest = max(map(len, starts))
    padded = torch.tensor([[0] * (longest - len(start)) + start for start in starts])
    mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts])
    with trainer._random_numbers_of(1):
        config = trainer._writer._config
        ids, kept, labels = GKDTrainer.generate_on_policy_outputs(
            restless().eval(), {"prompts": padded, "prompt_attention_mask": mask}, config
        )
    assert as_rows([{"input_ids": ids, "labels": labels, "attention_mask": kept}]) == as_rows(seen)


def test_writing_leaves_the_model_its_config_and_the_random_numbers_as_they_were(build, seen, monkeypatch):  # noqa: F811
    """What the model came with, a penalty and dropout, is not in what it writes."""
    rows, found = rows_of([9, 40, 5, 33]), []
    for penalty, dropout in ((1.0, 0.0), (5.0, 0.5)):
        student = restless()
        student.generation_config.repetition_penalty = penalty
        for layer in student.model.layers:
            layer.self_attn.attention_dropout = dropout
        trainer = build(student, stories(), rows, None, *ONE_STEP, *WRITES)
        inner, kept = trainer._writer.write, {}

        def write(asked, inner=inner, kept=kept, student=student):
            student.train()
            kept["before"] = student.generation_config
            completed = inner(asked)
            assert student.training and student.generation_config is kept["before"]
            return completed

        trainer._writer.write = write
        state = torch.get_rng_state()
        trainer.get_batch_samples(iter([]), 1, trainer.args.device)
        batch = trainer.data_collator([dict(rows[index]) for index in range(4)])
        (own,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        assert torch.equal(state, torch.get_rng_state())
        assert kept and own["input_ids"].shape != batch["input_ids"].shape
        found.append(as_rows([own]))
    assert found[0] == found[1]


def test_rows_of_a_head_that_are_no_tokens_are_never_written(build, seen, monkeypatch):  # noqa: F811
    import test_distill

    monkeypatch.setattr(test_distill, "VOCABULARY", 100)
    rows = rows_of([9, 40, 5, 33])
    rows = rows.map(lambda row: {key: [token % 100 if token >= 0 else token for token in row[key]] for key in ("input_ids", "labels")})
    trainer = build(quarter(), stories(), rows, None, *ONE_STEP, *WRITES, "distill.on_policy.max_new_tokens=60")
    trainer.train()
    tokens = [token for completion in completions(as_rows(seen)) for token in completion]
    assert len(tokens) > 100 and max(tokens) < 100


def test_to_see_whether_it_fits_every_completion_is_as_long_as_it_may_be(build, seen):  # noqa: F811
    trainer = build(restless(), stories(), rows_of([9, 40, 5, 33]), None, *ONE_STEP, *WRITES, fills=True)
    trainer.train()
    assert [len(completion) for completion in completions(as_rows(seen))] == [12] * 4


def test_a_smoke_test_of_a_student_that_writes_seldom_sees_all_rows_as_they_are_and_then_written(build, seen):  # noqa: F811
    rows = rows_of([9, 40, 5, 33, 12, 20, 7, 28])
    seldom = ("distill.on_policy.fraction=0.01", "distill.weight=0.5", "train.max_steps=4")
    build(restless(), stories(), rows, None, *ONE_STEP, *WRITES, *seldom, fills=True).train()
    gold, written = as_rows(seen[:2]), as_rows(seen[2:])
    assert sorted(row["input_ids"] for row in gold) == sorted(row["input_ids"] for row in rows)
    assert sorted(prompts(written)) == sorted(prompts(rows)) and {len(completion) for completion in completions(written)} == {12}


# ---- what it counts


@pytest.mark.parametrize(("divergence", "beta", "temperature"), [("forward_kl", 0.0, 1), ("reverse_kl", 1.0, 2), ("jsd", 0.5, 1)])
def test_loss_and_gradient_on_what_is_written_are_trls(build, seen, divergence, beta, temperature):  # noqa: F811
    """TRL's do not multiply by the square of the temperature."""
    rows, teacher = rows_of([9, 40, 5, 33]), stories()
    settings = (f"distill.divergence={divergence}", f"distill.temperature={temperature}", "train.max_grad_norm=1e9")
    trainer = build(restless(), teacher, rows, None, *ONE_STEP, *WRITES, *settings)
    trainer.train()
    (batch,) = seen
    inputs, labels = {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"]
    losses, norms = [], []
    for which in ("GKD", "DistillationTrainer"):
        student = restless()
        hidden = [model.model(**inputs).last_hidden_state[:, :-1] for model in (student, teacher)]
        if which == "GKD":
            logits = student.lm_head(hidden[0]), teacher.lm_head(hidden[1])
            loss = GKDTrainer.generalized_jsd_loss(*logits, labels[:, 1:], beta, temperature)
        else:
            heads = student.lm_head.weight, teacher.lm_head.weight
            loss, *_ = _chunked_divergence_loss(
                *hidden, *heads, labels[:, 1:] != -100, beta, student_lm_head_bias=student.lm_head.bias, temperature=temperature
            )
        loss.backward()
        losses.append(loss.item() * temperature**2)
        norms.append(torch.cat([each.grad.flatten() for each in student.parameters()]).norm().item() * temperature**2)
    assert losses == pytest.approx([logged(trainer, "loss")[0]] * 2, rel=1e-5)
    assert norms == pytest.approx([logged(trainer, "grad_norm")[0]] * 2, rel=1e-4)


def test_sums_are_divided_by_the_tokens_that_were_written_in_all_of_the_step(build, seen):  # noqa: F811
    rows, teacher = rows_of([9, 40, 5, 33, 12, 21, 60, 8]), stories()
    trainer = build(restless(), teacher, rows, None, *ONE_STEP, *WRITES, "train.gradient_accumulation_steps=2")
    trainer.train()
    kl, _ = plain_losses(restless(), teacher, as_rows(seen))
    assert logged(trainer, "loss")[0] == pytest.approx(kl, rel=1e-5)
    assert logged(trainer, "distill/on_policy_kl")[0] == pytest.approx(kl, rel=1e-5)
    # Neither the mean of the micro-batches' means nor a sum over what the data would have trained.
    halves = [plain_losses(restless(), teacher, as_rows([batch]))[0] for batch in seen]
    assert abs(sum(halves) / 2 - kl) > 1e-4
    assert sum(map(len, completions(as_rows(seen)))) != sum(map(len, completions(rows)))


def test_gold_counts_where_there_is_some_and_both_kinds_are_logged_apart(build, seen):  # noqa: F811
    rows, teacher = rows_of([9, 40, 5, 33, 12, 21, 60, 8]), stories()
    seed = next(seed for seed in range(99) if [is_written(0.5, seed, 1, place) for place in (0, 1)] == [False, True])
    settings = ("distill.weight=0.7", "distill.on_policy.fraction=0.5", f"train.seed={seed}", "train.gradient_accumulation_steps=2")
    trainer = build(restless(), teacher, rows, None, *ONE_STEP, *WRITES, *settings)
    trainer.train()
    data, own = (as_rows([batch]) for batch in seen)
    assert all(row["input_ids"] in rows["input_ids"] for row in data)
    (kl, nll), (own_kl, _) = (plain_losses(restless(), teacher, part) for part in (data, own))
    tokens, own_tokens = (sum(map(len, completions(part))) for part in (data, own))
    expected = (0.7 * kl * tokens + 0.3 * nll * tokens + 0.7 * own_kl * own_tokens) / (tokens + own_tokens)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "distill/kl")[0] == pytest.approx(kl, rel=1e-5)
    assert logged(trainer, "distill/cross_entropy")[0] == pytest.approx(nll, rel=1e-5)
    assert logged(trainer, "distill/on_policy_kl")[0] == pytest.approx(own_kl, rel=1e-5)
    assert not logged(trainer, "distill/on_policy_cross_entropy")
    assert logged(trainer, "distill/on_policy_share") == [0.5]


def test_a_row_that_only_fills_a_batch_counts_nothing_whatever_is_written_to_it(build, seen):  # noqa: F811
    rows = with_filler(rows_of([9, 40, 5]), 1)
    trainer = build(restless(), stories(), rows, None, *ONE_STEP, *WRITES)
    trainer.train()
    written = as_rows(seen)
    (filler,) = [row for row in written if set(row["labels"]) == {-100}]
    others = [row for row in written if row is not filler]
    assert logged(trainer, "loss")[0] == pytest.approx(plain_losses(restless(), stories(), others)[0], rel=1e-5)
    assert logged(trainer, "distill/completion_length")[0] == pytest.approx(sum(map(len, completions(others))) / 3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_own_words(build):  # noqa: F811
    trainer = build(stories(), stories(), rows_of([9, 40, 5, 33]), None, *ONE_STEP, *WRITES, "distill.divergence=reverse_kl")
    trainer.train()
    assert abs(logged(trainer, "loss")[0]) < 1e-6 and logged(trainer, "grad_norm")[0] < 1e-3
    assert logged(trainer, "distill/on_policy_top1_agreement") == [1]


def test_held_out_rows_are_gold_as_ever(build):  # noqa: F811
    rows, held_out = rows_of([9, 40, 5, 33]), rows_of([12, 21, 60, 8], seed=5)
    kl, nll = plain_losses(quarter(), stories(), held_out)
    measured = build(quarter(), stories(), rows, held_out, *WRITES).evaluate()
    assert (measured["eval_kl"], measured["eval_cross_entropy"]) == pytest.approx((kl, nll), rel=1e-5)
    assert measured["eval_loss"] == pytest.approx(kl, rel=1e-5)


def test_a_step_that_a_rollback_passes_over_writes_nothing(build):  # noqa: F811
    trainer = build(quarter(), stories(), rows_of([9, 40, 5, 33]), None, *ONE_STEP, *WRITES, "train.max_steps=2")
    trainer.lives.guard._rolled_back = [(1, 1)]
    write, steps = trainer._writer.write, []
    trainer._writer.write = lambda asked: steps.append(trainer.state.global_step + 1) or write(asked)
    trainer.train()
    assert steps == [2]


def test_an_adapter_writes_with_checkpointing_switched_off_and_on_again(build, monkeypatch):  # noqa: F811
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    student = get_peft_model(quarter(), config)
    base, kept, generate = student.get_base_model(), [], LlamaForCausalLM.generate

    def generating(self, *args, **kwargs):
        kept.append((self.is_gradient_checkpointing, self.training, self.generation_config.use_cache))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generating)
    trainer = build(
        *(student, stories(), rows_of([9, 40, 5, 33]), None, *ONE_STEP, *WRITES),
        *("train.max_steps=2", "train.gradient_checkpointing=true", "train.learning_rate=0.05"),
    )
    own = base.generation_config
    trainer.train()
    assert kept == [(False, False, True)] * 2
    assert student.is_gradient_checkpointing and base.generation_config is own
    assert logged(trainer, "grad_norm")[0] > 0


def test_a_student_says_from_bare_prompts_what_is_more_like_its_teacher(build):  # noqa: F811
    """A teacher that was shaken until it stammers learns to speak again, from the first token of a story alone."""
    rows = [{"input_ids": [1, 1], "labels": [-100, 1], "length": 2, "sample": "", "location": ""}] * 16
    rows, student, generator = Dataset.from_list(rows, features=SAMPLE_FEATURES), stories(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in student.parameters():
            weights += 0.3 * weights.std() * torch.randn(weights.shape, generator=generator)
    steps = ["train.max_steps=12", "train.learning_rate=3e-3", "train.per_device_train_batch_size=16", "distill.divergence=reverse_kl"]
    trainer = build(student, stories(), rows, None, "train.eval_steps=null", "data.eval=[]", *WRITES, *steps)
    trainer.train()
    losses, overlaps = logged(trainer, "loss"), logged(trainer, "distill/on_policy_overlap")
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3]) and sum(overlaps[-3:]) > 1.1 * sum(overlaps[:3]), (losses, overlaps)


# ---- whole runs


@pytest.mark.slow
def test_the_tiny_recipe_runs_and_logs_both_kinds_of_what_it_learns_from(tmp_path):
    done = harness("run", "tiny/distill-on-policy", f"output_dir={tmp_path / 'run'}", "tracking.mode=disabled", "train.max_steps=10")
    assert done.code == 0, done.output
    assert {key for line in read_metrics(tmp_path / "run") for key in line} >= {
        *("distill/kl", "distill/cross_entropy", "distill/on_policy_kl", "distill/on_policy_top1_agreement", "distill/on_policy_overlap"),
        *("distill/on_policy_share", "distill/completion_length", "distill/ended", "speed/generation_s", "eval/kl"),
    }


def test_a_smoke_test_takes_the_prompts_after_which_the_rows_can_become_longest():
    """The row that is longest now has the shortest prompt."""
    ids = [[1] * 90, [1] * 60, [1] * 40]
    labels = [[-100] * 5 + [1] * 85, [-100] * 50 + [1] * 10, [-100] * 39 + [1]]
    rows = [
        {"input_ids": row, "labels": trained, "length": len(row), "sample": "", "location": ""}
        for row, trained in zip(ids, labels, strict=True)
    ]
    rows = Dataset.from_list(rows, features=SAMPLE_FEATURES)
    for fraction, weight, longest in ((1.0, 1, [60, 40]), (0.5, 0.5, [60, 90])):
        recipe = load(
            "tiny/distill-on-policy",
            [f"distill.on_policy={{fraction: {fraction}, max_new_tokens: 30}}", f"distill.weight={weight}", *SMALL],
        )
        shortened, chosen, _ = smoke_test(recipe, rows, 1)
        assert sorted(map(len, chosen["input_ids"])) == sorted(longest), fraction
        assert shortened.train.max_steps == (2 if fraction == 1 else 4)


# ---- what is refused


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_completions_that_neither_has_positions_for_are_refused_with_how_many_there_are(build, which):  # noqa: F811
    rows, student, teacher = rows_of([9, 40, 5, 33]), quarter(), stories()
    longest = max(map(len, prompts(rows)))
    {"student": student, "teacher": teacher}[which].config.max_position_embeddings = longest + 11
    with pytest.raises(ModelError, match=f"after the longest prompt of {longest} tokens the {which} has positions for 11 more"):
        build(student, teacher, rows, None, *ONE_STEP, *WRITES)
    build(student, teacher, rows, None, *ONE_STEP, *WRITES, "distill.on_policy.max_new_tokens=11")


# ---- vLLM


@pytest.fixture
def asking(tmp_path):
    def asking(*overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(
            "{task: distill, model: {name_or_path: a}, teacher: {name_or_path: b, source: resident}, data: {train: rows.jsonl}, "
            "distill: {weight: 1, on_policy: {}}}"
        )
        return load(str(file), overrides)

    return asking


def test_vllm_writes_where_it_is_and_where_it_is_not_asking_for_it_is_refused(asking, tmp_path, monkeypatch):
    wanted = asking("distill.on_policy.use_vllm=true")
    for has_gpu in (True, False):
        assert not uses_vllm(asking(), has_gpu=has_gpu)
        with pytest.raises(ModelError, match=r"pip install 'trl\[vllm\]' on a machine with a GPU"):
            uses_vllm(wanted, has_gpu=has_gpu)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert uses_vllm(asking(), has_gpu=True) and uses_vllm(wanted, has_gpu=True)
    assert not uses_vllm(asking(), has_gpu=False)
    assert not uses_vllm(asking("model.lora.r=8"), has_gpu=True)
    assert not uses_vllm(asking("distill.on_policy.use_vllm=false"), has_gpu=True)
    with pytest.raises(ModelError, match="use_vllm = true"):
        uses_vllm(wanted, has_gpu=False)


def test_what_vllm_is_handed_and_asked_is_what_the_student_would_write_itself(build, seen, tmp_path, monkeypatch):  # noqa: F811
    """Two steps, the second with other weights; the most probable token each time, so that there is one answer. Of the head's 512 rows
    100 are tokens."""
    import test_distill

    monkeypatch.setattr(test_distill, "VOCABULARY", 100)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # VLLMGeneration sets them.
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    small_vllm.install(monkeypatch)
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    rows = rows.map(lambda row: {key: [token % 100 if token >= 0 else token for token in row[key]] for key in ("input_ids", "labels")})
    settings = (
        *WRITES,
        "distill.on_policy.top_k=1",
        "train.max_steps=2",
        "train.learning_rate=0.05",
        "train.gradient_accumulation_steps=2",
    )
    written = []
    for by_vllm in (False, True):
        seen.clear()
        student = quarter()
        student.generation_config.eos_token_id = [END, *range(10, 20)]
        student.save_pretrained(tmp_path / "student")
        student.config._name_or_path = student.name_or_path = str(tmp_path / "student")
        trainer = build(student, stories(), rows, None, *ONE_STEP[:2], *settings, by_vllm=by_vllm)
        trainer.train()
        written.append(as_rows(seen))
    assert len(written[0]) == 16 and written[0] == written[1]
    assert written[0][:8] != written[0][8:]
    engine = trainer._writer._engine.llm
    # Once a step, and not once a micro-batch.
    assert engine.handed == 2 * [name for name, _ in student.named_parameters()]
