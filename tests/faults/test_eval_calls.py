"""Held-out tool calls that are answered while a model trains: the same rates on any backend, and nothing of the training is otherwise."""

import itertools
import json

import pytest
from by_heart import learn_by_heart
from lives import Run
from peft import LoraConfig, get_peft_model
from rig import die_in_phase, shared_rig

from harness.data.sources import load_rows
from harness.data.templates import Renderer
from harness.embedded import resolve
from harness.errors import DataError, EvaluationError
from harness.evaluate.calls import answer_questions, choose_questions
from harness.recipe.schema import Source
from harness.tasks.calls import FAILING_COLUMNS
from harness.tools import summarise

RECIPE = """
model: {{name_or_path: "{model}"}}
data: {{train: [{{path: "embedded:base-train", max_rows: 16}}], eval: "{rows}", max_length: 256}}
train: {{max_steps: 1, global_batch_size: 8, per_device_train_batch_size: 4, per_device_eval_batch_size: 4, learning_rate: 1.0e-9,
        eval_steps: 1, eval_on_start: true, eval_tool_calls: 13}}
checkpoint: {{auto: false}}
tracking: {{mode: disabled}}
output_dir: {run}
"""
RATES = ("exact_match", "valid_json", "valid_schema", "right_abstention")
WHOLLY_SHARDED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with held-out rows, of which the model knows half."""
    folder = tmp_path_factory.mktemp("calls")
    with open(resolve("embedded:base-eval"), encoding="utf-8") as stream:
        rows = list(itertools.islice(stream, 16))
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "known.jsonl").write_text("".join(rows[:8]))
    learn_by_heart(folder / "model", folder / "known.jsonl")
    return folder


@pytest.fixture(scope="module")
def alone(world):
    """The answers of that model, one question at a time, without a trainer."""
    from harness.model.export import load_for_inference

    model, tokenizer = load_for_inference(world / "model")
    questions, _ = choose_questions(load_rows(Source(path=str(world / "rows.jsonl"))).rows, Renderer(tokenizer), 13, 256)
    assert len(questions) == 13
    return answer_questions(model, tokenizer, questions, max_new_tokens=200, batch_size=1)


@pytest.fixture(scope="module")
def expected(alone):
    summary = summarise([answer.score for answer in alone])
    assert 0 < summary["exact_match"] < 1
    return {key: summary[key] for key in RATES if summary[key] is not None}


MEDIA_FOLDER = """
import pathlib
from wandb.sdk.data_types._private import MEDIA_TMP
pathlib.Path(MEDIA_TMP.name).mkdir(exist_ok=True)
"""
"""Of tables on their way; the first rank that was forked after the import of wandb takes it along when it ends."""


def evaluated(file, *overrides, backend="ddp") -> dict[tuple[int, str], float]:
    life = shared_rig().run(file, *overrides, world=2, backend=backend, inject=MEDIA_FOLDER)
    assert list(life.codes.values()) == [0, 0], life.output(0)
    lines = [json.loads(line) for line in (file.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): value for line in lines for key, value in line.items()}


def recipe(world, name: str):
    file = world / f"{name}.yaml"
    file.write_text(RECIPE.format(model=world / "model", rows=world / "rows.jsonl", run=world / name))
    return file


SHARDED = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("zero2", "zero3")]


@pytest.mark.parametrize("backend", ["ddp", *SHARDED])
def test_the_rates_and_the_failing_rows_are_those_of_the_model_alone_whatever_the_backend(world, alone, expected, tmp_path, backend):
    file = recipe(world, f"rates-{backend}")
    if backend == "zero3":
        (tmp_path / "ds.json").write_text(json.dumps(WHOLLY_SHARDED))
        backend = tmp_path / "zero3-whole.yaml"
        backend.write_text(
            f"""
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {tmp_path / "ds.json"}, zero3_init_flag: true, deepspeed_multinode_launcher: standard}}
"""
        )
    logged = evaluated(file, "tracking.mode=offline", backend=str(backend))
    # Nothing is learnt at this rate.
    for step in (0, 1):
        assert {key: logged[step, f"eval/{key}"] for key in expected} == pytest.approx(expected)
    tables = [
        json.loads(table.read_text()) for table in file.with_suffix("").glob("wandb/offline-run-*/files/media/table/eval/*.table.json")
    ]
    assert len(tables) == 2
    failed = {answer.location: answer.score.failure for answer in alone if answer.score.failure}
    for table in tables:
        assert table["columns"] == list(FAILING_COLUMNS)
        assert {row[0]: row[1] for row in table["data"]} == failed


@pytest.mark.slow
def test_a_resident_teacher_is_measured_once_before_the_first_step_and_a_cache_loads_none(world, expected):
    teacher = ["task=distill", f"teacher.name_or_path={world / 'model'}", "teacher.source=resident"]
    student = ["model.name_or_path=null", "model.init=embedded:tiny-llama"]
    logged = evaluated(recipe(world, "taught"), *teacher, *student)
    assert {key: logged[0, f"eval/teacher_{key}"] for key in expected} == pytest.approx(expected)
    assert logged[1, "eval/exact_match"] == 0
    assert not any(key.startswith("eval/teacher") for step, key in logged if step)


# ---- lives


FULL = ["model.lora=null", "model.name_or_path=null", "model.init=embedded:tiny-llama", "train.max_steps=9"]


@pytest.mark.slow
@pytest.mark.parametrize("backend, overrides, killed", [("ddp", [], True), ("zero3", FULL, False)])
def test_training_is_bit_for_bit_the_same_with_and_without_also_when_it_is_killed(tmp_path, backend, overrides, killed):
    without, with_calls = (
        Run(tmp_path / name, *overrides, *more, backend=backend) for name, more in (("without", []), ("with", ["train.eval_tool_calls=5"]))
    )
    without.live()
    if killed:
        with_calls.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    with_calls.live()
    assert with_calls.steps == without.steps
    assert with_calls.samples == without.samples
    assert with_calls.exported() == without.exported()
    plain, logged = without.points(), with_calls.points(repeats=killed)
    assert {key: value for key, value in logged.items() if key in plain} == plain
    assert {key for _, key in logged.keys() - plain.keys()} >= {"eval/exact_match", "eval/valid_json"}


# ---- which questions


def test_questions_are_chosen_by_their_content_and_none_is_longer_than_training_allows(world):
    from harness.model import load_tokenizer
    from harness.recipe import load

    renderer = Renderer(load_tokenizer(load(recipe(world, "choice"))))
    rows = load_rows(Source(path=str(world / "rows.jsonl"))).rows
    chosen, longest = choose_questions(rows, renderer, 6, 256)
    again, _ = choose_questions([*rows[::-1], *rows], renderer, 6, 256)
    assert [question.ids for question in chosen] == [question.ids for question in again]
    assert len(chosen) == 6
    whole = {row.location: len(renderer.render(row.row).ids) for row in rows}
    assert longest == max(whole[question.location] - len(question.ids) for question in chosen if question.gold)
    middle = sorted(whole.values())[8]
    assert {question.location for question in choose_questions(rows, renderer, 16, middle)[0]} == {
        location for location, length in whole.items() if length <= middle
    }
    without = [row for row in rows if not row.row["messages"][-1].get("tool_calls")]
    with pytest.raises(EvaluationError, match=f"of {len(without)} held-out rows .* none wants a call; give held-out rows with calls"):
        choose_questions(without, renderer, 6, 256)


def test_a_held_out_row_that_the_template_refuses_is_left_out_as_it_is_of_the_data(world):
    from harness.model import load_tokenizer
    from harness.recipe import load

    class Picky(Renderer):
        def render_prompt(self, row, location=""):
            if location == bad:
                raise DataError(f"{location}: the chat template refuses it")
            return super().render_prompt(row, location)

    tokenizer = load_tokenizer(load(recipe(world, "picky")))
    rows = load_rows(Source(path=str(world / "rows.jsonl"))).rows
    bad = choose_questions(rows, Renderer(tokenizer), 99, 256)[0][0].location
    chosen, _ = choose_questions(rows, Picky(tokenizer), 99, 256)
    assert chosen == choose_questions([row for row in rows if row.location != bad], Renderer(tokenizer), 99, 256)[0]


@pytest.mark.parametrize("own", ["flex_attention", "sdpa"])
def test_an_attention_that_takes_no_padding_is_set_aside_while_questions_are_answered(world, own):
    from transformers import AutoModelForCausalLM

    from harness.tasks.calls import attends_to_padded_batches

    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation=own)
    for wrapped in (model, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))):
        with pytest.raises(KeyboardInterrupt), attends_to_padded_batches(wrapped):
            assert model.config._attn_implementation == model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
            raise KeyboardInterrupt
        assert model.config._attn_implementation == own
