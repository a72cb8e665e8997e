"""Capture, with a real teacher on real rows: what is kept is what float64 says, and neither workers, kills nor ZeRO-3 change a byte."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MICRO_TEMPLATE, STORIES, XLAM, harness, needs_shared
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.data import prepare_recipe
from harness.errors import ModelError, Stopped, TeacherError
from harness.launcher import Machines
from harness.losses import Head
from harness.model import load_tokenizer
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.teacher import capture as capture_module
from harness.teacher import resident, samples
from harness.teacher.capture import capture
from harness.teacher.format import UNIT_FILE, Settings
from harness.teacher.head import keep, uniforms_of
from harness.teacher.reader import open_cache
from harness.teacher.samples import Samples, cache_folder, keys_of, plan_units
from harness.teacher.vocabulary import check_same_vocabulary, true_vocabulary, vocabulary_digest
from harness.teacher.writer import UnitWriter
from harness.units import Worker

pytestmark = needs_shared

RECIPE = f"""
task: distill
model: {{name_or_path: "{STORIES}"}}
data: {{train: [{{path: "{XLAM}", max_rows: 60}}], eval_rows: 8, max_length: 512, chat_template: "{MICRO_TEMPLATE}"}}
teacher: {{name_or_path: "{STORIES}", unit_tokens: 1500, draws: 4}}
train: {{num_train_epochs: 3}}
"""
FP32_NATS = 2e-5
"""Of a forward in float32 through five layers, against one in float64."""


def code_nats(logs):
    """What the codes of the format may be off, and the sum to 1 that is restored when they are read."""
    return 1.4e-4 * np.sqrt(np.clip(-np.where(np.isfinite(logs), logs, 0), 0, 64)) + 2e-4


class Captured:
    """A recipe and its data, captured in this process."""

    def __init__(self, folder: Path, *overrides: str):
        self.file = folder / "recipe.yaml"
        self.file.write_text(RECIPE)
        self.recipe = load(self.file, [f"teacher.cache={folder / 'cache'}", *overrides])
        self.folder = Path(self.recipe.teacher.cache)
        self.tokenizer = load_tokenizer(self.recipe)
        self.prepared = prepare_recipe(self.recipe, self.tokenizer, packing=False, say=lambda text: None)
        self.said: list[str] = []

    def run(self, worker: Worker = Worker(), *, stop=lambda: None) -> Path:  # noqa: B008
        return capture(self.recipe, self.tokenizer, self.prepared, worker, sharded_by=None, stop=stop, say=self.said.append)

    def at(self, folder: Path) -> "Captured":
        """The same, to be captured elsewhere."""
        other = Captured.__new__(Captured)
        other.__dict__ = dict(self.__dict__)
        other.folder, other.said = folder, []
        other.recipe = self.recipe.model_copy(update={"teacher": self.recipe.teacher.model_copy(update={"cache": str(folder)})})
        return other

    def samples(self) -> Samples:
        return Samples(self.prepared, self.recipe.teacher.unit_tokens)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As `harness capture` has it on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Captured:
    captured = Captured(tmp_path_factory.mktemp("reference"))
    captured.run()
    return captured


@pytest.fixture(scope="module")
def dense():
    """The teacher in float64, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float64).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# ---- what is kept


