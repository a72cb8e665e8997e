"""What is found out before a student is loaded: a cache without these rows, of another teacher, of other tokens, or off by one."""

from dataclasses import replace

import pytest
import torch
from conftest import STORIES, needs_shared
from dense import SETTINGS, capture, shifted, targets_of
from test_targets import VOCABULARY, logits_of, rows_of

from harness.data.packing import pack
from harness.data.report import PrepareReport, SplitReport
from harness.data.store import Prepared
from harness.errors import TeacherError
from harness.losses import DivergenceLoss
from harness.recipe import load
from harness.teacher import probe
from harness.teacher.format import Teacher
from harness.teacher.resident import weights_digest
from harness.teacher.samples import keys_of
from harness.teacher.vocabulary import true_vocabulary, vocabulary_digest


def samples(rows):
    return [(row["input_ids"], row["labels"]) for row in rows]


@pytest.fixture
def rows():
    return rows_of([9, 4, 30, 17, 6, 25])


# ---- rows


def test_rows_that_a_cache_lacks_are_counted_and_the_first_is_named_by_its_place_with_the_command(tmp_path, rows):
    cache = capture(tmp_path, samples(rows), logits_of, VOCABULARY)
    probe.check_rows(cache, "train", rows, keys_of(rows)[0])
    more = rows_of([9, 4, 30, 17, 6, 25, 11, 13]).select([6, 7])
    with pytest.raises(
        TeacherError, match=r"data\.eval: .*: 2 of 2 samples have no targets .*`harness capture RECIPE`.*; the first of them: rows:6"
    ):
        probe.check_rows(cache, "eval", more, keys_of(more)[0])
    packs = pack(more, capacity=64)
    with pytest.raises(TeacherError, match="the first of them: in a pack that begins with the tokens"):
        probe.check_rows(cache, "eval", packs, keys_of(packs)[0])


def test_the_same_tokens_with_another_mask_are_other_samples(tmp_path, rows):
    cache = capture(tmp_path, samples(rows), logits_of, VOCABULARY)
    all_trained = rows.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})
    others = sum(now != before for now, before in zip(all_trained["labels"], rows["labels"], strict=True))
    with pytest.raises(TeacherError, match=f"{others} of {len(rows)} samples have no targets"):
        probe.check_rows(cache, "train", all_trained, keys_of(all_trained)[0])


# ---- gold tokens


def test_what_the_teacher_thinks_of_the_gold_tokens_is_said(tmp_path, rows):
    nll, entropy = [], []
    for ids, labels in samples(rows):
        logs, labels = logits_of(ids)[:-1].double().log_softmax(-1), torch.tensor(labels[1:])
        nll += [-logs[place, label].item() for place, label in enumerate(labels.tolist()) if label != -100]
        entropy += (-(logs.exp() * logs).sum(-1)[labels != -100]).tolist()
    line = probe.check_gold(capture(tmp_path, samples(rows), logits_of, VOCABULARY), rows)
    said = [float(word) for word in line.replace(",", "").replace(")", "").split() if word[0].isdigit()]
    # The blind guess by hand: ln 50.
    assert said == pytest.approx([sum(nll) / len(nll), len(nll), sum(entropy) / len(entropy), 3.912], abs=2e-3)


def test_of_packs_a_sample_of_each_is_looked_at(tmp_path, rows):
    packs = pack(rows, capacity=40)
    assert "gold tokens" in probe.check_gold(capture(tmp_path, samples(rows), logits_of, VOCABULARY), packs)


