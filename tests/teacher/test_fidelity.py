"""What a cache lost: each number of the report against float64 and loops, on a teacher that is a table; and what a capture will cost."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.errors import TeacherError
from harness.teacher.fidelity import FIDELITY_FILE, measure_fidelity, render_fidelity, save_fidelity
from harness.teacher.forecast import Done, Forecast, clock, most_bytes, render_progress
from harness.teacher.format import CacheHeader, Plan, Settings, Targets, Teacher
from harness.teacher.reader import open_cache
from harness.teacher.samples import Sample
from harness.teacher.writer import UnitWriter, save_header

VOCABULARY, LENGTH = 50, 21


class Table:
    """A teacher whose logits [T, V + padding] depend on the first id of a row alone."""

    device, rounding_nats = torch.device("cpu"), 1e-3

    def __init__(self, seed: int = 0, scale: float = 2.0):
        self._generator, self._scale, self._rows = torch.Generator().manual_seed(seed), scale, {}

    def logits(self, ids):
        first = int(ids[0, 0])
        if first not in self._rows:
            self._rows[first] = torch.randn(1, ids.shape[1], VOCABULARY + 6, generator=self._generator) * self._scale
        return self._rows[first]


def capture(folder, teacher: Table, settings: Settings, samples: int = 3):
    """(cache, samples): written from the table in float64."""
    rng, written = np.random.default_rng(1), []
    header = CacheHeader(Teacher("table", None, "0", "float32", None), "0", VOCABULARY, settings, Plan(1, samples, "0"))
    save_header(folder, header)
    with UnitWriter(folder, header, 0) as unit:
        for number in range(samples):
            ids = rng.integers(0, VOCABULARY, LENGTH)
            ids[0] = number
            sample = Sample(bytes([number]) * 16, ids, np.sort(rng.choice(np.arange(1, LENGTH), 9, replace=False)))
            logs = teacher.logits(torch.from_numpy(ids)[None])[0, sample.trained_at - 1, :VOCABULARY].double().log_softmax(-1).numpy()
            order = np.argsort(-logs, axis=1)
            ranked = np.take_along_axis(logs, order, 1)
            counts = np.clip((np.exp(ranked).cumsum(1) < settings.p).sum(1) + 1, settings.floor, min(settings.cap, VOCABULARY))
            is_kept = np.arange(VOCABULARY) < counts[:, None]
            draws = np.array(
                [rng.choice(row[count:], settings.draws) if settings.draws else [] for row, count in zip(order, counts, strict=True)]
            )
            with np.errstate(divide="ignore"):
                tail = np.log(np.where(is_kept, 0, np.exp(ranked)).sum(1))
            unit.add(
                sample.key,
                Targets(
                    counts.astype("u1"),
                    np.where(is_kept, order, 0).astype(np.int32),
                    np.where(is_kept, ranked, -np.inf).astype(np.float32),
                    tail.astype(np.float32),
                    -(np.exp(logs) * logs).sum(1).astype(np.float32),
                    logs[np.arange(9), ids[sample.trained_at]].astype(np.float32),
                    draws.reshape(9, settings.draws).astype(np.int32),
                ),
            )
            written.append(sample)
        unit.commit()
    return open_cache(folder), SimpleNamespace(batches=lambda unit: [written])


def by_loops(teacher: Table, cache, samples) -> dict:
    """The same numbers, token by token in float64."""
    sums: dict[str, float] = {}
    positions = 0
    for sample in samples.batches(0)[0]:
        stored = cache.read(sample.key)
        logits = teacher.logits(torch.from_numpy(sample.input_ids)[None])[0, sample.trained_at - 1, :VOCABULARY]
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        for t, (row, shaken) in enumerate(zip(logits.double(), (logits + noise).double(), strict=True)):
            p, q, count = row.softmax(-1).numpy(), shaken.softmax(-1).numpy(), int(stored.counts[t])
            kept, gold = stored.ids[t, :count], sample.input_ids[sample.trained_at[t]]
            decoded = dict(zip(kept.tolist(), np.exp(stored.logprobs[t, :count].astype(np.float64)).tolist(), strict=True))
            rest = [token for token in range(VOCABULARY) if token not in decoded]
            tail, tail_stored = sum(p[token] for token in rest), float(np.exp(np.float64(stored.log_tail[t])))
            head = sum(p[token] * np.log(p[token] / decoded[token]) for token in decoded)
            ghost = {token: tail_stored * q[token] / sum(q[other] for other in rest) for token in rest}
            drawn = {token: tail_stored * np.mean(stored.draws[t] == token) for token in rest} if stored.draws.shape[1] else {}
            found = {
                "entries": count,
                "retained_mass": 1 - tail,
                "kl": head + (tail * np.log(tail / tail_stored) if rest else 0),
                "kl_flat_tail": head + sum(p[token] * np.log(p[token] / (tail_stored / len(rest))) for token in rest),
                "gold_nll": -np.log(p[gold]),
                "gold_error": abs(np.log(p[gold]) - stored.gold[t]),
                "entropy": -(p * np.log(p)).sum(),
                "gradient": ((q - p) ** 2).sum(),
                "ghost": sum(((decoded | ghost)[token] - p[token]) ** 2 for token in range(VOCABULARY)),
                "draws": sum(((decoded | drawn)[token] - p[token]) ** 2 for token in range(VOCABULARY)) if drawn else 0,
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            positions += 1
    means = {name: value / positions for name, value in sums.items()}
    return means | {kind: means[kind] / means["gradient"] for kind in ("ghost", "draws")}


@pytest.mark.parametrize(
    "settings", [Settings(0.9, 2, 12, 5, 0), Settings(0.9, 2, 12, 0, 0), Settings(1.0, 1, 255, 0, 0)], ids=["draws", "ghost", "all"]
)
def test_every_number_of_the_report_is_what_loops_in_float64_say(tmp_path, settings):
    teacher = Table()
    cache, samples = capture(tmp_path, teacher, settings)
    found, expected = measure_fidelity(teacher, samples, cache), by_loops(teacher, cache, samples)
    for name in ("entries", "retained_mass", "gold_nll", "entropy"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-5), name
    for name in ("kl", "kl_flat_tail", "gold_error"):
        assert getattr(found, name) == pytest.approx(expected[name], abs=2e-6), name
    assert found.gradient_error == pytest.approx(
        {kind: expected[kind] for kind in ("ghost", "draws") if kind == "ghost" or settings.draws}, rel=1e-3, abs=1e-8
    )
    assert found.positions == 27
    assert found.bytes_per_token == cache.bytes / 27
    if settings.cap == 255:
        assert (found.entries, found.retained_mass) == (VOCABULARY, pytest.approx(1, abs=1e-6))
        assert found.gradient_error["ghost"] < 1e-6
    else:
        assert found.kl_flat_tail > found.kl + 1e-3


def test_only_as_many_tokens_are_asked_for_again_as_a_mean_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.teacher.fidelity.POSITIONS", 10)
    teacher = Table()
    cache, samples = capture(tmp_path, teacher, Settings(0.9, 2, 12, 0, 0))
    assert measure_fidelity(teacher, samples, cache).positions == 18


def test_a_cache_that_is_not_this_teachers_is_refused(tmp_path):
    cache, samples = capture(tmp_path, Table(seed=0), Settings(0.9, 2, 12, 0, 0))
    with pytest.raises(TeacherError, match="nats away from what the teacher says now, more than rounding .* remove it and capture again"):
        measure_fidelity(Table(seed=1), samples, cache)


def test_targets_that_are_off_by_one_position_are_refused(tmp_path):
    teacher = Table()
    cache, samples = capture(tmp_path, teacher, Settings(0.9, 2, 12, 0, 0))
    off = [
        Sample(sample.key, sample.input_ids, sample.trained_at - 1)
        for sample in itertools.chain(*samples.batches(0))
        if sample.trained_at[0] > 1
    ]
    with pytest.raises(TeacherError, match="nats away"):
        measure_fidelity(teacher, SimpleNamespace(batches=lambda unit: [off]), cache)


def test_the_report_is_kept_beside_the_cache_and_can_be_read_aloud(tmp_path):
    teacher = Table()
    cache, samples = capture(tmp_path, teacher, Settings(0.9, 2, 12, 5, 0))
    fidelity = measure_fidelity(teacher, samples, cache)
    save_fidelity(tmp_path, fidelity)
    kept = json.loads((tmp_path / FIDELITY_FILE).read_text())
    assert kept["gradient_error"].keys() == {"ghost", "draws"}
    assert kept["positions"] == 27
    text = render_fidelity(fidelity)
    for part in (
        f"{fidelity.bytes_per_token:.1f} bytes per trained token",
        f"{fidelity.retained_mass:.4%} of the mass",
        "(ghost), ",
        "(draws)",
    ):
        assert part in text


# ---- the forecast


def test_a_forecast_by_hand():
    """A first unit of 1,000 tokens, 400 of them trained, of 10,000: 50 s, of which the teacher took 40, and 24,000 bytes."""
    first = Done(tokens=1000, positions=400, bytes=24_000, asking_s=40.0, took_s=50.0)
    forecast = Forecast.of(first, 10_000)
    assert (forecast.disk_bytes, forecast.capture_s, forecast.teacher_s) == (240_000, 500.0, 400.0)
    assert forecast.pays_after_epochs == 1.25
    lines = forecast.render(first, 3.0).splitlines()
    assert "20 tokens/s, 60.0 bytes per trained token; in all 0:08:20 of one such worker and 0.2 MiB on the disk" in lines[0]
    assert (
        "a resident teacher takes 0:06:40 in every epoch of every student, the cache 0:08:20 once: it has paid after 1.25 epochs"
        in lines[1]
    )
    assert lines[2] == "for this recipe's 3 epochs it saves 0:11:40, and it saves 0:20:00 with each further student"
    assert forecast.render(first, 1.0).splitlines()[2].startswith("for this recipe's 1 epoch it costs 0:01:40 more than it saves")
    assert len(forecast.render(first, None).splitlines()) == 2


def test_ranks_that_work_together_add_up_and_take_as_long_as_the_slowest():
    assert Done.together([Done(10, 4, 100, 1.0, 2.0), Done(20, 6, 200, 3.0, 3.5), Done()]) == Done(30, 10, 300, 3.0, 3.5)


def test_no_cache_is_larger_than_was_said(tmp_path):
    """All entries up to the cap, at an odd number of bits."""
    settings, positions = Settings(1.0, 7, 7, 3, 0), 11
    header = CacheHeader(Teacher("t", None, "0", "f", None), "0", 500, settings, Plan(1, 1, "0"))
    save_header(tmp_path, header)
    logs = np.full((positions, 7), np.log(0.1), np.float32)
    columns = np.full((3, positions), np.log(0.3), np.float32)
    ids, draws = np.tile(np.arange(7, dtype=np.int32), (positions, 1)), np.full((positions, 3), 400, np.int32)
    with UnitWriter(tmp_path, header, 0) as unit:
        unit.add(b"k" * 16, Targets(np.full(positions, 7, "u1"), ids, logs, columns[0], -columns[1], columns[2], draws))
        size = unit.commit().stat().st_size
    empty = tmp_path / "empty"
    save_header(empty, header)
    with UnitWriter(empty, header, 0) as unit:
        of_nothing = unit.commit().stat().st_size
    most = most_bytes(1, positions, settings, header.id_bits)
    assert most - 2 * header.id_bits <= size - of_nothing <= most


def test_progress_is_a_line_for_people():
    done = Done(2000, 500, 10, 1.0, 4.0)
    assert render_progress([3], done, 10, 6, 20.0) == "unit 3: 2,000 tokens in 4.0 s (500 tokens/s); 4 of 10 units, about 0:02:00 left"
    assert render_progress([3, 4], done, 10, 0, 20.0) == "units 3, 4: 2,000 tokens in 4.0 s (500 tokens/s); 10 of 10 units, all are there"
    assert [clock(seconds) for seconds in (0.04, 59.94, 60, 86_400 + 61)] == ["0.0 s", "59.9 s", "0:01:00", "24:01:01"]
