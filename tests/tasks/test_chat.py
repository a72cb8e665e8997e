"""A conversation at a pipe: calls are judged and answered, what is torn is taken back, and what is left can be trained."""

import json
import os
import stat
import sys

import pytest
from by_heart import learn_by_heart
from click.testing import CliRunner
from conftest import harness
from exported import export_run

from harness.cli.chat import command
from harness.embedded import resolve
from harness.errors import DataError, ModelError, RecipeError
from harness.tasks.answering import Connection, Settings
from harness.tasks.chat import Chat, open_target
from harness.tools import ToolCall
from harness.tools.offered import Offered, load_all_offered, load_offered

SCHEMAS, FUNCTIONS = "embedded:base-eval", "harness.quickstart.tools:TOOLS"


@pytest.fixture(scope="module")
def row(cache) -> dict:
    """Whose answer is one call of get_weather."""
    with open(resolve("embedded:base-eval"), encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return next(row for row in rows if '"name": "get_weather", "arguments"' in json.dumps(row["messages"]))


@pytest.fixture(scope="module")
def model(tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("by-heart")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    learn_by_heart(folder / "model", folder / "rows.jsonl", steps=60)
    return folder / "model"


@pytest.fixture
def tools(tmp_path, row):
    """tools(edit=None) -> the path of the row's own tools, after an edit of the parameters of get_weather."""

    def tools(edit=lambda parameters: None):
        offered = json.loads(json.dumps(row["tools"]))
        edit(next(tool["function"]["parameters"] for tool in offered if tool["function"]["name"] == "get_weather"))
        (tmp_path / "tools.json").write_text(json.dumps(offered))
        return str(tmp_path / "tools.json")

    return tools


def question(row) -> str:
    return row["messages"][0]["content"]


def talk(model, lines: list[str], *options: str):
    return CliRunner().invoke(command, [str(model), "--max-new-tokens", "40", *options], input="".join(f"{line}\n" for line in lines))


def test_a_right_call_is_shown_and_a_conversation_that_ends_with_it_can_be_trained(model, row, tools, tmp_path):
    saved = tmp_path / "rows.jsonl"
    done = talk(model, [question(row), "", "/reset"], "--tools", tools(), "--save", str(saved))
    assert done.exit_code == 0, done.output
    assert "→ get_weather(" in done.output and "fits its schema" in done.output and "left at the call" in done.output
    assert "\x1b[" not in done.output
    audited = harness("validate", saved)
    assert audited.code == 0 and "nothing is wrong" in audited.output, audited.output
    call = json.loads(saved.read_text())["messages"][-1]["tool_calls"][0]["function"]
    assert call == row["messages"][-1]["tool_calls"][0]["function"]


def test_a_call_that_breaks_its_schema_is_named_with_its_class_and_is_no_row(model, row, tools, tmp_path):
    def edit(parameters):
        parameters["properties"]["city"] = {"type": "integer"}

    done = talk(model, [question(row), "", "/save " + str(tmp_path / "rows.jsonl")], "--tools", tools(edit))
    assert "! wrong_type: get_weather.city: is" in done.output and "must be integer" in done.output
    assert isinstance(done.exception, DataError) and "wrong_type" in str(done.exception)
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_a_person_types_is_the_result_that_the_model_reads_next(model, row, tools):
    chat = Chat(open_target(str(model), Settings(max_new_tokens=40), Connection()), Settings(max_new_tokens=40), load_offered(tools()))
    chat.ask(question(row))
    turn = chat.answer(lambda piece: None)
    assert chat.waits
    chat.give(turn, ["35"])
    result = chat.messages[-1]
    assert (result["role"], result["content"], result["tool_call_id"]) == ("tool", "35", chat.messages[-2]["tool_calls"][0]["id"])
    assert "35" in chat.who.tokenizer.decode(chat.who._prompt_of(chat._item(chat.messages)))


def test_functions_answer_and_what_they_raise_is_a_result_too(model, row, tools, tmp_path):
    (tmp_path / "mine.py").write_text("def get_weather(city, days=0):\n    raise KeyError(city)\n")
    source = "from typing import Any\n" + (
        'def get_weather(city: str, days: int = 0) -> str:\n    """Weather\n\n    Args:\n        city: c\n        days: d\n    """\n'
        "    raise KeyError(city)\n"
    )
    (tmp_path / "mine.py").write_text(source)
    done = talk(model, [question(row)], "--tools", tools(), "--tools", str(tmp_path / "mine.py"))
    assert '← {"error": "KeyError: ' in done.output and "1 of them answered by functions" in done.output


def test_half_of_a_character_in_a_result_is_told_by_its_escape_and_ends_no_conversation(model, row, tools, tmp_path):
    said = '    """Weather\n\n    Args:\n        city: c\n        days: d\n    """\n'
    (tmp_path / "mine.py").write_text(f"def get_weather(city: str, days: int = 0) -> str:\n{said}    return chr(0xD83D)\n")
    done = talk(model, [question(row), "/help"], "--tools", tools(), "--tools", str(tmp_path / "mine.py"))
    assert done.exit_code == 1 and "← \\ud83d" in done.output and "is half of a surrogate pair" in done.output
    assert done.output.rstrip().endswith("as a row that can be trained")


def test_what_was_said_before_a_wrong_command_is_saved(model, row, tools, tmp_path):
    done = talk(model, [question(row), "", "/rest"], "--tools", tools(), "--save", str(tmp_path / "rows.jsonl"))
    assert isinstance(done.exception, RecipeError) and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_an_answer_is_heard_in_pieces_and_one_that_is_stopped_is_taken_back(model, row, tools, monkeypatch):
    settings = Settings(max_new_tokens=40)
    chat, heard = Chat(open_target(str(model), settings, Connection()), settings, load_offered(tools())), []
    chat.ask(question(row))
    said = chat.answer(heard.append).said
    assert len([piece for piece in heard if piece]) > 3 and "".join(heard).strip() == said.strip()
    before = list(chat.messages)

    def stop(piece):
        raise KeyboardInterrupt

    chat.ask("and again")
    with pytest.raises(KeyboardInterrupt):
        chat.answer(stop)
    assert chat.messages == before
    # Through a pipe it is a question that was not answered.
    monkeypatch.setattr(Chat, "answer", lambda self, hear: stop(""))
    assert talk(model, [question(row)]).exit_code == 1


def test_a_question_that_does_not_fit_is_not_answered_and_the_exit_code_says_so(model, row, tools):
    done = CliRunner().invoke(command, [str(model), "--max-new-tokens", "512"], input=f"{question(row)}\n")
    assert done.exit_code == 1 and "too_long" in done.output and "taken back" in done.output


def test_commands_show_and_take_back(model, row, tools):
    lines = ["/help", "/tools", "/system be brief", "/undo", question(row), "", "/undo"]
    done = talk(model, lines, "--tools", tools())
    assert "/save FILE" in done.output and "get_weather(city, days?)" in done.output and "be brief" in done.output
    assert "there is no question to take back" in done.output and f"taken back: {question(row)}" in done.output
    wrong = talk(model, ["/rest"])
    assert isinstance(wrong.exception, RecipeError) and '"/reset"' in str(wrong.exception)


def test_schemas_and_functions_are_named_in_four_ways_and_their_faults_are_refused(tmp_path):
    assert len(load_all_offered([resolve(SCHEMAS), FUNCTIONS]).functions) == 6
    assert load_all_offered([]) == Offered()
    assert load_offered(FUNCTIONS).tools[0]["function"]["name"] == "get_weather"
    (tmp_path / "one.json").write_text('{"name": "f", "parameters": {"type": "object", "properties": {}}}')
    assert load_offered(str(tmp_path / "one.json")).tools[0]["function"]["name"] == "f"
    with pytest.raises(RecipeError, match="answers for none of the schemas"):
        load_all_offered([str(tmp_path / "one.json"), FUNCTIONS])
    (tmp_path / "bare.py").write_text("def f(a):\n    pass\n")
    with pytest.raises(RecipeError, match="no schema can be read from f"):
        load_offered(str(tmp_path / "bare.py"))
    (tmp_path / "twice.json").write_text('[{"name": "f"}, {"name": "f"}]')
    for name, text in (("keys.json", '{"a": 1}'), ("words.json", '["x"]'), ("rows.jsonl", '{"tools": [{"a": 1}]}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}: .*a tool "):
            load_offered(str(tmp_path / name))
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('usage: leaves.py FILE')\n")
    with pytest.raises(RecipeError, match="leaves.py; cannot be imported: SystemExit: usage"):
        load_offered(str(tmp_path / "leaves.py"))
    with pytest.raises(DataError, match='two tools are called "f"'):
        load_offered(str(tmp_path / "twice.json"))


def test_a_file_of_tools_may_be_called_as_a_module_that_others_import_and_its_functions_may_be_asynchronous(tmp_path):
    import random

    said = '    """Draw\n\n    Args:\n        n: how many\n    """\n'
    (tmp_path / "random.py").write_text(f"async def draw(n: int) -> dict:\n{said}    return {{'drawn': n}}\n")
    offered = load_offered(str(tmp_path / "random.py"))
    assert offered.run(ToolCall("draw", {"n": 3})) == '{"drawn": 3}'
    assert sys.modules["random"] is random


def test_a_line_separator_in_a_row_ends_no_line(tmp_path):
    row = {
        "messages": [{"role": "user", "content": "a\u2028b"}],
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [tool["function"]["name"] for tool in load_offered(str(tmp_path / "rows.jsonl")).tools] == ["f"]


def test_nobody_chats_with_a_reward_model(tmp_path, cache):
    run = export_run(tmp_path / "run", "tiny/reward-lora", "model.lora=null")
    with pytest.raises(ModelError, match="is a reward model"):
        open_target(str(run.path), Settings(), Connection())


# ---- GGUF


CONVERTER = """#!/usr/bin/env python3
import struct, sys
source, _, target, _, kind = sys.argv[1:]
open(target, "wb").write(b"{magic}" + struct.pack("<IQQ", 3, 20, 5) + bytes({size}))
"""


def converter(folder, magic="GGUF", size=1_000_000):
    """A fake of llama.cpp's: a real executable that writes a header and as many bytes."""
    file = folder / "convert_hf_to_gguf.py"
    file.write_text(CONVERTER.replace("{magic}", magic).replace("{size}", str(size)))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_a_whole_model_is_written_as_gguf_by_the_converter_on_the_path(tmp_path, cache, monkeypatch):
    from harness.cli.export import command as export
    from harness.model.export import verify_export

    run = export_run(tmp_path / "run", "tiny/sft-full")

    def gguf(*options):
        return CliRunner().invoke(export, [str(run.path), "--gguf", "bf16", *map(str, options)])

    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert "git clone https://github.com/ggml-org/llama.cpp" in str(gguf().exception)
    (tmp_path / "bin").mkdir()
    converter(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    done = gguf()
    assert done.exit_code == 0 and "20 tensors" in done.output, done.output
    assert verify_export(run.gguf("bf16"))["files"].keys() == {"run-bf16.gguf"}
    assert "--force replaces it" in str(gguf().exception)
    for fault, message in (({"magic": "NONE"}, "is no GGUF file"), ({"size": 10}, "weights need")):
        wrong = gguf("--force", "--converter", converter(tmp_path, **fault))
        assert message in str(wrong.exception)
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise NotImplementedError('no such architecture')")
    assert "no such architecture" in str(gguf("--force", "--converter", tmp_path).exception)
    assert verify_export(run.gguf("bf16"))


def test_a_score_is_refused_as_gguf_before_a_converter_is_asked_for(tmp_path, cache, monkeypatch):
    from harness.cli.export import command as export

    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = export_run(tmp_path / "run", "tiny/reward-lora", "model.lora=null")
    refused = CliRunner().invoke(export, [str(run.path), "--gguf", "bf16"])
    assert "ends in a score, which llama.cpp's converter would leave out" in str(refused.exception)
