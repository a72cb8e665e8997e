"""Sequence-level distillation: a teacher that has learnt a few rows by heart, asked by `harness generate`, and a student of its answers."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from by_heart import learn_by_heart
from conftest import harness, metrics
from transformers import AutoModelForCausalLM

from harness.cli import main
from harness.data import prepare_recipe
from harness.data.prompts import load_prompts
from harness.data.sources import load_rows
from harness.embedded import resolve
from harness.errors import HarnessError, Stopped, TeacherError
from harness.evaluate.generate import generate
from harness.model import load_tokenizer
from harness.recipe import load
from harness.recipe.schema import Source
from harness.tasks import generate as task
from harness.tasks.generate import ANSWERS, DROPPED, REPORT, answer_prompts
from harness.units import Worker

RECIPE = """
task: generate
model: {{name_or_path: "{teacher}"}}
data: {{train: "{rows}", max_length: 256}}
generate: {{max_new_tokens: 40, unit_rows: 4, batch_rows: 3}}
output_dir: {folder}
"""
KNOWN, ASKED = 8, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a teacher that knows the first rows of rows.jsonl by heart, and says something or other to the rest."""
    folder = tmp_path_factory.mktemp("generate")
    with open(resolve("embedded:base-train"), encoding="utf-8") as stream:
        rows = [json.loads(line) for line in itertools.islice(stream, ASKED)]
    # Asked without an answer, and asked twice with another one.
    rows[1] = {**rows[1], "messages": rows[1]["messages"][:-1]} if "tool_calls" not in rows[1]["messages"][-1] else rows[1]
    rows += [{**rows[0], "messages": [*rows[0]["messages"][:-1], {"role": "assistant", "content": "never shown"}]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "known.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:KNOWN] if row["messages"][-1]["role"] == "assistant")
    )
    learn_by_heart(folder / "teacher", folder / "known.jsonl")
    return folder


class Generated:
    """A recipe over that world, run in this process."""

    def __init__(self, world: Path, folder: Path, *overrides: str):
        file = folder.with_name(f"{folder.name}.yaml")
        file.write_text(RECIPE.format(teacher=world / "teacher", rows=world / "rows.jsonl", folder=folder))
        self.file, self.folder, self.recipe, self.said = file, folder, load(file, overrides), []

    def run(self, worker: Worker = Worker(), *, stop=lambda: None) -> Path:  # noqa: B008
        return answer_prompts(self.recipe, worker, stop=stop, say=self.said.append)

    def files(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in sorted(self.folder.rglob("*")) if file.is_file()}

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def report(self) -> dict:
        return json.loads((self.folder / REPORT).read_text())


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Generated:
    generated = Generated(world, tmp_path_factory.mktemp("reference") / "run")
    generated.run()
    return generated


@pytest.fixture(scope="module")
def drawn(world, tmp_path_factory) -> Generated:
    generated = Generated(world, tmp_path_factory.mktemp("drawn") / "run", "generate.temperature=1.5", "generate.samples_per_prompt=3")
    generated.run()
    return generated


def plain_answer(model, ids: list[int], stop: int, most: int) -> tuple[list[int], bool]:
    """Token by token, alone, without a cache and without padding."""
    said = []
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
        if token == stop:
            return said, True
        said.append(token)
    return said, False


# ---- what is written


def test_a_unit_keeps_what_the_model_says_greedily_alone_and_without_padding(world, reference):
    tokenizer = load_tokenizer(reference.recipe)
    prompts = load_prompts(reference.recipe.data, tokenizer, 40).prompts
    model = AutoModelForCausalLM.from_pretrained(world / "teacher").eval()
    kept = [line for unit in sorted((reference.folder / "units").iterdir()) for line in map(json.loads, unit.read_text().splitlines())]
    assert [line["prompt"] for line in kept] == [prompt.key for prompt in prompts]
    assert len(kept) == ASKED
    for prompt, line in zip(prompts, kept, strict=True):
        said, ended = plain_answer(model, prompt.ids, tokenizer.eos_token_id, 40)
        assert (tokenizer.decode(said), ended, len(said)) == (line["said"], line["ended"], line["tokens"])


def test_the_answers_are_the_gold_of_what_the_teacher_knows_and_the_gold_itself_is_never_asked_for(world, reference):
    known = [json.loads(line) for line in (world / "known.jsonl").read_text().splitlines()]
    answers = {json.dumps(row["prompt"]): row for row in reference.rows(ANSWERS)}
    right = 0
    for row in known:
        canonical = load_rows(Source(path=str(world / "known.jsonl"))).rows[known.index(row)].row
        answer = answers[json.dumps(canonical["messages"][:-1])]
        right += answer["completion"] == canonical["messages"][-1:] and answer["tools"] == canonical["tools"]
    assert right == len(known) >= KNOWN - 1
    assert any("tool_calls" in row["completion"][0] for row in answers.values())
    assert any("content" in row["completion"][0] for row in answers.values())
    assert b"never shown" not in b"".join(reference.files().values())


def test_every_answer_is_kept_or_dropped_with_its_reason_and_the_report_adds_up(drawn):
    report, answers, dropped = drawn.report(), drawn.rows(ANSWERS), drawn.rows(DROPPED)
    assert report["rows"] == ASKED + 1 and report["prompts"] == ASKED and report["asked"] == 3 * ASKED
    assert report["answers"] == len(answers)
    assert report["dropped"] == dict(Counter(row["kind"] for row in dropped)) and len(report["dropped"]) >= 2
    assert report["asked"] == report["answers"] + report["repeated"] + len(dropped)
    assert report["repeated"] > 0
    assert len({json.dumps(row, sort_keys=True) for row in answers}) == len(answers)
    assert all(row["location"].startswith(drawn.recipe.data.train[0].path) and row["reason"] and "said" in row for row in dropped)
    assert f"{len(dropped)} of {3 * ASKED} as invalid" in "\n".join(drawn.said)


def test_what_cannot_be_asked_is_listed_beside_what_is_not_valid(world, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world / "rows.jsonl").read_text() + '{"text": "once"}\n')
    generated = Generated(world, tmp_path / "run", f"data.train={rows}", "data.on_error=skip")
    generated.run()
    assert generated.rows(DROPPED)[0] == {
        "location": f"{rows}:{ASKED + 2}",
        "kind": "not_asked",
        "reason": "a row of text has no turn that could be answered; must be messages",
    }
    assert "1 rows were not asked" in "\n".join(generated.said)


