"""Training that asks a server about each batch: it learns what it would learn from the cache of that server, rank by rank."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import MICRO_TEMPLATE, STORIES, XLAM, harness, needs_shared
from test_distill import build, logged, plain_losses, quarter, rows_of, stories  # noqa: F401 (build is a fixture)
from transformers import AutoTokenizer

from harness.data.packing import pack
from harness.errors import TeacherError
from harness.teacher import client as client_module
from harness.teacher.client import Client
from harness.teacher.format import CacheHeader, Plan, Settings, Teacher, sample_key
from harness.teacher.reader import open_cache
from harness.teacher.samples import Sample
from harness.teacher.served import ServedTeacher
from harness.teacher.writer import UnitWriter, save_header

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "teacher"))
from server import TeacherServer  # noqa: E402

pytestmark = needs_shared

SETTINGS = Settings(p=1.0, floor=8, cap=255, draws=0, seed=0)
QUIET = ("train.eval_steps=null", "data.eval=[]")


@pytest.fixture
def server():
    with TeacherServer(stories(), AutoTokenizer.from_pretrained(STORIES)) as server:
        yield server


def teacher_at(server, timeout_s=20.0) -> ServedTeacher:
    return ServedTeacher(Client(server.url, None, timeout_s), server.name, "prompt_logprobs", SETTINGS, 512, 4)


def recorded(teacher: ServedTeacher, rows, folder: Path):
    """What the server says of the rows, as a cache."""
    samples = {sample_key(row["input_ids"], row["labels"]): row for row in rows.with_format("numpy")}
    header = CacheHeader(Teacher("t", None, "t", None, None, "served"), "0", 512, SETTINGS, Plan(1, len(samples), "0"))
    save_header(folder, header)
    with UnitWriter(folder, header, 0) as writer:
        for key, row in samples.items():
            writer.add(key, teacher.ask(Sample.of(row["input_ids"], row["labels"])))
        writer.commit()
    return open_cache(folder)


@pytest.mark.parametrize("flattens", [False, True], ids=["padded", "packed"])
def test_training_from_a_server_is_training_from_its_cache_within_the_rounding_of_the_cache(build, server, tmp_path, flattens):  # noqa: F811
    rows = rows_of([9, 40, 5, 33, 12, 21, 60, 8])
    teacher, curves = teacher_at(server), []
    cache = recorded(teacher, rows, tmp_path / "cache")
    given = pack(rows, capacity=64, seed=1) if flattens else rows
    for source in (teacher, cache):
        # All rows in each step.
        trainer = build(
            quarter(),
            source,
            given,
            None,
            *QUIET,
            "train.max_steps=5",
            f"train.per_device_train_batch_size={len(given)}",
            flattens=flattens,
        )
        trainer.train()
        curves.append([logged(trainer, key) for key in ("loss", "distill/kl", "distill/top1_agreement", "distill/overlap")])
    by_server, by_cache = map(torch.tensor, curves)
    assert (by_server - by_cache).abs().max() < 2e-4
    assert by_server[0, 0] - by_server[0, -1] > 0.05


def test_what_is_logged_is_the_divergence_from_the_served_model(build, server):  # noqa: F811
    rows = rows_of([9, 40, 5, 33])
    trainer = build(quarter(), teacher_at(server), rows, None, *QUIET, "train.max_steps=1", "train.dataloader_num_workers=1")
    divergence, nll = plain_losses(quarter(), stories(), rows)
    trainer.train()
    assert logged(trainer, "distill/kl")[0] == pytest.approx(divergence, rel=5e-3)
    assert logged(trainer, "distill/cross_entropy")[0] == pytest.approx(nll, rel=1e-5)


def test_a_server_that_is_gone_ends_training_with_its_name(build, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(client_module, "DELAYS_S", (0.01,) * 6)
    server.dies_after = 4
    trainer = build(quarter(), teacher_at(server), rows_of([9, 40, 5, 33]), None, *QUIET, "train.max_steps=3")
    with pytest.raises(TeacherError, match=r"/completions: cannot be reached"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.slow
def test_the_command_trains_on_two_ranks_each_of_which_asks_for_its_own_rows(server, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"""
task: distill
model: {{name_or_path: "{STORIES}"}}
data: {{train: [{{path: "{XLAM}", max_rows: 24}}], eval_rows: 4, max_length: 512, chat_template: "{MICRO_TEMPLATE}"}}
teacher: {{name_or_path: "{STORIES}", source: served, server: {{url: "{server.url}", model: teacher, concurrency: 2}}}}
distill: {{weight: 1}}
train: {{per_device_train_batch_size: 2, max_steps: 2, logging_steps: 1, eval_steps: 2, learning_rate: 1e-6, dataloader_num_workers: 1}}
tracking: {{mode: disabled}}
output_dir: "{tmp_path / "run"}"
"""
    )
    done = harness("run", tmp_path / "recipe.yaml", "--backend", "ddp", "--processes", "2", timeout_s=400)
    assert done.code == 0, done.output
    assert done.output.count("scores given tokens (prompt_logprobs, 64 entries each)") == 1
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    # The student is the teacher: nothing is to be learnt.
    values = [float(part.split(",")[0].rstrip("}\n")) for part in metrics.split('"distill/kl": ')[1:]]
    assert values and all(abs(value) < 1e-3 for value in values)
    # The probe; a row each of 2 steps of 2 ranks of 2, those that the loaders fetch beforehand, and the held-out ones.
    asked = [tuple(question["prompt"]) for question in server.questions[1:]]
    assert len(set(asked)) >= 12