def test_what_is_kept_of_every_row_is_what_the_teacher_says_in_float64_one_row_at_a_time(reference, dense):
    cache, settings = open_cache(reference.folder), reference.recipe.teacher
    rows = [row for split in (reference.prepared.train, reference.prepared.eval) for row in split]
    assert len(cache) == len({(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}) >= 60
    for row, key in zip(
        rows, [key for split in (reference.prepared.train, reference.prepared.eval) for key in keys_of(split)[0]], strict=True
    ):
        trained = [place for place, label in enumerate(row["labels"]) if label != -100]
        with torch.no_grad():
            logs = dense(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).numpy()[np.array(trained) - 1]
        targets = cache.read(key)
        assert len(targets) == len(trained)
        for t, log in enumerate(logs):
            count = int(targets.counts[t])
            by_rank = np.sort(log)[::-1]
            mass = np.exp(by_rank).cumsum()
            fewest = int((mass < settings.top_p).sum()) + 1
            near = abs(mass[fewest - 1] - settings.top_p) < 1e-5 or abs(mass[fewest - 2] - settings.top_p) < 1e-5
            assert count == min(max(fewest, settings.floor), settings.cap) or near
            kept = targets.ids[t, :count]
            assert len(set(kept.tolist())) == count
            assert np.allclose(log[kept], by_rank[:count], atol=FP32_NATS)
            assert (np.abs(targets.logprobs[t, :count] - log[kept]) <= code_nats(log[kept])).all()
            outside = np.delete(log, kept)
            tail = np.log(np.exp(outside).sum())
            assert abs(targets.log_tail[t] - tail) <= code_nats(tail)
            assert abs(targets.entropy[t] + (np.exp(log) * log).sum()) <= 1e-3
            gold = log[row["input_ids"][trained[t]]]
            assert abs(targets.gold[t] - gold) <= code_nats(gold)
            assert not set(targets.draws[t].tolist()) & set(kept.tolist())


def test_neither_the_batch_nor_the_side_of_the_padding_matters_beyond_rounding(reference, tmp_path, monkeypatch):
    """Another batch: every sample alone. Another side: by transformers, with padding at the left and a mask."""
    monkeypatch.setattr(samples, "BATCH_TOKENS", 1)
    alone = reference.at(tmp_path / "alone")
    assert all(len(batch) == 1 for batch in alone.samples().batches(0))
    alone.run()
    batched, single = open_cache(reference.folder), open_cache(alone.folder)
    keys = list(batched.keys())
    ours, theirs = batched.read_many(keys), single.read_many(keys)
    # A rounding of the forward may move a code by one step, which is twice the error of one.
    assert (np.abs(ours.gold - theirs.gold) <= 2 * code_nats(theirs.gold)).all()
    same = ours.counts == theirs.counts
    assert (np.abs(ours.log_tail - theirs.log_tail) <= 2 * code_nats(theirs.log_tail))[same].all()
    assert same.mean() > 0.999

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    monkeypatch.undo()
    batch = reference.samples().batches(0)[0]
    assert len({len(sample.input_ids) for sample in batch}) > 1
    width = max(len(sample.input_ids) for sample in batch)
    ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    for row, sample in enumerate(batch):
        ids[row, width - len(sample.input_ids) :] = torch.from_numpy(sample.input_ids)
        mask[row, width - len(sample.input_ids) :] = 1
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logs = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    for row, sample in enumerate(batch):
        left = width - len(sample.input_ids)
        gold = logs[row, left + sample.trained_at - 1, sample.input_ids[sample.trained_at]].numpy()
        stored = batched.read(sample.key).gold
        assert (np.abs(stored - gold) <= code_nats(gold)).all()


def kept_in_float64(hidden, head: Head, gold, settings: Settings, vocabulary: int):
    """(counts, ids sorted, log-probabilities, log tail, entropy, gold): by sorting whole distributions."""
    logits = hidden.double() @ head.weight[:vocabulary].double().T
    if head.bias is not None:
        logits += head.bias[:vocabulary].double()
    logits *= head.logit_scale
    if head.softcap:
        logits = head.softcap * (logits / head.softcap).tanh()
    logs = logits.log_softmax(-1)
    values, ids = logs.sort(dim=-1, descending=True, stable=True)
    counts = ((values.exp().cumsum(-1) < settings.p).sum(-1) + 1).clamp(settings.floor, settings.cap).clamp(max=vocabulary)
    tail = torch.stack([row[count:].exp().sum().log() for row, count in zip(values, counts.tolist(), strict=True)])
    return counts, ids, values, tail, -(logs.exp() * logs).sum(-1), logs.gather(1, gold[:, None])[:, 0]


@pytest.mark.parametrize("tile_bytes", [1, 2**30], ids=["a-token-at-a-time", "all-at-once"])
@pytest.mark.parametrize(
    "form", [{}, {"bias": torch.linspace(-2, 2, 300)}, {"logit_scale": 1.5}, {"softcap": 20.0}], ids=["plain", "bias", "scale", "cap"]
)
def test_the_head_keeps_what_float64_keeps_and_padding_rows_of_it_take_no_part(form, tile_bytes):
    torch.manual_seed(0)
    weight = torch.randn(300, 32) * 0.7
    # Padding, which would win every distribution.
    weight[290:] += 10
    head = Head(weight, **form)
    hidden, gold, settings = torch.randn(40, 32), torch.randint(0, 290, (40,)), Settings(0.9, 3, 20, 0, 0)
    kept = keep(hidden, head, gold, torch.empty(40, 0, dtype=torch.float64), settings, 290, tile_bytes=tile_bytes)
    counts, ids, values, tail, entropy, gold_log = kept_in_float64(hidden, head, gold, settings, 290)
    assert torch.equal(kept.counts, counts)
    assert len(set(counts.tolist())) > 5
    for row, count in enumerate(counts.tolist()):
        assert torch.equal(kept.ids[row, :count], ids[row, :count])
        assert torch.equal(kept.ids[row, count:], torch.zeros_like(kept.ids[row, count:]))
        assert torch.allclose(kept.logprobs[row, :count].double(), values[row, :count], atol=1e-5)
        assert (kept.logprobs[row, count:] == -torch.inf).all()
    for ours, theirs in ((kept.log_tail, tail), (kept.entropy, entropy), (kept.gold, gold_log)):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)


