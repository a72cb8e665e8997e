import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.data.reading import read_raw
from harness.data.rows import SourceRow, content_digest, data_fingerprint
from harness.data.sources import LoadedRows, load_rows, mix, split_held_out
from harness.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data is not at hand ({SHARED})")


@dataclass
class Source:
    path: str
    format: str = "auto"
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    max_rows: int | None = None


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def texts(*values):
    return [json.dumps({"text": value}) for value in values]


# ---- reading


def test_every_kind_of_file_gives_the_same_rows_and_says_where_they_are(tmp_path):
    rows = [{"text": "a"}, {"text": "é\u2028"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.json").write_text(lines, encoding="utf-8-sig")  # JSON Lines all the same, as APIBench has it
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    for name in ("a.jsonl", "b.json", "d.jsonl.gz"):
        assert list(read_raw(tmp_path / name)) == [(f"{tmp_path / name}:1", rows[0]), (f"{tmp_path / name}:2", rows[1])]
    for name in ("c.json", "e.json.gz", "f.parquet"):
        assert list(read_raw(tmp_path / name)) == [(f"{tmp_path / name}:row 0", rows[0]), (f"{tmp_path / name}:row 1", rows[1])]


def test_a_folder_and_a_pattern_read_their_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", *texts("b"))
    write(tmp_path / "a.jsonl", *texts("a"))
    write(tmp_path / "README.md", "not data")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.jsonl", *texts("c"))
    assert [row["text"] for _, row in read_raw(tmp_path)] == ["a", "b"]
    assert [row["text"] for _, row in read_raw("**/*.jsonl", base_dir=tmp_path)] == ["a", "b", "c"]
    assert [row["text"] for _, row in read_raw("a.jsonl", base_dir=tmp_path)] == ["a"]


def test_parquet_structs_do_not_invent_null_arguments(tmp_path):
    """pitfall 1 of research/tool-calling.md: one row has `city`, the other `host`, and a struct column gives both to each."""
    calls = [{"name": "f", "arguments": {"city": "Paris"}}, {"name": "g", "arguments": {"host": "x", "opts": [{"a": 1}, {"b": 2}]}}]
    table = pa.Table.from_pylist([{"query": "q", "tools": '[{"name": "f"}, {"name": "g"}]', "answers": [call]} for call in calls])
    assert table.to_pylist()[0]["answers"][0]["arguments"]["host"] is None  # it does happen
    pq.write_table(table, tmp_path / "x.parquet")
    assert [row["answers"] for _, row in read_raw(tmp_path / "x.parquet")] == [[call] for call in calls]


def test_parquet_json_columns_keep_the_nulls_that_were_written(tmp_path):
    from datasets import Dataset, Features, Json, List

    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "extra": {"x": None}}]
    Dataset.from_list([{"messages": messages}], features=Features({"messages": List(Json())})).to_parquet(tmp_path / "x.parquet")
    assert [row for _, row in read_raw(tmp_path / "x.parquet")] == [{"messages": messages}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": oops}\n', r"x.jsonl:2: column 10: not JSON"),
        ('{"text": "a"}\n\n[1]\n', r"x.jsonl:3: the row is \[1\]; must be an object"),
        ('{"text": NaN}\n', "NaN is not a JSON value"),
        ('{\n"text": "a"\n}', r"x.jsonl:1: column 2: not JSON .*one object per line"),
        ('[{"text": "a"},\n {"text" "b"}]', r"x.jsonl:2:10: not JSON .*array of rows"),
        ('[{"text": "a"}, 3]', "x.jsonl:row 1: the row is 3"),
    ],
)
def test_bad_json_is_named_by_file_line_and_column(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_raw(tmp_path / "x.jsonl"))


