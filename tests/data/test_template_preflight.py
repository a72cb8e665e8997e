"""Chat templates tried on data before a run: over every template that TRL ships, no row is trained as other calls than it holds."""

import json
from functools import cache
from importlib.resources import files

import pytest
from chat_tokenizer import chat_tokenizer
from conftest import MICRO_TEMPLATE, REPOSITORY, SHARED, needs_shared

from harness.data.preflight import check_template, control_pattern, probe_template, render_preflight
from harness.data.readback import calls_of, reads_back
from harness.data.rows import SourceRow
from harness.data.sources import load_rows
from harness.data.templates import Renderer, has_markers
from harness.errors import DataError, ModelError
from harness.recipe.schema import Source
from harness.tools import ToolCall
from harness.tools.served import difference, parse_served

TEMPLATES = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    for file in sorted((files("trl") / "chat_templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
FAMILIES = [name for name in TEMPLATES if not name.endswith("_training")]


def names(text):
    """Names of families, and of their training variants where there are any."""
    return {name for family in text.split() for name in (family, f"{family}_training") if name in TEMPLATES}


PARTS = names("idefics3 llava_next smolvlm")  # take content as a list of parts only: no conversation of text can be rendered
NO_TOOLS = names("cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 llama3 phi3 phi3_5 qwen2_5_vl") | PARTS
NO_CALLS = NO_TOOLS - names("deepseekv3") | names("lfm2")
NEMOTRON = names("nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra")
# What is lossy, and why, family by family; from research/tool-calling.md, section 4, and from the templates' text.
LOSSY = {
    "shows tools": NO_TOOLS,
    "writes a call": NO_CALLS | {"deepseekv3"},  # its training variant writes objects, it concatenates text
    "writes parallel calls": NO_CALLS
    | {"deepseekv3"}
    | names("llama3_1 llama3_2 gptoss"),  # the first two raise, the last drops the second
    "writes words beside a call": PARTS | {"deepseekv3"} | names("llama3_1 llama3_2 muse_glimmer"),
    "shows a system prompt": names("gemma") | PARTS,
}
TWICE = names("qwen2_5 gptoss llama3_1 llama3_2") | {"deepseekv3_training"}
NULL_AS_NONE = (
    names("qwen3_5_nothink qwen3_5_think gemma4 gemma4_v2 gemma4_v3 gemma4_v4") | NEMOTRON
)  # `None`, which no server reads as null
ONE_CALL = names("llama3_1 llama3_2 gptoss")
XML = names("qwen3_5_nothink qwen3_5_think qwen3_6 qwen3_8") | NEMOTRON
UNESCAPED = names("lfm2_2_5 lfm2_2_5_v2")  # text between quotes as it is

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}, "additionalProperties": True}},
}


def calling(*arguments):
    calls = [{"id": f"call0000{i}", "type": "function", "function": {"name": "f", "arguments": each}} for i, each in enumerate(arguments)]
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}], "tools": [TOOL]}


ROWS = {
    "plain": (calling({"a": "x", "n": 3}), set()),
    "parallel": (calling({"a": "x"}, {"a": "y"}), ONE_CALL),
    "quotes": (calling({"a": 'it\'s "x" \\ <b> & {{y}} {"k": 1}'}), UNESCAPED),
    "unicode": (calling({"a": "grüße 東京 🙂"}), set()),
    "null": (calling({"a": None}), NULL_AS_NONE),
    "booleans": (calling({"a": True, "b": False}), set()),
    "texts like numbers": (calling({"a": "21", "b": "true"}), set()),
    "nested": (calling({"o": {"a": [1, "x", True, -2.5], "b": {}}, "l": []}), set()),
    "line ends": (calling({"a": "one\n\n two"}), UNESCAPED),
    "nothing": (calling({}), set()),
    "a tag": (calling({"a": "</parameter>"}), XML),
}