def test_sft_takes_the_answers_as_they_are_and_trains_what_the_teacher_said_token_by_token(reference):
    recipe = load("tiny/sft-full", [f"data.train={reference.folder / ANSWERS}", "data.eval=[]", "train.eval_steps=null"])
    tokenizer = load_tokenizer(recipe)
    prepared = prepare_recipe(recipe, tokenizer, packing=False, say=lambda text: None).train
    prompts = {tuple(prompt.ids) for prompt in load_prompts(reference.recipe.data, tokenizer, 40).prompts}
    said = {line["said"] for unit in (reference.folder / "units").iterdir() for line in map(json.loads, unit.read_text().splitlines())}
    assert len(prepared) == reference.report()["answers"]
    for row in prepared:
        trained = [token for token in row["labels"] if token != -100]
        assert tuple(row["input_ids"][: -len(trained)]) in prompts
        assert trained[-1] == tokenizer.eos_token_id and tokenizer.decode(trained[:-1]) in said


@pytest.mark.slow
def test_generate_and_then_sft_make_a_student_of_the_teacher(world, tmp_path):
    overrides = [f"model.name_or_path={world / 'teacher'}", f"data.train={world / 'rows.jsonl'}", f"output_dir={tmp_path / 'answers'}"]
    done = harness("generate", "tiny/generate", *overrides, "--processes", "2")
    assert done.code == 0, done.output
    assert "[0/2] " in done.output and "[1/2] " in done.output
    student = tmp_path / "student"
    train = [f"data.train={tmp_path / 'answers' / ANSWERS}", f"output_dir={student}", "data.eval=[]", "train.eval_steps=null"]
    done = harness("run", "tiny/sft-full", *train, "train.max_steps=40", "tracking.mode=disabled")
    assert done.code == 0, done.output
    losses = metrics(student, "train/loss")
    assert losses[40] < 0.25 * losses[1]


# ---- drawing


def test_draws_come_from_the_seed_and_the_unit_alone(world, drawn, tmp_path):
    overrides = ("generate.temperature=1.5", "generate.samples_per_prompt=3")
    again = Generated(world, tmp_path / "again", *overrides)
    torch.manual_seed(123)
    # In another order, with something else drawn in between.
    again.run(Worker(1, 3))
    assert again.files() == drawn.files()
    other, stops = Generated(world, tmp_path / "other", *overrides, "data.seed=43"), itertools.count()
    with pytest.raises(Stopped):
        other.run(stop=lambda: "enough" if next(stops) else None)
    assert other.files()["units/unit-00000.jsonl"] != drawn.files()["units/unit-00000.jsonl"]
    said = [line["said"] for line in map(json.loads, (drawn.folder / "units" / "unit-00000.jsonl").read_text().splitlines())]
    assert len(set(said)) > len(said) / 3


