"""`harness convert`: there and back again, what is lost is said, and nothing is written by halves."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import SHARED, needs_shared

from harness.cli import main
from harness.data.convert import TARGETS, as_openai, as_xlam
from harness.data.formats import Reading, to_canonical
from harness.data.reading import read_each

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
USER = {"role": "user", "content": "q"}
SAYS = {"role": "assistant", "content": "é\u2028\"'"}


def call(text, identity=None):
    return ({"id": identity} if identity else {}) | {"type": "function", "function": {"name": "f", "arguments": {"a": text}}}


ROWS = [
    {"messages": [USER, SAYS]},
    {"messages": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "tool_calls": [call("x"), call("y")]}], "tools": [TOOL]},
    {"messages": [USER, {"role": "assistant", "content": "w", "reasoning_content": "r", "tool_calls": [call("x", "c1")]},
                  {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"}, SAYS, USER, SAYS], "tools": [TOOL], "train_from": 5},
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments, code=0):
        with pytest.raises(SystemExit) as left:
            main(["convert", *map(str, arguments)])
        said = capsys.readouterr()
        assert left.value.code == code, said
        return said.out + said.err

    return run_here


def save(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_messages_there_and_back_are_the_same_rows(run, tmp_path):
    rows = [*ROWS, {"prompt": "p", "completion": "c"}, {"text": "t"}]
    said = run(save(tmp_path / "a.b.jsonl", rows))
    assert load(tmp_path / "a.b.messages.jsonl") == rows
    assert (
        "5 rows read (3 as messages, 1 as prompt_completion, 1 as text), 5 written to a.b.messages.jsonl" in said
        and "nothing was lost" in said
    )


def test_openai_has_arguments_as_text_ids_that_pair_and_weights(run, tmp_path):
    run(save(tmp_path / "a.jsonl", ROWS), "--to", "openai")
    written = load(tmp_path / "a.openai.jsonl")
    calls = written[1]["messages"][2]["tool_calls"]
    assert [json.loads(made["function"]["arguments"]) for made in calls] == [{"a": "x"}, {"a": "y"}]
    assert len({made["id"] for made in calls}) == 2 and written[1]["messages"][2]["content"] is None
    assert [message.get("weight") for message in written[2]["messages"]] == [None, 0, None, 0, None, None]
    back = [to_canonical(row) for row in written]
    assert back[2] == ROWS[2] and back[0] == ROWS[0]  # where the row has ids, or no calls, to the letter
    for made in back[1]["messages"][2]["tool_calls"]:
        del made["id"]
    assert back[1] == ROWS[1]


def test_xlam_holds_rows_that_end_with_calls(run, tmp_path):
    path = save(tmp_path / "a.jsonl", ROWS)
    assert "a.jsonl:1: ends with words; an xlam row ends with calls" in run(path, "--to", "xlam", code=2)
    assert not list(tmp_path.glob("*xlam*")) and not list(tmp_path.glob(".*"))
    said = run(path, "--to", "xlam", "--on-error", "skip")
    (written,) = load(tmp_path / "a.xlam.jsonl")
    assert to_canonical(written) == ROWS[1] and isinstance(written["answers"], str)
    assert "skipped: 2 rows" in said
    assert len((tmp_path / "a.xlam.jsonl.skipped.txt").read_text().splitlines()) == 2


def test_what_an_xlam_row_cannot_hold_is_said():
    messages = [USER, {"role": "assistant", "tool_calls": [call("x", "c1")]}, {"role": "tool", "content": "1", "tool_call_id": "c1"}]
    lost = []
    row = as_xlam({"messages": [*messages, {"role": "assistant", "content": "w", "tool_calls": [call("z")]}], "tools": [TOOL]}, lost.append)
    assert set(lost) == {"`tool_call_id` of a message", "`id` of a call", "the training of earlier turns of the assistant"}
    back = to_canonical(row)
    assert back["messages"][-1] == {"role": "assistant", "content": "w", "tool_calls": [call("z")]} and back["train_from"] == 3


def test_an_output_that_is_there_is_kept_unless_forced(run, tmp_path):
    path, out = save(tmp_path / "a.jsonl", ROWS), tmp_path / "a.messages.jsonl"
    out.write_text("mine")
    assert "is there already; give another --output, or --force" in run(path, code=2) and out.read_text() == "mine"
    save(path, [*ROWS, {"messages": [USER]}])
    run(path, "--force", code=2)
    assert out.read_text() == "mine"  # a failure writes nothing
    run(path, "--force", "--on-error", "skip", "--output", out)
    assert load(out) == ROWS


def test_losses_and_rows_left_out_are_counted_with_the_first_place(run, tmp_path):
    rows = [{"messages": [USER, SAYS], "label": label, "source": "x"} for label in (False, True, True)]
    said = run(save(tmp_path / "a.jsonl", rows))
    assert "left out, is labelled false, and fine-tuning would imitate it: 1 rows, the first" in said
    assert f"lost, `source` of the row: 2 rows, the first {tmp_path / 'a.jsonl'}:2" in said


def test_a_layout_can_be_named_and_one_that_is_not_known_is_refused(run, tmp_path):
    both = save(tmp_path / "a.jsonl", [{"messages": [USER, SAYS], "text": "t"}])
    assert "fit messages and text" in run(both, code=2)
    assert "lost, `text` of the row" in run(both, "--from", "messages")
    assert "--from mesages: no such layout" in run(both, "--from", "mesages", code=2)


def test_questions_are_written_when_they_are_asked_for(run, tmp_path):
    path = save(tmp_path / "a.jsonl", [{"prompt": "Write.", "instruction_id_list": []}])
    assert "the row asks and holds no answer" in run(path, code=2)
    run(path, "--questions")
    assert load(tmp_path / "a.messages.jsonl") == [{"messages": [{"role": "user", "content": "Write."}]}]


def test_the_settings_of_retrieval_rows_reach_them(run, tmp_path):
    rows = [{"question": f"Who {n}?", "gold": "GOLD", "distractors": ["a", "b", "c"], "answer": "x"} for n in range(40)]
    run(save(tmp_path / "a.jsonl", rows), "--without-gold", "0.5", "--distractors", "2")
    asked = [row["messages"][0]["content"] for row in load(tmp_path / "a.messages.jsonl")]
    assert 5 < sum("GOLD" in text for text in asked) < 35
    assert {sum(f"] {letter}" in text for letter in "abc") for text in asked} == {2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', ":2: not JSON ('utf-8' codec"),
        (b'{"text": "a", "text": "b"}', ':2: not JSON (the key "text" stands twice in one object)'),
        (b'{"messages": [{"role": "us', ":2: column"),
        (b'{"text": "\\ud83d"}', ":2: '\\ud83d' is half of a surrogate pair"),
        (b"[" * 100_000, ":2: not JSON (nested too deeply)"),
        (b'{"text": NaN}', ":2: not JSON (NaN is not a JSON value)"),
    ],
)
def test_a_line_that_is_no_row_is_named_and_can_be_skipped(run, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n' + line)
    assert message in run(path, code=2)
    run(path, "--on-error", "skip")
    assert load(tmp_path / "a.messages.jsonl") == [{"text": "a"}]


def test_twin_keys_in_arguments_that_are_text_are_refused(run, tmp_path):
    made = {"function": {"name": "f", "arguments": '{"a": "x", "a": "y"}'}}
    path = save(tmp_path / "a.jsonl", [{"messages": [USER, {"role": "assistant", "tool_calls": [made]}], "tools": [TOOL]}])
    assert 'arguments of "f": the key "a" stands twice in one object' in run(path, code=2)


def test_a_compressed_file_of_a_200_kb_result_comes_through(run, tmp_path):
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": [call("x")]}, {"role": "tool", "content": "ß" * 200_000}, SAYS],
        "tools": [TOOL],
    }
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    run(tmp_path / "a.jsonl.gz")
    assert load(tmp_path / "a.messages.jsonl") == [row]


FILES = """
    apibank/apibank_l1.json apibank/apibank_l2.json xlam/sealtool.json xlam/example.jsonl xlam/example_rollouts.jsonl
    xlam/masking_sft_data_example.json sealtools/test_in_domain.jsonl glaive/glaive_toolcall_en_demo.json
    glaive/reason_tool_use_demo_50.jsonl
    bfcl/BFCL_v4_parallel.json formats/toolace_sample.jsonl formats/hermes_v1_sample.jsonl formats/glaive_sample.jsonl
    when2call/when2call_test_llm_judge.jsonl apibench/torchhub_eval.json toolpref/ask_first_v1.0.jsonl