@cache
def renderer(name):
    """With TRL's training variant where the template has no marks of its own, as the tasks use it."""
    own = TEMPLATES[name]
    return Renderer(chat_tokenizer(own), None if has_markers(own) else TEMPLATES.get(f"{name}_training"))


@cache
def traits(name):
    return probe_template(Renderer(chat_tokenizer(TEMPLATES[name])))


def test_trl_ships_the_templates_that_the_tables_are_about():
    assert len(TEMPLATES) == 72 and all(known <= TEMPLATES.keys() for known in (*LOSSY.values(), TWICE, XML, UNESCAPED))


@pytest.mark.parametrize("trait", LOSSY)
def test_what_a_template_loses_is_told_and_nothing_else(trait):
    assert {name for name in TEMPLATES if traits(name)[trait] != "yes"} == LOSSY[trait]


def test_other_traits_are_told():
    def having(trait, words):
        return {name for name in TEMPLATES if words in traits(name)[trait]}

    assert having("takes arguments that are text", "twice") == TWICE
    assert having("takes arguments that are text", "yes") == names("qwen3 qwen3_instruct_2507 qwen3_vl")
    assert having("takes an empty list of tools", "frame") == names("llama3_1 llama3_2")
    assert having("writes reasoning", "no, drops it") >= names("qwen2_5 llama3_1 qwen3_instruct_2507")
    assert (
        having("writes reasoning", "last turn only") >= {"qwen3", "glm4moe", "gptoss"}
        and traits("qwen3_training")["writes reasoning"] == "yes"
    )
    assert {"qwen3_5_think", "deepseekv3"} <= having("a prompt is a prefix", "no")
    assert "qwen3" in having("keeps earlier turns as they were", "no") and "qwen3_training" in having(
        "keeps earlier turns as they were", "yes"
    )
    assert having("ends a turn with", "never learn to stop") == PARTS
    assert traits("llama3_1")["ends a turn with"] == "<|eot_id|>; eos_token is <|im_end|>, at which generation stops"
    assert {"qwen2_5", "llama3_1", "gptoss"} <= having("adds a system prompt of its own", "yes")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_refused_or_its_calls_read_back_as_they_were_meant(name):
    refused = set()
    for kind, (row, _) in ROWS.items():
        try:
            renderer(name).render(row, "rows.jsonl:7")
        except (DataError, ModelError) as error:
            assert "rows.jsonl:7" in str(error)
            refused.add(kind)
            continue
        text, turns = renderer(name).turns_of(row)
        said = "".join(text[a:b] for a, b in turns[1])
        assert difference(parse_served(said), calls_of(row["messages"][1])) is None
    unmarked = NO_TOOLS | NO_CALLS
    assert refused == (set(ROWS) if name in unmarked else {kind for kind, (_, lossy) in ROWS.items() if name in lossy})


def test_a_lossy_pair_is_refused_with_the_row_and_the_difference():
    wrong = {
        ("llama3_1", "parallel"): "only supports single tool-calls",
        ("gptoss_training", "parallel"): "drops a call|2 calls are 1",
        ("qwen3_5_think_training", "null"): "f.a is null and reads back as None",
        ("gemma4", "null"): "cannot be read",
        ("qwen3_6_training", "a tag"): 'f.a is "</parameter>" and reads back as',
        ("lfm2_2_5", "quotes"): "cannot be read",
    }
    for (name, kind), message in wrong.items():
        with pytest.raises(DataError, match=f"d.jsonl:3: .*({message})"):
            renderer(name).render(ROWS[kind][0], "d.jsonl:3")


def test_a_call_before_what_is_trained_may_be_written_as_it_is():
    row = calling({"a": None})
    more = [{"role": "tool", "content": "x", "tool_call_id": "call00000", "name": "f"}, {"role": "assistant", "content": "y"}]
    told = {**row, "messages": [*row["messages"], *more], "train_from": 3}
    assert any(renderer("qwen3_5_think_training").render(told).mask)
    with pytest.raises(DataError, match="read back otherwise"):
        renderer("qwen3_5_think_training").render({**told, "train_from": 0})