class Fixed(torch.nn.Module):
    """A model whose next token always has the same distribution, for `generate` to draw from."""

    def __init__(self, world: Path, probabilities: list[float]):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(world / "teacher")
        logits = torch.full((self.model.config.vocab_size,), -1e4)
        logits[5 : 5 + len(probabilities)] = torch.tensor(probabilities).log()
        self.model.lm_head.register_forward_hook(lambda module, inputs, out: logits.expand_as(out))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.5, 0.3, 0.0, 0.0]),
        ({}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_temperature_and_nucleus_leave(world, reference, settings, expected):
    model = Fixed(world, [0.5, 0.3, 0.15, 0.05]).model
    # Of a model that asks for a cut of its own, and for penalties, as Qwen2.5 does.
    model.generation_config.update(top_k=1, repetition_penalty=50.0, no_repeat_ngram_size=1)
    torch.manual_seed(0)
    found = generate(model, load_tokenizer(reference.recipe), [[7]] * 100, max_new_tokens=40, batch_size=50, **settings)
    counts = Counter(token for continuation in found for token in continuation.ids)
    assert sum(counts.values()) == 4000 and not any(continuation.ended for continuation in found)
    expected = torch.tensor(expected) / sum(expected)
    shares = torch.tensor([counts[token] / 4000 for token in (5, 6, 7, 8)])
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_models_own_penalties_do_not_count(world, reference, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "teacher", teacher)
    own = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps({**own, "repetition_penalty": 50.0, "no_repeat_ngram_size": 1}))
    generated = Generated(world, tmp_path / "run", f"model.name_or_path={teacher}")
    generated.run()
    assert generated.files()[ANSWERS] == reference.files()[ANSWERS]


# ---- units and workers


def test_any_number_of_workers_in_any_order_write_the_same_bytes(world, reference, tmp_path):
    generated, stops = Generated(world, tmp_path / "run"), itertools.count(1)
    with pytest.raises(Stopped, match=r"stopped \(SIGTERM\): 2 of 4 units are there; the same command goes on, with any number"):
        generated.run(Worker(2, 4), stop=lambda: "SIGTERM" if next(stops) > 2 else None)
    assert not (generated.folder / ANSWERS).exists()
    assert sum(name.startswith("units/") for name in generated.files()) == 2
    generated.run(Worker(0, 2))
    assert generated.files() == reference.files()


def work_and_die(generated: Generated, name: str, call: int) -> None:
    """With a SIGKILL at the given call of a function of os."""
    torch.set_num_threads(1)
    original, calls = getattr(os, name), itertools.count(1)

    def dying(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, name, dying)
    generated.run()


KILLS = {
    "the header": ("fsync", 1),
    "a unit": ("fsync", 7),
    "its name": ("rename", 4),
    "the report": ("rename", 6),
    "the answers": ("rename", 8),
}


@pytest.mark.parametrize(
    "name, call", [pytest.param(*KILLS[at], id=at, marks=[] if at == "the header" else pytest.mark.slow) for at in KILLS]
)
def test_whoever_is_killed_loses_a_unit_and_the_same_command_goes_on_to_the_same_bytes(world, reference, tmp_path, name, call):
    generated = Generated(world, tmp_path / "run")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.tasks.generate", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=work_and_die, args=(generated, name, call))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    whole = {name: data for name, data in generated.files().items() if not name.endswith(".tmp")}
    assert whole.items() < reference.files().items()
    generated.run()
    assert {name: data for name, data in generated.files().items() if not name.endswith(".tmp")} == reference.files()


def test_what_is_complete_is_told_from_its_files_and_the_model_is_not_loaded(reference, monkeypatch):
    monkeypatch.setattr(task, "load_frozen", None)
    before = reference.files()
    assert reference.run() == reference.folder / ANSWERS
    assert reference.said[-1] == f"complete: {reference.folder / ANSWERS}"
    assert reference.files() == before


def test_other_batches_go_on_with_what_is_there(world, reference):
    generated = Generated(world, reference.folder, "generate.batch_rows=7")
    assert generated.run() == reference.folder / ANSWERS


# ---- what is refused


