"""Preparing: once, into a folder named by its content, complete or absent, with every row accounted for."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_tokenizer import chat_tokenizer
from test_templates import TOOL_ROW, TOOLS, call, talk
from transformers import AutoTokenizer

from harness.data import prepare as module
from harness.data.prepare import fit, load_prepared, prepare, row_digest, tokenise_batch
from harness.data.report import Dropped, render_report
from harness.data.rows import SourceRow
from harness.data.templates import Renderer
from harness.errors import DataError, HarnessError, ModelError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def located(*rows, name="d.jsonl"):
    return [SourceRow(f"{name}:{n}", row) for n, row in enumerate(rows, 1)]


def some_rows(n):
    return located(*(talk(f"question {i}", f"answer {i} " * (1 + i % 7)) for i in range(n)))


def long_talk(turns):
    """A conversation of `turns` calls, each with its result."""
    messages = [{"role": "system", "content": "You call tools."}]
    for i in range(turns):
        messages += [{"role": "user", "content": f"weather in city {i}?"}, {"role": "assistant", "tool_calls": [call(f"city {i}")]}]
        messages += [{"role": "tool", "name": "get_weather", "content": f"RESULT {i}"}]
    return {"messages": [*messages, {"role": "assistant", "content": "That was all."}], "tools": TOOLS}


def columns(prepared):
    return [list(row.values()) for row in prepared.train]


@pytest.fixture
def tokenizer():
    return chat_tokenizer("qwen2_5")


def test_samples_carry_labels_lengths_digests_and_places(tmp_path, tokenizer):
    rows = located(TOOL_ROW, {"text": "plain words"}, {"prompt": "2 + 2 =", "completion": " 4"})
    prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=1024)
    renderer = Renderer(tokenizer)
    for source, sample in zip(rows, prepared.train, strict=True):
        rendered = renderer.render(source.row)
        assert sample["input_ids"] == rendered.ids and sample["length"] == len(rendered.ids)
        expected = [token if bit else -100 for token, bit in zip(rendered.ids, rendered.mask, strict=True)]
        assert sample["labels"] == [-100, *expected[1:]]
        assert sample["sample"] == row_digest(source.row) and sample["location"] == source.location
    counts = prepared.report.train
    assert (counts.rows_in, counts.rows, counts.dropped) == (3, 3, {})
    assert counts.tokens == sum(prepared.train["length"])
    assert counts.trained_tokens == sum(label != -100 for labels in prepared.train["labels"] for label in labels)
    assert counts.length_percentiles["max"] == max(prepared.train["length"]) and counts.length_percentiles["min"] == min(
        prepared.train["length"]
    )
    assert prepared.train.features["input_ids"].feature.dtype == "int32" and prepared.train.cache_files  # memory-mapped


def test_the_second_time_nothing_is_tokenised(tmp_path, tokenizer, monkeypatch):
    first = prepare(some_rows(20), tokenizer, cache_dir=tmp_path, max_length=128, packing=True)

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", refuse)
    monkeypatch.setattr(Renderer, "render", refuse)
    elsewhere = [SourceRow(f"other.jsonl:{n}", source.row) for n, source in enumerate(some_rows(20))]
    again = prepare(elsewhere, tokenizer, cache_dir=tmp_path, max_length=128, packing=True)
    assert again.folder == first.folder and columns(again) == columns(first) and again.report == first.report
    assert columns(load_prepared(first.folder)) == columns(first)


def test_an_end_of_turn_at_which_generation_would_not_stop_is_said_before_training(tmp_path, caplog):
    prepare(some_rows(3), chat_tokenizer("qwen2_5"), cache_dir=tmp_path / "a", max_length=128)
    assert not caplog.records
    prepare(some_rows(3), chat_tokenizer("qwen2_5", eos="<|endoftext|>"), cache_dir=tmp_path / "b", max_length=128)
    assert "ends an assistant turn with '<|im_end|>', but generation stops at '<|endoftext|>'" in caplog.text


def test_whatever_changes_a_token_changes_the_folder(tmp_path):
    def folder(rows=None, template="qwen2_5", eos="<|im_end|>", **more):
        settings = {"max_length": 128, **more}
        return prepare(rows or some_rows(4), chat_tokenizer(template, eos=eos), cache_dir=tmp_path, **settings).folder

    reordered = [SourceRow("d:1", {"messages": some_rows(1)[0].row["messages"], "train_from": 0})]
    folders = [
        folder(),
        folder(some_rows(5)),
        folder(some_rows(4)[::-1]),
        folder(reordered),
        folder(template="qwen3_instruct_2507"),
        folder(eos="<|endoftext|>"),
        folder(max_length=129),
        folder(too_long="drop_row"),
        folder(on_error="skip"),
        folder(train_on="all"),
        folder(eval=some_rows(2)),
        folder(packing=True),
        folder(packing=True, seed=1),
        folder(training_template=lambda t: "{# other #}" + t.chat_template),
    ]
    assert len(set(folders)) == len(folders)
    assert folder(num_proc=2) == folders[0]


def test_a_padded_call_does_not_change_what_a_tokenizer_is(tmp_path, tokenizer):
    first = prepare(some_rows(4), tokenizer, cache_dir=tmp_path, max_length=128)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=7)
    assert prepare(some_rows(4), tokenizer, cache_dir=tmp_path, max_length=128).folder == first.folder


def test_the_order_of_arguments_is_part_of_a_rows_identity():
    assert row_digest({"text": "a", "b": 1}) != row_digest({"b": 1, "text": "a"})


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 10)
    rows, held_out = some_rows(101) + located(long_talk(9)), some_rows(7)
    one, *others = (
        prepare(rows, tokenizer, eval=held_out, cache_dir=tmp_path / str(n), max_length=300, num_proc=n, packing=True) for n in (1, 2, 3)
    )
    wanted = {path.relative_to(tmp_path / "1"): path.read_bytes() for path in (tmp_path / "1").rglob("*.*")}
    assert len(wanted) == 6  # of samples and of packs: train, eval and the manifest
    for n, other in enumerate(others, 2):
        assert {path.relative_to(tmp_path / str(n)): path.read_bytes() for path in (tmp_path / str(n)).rglob("*.*")} == wanted
        assert columns(one) == columns(other) and one.report == other.report


def test_a_long_row_loses_whole_turns_and_every_call_that_is_left_is_json(tmp_path, tokenizer):
    row, limit = long_talk(12), 800
    full = len(Renderer(tokenizer).render(row).ids)
    prepared = prepare(located(row), tokenizer, cache_dir=tmp_path, max_length=limit)
    assert full > limit
    ids, labels = prepared.train[0]["input_ids"], prepared.train[0]["labels"]
    text = tokenizer.decode(ids)
    calls = [json.loads(part.split("</tool_call>")[0]) for part in text.split("<|im_start|>user\n", 1)[1].split("<tool_call>")[1:]]
    kept = len(calls)
    assert [c["arguments"]["city"] for c in calls] == [f"city {i}" for i in range(kept)] and 1 < kept < 12
    assert text.rstrip().endswith("</tool_call><|im_end|>") and "You call tools." in text and "# Tools" in text
    assert len(ids) <= limit < len(Renderer(tokenizer).render({**row, "messages": row["messages"][: 1 + 3 * kept + 2]}).ids)
    assert labels[-2] == tokenizer.eos_token_id  # before the line end that Qwen's template writes
    counts = prepared.report.train
    assert (counts.shortened_rows, counts.dropped_messages) == (
        1,
        len(row["messages"]) - 3 * kept,
    )  # system, and 3 per call less its result
    assert "shortened       1 rows by" in render_report(prepared.report)


def test_a_shortened_row_is_what_the_template_writes_for_the_turns_that_are_left():
    tokenizer = chat_tokenizer("gptoss_training", eos="<|return|>")  # ends the last turn otherwise than those before it
    row = talk(*(word * 30 for word in ("question ", "answer ", "question ", "answer ", "question ", "answer ")))
    renderer = Renderer(tokenizer)
    whole = renderer.render(row)
    shorter, lost = fit(renderer, row, "d:1", whole.turn_ends[1] + 5, "drop_turns")
    assert lost == 2 and shorter == renderer.render({"messages": row["messages"][:4]})
    assert tokenizer.decode(shorter.ids[-1:]) == "<|return|>"


def test_rows_that_cannot_be_shortened_go_and_are_counted(tmp_path, tokenizer):
    huge = "word " * 400
    rows = located(talk("hi", "hello"), talk(huge, "hello"), {"text": huge}, {**talk("hi", "hello", "more", huge), "train_from": 2})
    prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=200)
    assert prepared.train["location"][:] == ["d.jsonl:1"]
    assert prepared.report.train.dropped == {"longer than max_length": Dropped(3, ["d.jsonl:2", "d.jsonl:3", "d.jsonl:4"])}
    assert "dropped, longer than max_length: 3\n    d.jsonl:2" in render_report(prepared.report)


def test_too_long_obeys_the_recipe(tmp_path, tokenizer):
    rows = located(talk("hi", "hello"), long_talk(12))
    assert prepare(rows, tokenizer, cache_dir=tmp_path, max_length=800, too_long="drop_row").train.num_rows == 1
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=r"d.jsonl:2: \d+ tokens; data.max_length is 800"):
            prepare(rows, tokenizer, cache_dir=tmp_path, max_length=800, too_long="fail", on_error=on_error)


def test_a_row_without_a_trained_token_never_gets_through(tmp_path, tokenizer):
    rows = located(talk("hi", "hello"), talk("only a question"), {**talk("hi", "hello"), "train_from": 2}, {"text": ""})
    for packing in (False, True):
        prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=200, packing=packing)
        assert prepared.report.train.dropped == {"no trained token": Dropped(3, ["d.jsonl:2", "d.jsonl:3", "d.jsonl:4"])}
        assert all(any(label != -100 for label in labels) for labels in prepared.train["labels"])


def test_a_question_at_the_end_that_nobody_answers_is_the_first_to_go(tmp_path, tokenizer):
    row = talk("hi", "hello", "word " * 300)
    prepared = prepare(located(row), tokenizer, cache_dir=tmp_path, max_length=100)
    assert tokenizer.decode(prepared.train[0]["input_ids"]).endswith("hello<|im_end|>\n")
    assert (prepared.report.train.shortened_rows, prepared.report.train.dropped_messages) == (1, 1)
    assert (
        prepare(located(row), tokenizer, cache_dir=tmp_path, max_length=100, train_on="all").train[:1]["length"]
        == prepared.train["length"][:]
    )


def test_a_control_token_in_the_words_of_a_row_is_reported(tmp_path, tokenizer):
    rows = located(talk("hi", "hello"), talk("what is <|im_end|> for?", "it ends a turn"), {"text": "a <|im_end|> b"})
    prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=100)
    assert prepared.report.train.control_tokens == Dropped(1, ["d.jsonl:2: <|im_end|>"]) and prepared.train.num_rows == 3
    assert "d.jsonl:2: <|im_end|>" in render_report(prepared.report)


def test_when_no_row_is_left_the_reasons_are_told(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"data.train: none of 1 rows is left.*no trained token: 1 \(first: d.jsonl:1\)"):
        prepare(located(talk("only a question")), tokenizer, cache_dir=tmp_path, max_length=200)
    with pytest.raises(DataError, match=r"data.train: none of 0 rows"):
        prepare([], tokenizer, cache_dir=tmp_path, max_length=200)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_row_that_the_template_refuses_stops_or_is_skipped(tmp_path, num_proc):
    tokenizer = chat_tokenizer("gemma_training", eos="<end_of_turn>")
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
    rows = [*some_rows(9), SourceRow("bad.jsonl:5", bad)]
    with pytest.raises(DataError, match="bad.jsonl:5: .* must alternate"):
        prepare(rows, tokenizer, cache_dir=tmp_path, max_length=200, num_proc=num_proc)
    assert list(tmp_path.iterdir()) == []
    prepared = prepare(
        rows, tokenizer, cache_dir=tmp_path, max_length=200, num_proc=num_proc, on_error="skip", skipped=Dropped(2, ["x:1", "x:4"])
    )
    dropped = prepared.report.train.dropped["refused by the chat template"]
    assert prepared.train.num_rows == 9 and dropped.rows == 1 and "bad.jsonl:5: " in dropped.locations[0]
    text = render_report(prepared.report)
    assert "must alternate" in text and "skipped, not readable as rows: 2\n    x:1" in text


def test_an_error_of_the_tokenizer_is_never_skipped(tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        prepare(some_rows(2), chat_tokenizer(), cache_dir=tmp_path, max_length=200, on_error="skip", num_proc=2)


def test_a_child_that_is_killed_is_said_to_be(tmp_path, tokenizer, monkeypatch):
    def kill(batch, **options):
        if batch.split == "eval":
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenise_batch(batch, **options)

    monkeypatch.setattr(module, "tokenise_batch", kill)
    wanted = "^d.jsonl:1 and the 3 rows after it: the process in which it was tokenised ended with code -9.*data.num_proc"
    with pytest.raises(HarnessError, match=wanted):
        prepare(some_rows(9), tokenizer, eval=some_rows(4), cache_dir=tmp_path, max_length=200, num_proc=2)
    assert list(tmp_path.iterdir()) == []


def test_packs_hold_the_samples_and_come_from_their_cache(tmp_path, tokenizer):
    plain = prepare(some_rows(50), tokenizer, cache_dir=tmp_path, max_length=256)
    packed = prepare(some_rows(50), tokenizer, cache_dir=tmp_path, max_length=256, packing=True, eval=())
    assert packed.train.column_names == ["input_ids", "labels", "seq_lengths", "samples"]
    assert sorted(s for samples in packed.train["samples"] for s in samples) == sorted(plain.train["sample"])
    counts = packed.report.train
    assert counts.packs == packed.train.num_rows < 50 and counts.fill_rate == pytest.approx(counts.tokens / (256 * counts.packs))
    assert counts.trained_tokens == sum(label != -100 for labels in packed.train["labels"] for label in labels)
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}, {repo!r}]
from chat_tokenizer import chat_tokenizer
from harness.data import prepare as module, samples, store
from test_prepare import SourceRow, talk
rows = [SourceRow(f"d:{{i}}", talk("q", "a")) for i in range(1200)]
{hang}
module.prepare(rows, chat_tokenizer("qwen2_5"), cache_dir={cache!r}, max_length=128, num_proc=1)
"""
HANG = {
    "while rows are written": """
fit = samples.fit
def slow(renderer, row, location, *rest):
    if location == "d:900":
        print("now", flush=True)
        time.sleep(60)
    return fit(renderer, row, location, *rest)
samples.fit = slow
""",
    "before the rename": """
def slow(*args):
    print("now", flush=True)
    time.sleep(60)
store._rename = slow
""",
}


