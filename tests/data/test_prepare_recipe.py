"""What people are told of their rows before they train on them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from harness.data import prepare_recipe
from harness.embedded import resolve
from harness.model import load_tokenizer
from harness.recipe import load

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def row(question):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}


def told(tmp_path, **data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": {"name_or_path": "embedded:tiny-llama"}, "data": {**data, "cache_dir": str(tmp_path / "cache")}})
    )
    lines = []
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    prepare_recipe(load(recipe), tokenizer, packing=False, say=lines.append)
    return lines


def test_skipped_rows_are_listed_whole_in_a_file_that_is_named(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [row("a"), "not json\n", row("b"), *["{}\n"] * 9])
    (line,) = told(tmp_path, train=str(rows), on_error="skip")
    assert line.startswith("warning: 10 rows were skipped")
    listed = Path(line.split(": ")[-1]).read_text().splitlines()
    assert [entry.split(": ")[0] for entry in listed] == [f"{rows}:{number}" for number in (2, *range(4, 13))]


def test_held_out_rows_that_are_trained_as_well_are_counted(tmp_path):
    rows = write(tmp_path / "rows.jsonl", [row("a"), row("b")])
    held_out = write(tmp_path / "eval.jsonl", [row("b"), row("c")])
    (line,) = told(tmp_path, train=str(rows), eval=str(held_out))
    assert line.startswith("warning: 1 rows of data.eval are also rows of data.train")


def test_gold_calls_that_break_their_schema_are_counted(tmp_path):
    broken = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]}
    (line,) = told(tmp_path, train=str(write(tmp_path / "rows.jsonl", [row("a"), broken])))
    assert line.startswith("warning: 1 of 1 gold calls (100.0%) break their own tool's schema")


@pytest.mark.parametrize("template", ["templates/plain-tools.jinja", "configs/templates/plain-tools.jinja"])
def test_the_plain_template_gives_any_tokenizer_its_turns_tools_and_marks(tmp_path, template):
    good = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
    rows = write(
        tmp_path / "rows.jsonl",
        [{"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "tool_calls": [good]}], "tools": [TOOL]}],
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name_or_path": "embedded:tiny-llama"},
                "data": {"train": str(rows), "chat_template": template, "cache_dir": str(tmp_path / "cache")},
            }
        )
    )
    recipe = load(recipe)
    tokenizer = load_tokenizer(recipe)
    prepared = prepare_recipe(recipe, tokenizer, packing=False)
    labels = [token for token in prepared.train[0]["labels"] if token != -100]
    assert tokenizer.decode(labels) == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' + tokenizer.eos_token
    assert '"name": "add"' in tokenizer.decode(prepared.train[0]["input_ids"]).split("<user>")[0]