""".split()


@needs_shared
@pytest.mark.parametrize("path", FILES)
def test_every_real_row_is_the_same_row_after_a_round_trip(path):
    def canonical(raw):
        try:
            return to_canonical(raw)
        except Exception:  # a bad row; test_layouts counts them
            return None

    rows = [row for _, raw in read_each(str(SHARED / path)) if (row := canonical(raw)) is not None]
    assert rows
    xlam = 0
    for row in rows:
        copy = json.dumps(row)
        assert to_canonical(json.loads(copy)) == row
        openai = to_canonical(json.loads(json.dumps(as_openai(row, lambda what: None))))
        assert said_and_trained(openai) == said_and_trained(row)
        if row["messages"][-1].get("tool_calls"):
            lost = []
            back = to_canonical(as_xlam(row, lost.append))
            assert lost or back == row
            xlam += 1
        assert json.dumps(row) == copy  # nobody wrote to it
    assert xlam or path.startswith(("glaive", "formats", "apibench", "toolpref", "xlam/example_r"))


def said_and_trained(row):
    """The row without ids, with the places of the messages that are trained; `train_from` may point at any message before the first."""
    messages = [{key: value for key, value in message.items() if key != "tool_call_id"} for message in row["messages"]]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [{key: value for key, value in made.items() if key != "id"} for made in message["tool_calls"]]
    start = row.get("train_from", 0)
    return messages, row.get("tools"), [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= start]


def test_the_verbs_targets_are_the_writers():
    from harness.cli.convert import TARGETS as names

    assert set(names) == set(TARGETS)
    assert Reading().lost is None


@pytest.mark.parametrize("verb", [["convert", "rows.jsonl", "--output", "out.jsonl"], ["validate", "rows.jsonl", "--output", "out.jsonl"]])
def test_a_command_that_is_told_to_end_leaves_nothing_behind(tmp_path, verb):
    with open(tmp_path / "rows.jsonl", "w") as rows:
        for number in range(100_000):
            said = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"The successor of {number - 1}."}]
            rows.write(json.dumps({"messages": said}) + "\n")
    running = subprocess.Popen([sys.executable, "-m", "harness", *verb], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".out.jsonl.*")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 128 + signal.SIGTERM
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