@pytest.mark.parametrize("moment", HANG)
def test_a_kill_in_the_middle_leaves_nothing_that_loads_and_the_next_run_cleans_up(tmp_path, tokenizer, moment):
    script = KILLED.format(tests=str(Path(__file__).parent), repo=str(Path(__file__).parents[2]), cache=str(tmp_path), hang=HANG[moment])
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".")  # scratch, under a name that no digest has
    for path in (*left[0].iterdir(), left[0]):
        os.utime(path, (0, 0))  # long ago
    rows = [SourceRow(f"d:{i}", talk("q", "a")) for i in range(1200)]
    prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=128)
    assert prepared.train.num_rows == 1200 and list(tmp_path.iterdir()) == [prepared.folder]


def test_a_folder_that_is_torn_is_refused_by_ranks_and_made_again_by_prepare(tmp_path, tokenizer):
    prepared = prepare(some_rows(30), tokenizer, cache_dir=tmp_path, max_length=128)
    expected, file = columns(prepared), prepared.folder / "train-00000.arrow"
    for harm in (lambda: file.write_bytes(file.read_bytes()[:-100]), file.unlink, (prepared.folder / "manifest.json").unlink):
        harm()
        with pytest.raises(DataError, match="prepare"):
            load_prepared(prepared.folder)
        again = prepare(some_rows(30), tokenizer, cache_dir=tmp_path, max_length=128)
        assert again.folder == prepared.folder and columns(again) == expected
    assert list(tmp_path.iterdir()) == [prepared.folder]


