"""A teacher behind a real server: what is kept through it is what the same model says in memory, and whatever a server does wrong has a
name."""

import itertools
import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO_TEMPLATE, STORIES, XLAM, harness, needs_shared
from server import TeacherServer
from test_capture import Captured, code_nats, files_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.cli import main
from harness.data import prepare_recipe
from harness.errors import ModelError, Stopped, TeacherError
from harness.model import load_tokenizer
from harness.recipe import load
from harness.teacher import client as client_module
from harness.teacher.client import Client
from harness.teacher.format import Settings, load_header
from harness.teacher.probe import find_cache
from harness.teacher.reader import open_cache
from harness.teacher.samples import Sample, cache_folder
from harness.teacher.served import ServedTeacher, connect

pytestmark = needs_shared

RECIPE = f"""
task: distill
model: {{name_or_path: "{STORIES}"}}
data: {{train: [{{path: "{XLAM}", max_rows: 10}}], eval_rows: 3, max_length: 512, chat_template: "{MICRO_TEMPLATE}"}}
teacher: {{name_or_path: "{STORIES}", unit_tokens: 700}}
"""
SETTINGS = Settings(0.99, 8, 64, 0, 0)
FP32_NATS = 2e-5
"""Of a forward of a row in a batch, against one of the row alone."""


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def serve(model, tokenizer):
    """serve(**faults) -> a server that answers until the test ends."""
    running = []

    def serve(**faults):
        running.append(TeacherServer(faults.pop("model", model), tokenizer, **faults).__enter__())
        return running[-1]

    yield serve
    for server in running:
        server.__exit__()


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Between attempts a hundredth of the time passes."""
    monkeypatch.setattr(client_module, "DELAYS_S", tuple(delay_s / 100 for delay_s in client_module.DELAYS_S))


class CapturedHere(Captured):
    """A recipe of fewer rows, captured in this process."""

    def __init__(self, folder: Path, *overrides: str):
        folder.mkdir(exist_ok=True)
        self.file, self.said = folder / "recipe.yaml", []
        self.file.write_text(RECIPE)
        self.recipe = load(self.file, [f"teacher.cache={folder / 'cache'}", *overrides])
        self.folder = Path(self.recipe.teacher.cache)
        self.tokenizer = load_tokenizer(self.recipe)
        self.prepared = prepare_recipe(self.recipe, self.tokenizer, packing=False, say=lambda text: None)


def through(server: TeacherServer, *overrides: str) -> list[str]:
    return [f"teacher.server.url={server.url}", f"teacher.server.model={server.name}", *overrides]


@pytest.fixture(scope="module")
def resident(tmp_path_factory) -> CapturedHere:
    captured = CapturedHere(tmp_path_factory.mktemp("resident"))
    captured.run()
    return captured


@pytest.fixture(scope="module")
def reference(model, tokenizer, tmp_path_factory):
    """(a recipe, captured; its server, which still answers)"""
    with TeacherServer(model, tokenizer, name="stories-v7") as server:
        captured = CapturedHere(tmp_path_factory.mktemp("reference"), *through(server))
        captured.run()
        yield captured, server


def teacher_at(url: str, way="prompt_logprobs", settings=SETTINGS, vocabulary=512, key_variable=None, timeout_s=20.0) -> ServedTeacher:
    return ServedTeacher(Client(url, key_variable, timeout_s), "teacher", way, settings, vocabulary, 4)


def a_sample(length=20, seed=0) -> Sample:
    ids = np.random.default_rng(seed).integers(3, 512, length)
    return Sample.of(ids, np.where(np.arange(length) % 3 == 0, -100, ids))


# ---- what is kept


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_a_capture_through_a_server_keeps_what_the_same_model_in_memory_says(serve, reference, resident, tmp_path, way):
    captured = reference[0]
    if way == "echo":
        captured = CapturedHere(tmp_path, *through(serve(), "teacher.server.scores=echo"))
        captured.run()
    ours, theirs = open_cache(captured.folder), open_cache(resident.folder)
    keys = list(theirs.keys())
    assert sorted(ours.keys()) == sorted(keys) and len(keys) >= 9
    found, expected = ours.read_many(keys), theirs.read_many(keys)
    same = found.counts == expected.counts
    assert same.mean() > 0.999
    # A rounding of the forward may move a code by one step, which is twice the error of one; and turn a tie round.
    assert (np.abs(found.gold - expected.gold) <= 2 * code_nats(expected.gold)).all()
    kept = np.isfinite(expected.logprobs[same]) & np.isfinite(found.logprobs[same])
    assert (kept == np.isfinite(expected.logprobs[same])).all()
    difference = np.where(kept, found.logprobs[same], 0) - np.where(kept, expected.logprobs[same], 0)
    assert (np.abs(difference) <= 2 * code_nats(np.where(kept, expected.logprobs[same], 0))).all()
    assert (found.ids == expected.ids)[same].mean() > 0.999
    # The whole is 1 in float32 arithmetic of 64 terms; below that a tail is known by what is told of it.
    assert np.abs(np.exp(found.log_tail) - np.exp(expected.log_tail))[same].max() < 2e-4
    assert (found.entropy <= expected.entropy + 1e-3).all()
    # What is not told has at most the entropy of as many equals.
    assert (expected.entropy - found.entropy <= np.exp(expected.log_tail) * np.log(512 - 64) + 1e-3).all()
    text = captured.said[-2]
    assert "not measured: kl, kl_flat_tail and gradient_error need whole distributions" in text and "entries hold 9" in text
    written = json.loads((captured.folder / "fidelity.json").read_text())
    assert written["kl"] is None and written["gradient_error"] == {} and written["bytes_per_token"] > 10
    # Of the first unit, which is asked about once more.
    again = ours.read_many([sample.key for batch in captured.samples().batches(0) for sample in batch])
    assert written["positions"] == len(again)
    assert written["retained_mass"] == pytest.approx(np.exp(again.logprobs).sum(1).mean(), abs=1e-5)
    assert written["gold_error"] < 1e-3


def test_the_header_says_that_a_server_was_asked_and_what_it_calls_the_model(reference):
    captured, server = reference
    teacher = load_header(captured.folder).teacher
    assert (teacher.kind, teacher.digest, teacher.dtype, teacher.revision) == ("served", "stories-v7", None, None)
    assert teacher.name == str(STORIES)
    # Training finds it, and needs no server.
    said = []
    assert find_cache(captured.recipe, captured.tokenizer, captured.prepared, said.append) == captured.folder
    assert "nats on" in said[0]
    assert any("that its weights are those of" in line and "cannot be seen from here" in line for line in captured.said)
    # Complete: nobody is asked any more.
    asked = len(server.questions)
    captured.run()
    assert len(server.questions) == asked


def test_heads_tails_and_entropy_are_those_of_float64_as_far_as_they_were_told(serve):
    """A distribution made by hand of which 4 of 512 entries are told."""
    logits = torch.randn(512, generator=torch.Generator().manual_seed(3)).double() * 3
    logs = logits.log_softmax(-1)
    server = serve(change_logs=lambda given: logs.float().expand(len(given), 512))
    order = logs.argsort(descending=True).tolist()
    gold = order[300]
    sample = Sample.of(np.array([5, order[1], gold]), np.array([-100, order[1], gold]))
    of_two = float(logs[order[:2]].exp().sum())
    for settings, count in ((Settings(of_two - 1e-3, 1, 4, 0, 0), 2), (Settings(1.0, 1, 4, 0, 0), 4)):
        targets = teacher_at(server.url, settings=settings).ask(sample)
        assert targets.counts.tolist() == [count, count]
        assert targets.ids[0].tolist() == [*order[:count], *[0] * (4 - count)]
        assert targets.logprobs[0, :count] == pytest.approx(logs[order[:count]].numpy(), abs=1e-5)
        assert (targets.logprobs[0, count:] == -np.inf).all()
        assert np.exp(targets.log_tail) == pytest.approx(1 - float(logs[order[:count]].exp().sum()), abs=1e-6)
        assert targets.gold == pytest.approx([float(logs[order[1]]), float(logs[gold])], abs=1e-5)
        told = logs[order[:4]]
        rest = 1 - told.exp().sum()
        assert targets.entropy == pytest.approx(float(-(told.exp() * told).sum() - rest * rest.log()), abs=1e-4)
        assert targets.entropy[0] < float(-(logs.exp() * logs).sum())
        assert targets.draws.shape == (2, 0)


def test_a_tail_of_a_billionth_is_what_was_told_of_it_and_not_the_rounding_of_a_sum(serve):
    logs = torch.full((512,), -60.0, dtype=torch.float64)
    logs[:12] = torch.tensor([0.0] + [-20.0 - place for place in range(11)])
    logs = logs.log_softmax(-1)
    # Off by the rounding of a float32 near a logit of 20.
    server = serve(change_logs=lambda given: (logs - 1e-6).float().expand(len(given), 512))
    ids = np.array([1, 0])
    targets = teacher_at(server.url, settings=Settings(0.9, 2, 12, 0, 0)).ask(Sample.of(ids, ids))
    # As what is missing to 1 it would be -13.8.
    assert float(targets.log_tail[0]) == pytest.approx(float(logs[2:].logsumexp(0)), abs=0.05)
    # With nothing told beside the head, what is not told is bounded by its last entry.
    targets = teacher_at(server.url, settings=Settings(1.0, 12, 12, 0, 0)).ask(Sample.of(ids, ids))
    assert float(np.exp(targets.log_tail[0])) <= 500 * float(logs[11].exp()) * 1.001
    # With all told there is no tail.
    server.change_logs = lambda given: logs[:200].log_softmax(-1).float().expand(len(given), 200)
    targets = teacher_at(server.url, settings=Settings(1.0, 1, 255, 0, 0), vocabulary=200).ask(Sample.of(ids, ids))
    assert targets.counts.tolist() == [200] and targets.log_tail.tolist() == [-np.inf]


def test_padding_rows_of_a_head_are_no_tokens_and_other_tokens_are_another_model(serve):
    server, sample = serve(), a_sample()
    whole = teacher_at(server.url).ask(sample)
    # Of 64 entries some are beyond 500: little of the mass, so that it is padding as of 152,064 rows for 151,665 ids.
    server.change_logs = lambda logs: torch.cat([logs[:, :500], logs[:, 500:] - 12], 1).log_softmax(-1)
    ids = np.minimum(sample.input_ids, 499)
    cut = teacher_at(server.url, vocabulary=500, settings=Settings(0.99, 8, 255, 0, 0)).ask(Sample.of(ids, ids))
    assert cut.ids.max() < 500 and (cut.counts >= 8).all()
    mass = np.exp(np.where(np.isfinite(cut.logprobs), cut.logprobs, -np.inf)).sum(1) + np.exp(cut.log_tail)
    assert mass == pytest.approx(1, abs=1e-4)
    server.change_logs = lambda logs: logs
    assert whole.ids.max() >= 300
    with pytest.raises(TeacherError, match=r"of the mass is on ids from 300 on, which are no tokens of the student"):
        teacher_at(server.url, vocabulary=300).ask(Sample.of(np.minimum(ids, 299), np.minimum(ids, 299)))
    # One of the 8 most probable is padding, with nearly no mass.
    server.change_logs = lambda logs: (
        torch.where(torch.arange(512) < 7, -torch.arange(512.0), torch.where(torch.arange(512) < 511, -40.0, -30.0))[None]
        .log_softmax(-1)
        .expand(len(logs), 512)
    )
    few = teacher_at(server.url, vocabulary=511, settings=Settings(0.99, 8, 8, 0, 0))
    with pytest.raises(
        TeacherError, match="of 8 entries only 7 are tokens of the student, the rest is padding of the head; lower teacher.fl"
    ):
        few.ask(Sample.of(ids, ids))


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_token_ids_go_out_and_never_text(serve, way):
    server, sample = serve(), a_sample()
    teacher_at(server.url, way).ask(sample)
    assert server.questions[0]["prompt"] == sample.input_ids.tolist()


# ---- a capture that breaks off


def test_an_interrupted_capture_goes_on_at_another_server_with_what_was_done(serve, reference, tmp_path):
    dying = serve(dies_after=6, name="stories-v7")
    captured = CapturedHere(tmp_path, *through(dying, "teacher.server.concurrency=1"))
    with pytest.raises(TeacherError, match=r"completions: cannot be reached .*, 7 times in a row; start the server, or correct"):
        captured.run()
    done = files_of(captured.folder)
    units = {name for name in done if name.endswith(".tc")}
    assert units and not any(name.endswith(".tmp") for name in done)
    whole, healthy = reference
    CapturedHere(tmp_path, *through(healthy)).run()
    after, expected = files_of(captured.folder), files_of(whole.folder)
    assert len([name for name in after if name.endswith(".tc")]) > len(units)
    assert {name: after[name] for name in units} == {name: done[name] for name in units}
    # One row at a time, in one process: the same bits, from two servers.
    assert {name: data for name, data in after.items() if name.endswith(".tc")} == {
        name: data for name, data in expected.items() if name.endswith(".tc")
    }


def test_a_capture_that_is_told_to_stop_ends_its_unit(serve, tmp_path):
    captured, calls = CapturedHere(tmp_path, *through(serve())), itertools.count()
    with pytest.raises(Stopped, match="1 of"):
        captured.run(stop=lambda: "SIGTERM" if next(calls) else None)


def test_a_folder_of_a_resident_teacher_and_of_another_served_one_are_not_taken(serve, resident, tmp_path):
    server = serve()
    with pytest.raises(TeacherError, match="teacher: (kind|dtype|digest) is .* belongs to another cache"):
        CapturedHere(tmp_path, *through(server, f"teacher.cache={resident.folder}")).run()
    with pytest.raises(Stopped):
        CapturedHere(tmp_path / "2", *through(server)).run(stop=iter([None, "enough"]).__next__)
    server.name = "another"
    with pytest.raises(TeacherError, match="teacher: digest is 'teacher', and the cache is of 'another'|'another', and the cache is of"):
        CapturedHere(tmp_path / "2", *through(server)).run()


def test_that_it_is_served_decides_the_folder_and_where_and_how_it_is_served_does_not(resident, tmp_path):
    plan = resident.samples().units.plan
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def folder(*overrides):
        return cache_folder(load(tmp_path / "recipe.yaml", list(overrides)), resident.tokenizer, plan)

    here, there = (folder(f"teacher.server.url=http://{host}:8000/v1") for host in ("here", "there"))
    assert here == there == folder("teacher.server.url=http://x", "teacher.server.model=m", "teacher.server.scores=echo") != folder()


def test_a_server_that_says_something_else_after_the_capture_is_found_out(serve, reference, tmp_path):
    shutil.copytree(reference[0].folder, tmp_path / "cache")
    (tmp_path / "cache" / "fidelity.json").unlink()
    server = serve(name="stories-v7", change_logs=lambda logs: (logs * 1.3).log_softmax(-1))
    with pytest.raises(TeacherError, match=r"nats away from what the teacher says now, more than rounding \(0.05\)"):
        CapturedHere(tmp_path, *through(server)).run()


# ---- servers that do not fit


@pytest.fixture
def recipe_of(tmp_path):
    def recipe_of(server, *overrides):
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        return load(tmp_path / "recipe.yaml", through(server, *overrides))

    return recipe_of


@pytest.mark.parametrize(
    "faults, overrides, words",
    [
        (
            {"ways": set()},
            [],
            r"does not score the tokens that it is given.*without prompt_logprobs; .*scores of 1 tokens, and was given 16",
        ),
        ({"ways": {"echo"}}, ["teacher.server.scores=prompt_logprobs"], "does not score the tokens that it is given"),
        ({"ways": {"echo"}, "names_by_text": True}, [], r"names tokens by their text .* several ids may share"),
        ({"max_logprobs": 20}, [], r"64, which is greater than max allowed: 20.*vLLM with --max-logprobs 64 .*set teacher.cap"),
        ({"tells": 5}, [], r"token 1 of 16: [56] entries are told, and 64 were asked for; start vLLM with --max-logprobs 64"),
        ({"change_logs": lambda logs: torch.where(logs < -2, -np.inf, logs)}, [], "some probabilities are 0 or no numbers"),
        (
            {"change_logs": lambda logs: logs + 3},
            [],
            r"its probabilities sum to .*raw log-probabilities, normalised over all tokens, are needed",
        ),
        ({"change_logs": lambda logs: logs - 3}, [], r"its probabilities sum to 0\.\d+ at most, whatever those have that it does not tell"),
        ({"change_ids": lambda ids: [1, *ids]}, [], r"scores of 17 tokens, and was given 16"),
        ({"change_ids": lambda ids: [*ids[1:], 3]}, [], r"is not among those told; the server scores something else"),
        ({"max_model_len": 100}, [], r"has room for 100 tokens, and the longest row needs 101; .*--max-model-len 101.*data.max_length"),
        ({"change_choice": lambda choice: []}, [], "answers prompt_logprobs in a form that is not known here"),
        ({"change_choice": lambda choice: {"prompt_logprobs": [None] * 16}}, [], "--no-enable-prefix-caching"),
        ({"models": {"object": "list"}}, [], "serves nothing, and not teacher"),
        ({"name": "other"}, ["teacher.server.model=mine"], "serves other, and not mine; set teacher.server.model to one of them"),
        ({"key": "k"}, [], r'answers 401 \("Incorrect key None"\); name the variable with its key \(teacher.server.api_key_variable\)'),
        ({"body": b"<html>"}, [], "something that is not JSON; give the url of an OpenAI-compatible API"),
        ({"body": b"[1]"}, [], "JSON that is no object"),
        ({"statuses": [307] * 9}, [], r"answers 307.*give the address itself as teacher.server.url \(http://elsewhere.invalid"),
        ({"statuses": [404] * 9}, [], "answers 404.*ends with the version, as in http://host:8000/v1"),
        ({"statuses": [403] * 9}, [], "answers 403"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_the_first_unit(serve, recipe_of, faults, overrides, words):
    recipe = recipe_of(serve(**faults), *overrides)
    with pytest.raises(TeacherError, match=f"(?s){words}"):
        connect(recipe, AutoTokenizer.from_pretrained(STORIES), 100, lambda text: None)


def test_room_for_the_longest_row_and_the_token_that_is_generated_is_enough(serve, recipe_of, tokenizer):
    server = serve(max_model_len=100)
    assert connect(recipe_of(server), tokenizer, 99, lambda text: None).way == "prompt_logprobs"
    assert connect(recipe_of(server, "teacher.server.scores=echo"), tokenizer, 100, lambda text: None).way == "echo"


def test_without_prompt_logprobs_a_server_is_asked_to_echo_and_a_smaller_cap_is_what_it_allows(serve, recipe_of, tokenizer):
    server = serve(ways={"echo"}, max_logprobs=20)
    teacher = connect(recipe_of(server, "teacher.cap=20"), tokenizer, 100, lambda text: None)
    assert (teacher.way, teacher.width) == ("echo", 20)
    assert teacher.ask(a_sample()).ids.shape[1] == 20


def test_another_tokenizer_than_the_students_is_refused_though_the_server_has_the_weights(serve, recipe_of, tokenizer, tmp_path):
    other = tmp_path / "other"
    tokenizer.save_pretrained(other)
    facts = json.loads((other / "tokenizer.json").read_text())
    vocab = facts["model"]["vocab"]
    a, b = [token for token in vocab if token.isalpha()][:2]
    swapped = vocab | {a: vocab[b], b: vocab[a]}
    (other / "tokenizer.json").write_text(json.dumps(facts | {"model": facts["model"] | {"vocab": swapped}}))
    server = serve()
    with pytest.raises(TeacherError, match="of the student; distributions over other tokens cannot be compared"):
        connect(recipe_of(server, f"teacher.name_or_path={other}"), tokenizer, 100, lambda text: None)
    with pytest.raises(ModelError, match="its tokenizer is read from there, though a server has its weights"):
        connect(recipe_of(server, "teacher.name_or_path=/no/such/teacher"), tokenizer, 100, lambda text: None)


# ---- what passes, and what does not


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_or_starts_again_is_asked_again(serve, status):
    server, sample = serve(statuses=[status] * 3), a_sample()
    found = teacher_at(server.url).ask(sample)
    assert len(server.questions) == 4
    assert (found.gold == teacher_at(server.url).ask(sample).gold).all()


def test_a_server_that_says_when_to_come_back_is_left_alone_so_long(serve, monkeypatch):
    waited = []
    monkeypatch.setattr(client_module.time, "sleep", waited.append)
    monkeypatch.setattr(client_module, "DELAYS_S", (1, 30))
    teacher_at(serve(statuses=[429], retry_after="7", slow_s=0).url).ask(a_sample())
    assert any(7 * 0.7 <= wait_s <= 7 * 1.3 for wait_s in waited)
    waited.clear()
    teacher_at(serve(statuses=[429], retry_after="86400").url).ask(a_sample())
    assert max(waited) <= 30 * 1.3


@pytest.mark.parametrize(
    "status, asked, advice", [(500, 7, "its own log says why"), (429, 7, "lower teacher.server.concurrency"), (400, 1, "")]
)
def test_a_server_that_never_answers_is_told_of_with_url_status_and_its_words(serve, status, asked, advice):
    server = serve(statuses=[status] * 20, words="CUDA is  out of\n memory " + "x" * 1000)
    with pytest.raises(TeacherError) as failed:
        teacher_at(server.url).ask(a_sample())
    message = str(failed.value)
    assert message.startswith(f'{server.url}/completions: answers {status} ("CUDA is out of memory xxx')
    assert advice in message and len(message) < 600
    assert len(server.questions) == asked


def test_a_slow_answer_is_not_waited_for_longer_than_was_said(serve):
    server = serve(slow_s=30)
    begun = time.monotonic()
    with pytest.raises(TeacherError, match=r"does not answer within 0.2 s, 2 times in a row; raise teacher.server.timeout_s"):
        teacher_at(server.url, timeout_s=0.2).ask(a_sample(), patience=1)
    assert time.monotonic() - begun < 20


def test_nobody_at_the_address_is_told_of_soon(recipe_of, serve, tokenizer):
    server = serve()
    recipe = recipe_of(server)
    server.__exit__()
    with pytest.raises(TeacherError, match=r"/models: cannot be reached \(.*\), 3 times in a row; start the server"):
        connect(recipe, tokenizer, 100, lambda text: None)
    server.__enter__()


def test_the_key_goes_to_the_server_and_nowhere_else(serve, recipe_of, tokenizer, monkeypatch, tmp_path, capfd):
    key = "sk-very-secret-1234"
    server = serve(key=key)
    recipe = recipe_of(server, "teacher.server.api_key_variable=A_TEACHER_KEY")
    with pytest.raises(TeacherError, match="api_key_variable = A_TEACHER_KEY; it is not set on this machine; export it here too"):
        connect(recipe, tokenizer, 100, lambda text: None)
    monkeypatch.setenv("A_TEACHER_KEY", key)
    said = []
    teacher = connect(recipe, tokenizer, 100, said.append)
    assert server.headers[-1]["Authorization"] == f"Bearer {key}"
    assert key not in repr(teacher) and key.encode() not in pickle.dumps(teacher)
    server.key = "another"
    with pytest.raises(TeacherError, match=r"the key in \$A_TEACHER_KEY is not the right one") as refused:
        teacher.ask(a_sample())
    # The server repeats what it was sent.
    assert "Incorrect key Bearer ***" in str(refused.value)
    captured = capfd.readouterr()
    assert key not in str(refused.value) + "".join(said) + captured.out + captured.err


# ---- batches


def test_a_batch_is_asked_about_at_once_and_a_sample_that_repeats_once(serve):
    server = serve(slow_s=0.1)
    samples = [a_sample(seed=seed) for seed in (1, 2, 1, 3, 4, 5, 2)]
    teacher = teacher_at(server.url)
    found = teacher.read_samples(samples)
    assert len(server.questions) == 5 and 2 <= server.most_at_once <= 4
    at = 0
    for sample in samples:
        expected = teacher.ask(sample)
        rows = slice(at, at := at + len(expected))
        for name, column in vars(expected).items():
            assert (getattr(found, name)[rows] == column).all()
    assert at == len(found)
    assert len(teacher.read_samples([])) == 0


def test_one_question_that_fails_ends_the_batch_without_asking_all_others(serve):
    server = serve(statuses=[400], slow_s=0.05)
    with pytest.raises(TeacherError, match="answers 400"):
        teacher_at(server.url).targets_of([a_sample(seed=seed) for seed in range(60)])
    assert len(server.questions) < 30


def test_a_recipe_with_a_server_passes_the_check_and_can_be_captured_only_into_a_cache(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    overrides = ["teacher.server.url=http://host:8000/v1", "teacher.source=served", "teacher.unit_tokens=262144"]
    with pytest.raises(SystemExit) as left:
        main(["check", str(tmp_path / "recipe.yaml"), *overrides])
    assert left.value.code == 0
    assert "http://host:8000/v1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["capture", str(tmp_path / "recipe.yaml"), *overrides])
    assert left.value.code == 2
    assert "teacher.source = served; it is asked beside the student and never captured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_captures_through_a_server_with_two_workers_under_any_backend(reference, tmp_path):
    """Under zero3 as well: there is no teacher here to share."""
    captured, server = reference
    done = harness("capture", captured.file, *through(server, f"teacher.cache={tmp_path / 'cache'}"), "--backend=zero3", "--processes=2")
    assert done.code == 0, done.output
    assert "[0/2]" in done.output and "[1/2]" in done.output and "scores given tokens (prompt_logprobs, 64 entries each)" in done.output
    assert files_of(tmp_path / "cache").keys() == files_of(captured.folder).keys()