@pytest.mark.parametrize(
    "override, words",
    [
        ("generate.max_new_tokens=41", "generate.max_new_tokens is 40, and of this recipe 41"),
        ("generate.temperature=0.5", "of this recipe"),
        ("data.train.0.max_rows=9", "prompts is"),
        ("model.dtype=bfloat16", "model.dtype is 'auto', and of this recipe 'bfloat16'"),
    ],
)
def test_a_folder_of_other_answers_is_refused(world, reference, override, words):
    with pytest.raises(TeacherError, match=f"{words}.*") as refused:
        Generated(world, reference.folder, override).run()
    assert "choose another output_dir" in str(refused.value)


def test_a_model_that_was_trained_on_is_another_one(world, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "teacher", teacher)
    generated = Generated(world, tmp_path / "run", f"model.name_or_path={teacher}")
    generated.run()
    shutil.copy(Path(resolve("embedded:tiny-llama")) / "model.safetensors", teacher / "model.safetensors")
    with pytest.raises(TeacherError, match="model.weights is"):
        generated.run()


def test_a_folder_that_holds_something_else_is_refused(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(TeacherError, match=r"holds what is not of `harness generate` \(thesis.tex\)"):
        Generated(world, tmp_path / "run").run()


def test_a_folder_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TeacherError, match="cannot be written: Not a directory; free some space or make it writable"):
        Generated(world, tmp_path / "run", f"output_dir={tmp_path / 'file' / 'run'}").run()


@pytest.mark.parametrize(
    "spoil, words", [(lambda text: text[:-9], "cannot be read"), (lambda text: text.split("\n", 1)[1], "does not hold the")]
)
def test_a_unit_that_is_not_whole_is_named(world, reference, tmp_path, spoil, words):
    generated = Generated(world, tmp_path / "run")
    shutil.copytree(reference.folder, generated.folder)
    (generated.folder / ANSWERS).unlink()
    unit = generated.folder / "units" / "unit-00001.jsonl"
    unit.write_text(spoil(unit.read_text()))
    with pytest.raises(TeacherError, match=f"unit-00001.jsonl: {words}.*remove it, and the same command writes it again"):
        generated.run()
    unit.unlink()
    generated.run()
    assert generated.files() == reference.files()


def test_an_answer_with_any_character_stays_one_line(reference, tmp_path, world):
    generated = Generated(world, tmp_path / "run")
    shutil.copytree(reference.folder, generated.folder)
    (generated.folder / ANSWERS).unlink()
    unit = generated.folder / "units" / "unit-00001.jsonl"
    first, rest = unit.read_text().split("\n", 1)
    odd = "first\u2028second\u2029third\x85fourth"
    unit.write_text(json.dumps(json.loads(first) | {"said": odd, "ended": True}, ensure_ascii=False) + "\n" + rest)
    generated.run()
    assert odd in [row.row["messages"][-1].get("content") for row in load_rows(Source(path=str(generated.folder / ANSWERS))).rows]


def test_a_model_without_a_single_valid_answer_is_told_of_each_time(world, tmp_path):
    generated = Generated(world, tmp_path / "run", "generate.max_new_tokens=1")
    for _ in range(2):
        with pytest.raises(TeacherError, match=f"none of {ASKED} answers is valid; dropped.jsonl beside it says why"):
            generated.run()
    assert {row["kind"] for row in generated.rows(DROPPED)} == {"cut_off"}


@pytest.mark.parametrize(
    "verb, arguments, words",
    [
        ("generate", ["task=sft", "generate={}"], "task = sft; it trains, and answers nothing; set task: generate"),
        ("generate", ["--shards", "2", "--shard", "2"], "--shard 2; with --shards 2 it goes from 0 to 1"),
        ("generate", ["generate.device_map=auto", "--processes", "2"], "one process takes all GPUs of its machine, and 2 were asked for"),
        ("generate", ["data.max_length=4096", "generate.max_new_tokens=600"], "set data.max_length: 512"),
        ("run", [], "it trains nothing; use `harness generate RECIPE`"),
        ("prepare", [], "its rows are prompts"),
        ("preview", [], "its rows are prompts"),
    ],
)
def test_what_cannot_be_generated_is_refused_by_the_command(world, tmp_path, capsys, verb, arguments, words):
    file = Generated(world, tmp_path / "run").file
    with pytest.raises(SystemExit) as left:
        main([verb, str(file), *arguments])
    assert left.value.code in (1, 2)
    assert words in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(world, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world / "teacher", teacher)
    for name in ("chat_template.jinja",):
        (teacher / name).unlink(missing_ok=True)
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "chat_template"}))
    with pytest.raises(HarnessError, match="chat template"):
        Generated(world, tmp_path / "run", f"model.name_or_path={teacher}").run()