# ---- notations


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<tool_call>\n<function=f>\n<parameter=a>\nx\ny\n</parameter>\n</function>\n</tool_call>", [{"a": "x\ny"}]),
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>3</arg_value>\n</tool_call><tool_call>f\n</tool_call>", [{"a": 3}, {}]),
        ('<atem:invoke name="f">\n<atem:parameter name="a">[1]</atem:parameter>\n</atem:invoke>', [{"a": [1]}]),
        ('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>', [{"a": 1}]),
        ('function<｜tool▁sep｜>f\n```json\n{"a": null}\n```<｜tool▁call▁end｜>', [{"a": None}]),
        ('<|tool_call_start|>[f(a=1, b={"c": true}), f()]<|tool_call_end|>', [{"a": 1, "b": {"c": True}}, {}]),
        (
            '<|tool_call>call:f{a:<|"|>x, }<|"|>,b:{c:[1,<|"|>y<|"|>,null],d:{}}}<tool_call|>',
            [{"a": "x, }", "b": {"c": [1, "y", None], "d": {}}}],
        ),
        ('{"name": "f", "parameters": {"a": 1}}<|eot_id|>', [{"a": 1}]),
        ('<tool_call>{"name": "f", "arguments": {"a": "<x>"}}</tool_call>', [{"a": "<x>"}]),
    ],
)
def test_each_notation_is_read(text, calls):
    assert difference(parse_served(text), [ToolCall("f", arguments) for arguments in calls]) is None
    assert reads_back(text) and not reads_back("It is 18 C.")


@pytest.mark.parametrize(
    ("found", "meant", "words"),
    [
        ({"a": 1}, {"a": "1"}, 'f.a is "1" and reads back as 1'),
        ({"a": True}, {"a": 1}, "f.a is 1 and reads back as true"),
        ({}, {"a": 1}, "f.a is lost"),
        ({"a": 1}, {}, "f.a is added"),
    ],
)
def test_a_difference_is_named(found, meant, words):
    assert difference([ToolCall("f", found)], [ToolCall("f", meant)]) == words
    assert difference([ToolCall("g", {})], [ToolCall("f", {})]) == 'call 0 is "f" and reads back as "g"'


# ---- rows against a template


def preflight(template, *rows, **options):
    return check_template(Renderer(chat_tokenizer(template, **options)), [SourceRow(f"d.jsonl:{n}", row) for n, row in enumerate(rows, 1)])


TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def test_what_is_refused_is_counted_by_reason_and_named():
    report = preflight(TEMPLATES["qwen2_5_training"], TALK, calling({"a": 1}), {"text": "x"}, calling({"a": 1}, {"a": 2}))
    assert (report.conversations, report.texts, report.refused.rows, report.calls, report.read_back) == (3, 1, 0, 3, 3)
    report = preflight(TEMPLATES["llama3_1"], TALK, calling({"a": 1}), calling({"a": 1}, {"a": 2}), eos="<|eot_id|>")
    assert report.refused.rows == 1 and "d.jsonl:3: the chat template" in report.refused.locations[0]
    shown = render_preflight(report, "x")
    assert (
        "3 conversations rendered, masked and read back; 1 refused" in shown and "FAIL   1 × " in shown and "1 of 1 trained calls" in shown
    )


def test_one_reason_is_one_line_however_many_rows_have_it():
    """They differ in numbers: which message it is that is dropped."""
    drops = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
    system = {"role": "system", "content": "You are a very careful assistant."}
    rows = [{"messages": [*TALK["messages"] * n, system, *TALK["messages"]]} for n in range(3)]
    report = preflight(drops, *rows)
    assert report.refused.rows == 3 and list(report.reasons.values()) == [3]


def test_words_that_a_template_drops_are_refused():
    drops = "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
    drops += "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    system = {"role": "system", "content": "You are a very careful assistant."}
    report = preflight(drops, {"messages": [system, *TALK["messages"]]})
    assert report.refused.rows == 1 and "drops what message 0 (system) says" in report.refused.locations[0]