def test_two_that_prepare_at_once_end_with_one_folder_and_both_succeed(tmp_path, tokenizer, monkeypatch):
    barrier, results, original = threading.Barrier(2, timeout=60), [], module.save_manifest

    def meet(*args):  # both have tokenised before either renames
        original(*args)
        barrier.wait()

    monkeypatch.setattr(module, "save_manifest", meet)
    run = lambda: results.append(prepare(some_rows(30), tokenizer, cache_dir=tmp_path, max_length=128))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert len(results) == 2 and columns(results[0]) == columns(results[1])
    assert list(tmp_path.iterdir()) == [results[0].folder]


def test_real_rows_with_a_real_tokenizer(tmp_path):
    model = SHARED / "tinymodels" / "stories260K-hf"
    if not model.exists():
        pytest.skip(f"{model} is not here: real data is not part of the repository")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson + '\n' }}{% endif %}{% for m in messages %}{{ m.role + ':' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + (m.tool_calls | map(attribute='function') | list | tojson"
        " if m.tool_calls else '') }}{{ eos_token }}{% endgeneration %}{% else %}{{ ' ' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = located(TOOL_ROW, talk("Tell a story", "Once upon a time, there was a girl.", "More", "The end, 🙂."))
    prepared = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=2000)
    decoded = [tokenizer.decode([t for t in labels if t != -100]) for labels in prepared.train["labels"]]
    assert "get_weather" in decoded[0] and "SECRETRESULT" not in decoded[0]
    assert (
        decoded[1].split(tokenizer.eos_token)[:2] == ["Once upon a time, there was a girl.", " The end, 🙂."]
        or "The end, 🙂." in decoded[1]
    )
    for sample in prepared.train:
        assert sample["labels"].count(tokenizer.eos_token_id) == 2  # pad is eos, and both turns end with it
    markers = tokenizer.chat_template
    tokenizer.chat_template = markers.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    by_prefix = prepare(rows, tokenizer, cache_dir=tmp_path, max_length=2000)
    assert by_prefix.folder != prepared.folder and by_prefix.train["labels"][:] == prepared.train["labels"][:]
