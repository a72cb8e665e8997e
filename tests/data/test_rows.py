"""Rows that lie in a file, and what memory holds of them."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from chat_tokenizer import chat_tokenizer

from harness.data import prepare as module
from harness.data.audit import File, audit, plan_actions
from harness.data.convert import convert
from harness.data.prepare import prepare
from harness.data.rows import Picked, Places, Rows, SourceRow, content_digests, data_fingerprint
from harness.data.samples import row_digest, source_digest
from harness.data.sources import load_rows, mix
from harness.errors import DataError
from harness.recipe.schema import Source

ROWS = [
    SourceRow("a.jsonl:1", {"text": "naïve 🙂"}),
    SourceRow("a.jsonl:2", {"messages": [{"role": "user", "content": "x\ny"}], "train_from": 1}),
    SourceRow("b \udcff.json:row 7", {"text": "\ud800", "n": [1.5, None, True, 10**30]}),
]


def test_rows_come_back_as_they_were_in_any_order_and_are_said_to_be_the_same():
    rows = Rows(ROWS)
    assert list(rows) == ROWS and rows[-1] == ROWS[2] and rows[1:] == ROWS[1:] and rows[::-1] == ROWS[::-1] and len(rows) == 3
    assert [list(row.row) for row in rows] == [list(row.row) for row in ROWS]  # the order of keys is written into tokens
    assert data_fingerprint(rows) == data_fingerprint(ROWS) and (content_digests(rows) == content_digests(ROWS)).all()
    assert [source_digest(row) for row in rows] == [row_digest(row.row) for row in ROWS]
    rows.append(ROWS[0])
    assert rows[3] == ROWS[0] and rows[2] == ROWS[2]
    with pytest.raises(IndexError):
        rows[4]


def test_picked_rows_are_those_of_their_places():
    first, second = Rows(ROWS), ROWS[:1]
    assert list(Picked([first, [], second])) == [*ROWS, ROWS[0]]
    picked = Picked([first, second], [3, 0, 0, 2])
    assert list(picked) == [ROWS[0], ROWS[0], ROWS[0], ROWS[2]] == picked[:] and picked[1:3] == [ROWS[0]] * 2 and picked[-1] == ROWS[2]
    assert not Picked([]) and len(Picked([first] * 3)) == 9


def test_places_take_memory_only_where_numbers_do_not_follow_each_other():
    wanted = [
        *(f"a:{n}" for n in range(1, 500)),
        *(f"a:{n}" for n in range(502, 900)),
        *(f"b.json:row {n}" for n in range(300)),
        "a:1",
        "a:1",
    ]
    places = Places()
    for location in wanted:
        places.append(location)
    assert [places[n] for n in range(len(wanted))] == wanted and len(places._runs) == 5


def test_a_full_disk_is_an_error_that_says_which(monkeypatch):
    rows = Rows(ROWS)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rows._file, "flush", full)
    with pytest.raises(DataError, match="No space left.*set TMPDIR"):
        rows[0]


def test_a_killed_process_leaves_no_rows_behind(tmp_path):
    code = "import os\nfrom harness.data.rows import *\nrows = Rows([SourceRow('a:1', {'text': 'x' * 100000})])\n"
    code += "assert rows[0]\nos.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=Path(__file__).parents[2])
    assert done.returncode == -9 and not list(tmp_path.iterdir())


# ---- memory


def write_rows(path, count):
    """Of about 3 kB, no two alike."""
    with open(path, "w") as file:
        for n in range(count):
            turns = [{"role": "user", "content": f"question {n} about {'x' * 3000}"}, {"role": "assistant", "content": f"answer {n}"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def convert_them(path, tmp_path):
    convert(str(path), "messages", tmp_path / "out.jsonl", force=True)


def audit_them(path, tmp_path):
    assert audit([File(str(path))], plan_actions([])).rows


def prepare_them(path, tmp_path):
    mixture = mix([Source(path=str(path))], [load_rows(Source(path=str(path)), num_proc=1)], seed=1, eval_fraction=0.1)
    tokenizer = chat_tokenizer("{% for m in messages %}{% generation %}{{ m.content[:40] + eos_token }}{% endgeneration %}{% endfor %}")
    prepare(mixture.train, tokenizer, eval=mixture.held_out, cache_dir=tmp_path / path.stem, max_length=2000, packing=True, num_proc=1)


@pytest.mark.parametrize(("stage", "most_bytes"), [(convert_them, 20), (audit_them, 200), (prepare_them, 250)])
def test_memory_grows_by_some_bytes_a_row_and_not_by_the_rows(tmp_path, monkeypatch, stage, most_bytes):
    monkeypatch.setattr("harness.data.spans.usable_cores", lambda: 1)
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 20)
    monkeypatch.setattr("harness.data.reading.ROWS_PER_SPAN", 20)
    monkeypatch.setattr("harness.data.repeats._AT_ONCE", 20)
    monkeypatch.setattr("harness.data.encode.KEPT_TOKENS", 1000)
    monkeypatch.setattr("harness.data.packing.PACKS_PER_BATCH", 4)
    peaks = {}
    stage(write_rows(tmp_path / "warm.jsonl", 50), tmp_path)
    for count in (100, 600):
        path = write_rows(tmp_path / f"rows-{count}.jsonl", count)
        tracemalloc.start()
        stage(path, tmp_path)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[600] - peaks[100]) / 500 < most_bytes, (peaks, (peaks[600] - peaks[100]) / 500)