def test_a_tail_of_a_billionth_is_kept_and_with_a_mass_of_one_nothing_is_left_out():
    """As 1 minus the head's mass it would be rounding."""
    logits = torch.tensor([[0.0, -1.0, -22.0, -23.0]])
    weight, none = torch.eye(4), torch.empty(1, 0, dtype=torch.float64)
    kept = keep(logits, Head(weight), torch.tensor([0]), none, Settings(0.9, 2, 2, 0, 0), 4)
    expected = np.log((np.exp(-22.0) + np.exp(-23.0)) / (1 + np.exp(-1.0)))
    assert float(kept.log_tail) == pytest.approx(expected, abs=1e-5)
    kept = keep(logits, Head(weight), torch.tensor([0]), none, Settings(1.0, 1, 255, 0, 0), 4)
    assert (kept.counts.tolist(), kept.log_tail.tolist()) == ([4], [-np.inf])


def test_among_equals_the_lowest_id_comes_first():
    logits = torch.zeros(1, 50)
    logits[0, 40] = 1.0
    kept = keep(logits, Head(torch.eye(50)), torch.tensor([0]), torch.empty(1, 0, dtype=torch.float64), Settings(1.0, 50, 50, 0, 0), 50)
    assert kept.ids[0].tolist() == [40, *range(40), *range(41, 50)]


def test_draws_have_the_tails_distribution_and_depend_on_nothing_but_seed_sample_and_position():
    torch.manual_seed(0)
    logits, many = torch.randn(1, 30) * 2, 40_000
    uniforms = torch.from_numpy(uniforms_of(7, b"k" * 16, many, 1))
    kept = keep(logits.expand(many, 30), Head(torch.eye(30)), torch.zeros(many, dtype=torch.long), uniforms, Settings(0.5, 2, 4, 1, 7), 30)
    p = logits[0].double().softmax(-1)
    p[kept.ids[0, : kept.counts[0]]] = 0
    p /= p.sum()
    found = torch.bincount(kept.draws[:, 0], minlength=30) / many
    assert (found[p == 0] == 0).all()
    assert ((found - p).abs() <= 5 * (p * (1 - p) / many).sqrt() + 1e-9).all()

    whole = uniforms_of(7, b"k" * 16, 10, 4)
    assert (whole[:3] == uniforms_of(7, b"k" * 16, 3, 4)).all()
    assert (whole > 0).all() and (whole < 1).all()
    assert abs(uniforms.mean() - 0.5) < 0.01
    for other in (uniforms_of(8, b"k" * 16, 10, 4), uniforms_of(7, b"l" * 16, 10, 4)):
        assert not (whole == other).any()


