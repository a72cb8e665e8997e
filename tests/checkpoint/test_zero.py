"""DeepSpeed's shards, written and read by real ranks (zero_ranks.py): nobody is left waiting, nothing in them is run, and nothing drifts.

A cell is a stage, a type and what is trained; every cell has two parameter groups, odd sizes, and at stage 3 several flat tensors.
"""

import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, run_command

from harness.checkpoint.zero import Layout, load_as_data, open_as_data, prepare_loading
from harness.errors import CheckpointError

QUICK = "zero2-fp32-lora"
CELLS = [
    *("zero0-fp32-full", "zero1-fp32-full", "zero2-fp32-full", "zero3-fp32-full", "zero1-fp32-lora", QUICK, "zero3-fp32-lora"),
    *("zero1-bf16-full", "zero2-bf16-lora", "zero3-bf16-full", "zero2-fp16-full", "zero3-fp16-full", "zero2-bf16-robin"),
    "zero3-bf16-offload",
]
# One optimiser step on the same global batch, summed in another order: float32 here differs by 1.2e-7, bf16 gradients by up to 3e-4.
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(scenario, cells...) -> the folder with what they saved and saw; each is run once."""

    @cache
    def run(scenario: str, *cells: str) -> Path:
        folder = tmp_path_factory.mktemp("zero")
        script = Path(__file__).with_name("zero_ranks.py")
        done = run_command(sys.executable, str(script), scenario, str(folder), *cells, timeout_s=1000, PYTHONPATH=str(REPOSITORY))
        assert done.code == 0, done.output[-8000:]
        return folder

    return run


def seen(folder: Path, cell: str, name: str) -> dict:
    return torch.load(folder / f"{cell}, {name}.seen")


def assert_same(one: dict, other: dict) -> None:
    """Masters, moments, counters, settings and scale, bit for bit; and weights that are their masters."""
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensors in one["tensors"].items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, other["tensors"][name], strict=True)), name
    assert {key: one[key] for key in ("steps", "groups", "engine", "scale")} == {
        key: other[key] for key in ("steps", "groups", "engine", "scale")
    }
    assert other["counters_are_apart"]
    assert other["weights_that_are_not_their_masters"] == one["weights_that_are_not_their_masters"]


# ---- saving


def check_failures(folder: Path, cell: str) -> None:
    first, second = (json.loads((folder / f"{cell}, rank {rank}.json").read_text()) for rank in (0, 1))
    shard = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    for rank, (own, other) in enumerate([(first, second), (second, first)]):
        (error,) = own[f"rank {rank} fails at optim_states"]
        assert "No space left on device" in error and shard.format(rank) in error
        assert other[f"rank {rank} fails at optim_states"] == other[f"rank {rank} fails at model_states"] == []
    assert len(first["rank 0 fails at model_states"]) == 1
    # Below stage 3 the weights are written by rank 0 alone.
    assert len(second["rank 1 fails at model_states"]) == ("zero3" in cell)
    assert len(second["the disk of rank 1 is full"]) == 1 and first["the disk of rank 1 is full"] == []
    assert first["all is well"] == second["all is well"] == []
    assert (folder / f"{cell}-well" / "latest").read_text() == "global_step1"


def test_a_rank_whose_disk_is_full_has_the_error_and_no_rank_is_left_waiting(ranks):
    check_failures(ranks("quick", QUICK), QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["zero1-fp32-full", "zero3-fp32-lora"])
def test_a_full_disk_leaves_no_rank_waiting_at_any_stage(ranks, cell):
    check_failures(ranks("failures", "zero1-fp32-full", "zero3-fp32-lora"), cell)


# ---- data, no code


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_shard_with_a_payload_is_refused_by_name_and_the_payload_does_not_run(ranks, tmp_path):
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(ranks("quick", QUICK) / QUICK, checkpoint)
    shard = checkpoint / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(shard, weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = Payload(tmp_path / "was-here")
    torch.save(content, shard)

    engine = SimpleNamespace(checkpoint_engine=TorchCheckpointEngine())
    open_as_data(engine)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt: .*posix\.mkdir.* nothing of it was run"):
        engine.checkpoint_engine.load(str(shard), map_location="cpu")
    assert not (tmp_path / "was-here").exists()
    torch.load(shard, weights_only=False)  # the way in which DeepSpeed opens it
    assert (tmp_path / "was-here").exists()


def test_a_file_that_is_no_shard_is_refused_with_its_name(tmp_path):
    for content in (b"", b"no pickle", b"\x80\x02cposix\nmkdir\n."):
        (tmp_path / "shard.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"shard\.pt"):
            load_as_data(str(tmp_path / "shard.pt"))
    with pytest.raises(CheckpointError, match=r"absent\.pt"):
        load_as_data(str(tmp_path / "absent.pt"))


@pytest.mark.slow
def test_every_class_that_a_shard_may_name_is_named_by_a_real_one(ranks, monkeypatch):
    asked = set()
    allow = torch.serialization.safe_globals
    monkeypatch.setattr(torch.serialization, "safe_globals", lambda known: asked.update(known) or allow(known))
    files = sorted(ranks("every way", *CELLS).glob("zero*/global_step*/*.pt"))
    named = set()
    for file in files:
        named |= set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        load_as_data(str(file))
    assert {f"{known.__module__}.{known.__qualname__}" for known in asked} == named


# ---- another number of ranks


def check_continued(folder: Path, cell: str, ways: list[str]) -> None:
    saved = seen(folder, cell, "uninterrupted")
    for how in ("native", "cut for as many"):
        loaded = seen(folder, cell, how)
        assert_same(saved, loaded)
        assert loaded["losses"] == saved["losses"]
        assert_same(saved["end"], loaded["end"])
    assert (saved["steps"], saved["end"]["steps"]) == ([3.0], [8.0])
    for way in ways:
        assert_same(saved, seen(folder, cell, way))
        losses = seen(folder, cell, f"{way}, trained")["losses"]
        assert losses == pytest.approx(saved["losses"], abs=TOLERANCE[cell.split("-")[1]])


def test_what_two_ranks_saved_is_continued_by_one_with_every_bit_of_it(ranks):
    check_continued(ranks("quick", QUICK), QUICK, ["2 to 1"])


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if "robin" not in cell])
def test_every_stage_is_continued_on_more_and_on_fewer_ranks_with_every_bit_of_it(ranks, cell):
    check_continued(ranks("every way", *CELLS), cell, ["2 to 1", "2 to 4", "1 to 2", "4 to 2"])


@pytest.mark.slow
def test_parameters_that_are_dealt_to_the_ranks_in_turn_are_found_again(ranks):
    folder, cell = ranks("every way", *CELLS), "zero2-bf16-robin"
    # DeepSpeed's own functions look up such parameters where they would lie without the dealing, except on one rank, where it is the same.
    check_continued(folder, cell, ["1 to 2", "4 to 2"])
    assert seen(folder, cell, "2 to 1")["weights_that_are_not_their_masters"] == []
    for way in ("2 to 1", "2 to 4"):
        losses = seen(folder, cell, f"{way}, trained")["losses"]
        assert losses == pytest.approx(seen(folder, cell, "uninterrupted")["losses"], abs=TOLERANCE["bf16"])


def check_refusals(folder: Path, cell: str) -> None:
    said = json.loads((folder / f"{cell}, refusals.json").read_text())
    assert "norm.bias has no trained elements there and 53 in this run" in said["other parameters"]
    assert "zero_pp_rank_2_mp_rank_00_optim_states.pt: cannot be read" in said["a shard is missing"]
    assert "`absmax` belongs to a rank's part as a whole" in said["moments of a whole part"]
    # Stages 1 and 2 keep frozen weights whole.
    assert ("holds frozen weights in parts for 2 ranks; continue on 2 ranks" in said["frozen weights"]) == ("zero3" in cell)


def test_what_cannot_be_cut_is_refused_and_never_guessed(ranks):
    check_refusals(ranks("quick", QUICK), QUICK)


@pytest.mark.slow
def test_what_cannot_be_cut_is_refused_at_stage_3_too(ranks):
    check_refusals(ranks("failures", "zero1-fp32-full", "zero3-fp32-lora"), "zero3-fp32-lora")


@pytest.mark.parametrize(("setting", "said"), [("zero_nvme_offload_optimizer", "NVMe"), ("zero_elastic_checkpoint", "elastic_checkpoint")])
def test_state_that_only_its_own_ranks_can_read_is_refused_on_others_and_loaded_on_them(setting, said):
    switches = {name: lambda name=name: name == setting for name in ("zero_nvme_offload_optimizer", "zero_elastic_checkpoint")}
    engine = SimpleNamespace(checkpoint_engine=SimpleNamespace(), zero_optimization=lambda: True, **switches)
    manifest = {"world_size": 2}
    prepare_loading(engine, Path("checkpoint-3"), manifest, 2)
    with pytest.raises(CheckpointError, match=rf"checkpoint-3: .*{said}.* continue on 2 ranks"):
        prepare_loading(engine, Path("checkpoint-3"), manifest, 4)


# ---- layouts, against tensors that are really laid out so

FLATS = [{"a": 7, "b": 1, "c": 12}, {"d": 5}]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_stages_1_and_2_lay_parameters_in_line_and_cut_the_line(ranks):
    gaps, lines = [[1, 3, 0], [0]], []
    for parameters, after in zip(FLATS, gaps, strict=True):
        line = [piece for (name, n), gap in zip(parameters.items(), after, strict=True) for piece in [*elements(name, n), *[None] * gap]]
        lines.append(line + [None] * (-len(line) % ranks))
    parts = [[line[rank * len(line) // ranks : (rank + 1) * len(line) // ranks] for line in lines] for rank in range(ranks)]
    check_layout(Layout.in_line(FLATS, [len(line) // ranks for line in lines], gaps), parts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_stage_3_cuts_each_parameter_and_lays_the_parts_side_by_side(ranks):
    parts = [[[] for _ in FLATS] for _ in range(ranks)]
    for flat, parameters in enumerate(FLATS):
        for name, n in parameters.items():
            padded = elements(name, n) + [None] * (-n % ranks)
            for rank in range(ranks):
                parts[rank][flat] += padded[rank * len(padded) // ranks : (rank + 1) * len(padded) // ranks]
    layout = Layout.side_by_side(FLATS, ranks)
    assert layout.part_sizes == [len(part) for part in parts[0]]
    check_layout(layout, parts)


def elements(name: str, n: int) -> list[str]:
    return [f"{name}{number}" for number in range(n)]


def check_layout(layout: Layout, parts: list) -> None:
    """parts: of each rank and flat tensor the elements in their places, None where there is none."""
    for parameters in FLATS:
        for name, n in parameters.items():
            found = [
                (piece.start + number, parts[piece.rank][piece.flat][piece.offset + number])
                for piece in layout.pieces[name]
                for number in range(piece.stop - piece.start)
            ]
            assert found == list(enumerate(elements(name, n)))