def test_targets_of_the_next_position_are_found(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("dense.targets_of", lambda *arguments: shifted(targets_of(*arguments)))
    cache = capture(tmp_path, samples(rows), logits_of, VOCABULARY)
    with pytest.raises(
        TeacherError, match=r"trained token \d+ \(id \d+\) is said to have the log-probability .*: remove the cache and run"
    ):
        probe.check_gold(cache, rows)


def test_targets_of_too_few_tokens_are_found(tmp_path, rows, monkeypatch):
    def without_the_last(*arguments):
        targets = targets_of(*arguments)
        return replace(targets, **{name: value[:-1] for name, value in vars(targets).items()})

    monkeypatch.setattr("dense.targets_of", without_the_last)
    cache = capture(tmp_path, samples(rows), logits_of, VOCABULARY)
    with pytest.raises(TeacherError, match=r"has \d+ positions for \d+ trained tokens"):
        probe.check_gold(cache, rows)


def test_rounding_on_the_disk_is_no_fault(tmp_path):
    """Many distributions, sharp and flat: the gold entry and the head's are rounded apart from each other."""
    rows = rows_of([64] * 64, seed=4)
    for sharpness in (0.02, 1.0, 8.0):
        cache = capture(tmp_path / str(sharpness), samples(rows), lambda ids, by=sharpness: logits_of(ids) * by, VOCABULARY)
        probe.check_gold(cache, rows)


# ---- the header


@pytest.fixture
def stories():
    """(recipe, tokenizer, what the header of its cache says)"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)

    def facts(**others):
        teacher = Teacher(str(STORIES), None, weights_digest(STORIES), "float32", None)
        return {"teacher": teacher, "tokenizer": vocabulary_digest(tokenizer), "vocabulary": true_vocabulary(tokenizer), **others}

    return tokenizer, facts


@pytest.fixture
def recipe(tmp_path):
    def recipe(*overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"""
task: distill
model: {{name_or_path: "{STORIES}"}}
teacher: {{name_or_path: "{STORIES}", cache: "{tmp_path / "cache"}"}}
data: {{train: rows.jsonl}}
"""
        )
        return load(str(file), overrides)

    return recipe


@needs_shared
@pytest.mark.parametrize(
    ("overrides", "others", "message"),
    [
        ([], {}, None),
        (["teacher.name_or_path=another/teacher"], {}, r"is of .*stories260K-hf; teacher\.name_or_path = another/teacher"),
        (
            ["teacher.top_p=0.9"],
            {},
            r"was captured with p = 0\.99; the recipe asks for 0\.9; put it back, or let teacher\.cache be another",
        ),
        (["teacher.draws=4"], {}, r"was captured with draws = 0; the recipe asks for 4"),
        ([], {"tokenizer": "f" * 32}, r"tokenizer = f+; the student's is [0-9a-f]{32}: its token ids mean other tokens; give the student"),
        ([], {"vocabulary": 511}, r"vocabulary = 511; the student's is 512"),
        (
            [],
            {"teacher": Teacher(str(STORIES), None, "0" * 32, "float32", None)},
            r"stories260K-hf has other weights than when it was captured; put them back",
        ),
    ],
)
def test_a_cache_of_another_teacher_other_settings_or_other_tokens_is_refused(tmp_path, rows, stories, recipe, overrides, others, message):
    tokenizer, facts = stories
    header = facts(**others)
    cache = capture(tmp_path / "cache", [], logits_of, settings=SETTINGS, **header)
    if message is None:
        probe.check_header(cache, recipe(*overrides), tokenizer)
        return
    with pytest.raises(TeacherError, match=message):
        probe.check_header(cache, recipe(*overrides), tokenizer)


@needs_shared
def test_a_recipes_cache_is_found_and_checked_for_rows_that_are_trained_and_held_out(tmp_path, rows, stories, recipe):
    tokenizer, facts = stories
    held_out = rows_of([8, 12], seed=7)
    wide = facts()

    def logits(ids):
        return torch.nn.functional.pad(logits_of(ids), (0, wide["vocabulary"] - VOCABULARY), value=-20.0)

    prepared = Prepared(rows, held_out, PrepareReport(SplitReport(), SplitReport(), ""), tmp_path)
    capture(tmp_path / "cache", samples(rows), logits, settings=SETTINGS, **wide)
    with pytest.raises(TeacherError, match=r"data\.eval: .* 2 of 2 samples have no targets"):
        probe.find_cache(recipe(), tokenizer, prepared, print)
    said = []
    alone = Prepared(rows, None, prepared.report, tmp_path)
    assert probe.find_cache(recipe(), tokenizer, alone, said.append) == tmp_path / "cache"
    assert said[0].startswith("teacher: ")
    # A capture is compared with its teacher when all of it is there, and only then has a report.
    assert "no fidelity.json" in said[1] and said[1].endswith("`harness capture RECIPE` says which")
    (tmp_path / "cache" / "fidelity.json").write_text("{}")
    probe.find_cache(recipe(), tokenizer, alone, said.append)
    assert len(said) == 3 and said[2] == said[0]
    with pytest.raises(TeacherError, match="`harness capture RECIPE` makes one"):
        probe.find_cache(recipe(f"teacher.cache={tmp_path / 'nothing'}"), tokenizer, alone, said.append)


# ---- a teacher in the student's place


@pytest.mark.parametrize(("kl", "agreement"), [(0.2, 4.0), (0.0, 3.0), (float("nan"), 4.0)])
def test_a_teacher_that_is_not_like_itself_is_refused(kl, agreement):
    def losses(kl, agreement):
        return DivergenceLoss(*(torch.tensor(value) for value in (0.0, 0.0, 0.0, kl, agreement, 4.0)))

    probe.check_same_distribution(losses(1e-5, 4.0), 4)
    with pytest.raises(TeacherError, match="it differs from itself by"):
        probe.check_same_distribution(losses(kl, agreement), 4)