# ---- units and workers


def test_units_hold_every_sample_once_whatever_the_order_and_the_repetitions_of_the_rows():
    rng = np.random.default_rng(0)
    # Keys that end with zeros: numpy would cut them off.
    keys = [bytes(rng.integers(0, 256, 13, np.uint8)) + bytes(3) for _ in range(500)]
    lengths = rng.integers(1, 90, 500).tolist()
    lengths[7] = 5000
    units = plan_units(keys, lengths, 1000)
    order = rng.permutation(500).tolist()
    shuffled = plan_units([keys[at] for at in [*order, *order[:50]]], [lengths[at] for at in [*order, *order[:50]]], 1000)
    assert shuffled.plan == units.plan
    assert shuffled.keys.tobytes() == units.keys.tobytes()
    places = [place for unit in range(units.plan.units) for place in range(500)[units.unit(unit)]]
    assert places == list(range(500))
    assert units.tokens == sum(lengths)
    assert [keys[row] for row in units.rows] == sorted(keys)
    sizes = [int(units.lengths[units.unit(unit)].sum()) for unit in range(units.plan.units)]
    assert sorted(sizes)[-1] >= 5000 and all(size > 900 - 90 or unit == units.plan.units - 1 for unit, size in enumerate(sizes))
    assert plan_units(keys, lengths, 900).plan.digest != units.plan.digest
    assert plan_units(keys[1:], lengths[1:], 1000).plan.digest != units.plan.digest
    assert plan_units([], [], 1000).plan.units == 0


def test_the_samples_of_packs_are_those_that_were_packed(reference):
    packed = prepare_recipe(reference.recipe, reference.tokenizer, packing=True, say=lambda text: None)
    assert "seq_lengths" in packed.train.column_names
    for packs, rows in ((packed.train, reference.prepared.train), (packed.eval, reference.prepared.eval)):
        assert sorted(zip(*keys_of(packs), strict=True)) == sorted(zip(*keys_of(rows), strict=True))


def test_batches_hold_a_unit_once_the_longest_first_and_no_more_than_they_may(reference, monkeypatch):
    monkeypatch.setattr(samples, "BATCH_TOKENS", 800)
    split = reference.samples()
    batches = split.batches(1)
    lengths = [len(sample.input_ids) for batch in batches for sample in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * len(batch[0].input_ids) <= 800 for batch in batches)
    assert len(batches) > 1 and max(map(len, batches)) > 1
    places = split.units.unit(1)
    assert {sample.key for batch in batches for sample in batch} == {split.key(place) for place in range(places.start, places.stop)}


def test_a_worker_does_its_own_units_first_and_helpers_go_different_ways():
    orders = [Worker(index, 4).order(40) for index in range(4)]
    for index, order in enumerate(orders):
        assert sorted(order) == list(range(40))
        assert order[:10] == list(range(index, 40, 4))
    assert len({tuple(order[10:]) for order in orders}) == 4