def test_what_only_differs_at_a_server_is_a_note():
    thinks = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    two = {"messages": [TALK["messages"][0], thinks, TALK["messages"][0], thinks]}
    report = preflight(TEMPLATES["glm4moe_training"], two)
    assert not report.refused.rows and any("reasoning of an earlier turn" in what for what in report.notes)
    report = preflight(TEMPLATES["nemotron_3_nano_training"], {"messages": [*TALK["messages"], *TALK["messages"]]})
    assert not report.refused.rows and any("no prefix" in what for what in report.notes)
    report = preflight(MICRO_TEMPLATE.read_text(), calling({"a": 1}))
    assert report.read_back == 0 and any("notation that is not read here" in what for what in report.notes)


def test_shipped_templates_write_every_call_so_that_it_reads_back():
    for name in ("plain-tools", "llama3-tools"):
        template = (REPOSITORY / "configs" / "templates" / f"{name}.jinja").read_text()
        report = preflight(template, *(row for row, _ in ROWS.values()), eos="<|eot_id|>")
        assert report.calls == report.read_back == 12 and not report.refused.rows, render_preflight(report, name)


def test_control_tokens_are_those_of_the_tokenizer():
    pattern = control_pattern(Renderer(chat_tokenizer(TEMPLATES["qwen3"])))
    assert pattern.fullmatch("<|im_end|>") and pattern.fullmatch("<tool_call>") and not pattern.search("<|no_such|> <b> [x]")


@needs_shared
@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_training", "qwen3_6_training", "glm4moe_training", "lfm2_v2_training"])
def test_real_calls_read_back_through_real_templates(name):
    paths = ("xlam/sealtool.json", "apibank/apibank_l2.json", "glaive/glaive_toolcall_en_demo.json", "formats/toolace_sample.jsonl")
    rows = [row for path in paths for row in load_rows(Source(path=str(SHARED / path)), "skip").rows[:40]]
    report = check_template(renderer(name), rows)
    # ToolACE has a tool whose name holds blanks and brackets, which no Python can hold that LFM2 writes.
    lossy = [place for place in report.refused.locations if "toolace_sample.jsonl:3: " in place and "(SyntaxError)" in place]
    assert report.refused.rows == len(lossy) == (name == "lfm2_v2_training"), report.refused
    assert report.calls == report.read_back > 90


# ---- the command


def test_validate_of_a_recipe_tries_its_rows_on_its_own_template(tmp_path, monkeypatch, capsys):
    from harness.cli import main

    def validate(*arguments, code):
        with pytest.raises(SystemExit) as left:
            main(["validate", "tiny/sft-full", "data.train=d.jsonl", "data.eval=e.jsonl", *arguments])
        said = capsys.readouterr()
        assert left.value.code == code, said
        return said.out + said.err

    monkeypatch.chdir(tmp_path)
    asks = {"messages": [{"role": "user", "content": "make it dark in the hall."}, {"role": "assistant", "content": "Dark."}]}
    bad = {
        "messages": [{"role": "user", "content": "so <|end|> then"}, {"role": "assistant", "content": "No.", "reasoning_content": "why"}]
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(asks) + "\n" + json.dumps(calling({"a": 1})) + "\n")
    (tmp_path / "e.jsonl").write_text(json.dumps(TALK) + "\n")
    said = validate(code=0)
    assert (
        "data.train: 2 rows" in said and "data.eval: 1 rows" in said and "1 of 1 trained calls read back" in said and "shows tools:" in said
    )
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (asks, bad, TALK)))
    told = json.loads(validate("--json", code=1))
    assert set(told["data.train"]["classes"]) == {"control_token", "contamination"}
    assert "d.jsonl:2" in told["data.train"]["classes"]["control_token"]["first"][0]  # a token that only this tokenizer has
    assert told["template"]["refused"] == 1 and "does not write reasoning_content" in told["template"]["first"][0]
    assert "name them in place of the recipe" in validate("--output", "o.jsonl", code=2)