def test_bytes_that_are_not_utf8_or_not_gzip_are_data_errors(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="x.jsonl:2: not JSON .*utf-8"):
        list(read_raw(tmp_path / "x.jsonl"))
    whole = gzip.compress("\n".join(texts(*map(str, range(1000)))).encode())
    for damaged in (whole[:-40], b"oops", whole[:60] + b"\0\0\0\0" + whole[64:]):
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="x.jsonl.gz"):
            list(read_raw(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.parquet").write_bytes(b"oops")
    with pytest.raises(DataError, match="not readable as Parquet"):
        list(read_raw(tmp_path / "x.parquet"))


def test_a_path_that_is_not_there_suggests_what_is(tmp_path):
    write(tmp_path / "train.jsonl", *texts("a"))
    write(tmp_path / "notes.txt", "x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        ("trian.jsonl", 'trian.jsonl: no such file under .*did you mean "train.jsonl"'),
        (str(tmp_path / "train"), "no such file"),
        ("empty/train", "no such file"),
        ("notes.txt", "notes.txt: cannot read this kind of file; must be .jsonl"),
        ("empty", "the folder holds no .jsonl"),
        ("*.parquet", "the pattern matches no data file"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_raw(path, base_dir=tmp_path))
    with pytest.raises(DataError, match="name = 'main' selects a configuration of a hub data set"):
        list(read_raw("train.jsonl", name="main", base_dir=tmp_path))


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Salesforce/xlam:train: is no local file or folder, and the Hugging Face hub did not give"):
        list(read_raw("Salesforce/xlam", base_dir=tmp_path))


def test_a_hub_data_set_is_read_like_parquet(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        features = datasets.Features({"a": {"x": datasets.Value("int64"), "y": datasets.Value("int64")}})
        return datasets.Dataset.from_list([{"a": {"x": 1}}, {"a": {"y": 2}}], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_raw("org/set", name="main", split="test", base_dir=tmp_path))
    assert rows == [("org/set:test:row 0", {"a": {"x": 1}}), ("org/set:test:row 1", {"a": {"y": 2}})]
    assert asked == [("org/set", "main", "test")]


# ---- loading

GOOD = [
    '{"text": "a"}',
    '{"prompt": "p", "completion": "c"}',
    '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}',
]


def test_a_bad_row_stops_the_run_and_says_whether_it_is_alone(tmp_path):
    path = write(tmp_path / "x.jsonl", *GOOD, '{"txt": "b"}', *GOOD)
    with pytest.raises(DataError) as one:
        load_rows(Source(path))
    assert str(one.value).startswith(f"{path}:4: the row's keys are txt")
    assert "bad too" not in str(one.value)
    path = write(tmp_path / "x.jsonl", *GOOD, '{"txt": "b"}', *GOOD, "{", '{"text": ""}')
    with pytest.raises(DataError, match="x.jsonl:4: .*\n2 of the next 5 rows are bad too; `data.on_error: skip`"):
        load_rows(Source(path))


def test_skipping_lists_every_bad_row_and_keeps_every_other(tmp_path):
    path = write(tmp_path / "x.jsonl", *GOOD, "{", '{"text": ""}', *GOOD)
    loaded = load_rows(Source(path), on_error="skip")
    assert [row.location.rpartition(":")[2] for row in loaded.rows] == ["1", "2", "3", "6", "7", "8"]
    assert [bad.location for bad in loaded.skipped] == [f"{path}:4", f"{path}:5"]
    assert [bad.reason.partition(" ")[0] for bad in loaded.skipped] == ["column", "text"]
    assert loaded.counts["read"] == loaded.counts["kept"] + loaded.counts["skipped"] == 8
    assert {key: n for key, n in loaded.counts.items() if key.startswith("layout/")} == {
        "layout/text": 2,
        "layout/prompt_completion": 2,
        "layout/messages": 2,
    }


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no row is left of 2; the first: .*x.jsonl:1: column 2"):
        load_rows(Source(write(tmp_path / "x.jsonl", "{", "{")), on_error="skip")
    with pytest.raises(DataError, match="no row is left of 0"):
        load_rows(Source(write(tmp_path / "x.jsonl", "")))


def test_a_row_that_is_nested_too_deeply_is_a_bad_row(tmp_path):
    def deep(levels):
        tool = '{"name": "f", "parameters": {"type": "object", "items": ' + '{"items": ' * levels + "{}" + "}" * levels + "}}"
        return '{"messages": [{"role": "assistant", "content": "a"}], "tools": [' + tool + "]}"

    # Where exactly it becomes too deep is Python's business; that nothing crashes on the way there is ours.
    rows = [deep(levels) for levels in (*range(50, 1000, 10), 100_000)]
    loaded = load_rows(Source(write(tmp_path / "x.jsonl", *rows)), on_error="skip")
    assert loaded.rows and loaded.skipped and len(loaded.rows) + len(loaded.skipped) == len(rows)
    assert all("nested too deeply" in bad.reason for bad in loaded.skipped)
    data_fingerprint(loaded.rows)


def test_broken_calls_are_counted_and_kept(tmp_path):
    tools = [{"name": "f", "parameters": {"a": {"type": "int"}}}]
    row = {"query": "q", "tools": tools, "answers": [{"name": "f", "arguments": {"a": "1"}}]}
    loaded = load_rows(Source(write(tmp_path / "x.jsonl", json.dumps(row))))
    assert {key: loaded.counts[key] for key in ("kept", "trained_calls", "broken_calls", "broken/wrong_type")} == {
        "kept": 1,
        "trained_calls": 1,
        "broken_calls": 1,
        "broken/wrong_type": 1,
    }


# ---- mixing


def rows_of(*values):
    return [SourceRow(f"x:{i}", {"text": value}) for i, value in enumerate(values, 1)]


def said(rows):
    return [row.row["text"] for row in rows]


HUNDRED = rows_of(*(str(i) for i in range(100)))


def test_the_held_out_split_depends_on_content_and_seed_and_not_on_order():
    train, out = split_held_out(HUNDRED, fraction=0.2, seed=1)
    assert (len(train), len(out)) == (80, 20)
    assert sorted(said(train) + said(out)) == sorted(said(HUNDRED))
    shuffled = random.Random(0).sample(HUNDRED, 100)
    assert set(said(split_held_out(shuffled, fraction=0.2, seed=1)[1])) == set(said(out))
    assert set(said(split_held_out(HUNDRED, count=20, seed=1)[1])) == set(said(out))
    assert set(said(split_held_out(HUNDRED, fraction=0.2, seed=2)[1])) != set(said(out))
    assert said(train) == [text for text in said(HUNDRED) if text in set(said(train))]  # the order of the rest is kept


def test_equal_rows_are_never_on_both_sides():
    for seed in range(20):
        train, out = split_held_out(rows_of(*"aaabbbcccdddeee"), count=2, seed=seed)
        assert not set(said(train)) & set(said(out))
        assert len(out) == 3  # the copies of one row


def test_key_order_does_not_hide_a_duplicate_but_changes_the_fingerprint():
    one, two = {"messages": [{"role": "user", "content": "x"}]}, {"messages": [{"content": "x", "role": "user"}]}
    assert content_digest(one) == content_digest(two)
    assert data_fingerprint([SourceRow("a:1", one)]) != data_fingerprint([SourceRow("a:1", two)])
    assert data_fingerprint([SourceRow("a:1", one)]) == data_fingerprint([SourceRow("b:9", one)])
    assert data_fingerprint(rows_of("a", "b")) != data_fingerprint(rows_of("b", "a"))
    assert len(data_fingerprint(rows_of("\ud800"))) == 32


def test_a_split_that_leaves_nothing_to_train_is_refused():
    with pytest.raises(DataError, match="takes 2 of 2 rows"):
        split_held_out(rows_of("a", "b"), count=2, seed=0)
    with pytest.raises(DataError, match="one of data.eval_fraction and data.eval_rows"):
        split_held_out(HUNDRED, seed=0)


def mixed(*sources, **options):
    return mix([source for source, _ in sources], [LoadedRows(rows) for _, rows in sources], seed=7, **options)


def test_weights_say_how_often_an_epoch_sees_each_row():
    counts = {}
    for weight in (0.25, 1.0, 2.0, 2.5):
        texts_seen = said(mixed((Source("x", weight=weight), HUNDRED)).train)
        counts[weight] = (len(texts_seen), len(set(texts_seen)))
        assert max(map(texts_seen.count, set(texts_seen))) - min(map(texts_seen.count, set(texts_seen))) <= 1
    assert counts == {0.25: (25, 25), 1.0: (100, 100), 2.0: (200, 100), 2.5: (250, 100)}
    with pytest.raises(DataError, match="weight = 0.1 of 3 rows leaves none"):
        mixed((Source("x", weight=0.1), HUNDRED[:3]))


def test_max_rows_draws_by_lot_and_keeps_the_order():
    drawn = said(mixed((Source("x", max_rows=10), HUNDRED)).train)
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=int)
    assert drawn != said(HUNDRED)[:10]
    assert drawn == said(mixed((Source("x", max_rows=10), HUNDRED)).train)


def test_a_row_held_out_of_one_source_is_held_out_of_all_and_is_not_weighted():
    fifty = HUNDRED[:50]
    mixture = mixed((Source("x", weight=3.0), HUNDRED), (Source("y", weight=2.0), fifty), eval_fraction=0.1)
    held_out = said(mixture.held_out)
    assert len(held_out) in (15, 16)  # 10 % of 150 rows, and perhaps the copy of the last one
    assert all(held_out.count(text) == said(HUNDRED).count(text) + said(fifty).count(text) for text in held_out)
    assert all(
        said(mixture.train).count(text) == (0 if text in held_out else 3 * said(HUNDRED).count(text) + 2 * said(fifty).count(text))
        for text in said(HUNDRED)
    )


def test_the_draws_do_not_follow_each_other():
    """A half by weight must not be the rows that max_rows or the split would have drawn first."""
    half = set(said(mixed((Source("x", weight=0.5), HUNDRED)).train))
    capped = set(said(mixed((Source("x", max_rows=50), HUNDRED)).train))
    held_out = set(said(mixed((Source("x"), HUNDRED), eval_rows=50).held_out))
    assert all(10 < len(a & b) < 40 for a, b in ((half, capped), (half, held_out), (capped, held_out)))


# ---- real data


@needs_shared
@pytest.mark.parametrize(
    ("path", "layout", "rows", "skipped", "calls"),
    [
        ("xlam/sealtool.json", "xlam", 294, 0, 294),
        ("xlam/example.jsonl", "xlam", 5, 0, 6),
        ("apibank/apibank_l1.json", "xlam", 399, 0, 399),
        ("apibank/apibank_l2.json", "xlam", 127, 6, 121),
        ("apibench/torchhub_train.json", "apibench", 837, 0, 0),
        ("apibench/torchhub_eval.json", "apibench", 186, 0, 0),
        ("apibench/huggingface_eval.json", "apibench", 911, 0, 0),
        ("apibench/tensorflow_eval.json", "apibench", 688, 0, 0),
    ],
)
def test_real_rows_convert_and_none_vanishes(path, layout, rows, skipped, calls):
    loaded = load_rows(Source(str(SHARED / path)), on_error="skip")
    counts = [loaded.counts[key] for key in ("read", "skipped", f"layout/{layout}", "trained_calls")]
    assert counts == [rows, skipped, rows - skipped, calls]
    assert len(loaded.rows) + len(loaded.skipped) == rows
    assert all("is not among the row's tools" in bad.reason for bad in loaded.skipped)
    assert all(row.row["messages"][-1]["role"] == "assistant" for row in loaded.rows)
    messages = [message for row in loaded.rows for message in row.row["messages"]]
    assert "null" not in json.dumps([message["tool_calls"] for message in messages if "tool_calls" in message])


@needs_shared
def test_the_audit_of_seal_tools_finds_what_research_found():
    """research/tool-calling.md, section 2, from other code: 55 of 294 gold calls have a wrong type."""
    counts = load_rows(Source(str(SHARED / "xlam/sealtool.json"))).counts
    assert (counts["broken_calls"], counts["broken/wrong_type"]) == (55, 55)


@needs_shared
@pytest.mark.parametrize(
    ("file", "parse"), [("torchhub_train", 774), ("torchhub_eval", 167), ("huggingface_eval", 894), ("tensorflow_eval", 688)]
)
def test_apibench_answers_are_the_calls_letter_by_letter(file, parse):
    """How many parse as Python is from research/tool-calling.md, section 1."""
    path = SHARED / "apibench" / f"{file}.json"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    loaded = load_rows(Source(str(path)))
    for row, original in zip(loaded.rows, raw, strict=True):
        question, answer = row.row["messages"]
        assert answer["content"] == original["api_call"]
        first, *_, last = question["content"].split()
        assert first in original["code"] and last in original["code"]
        assert not any(mark in question["content"] for mark in ("###", "<<<api_call>>>", "'Output':", "Instruction:"))
    assert len(raw) - loaded.counts["unparsable_answers"] == parse


@needs_shared
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("formats/fc_dpo_sample.jsonl", "a preference pair"),
        ("sealtools/tool.jsonl", "tools of Seal-Tools"),
        ("bfcl/possible_answer/BFCL_v4_multiple.json", "gold calls of BFCL"),
    ],
)
def test_files_that_are_no_rows_are_refused_and_it_is_said_what_they_are(path, what):
    with pytest.raises(DataError, match=f"the row's keys are .*{what}.*; must be one of the layouts"):
        load_rows(Source(str(SHARED / path)))