@pytest.fixture(scope="module")
def clean():
    """Processes that are forked from one which has imported what they need and computed nothing: a fork of this one would inherit the locks
    of torch's threads, and wait for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["harness.teacher.capture", "transformers.models.llama.modeling_llama", "transformers.integrations.accelerate"]
    )
    return context


def work(captured: Captured, worker: Worker) -> None:
    # Of a process that inherits nothing of this one's.
    torch.set_num_threads(1)
    captured.run(worker)


def work_and_die(captured: Captured, where: str, name: str, call: int) -> None:
    """With a SIGKILL at the given call of a function."""
    owner = UnitWriter if where == "UnitWriter" else os
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, dying)
    work(captured, Worker())


def test_eight_workers_at_once_write_the_bytes_that_one_writes(reference, tmp_path, clean):
    captured = reference.at(tmp_path / "cache")
    workers = [clean.Process(target=work, args=(captured, Worker(index, 8))) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(files_of(captured.folder)) >= 8
    assert files_of(captured.folder) == files_of(reference.folder)


@pytest.mark.parametrize(
    "where, name, call",
    [("UnitWriter", "__init__", 1), ("UnitWriter", "add", 17), ("UnitWriter", "commit", 2), ("os", "fsync", 4), ("os", "rename", 3)],
)
def test_a_capture_that_is_killed_goes_on_to_the_same_bytes(reference, tmp_path, clean, where, name, call):
    captured = reference.at(tmp_path / "cache")
    process = clean.Process(target=work_and_die, args=(captured, where, name, call))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = files_of(captured.folder)
    whole = {name: data for name, data in left.items() if not name.endswith(".tmp")}
    assert whole.items() < files_of(reference.folder).items()
    captured.run()
    assert files_of(captured.folder) == files_of(reference.folder)


def test_a_capture_that_is_told_to_stop_ends_its_unit_and_the_next_one_does_what_is_left(reference, tmp_path):
    captured, asked = reference.at(tmp_path / "cache"), itertools.count(1)
    with pytest.raises(Stopped, match=r"stopped \(SIGUSR1\): 2 of \d+ units are there; the same command goes on") as stopped:
        captured.run(Worker(1, 3), stop=lambda: "SIGUSR1" if next(asked) > 2 else None)
    assert stopped.value.exit_code == 75
    assert {name for name in files_of(captured.folder) if name.endswith(".tc")} == {UNIT_FILE.format(1), UNIT_FILE.format(4)}
    captured.run()
    assert files_of(captured.folder) == files_of(reference.folder)


def test_a_complete_capture_is_told_from_its_files_and_the_teacher_is_not_loaded(reference, monkeypatch):
    monkeypatch.setattr(capture_module, "load_teacher", None)
    reference.said.clear()
    reference.run()
    assert reference.said[-1] == f"complete: {reference.folder}"


def test_the_cost_is_forecast_after_the_first_unit_and_a_disk_that_is_too_small_is_refused(reference, tmp_path, monkeypatch):
    captured = reference.at(tmp_path / "cache")
    captured.run()
    assert re.match(r"capture: \d+ distinct samples, [\d,]+ tokens, [\d,]+ of them trained, in \d+ units; at most", captured.said[0])
    assert "break-even: a resident teacher takes" in captured.said[1]
    assert "for this recipe's 3 epochs it" in captured.said[1]
    assert re.match(r"unit 0: [\d,]+ tokens in", captured.said[2])
    assert "all are there" in "\n".join(captured.said)
    monkeypatch.setattr(capture_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(TeacherError, match=r"what is left needs about .* free some, give teacher.cache another folder"):
        reference.at(tmp_path / "other").run()


# ---- the folder


def test_the_folder_is_named_by_what_decides_the_content_and_by_nothing_else(reference, tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    plan = reference.samples().units.plan

    def folder(*overrides):
        return cache_folder(load(file, list(overrides)), reference.tokenizer, plan)

    assert folder().parent == Path(os.environ["HARNESS_CACHE"]) / "teachers"
    assert folder("train.learning_rate=1e-3", "data.seed=5") == folder()
    different = [
        "teacher.top_p=0.9",
        "teacher.cap=32",
        "teacher.floor=4",
        "teacher.draws=0",
        "teacher.dtype=float32",
        "teacher.revision=v1",
    ]
    folders = {folder(), *(folder(override) for override in (*different, "teacher.name_or_path=other/teacher"))}
    assert len(folders) == 8
    monkeypatch.chdir(STORIES.parent)
    assert folder(f"teacher.name_or_path={STORIES.name}") == folder()
    assert folder("teacher.cache=~/mine") == Path.home() / "mine"


def changed_teacher(folder: Path, change) -> Path:
    """A copy of the teacher whose weights `change` has changed."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((STORIES / name).read_bytes())
    weights = load_file(STORIES / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_whose_weights_have_changed_is_not_taken_for_the_one_of_a_complete_cache(tmp_path):
    teacher = changed_teacher(tmp_path / "teacher", lambda weights: None)
    captured = Captured(tmp_path, f"teacher.name_or_path={teacher}")
    captured.run()
    (teacher / "model.safetensors").unlink()
    weights = load_file(STORIES / "model.safetensors")
    save_file({name: weight * 1.001 for name, weight in weights.items()}, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="teacher: digest is .* belongs to another cache"):
        captured.run()


@pytest.mark.parametrize(
    "override, words",
    [
        ("teacher.top_p=0.9", "settings: p is 0.9, and the cache is of 0.99"),
        ("teacher.dtype=bfloat16", "teacher: dtype is 'bfloat16', and the cache is of 'float32'"),
        ("data.train.0.max_rows=59", "plan: .* belongs to another cache: use another folder"),
    ],
)
def test_a_folder_with_the_complete_cache_of_another_recipe_is_refused(reference, override, words):
    other = reference.at(reference.folder)
    other.recipe = load(reference.file, [f"teacher.cache={reference.folder}", override])
    other.prepared = prepare_recipe(other.recipe, other.tokenizer, packing=False, say=lambda text: None)
    with pytest.raises(TeacherError, match=words):
        other.run()


def test_a_unit_that_is_torn_is_told_of_before_the_others_are_done(reference, tmp_path):
    captured, asked = reference.at(tmp_path / "cache"), itertools.count(1)
    with pytest.raises(Stopped):
        captured.run(stop=lambda: "enough" if next(asked) > 1 else None)
    unit = captured.folder / UNIT_FILE.format(0)
    unit.write_bytes(unit.read_bytes()[:-20])
    with pytest.raises(TeacherError, match="unit-00000.tc: has no footer"):
        captured.run()


# ---- vocabularies


class Words:
    """A tokenizer's map, and no more."""

    def __init__(self, **words: int):
        self._words = words

    def get_vocab(self):
        return dict(self._words)


def test_the_true_vocabulary_ends_with_the_largest_id_also_where_ids_are_left_out():
    assert true_vocabulary(Words(a=0, b=1, c=5)) == 6


def test_the_digest_of_a_vocabulary_is_of_the_map_alone(reference):
    assert vocabulary_digest(Words(a=0, b=1)) == vocabulary_digest(Words(b=1, a=0)) != vocabulary_digest(Words(a=1, b=0))
    other = AutoTokenizer.from_pretrained(STORIES)
    other.chat_template, other.pad_token = "{{ messages }}", other.eos_token
    assert vocabulary_digest(other) == vocabulary_digest(reference.tokenizer)


@pytest.mark.parametrize(
    "student, teacher, words",
    [
        (dict(a=0, b=1, c=2), dict(a=0, c=1, b=2), "token 1 is 'c', and 'b' of the student"),
        (dict(a=0, b=1), dict(a=0, b=1, c=2), "token 2 is 'c', and nobody's of the student"),
        (dict(a=0, b=1, c=2), dict(a=0, b=1), "token 2 is nobody's, and 'c' of the student"),
        (dict(a=0, b=1), dict(a=0, b=1, c=1), "token 1 is 'b' or 'c', and 'b' of the student"),
    ],
)
def test_other_tokens_are_refused_with_the_first_that_differs_and_the_way_out(student, teacher, words):
    with pytest.raises(TeacherError) as refused:
        check_same_vocabulary(Words(**student), Words(**teacher), "some/teacher")
    assert words in str(refused.value)
    assert "sequence-level" in str(refused.value) and "TRL's GOLD" in str(refused.value)
    check_same_vocabulary(Words(**student), Words(**student), "some/teacher")


def test_a_teacher_with_padding_rows_says_the_same_as_one_without(reference, tmp_path):
    """The pair of 151,936 and 152,064 rows, on a small scale: rows that no token has, and that would win every distribution."""

    def pad(weights):
        name = "model.embed_tokens.weight"
        weights[name] = torch.cat([weights[name], weights[name].mean(0).expand(24, -1) + 50])

    teacher = changed_teacher(tmp_path / "padded", pad)
    config = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 536'))
    captured = Captured(tmp_path, f"teacher.name_or_path={teacher}")
    captured.run()
    padded, plain = open_cache(captured.folder), open_cache(reference.folder)
    keys = list(plain.keys())
    ours, theirs = padded.read_many(keys), plain.read_many(keys)
    assert (ours.ids == theirs.ids).mean() > 0.999
    assert (np.abs(ours.gold - theirs.gold) <= 2 * code_nats(theirs.gold)).all()


# ---- teachers that do not fit


@pytest.mark.parametrize(
    "overrides, error, words",
    [
        (
            "teacher.name_or_path=/no/such/teacher",
            ModelError,
            r"teacher \(/no/such/teacher; .* stands in teacher\.\* here\): model: no token",
        ),
        ("teacher.attn_implementation=varlen", ModelError, "torch's variable-length attention needs a CUDA GPU"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_refused_in_its_own_name(tmp_path, overrides, error, words):
    with pytest.raises(error, match=words):
        Captured(tmp_path, overrides).run()


def test_a_row_longer_than_the_teacher_has_positions_for_is_refused(reference):
    with pytest.raises(ModelError, match="the longest row has 513 tokens and the model positions for 512"):
        resident.load_teacher(reference.recipe, reference.tokenizer, 513)


def test_an_architecture_that_does_something_unknown_to_its_logits_is_refused(reference, monkeypatch):
    known = resident.head_of
    monkeypatch.setattr(resident, "head_of", lambda model: known(model)._replace(logit_scale=1.05))
    with pytest.raises(TeacherError, match=r"its head on its hidden states is .* nats away from its own logits"):
        resident.load_teacher(reference.recipe, reference.tokenizer, 100)


def test_a_teacher_that_is_spread_over_devices_or_in_four_bits_answers(reference):
    spread = reference.recipe.model_copy(update={"teacher": reference.recipe.teacher.model_copy(update={"device_map": "auto"})})
    whole = resident.load_teacher(reference.recipe, reference.tokenizer, 100)
    parts = resident.load_teacher(spread, reference.tokenizer, 100)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(whole.logits(ids), parts.logits(ids))
    packed = resident.load_teacher(
        load(reference.file, ["teacher.quantization.load_in_4bit=true", "teacher.dtype=float32"]), reference.tokenizer, 100
    )
    error = (whole.logits(ids).softmax(-1) - packed.logits(ids).softmax(-1)).abs().sum(-1).mean()
    assert 1e-3 < error < 0.5


def test_a_teacher_whose_head_was_left_on_the_host_is_refused(reference, monkeypatch):
    load_base = resident.models.load_base
    monkeypatch.setattr(resident.models, "load_base", lambda *arguments, **options: load_base(*arguments, **options).to("meta"))
    spread = reference.recipe.model_copy(update={"teacher": reference.recipe.teacher.model_copy(update={"device_map": "auto"})})
    with pytest.raises(ModelError, match="its head or its embedding was left on the host"):
        resident.load_teacher(spread, reference.tokenizer, 100)


# ---- the command


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["task=sft", "teacher=null"], "task = sft; it has no teacher to capture"),
        (["teacher.source=resident", "teacher.unit_tokens=262144", "teacher.draws=0"], "is asked beside the student and never captured"),
        (["--shards", "4", "--shard", "4"], "--shard 4; with --shards 4 it goes from 0 to 3"),
        (["teacher.device_map=auto", "--processes", "2"], "one process takes all GPUs of its machine, and 2 were asked for"),
        (["--backend", "fsdp2", "--processes", "2"], "a teacher is shared out by zero3 alone; give --backend zero3"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_loaded(tmp_path, capsys, arguments, words):
    from harness.cli import main

    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    with pytest.raises(SystemExit) as left:
        main(["capture", str(file), *arguments])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_were_signalled_end_their_units_and_the_same_command_goes_on_to_the_same_bytes(reference, tmp_path):
    """Two workers on this machine; the first unit's line is the moment at which the parent is told to end."""
    argv = [sys.executable, "-m", "harness", "capture", str(reference.file), f"teacher.cache={tmp_path / 'cache'}"]
    with subprocess.Popen(
        [*argv, "--backend", "ddp", "--processes", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as parent:
        lines = []
        for line in parent.stdout:
            lines.append(line)
            if ": unit" in line or "] unit" in line:
                parent.send_signal(signal.SIGTERM)
                break
        rest, _ = parent.communicate(timeout=240)
    output = "".join(lines) + rest
    assert parent.returncode == 75, output
    assert "stopping: each worker ends its unit and leaves" in output
    assert "[0/2]" in output and "[1/2]" in output
    assert not any(name.endswith(".tmp") for name in files_of(tmp_path / "cache"))
    done = harness("capture", reference.file, f"teacher.cache={tmp_path / 'cache'}")
    assert done.code == 0, done.output
    assert files_of(tmp_path / "cache") == files_of(reference.folder)


def test_two_ranks_that_share_a_teacher_by_zero3_write_the_bytes_of_one_process(reference, tmp_path):
    done = harness(
        "capture", reference.file, f"teacher.cache={tmp_path / 'cache'}", "--backend", "zero3", "--processes", "2", timeout_s=540
    )
    assert done.code == 0, done.output
    assert "units 0, 1: " in done.output
    assert files_of(tmp_path / "cache") == files_of(reference.folder)


@pytest.mark.parametrize(
    "codes, together, code",
    [
        ([0, 0], True, 0),
        ([0, 1], False, 0),
        ([75, 1], False, 1),
        ([75, 75], True, 75),
        ([-9, 1], True, 1),
        ([-9, -9], True, 137),
        ([75, -15], False, 143),
        ([0, 1], True, 1),
    ],
)
def test_the_exit_code_is_0_when_the_cache_is_complete_and_else_says_what_went_wrong(codes, together, code):
    from harness.cli.workers import exit_code_of

    assert exit_code_of(codes, together=together) == code


def test_one_process_shares_its_teacher_with_nobody_unless_the_host_holds_a_part(tmp_path):
    from harness.cli.capture import shares_teacher

    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def shared(*overrides):
        recipe, named = load(tmp_path / "recipe.yaml", list(overrides)), itertools.product(("ddp", "zero3", "zero3-offload"), (1, 2))
        return {(name, count) for name, count in named if shares_teacher(recipe, load_backend(name), count)}

    assert shared() == {("zero3", 2), ("zero3-offload", 1), ("zero3-offload", 2)}
    assert shared("teacher.server.url=http://host/v1", "teacher.draws=0") == set()


FAIL_OR_WAIT = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(float(sys.argv[1]))"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def test_a_process_that_fails_ends_those_that_share_its_teacher_and_no_others(tmp_path):
    from harness.cli.workers import supervise

    two = Machines(2)
    begun = time.monotonic()
    assert supervise([sys.executable, "-c", FAIL_OR_WAIT, "60"], two, {}, together=True) == 3
    assert time.monotonic() - begun < 50
    assert supervise([sys.executable, "-c", FAIL_OR_WAIT, "0.5"], two, {}, together=False) == 0


def test_the_processes_find_this_very_harness_wherever_they_are_started(monkeypatch, tmp_path):
    from harness.cli.workers import supervise
    from harness.resources import code_root

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    found = f"import os, sys; sys.exit({code_root()!r} not in os.environ.get('PYTHONPATH', ''))"
    assert supervise([sys.executable, "-c", found], Machines(2), {}, together=True) == 0


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    from harness.cli import workers as command

    for after_s in (6.0, 6.0 + command.ONE_CAUSE_S + 1.0):
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    assert command.supervise([sys.executable, "-c", DEAF], Machines(1), {}, together=False) == 128 + signal.SIGKILL
    assert time.monotonic() - begun < 50
