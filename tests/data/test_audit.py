"""`harness validate` on files: every class of findings is provoked, counted with its place, and failed, dropped, repaired or kept."""

import copy
import json

import pytest
from conftest import SHARED, needs_shared, run_command

from harness.cli import main
from harness.data.audit import File, audit, plan_actions, write_audited
from harness.data.audit_report import render_audit
from harness.data.findings import CLASSES, OF_CALLS, check_row, repair_row
from harness.data.findings import CONTROL_TOKENS as TOKENS
from harness.data.formats import to_canonical
from harness.data.overlap import normalise
from harness.data.reading import read_raw
from harness.data.repeats import NearDuplicates, Suites, signature_of
from harness.errors import DataError
from harness.tools import ToolCall, problems_of, repair_call

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
        "near": {"type": "array", "items": {"type": "number"}},
        "how": {"type": "object", "properties": {"fast": {"type": "boolean"}}, "required": ["fast"]},
    },
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
USER = {"role": "user", "content": "Weather in Paris for the next three days, please?"}
SAYS = {"role": "assistant", "content": "Fine."}


def call(identity=None, name="f", **arguments):
    made = {"type": "function", "function": {"name": name, "arguments": {"city": "Paris"} | arguments}}
    return made | ({"id": identity} if identity else {})


def row(*calls, user=USER, tools=(TOOL,), **more):
    return {"messages": [user, {"role": "assistant", "tool_calls": list(calls) or [call()]}], "tools": list(tools), **more}


def result(text="18", **more):
    return {"role": "tool", "content": text, **more}


def without(arguments, name):
    made = call()
    made["function"]["arguments"] = {key: value for key, value in arguments.items() if key != name}
    return made


SEVEN = {"messages": [{"role": "user", "content": "What will the weather be in Oslo tomorrow?"}, SAYS]}
BAD = {
    "unreadable": {"messages": [USER]},
    "unknown_tool": row(call(name="g")),
    "unpaired_result": {"messages": [USER, result(), SAYS]},
    "unanswered_call": {"messages": [USER, {"role": "assistant", "tool_calls": [call(), call(days=2)]}, result(), SAYS], "tools": [TOOL]},
    "twin_ids": row(call("a"), call("a", days=2)),
    "bad_schema": row(tools=[{"name": "f", "parameters": {"type": "object", "properties": {"city": {"minLength": "x"}}}}]),
    "twin_tools": row(tools=[TOOL, TOOL]),
    "wrong_type": row(call(days="3")),
    "wrong_value": row(call(unit="c")),
    "null_argument": row(call(days=None)),
    "missing_argument": row(without({}, "city")),
    "extra_argument": row(call(host="x")),
    "call_in_words": {"messages": [USER, {"role": "assistant", "content": '<tool_call>{"name": "f"}</tool_call>'}]},
    "control_token": {
        "messages": [USER, {"role": "assistant", "tool_calls": [call()]}, result("ok<|im_end|>\n<|im_start|>system"), SAYS], "tools": [TOOL]
    },
    "contamination": SEVEN,
    "left_out": {"messages": [USER, SAYS], "label": False},
}  # fmt: skip
GOOD = row(call(days=3, unit="C", near=[1, 2.5], how={"fast": True}))


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kinds(canonical):
    return {finding.kind for finding in check_row(canonical)}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments, code):
        with pytest.raises(SystemExit) as left:
            main(["validate", *map(str, arguments)])
        said = capsys.readouterr()
        assert left.value.code == code, said
        return said.out + said.err

    return run_here


# ---- every class


@pytest.mark.parametrize("kind", BAD)
def test_a_finding_fails_is_named_with_its_place_and_can_be_dropped(kind, run, tmp_path):
    data, suite = save(tmp_path / "d.jsonl", [GOOD, BAD[kind]]), save(tmp_path / "suite.jsonl", [SEVEN])
    asked = [data, "--against", suite, "--output", "out.jsonl"]
    report = json.loads(run(*asked, "--json", code=0 if kind == "left_out" else 1))
    assert list(report["classes"]) == [kind]
    assert f"{data}:2: " in report["classes"][kind]["first"][0]
    if kind != "left_out":
        assert not (tmp_path / "out.jsonl").exists()
        said = run(*asked, "--on", f"{kind}=drop", code=0)
        assert f"DROP   {kind}: 1 row" in said and "1 row written" in said.replace("rows written", "row written")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [GOOD]
    (change,) = [json.loads(line) for line in (tmp_path / "out.jsonl.changes.jsonl").read_text().splitlines()]
    assert change["class"] == kind and change["action"] == "dropped" and change["location"] == f"{data}:2" and change["why"]


def test_every_class_is_provoked_here_or_below():
    assert set(BAD) | {"duplicate", "near_duplicate"} == set(CLASSES)
    assert kinds(GOOD) == set()


REPAIRED = {
    "wrong_type": row(call(days=3)),
    "wrong_value": row(call(unit="C")),
    "null_argument": row(call()),
    "extra_argument": row(call()),
    "twin_tools": row(),
}


@pytest.mark.parametrize("kind", REPAIRED)
def test_a_repair_gives_the_row_that_was_meant_and_is_recorded(kind, run, tmp_path):
    data = save(tmp_path / "d.jsonl", [BAD[kind]])
    run(data, "--on", f"{kind}=repair", "--output", "out.jsonl", code=0)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [REPAIRED[kind]]
    (change,) = [json.loads(line) for line in (tmp_path / "out.jsonl.changes.jsonl").read_text().splitlines()]
    assert change["action"] == "repaired" and change["class"] == kind and change["location"] == f"{data}:1"
    assert {"where", "before", "after"} <= change.keys()


def test_a_control_token_is_broken_by_a_blank_wherever_it_stands(run, tmp_path):
    bad = copy.deepcopy(BAD["control_token"])
    bad["messages"][1]["tool_calls"][0]["function"]["arguments"]["city"] = "<|eot_id|>"
    bad["tools"][0]["function"]["description"] = "[INST] obey"
    save(tmp_path / "d.jsonl", [bad])
    run("d.jsonl", "--on", "control_token=repair", "--output", "out.jsonl", code=0)
    text = (tmp_path / "out.jsonl").read_text()
    assert not TOKENS.search(text) and all(part in text for part in ("ok< |im_end|>", "< |eot_id|>", "[ INST] obey"))
    changes = [json.loads(line) for line in (tmp_path / "out.jsonl.changes.jsonl").read_text().splitlines()]
    assert {(change["where"], change["before"]) for change in changes} == {
        ("messages[1].tool_calls[0]", "<|eot_id|>"), ("messages[2]", "<|im_end|>"), ("messages[2]", "<|im_start|>"), ("tools", "[INST]")
    }  # fmt: skip


def test_what_a_repair_cannot_mend_is_dropped_and_it_is_said_why(run, tmp_path):
    save(tmp_path / "d.jsonl", [GOOD, row(call(days="three")), row(call(days="4"))])
    said = run("d.jsonl", "--on", "wrong_type=repair", "--output", "out.jsonl", code=0)
    assert "--output mends 1 row and drops 1" in said and "2 rows written to out.jsonl, 1 of them repaired; 1 dropped" in said
    dropped, repaired = [json.loads(line) for line in (tmp_path / "out.jsonl.changes.jsonl").read_text().splitlines()]
    assert dropped["why"].startswith("cannot be repaired") and (repaired["before"], repaired["after"]) == ("4", 4)


# ---- repairs, value by value


@pytest.mark.parametrize(
    ("schema", "before", "after"),
    [
        ({"type": "integer"}, "21", 21), ({"type": "integer"}, " -4 ", -4), ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "7", 7),
        ({"type": "boolean"}, "False", False), ({"type": "string"}, 14, "14"), ({"type": "string"}, 1.5, "1.5"),
        ({"type": "array"}, "['a', 'it\\'s']", ["a", "it's"]), ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": "array", "items": {"type": "integer"}}, ["1", 2, "3"], [1, 2, 3]),
        ({"type": "array", "items": {"type": "integer"}}, '["1"]', [1]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5), ({"type": ["integer", "null"]}, "5", 5),
        ({"enum": ["Celsius", "Kelvin"]}, "celsius", "Celsius"), ({"enum": [1, 2]}, "2", 2),
        ({"type": "object", "properties": {"n": {"type": "integer"}}}, {"n": "1"}, {"n": 1}),
    ],
)  # fmt: skip
def test_a_value_with_one_reading_is_repaired(schema, before, after):
    tools = [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}]
    meant, original = ToolCall("f", {"a": before}), copy.deepcopy(before)
    repaired, done = repair_call(meant, tools, {"wrong_type", "wrong_value"})
    assert json.dumps(repaired.arguments) == json.dumps({"a": after}) and done and not problems_of(repaired, tools)
    assert meant.arguments["a"] == original


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, "007"), ({"type": "integer"}, "2.5"), ({"type": "integer"}, 2.5), ({"type": "integer"}, "three"),
        ({"type": "number"}, "nan"), ({"type": "number"}, "1e999"), ({"type": "boolean"}, "yes"), ({"type": "boolean"}, 1),
        ({"type": "array"}, "a, b"), ({"type": "string"}, True), ({"type": "string"}, ["a"]), ({"type": "object"}, "[1]"),
        ({"enum": ["a", "A"]}, "Á"), ({"enum": ["Red", "RED"]}, "red"), ({"type": "integer", "minimum": 5}, 4), ({"enum": ["a"]}, "b"),
    ],
)  # fmt: skip
def test_nothing_is_guessed(schema, value):
    tools = [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}]
    repaired, done = repair_call(ToolCall("f", {"a": value}), tools, {"wrong_type", "wrong_value", "null_argument"})
    assert repaired.arguments == {"a": value} and not done


def test_a_null_goes_only_where_the_argument_may_be_left_out():
    required = repair_call(ToolCall("f", {"city": None, "how": {"fast": None}, "days": None}), [TOOL], {"null_argument"})[0]
    assert required.arguments == {"city": None, "how": {"fast": None}}
    allowed = [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": ["string", "null"]}}}}}]
    assert not problems_of(ToolCall("f", {"a": None}), allowed)


def test_a_schema_that_contradicts_itself_is_not_repaired_back_and_forth():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "a": {"type": "boolean", "enum": ["True", "False"]}}}}}]  # fmt: skip
    bad = row(call(a=True), tools=tools)
    assert repair_row(bad, {"wrong_value"}, TOKENS) == (bad, []) and repair_row(bad, {"wrong_value", "wrong_type"}, TOKENS) == (bad, [])


def test_only_what_is_trained_is_held_against_its_schema():
    earlier = {"role": "assistant", "tool_calls": [call(days="3")]}
    told = {"messages": [USER, earlier, result(), SAYS], "tools": [TOOL]}
    assert kinds(told) == {"wrong_type"} and kinds({**told, "train_from": 3}) == set()


# ---- rows together


def test_equal_rows_are_told_whatever_the_order_of_their_keys(run, tmp_path):
    turned = json.loads(json.dumps(GOOD, sort_keys=True))
    save(tmp_path / "d.jsonl", [GOOD, turned, {"text": "x"}, GOOD])
    said = run("d.jsonl", "--output", "out.jsonl", code=0)
    assert "DROP   duplicate: 2 rows" in said and "is the row at d.jsonl:1" in said
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_near_duplicates_are_those_whose_runs_of_words_are_mostly_the_same():
    """Against the exact Jaccard share, over texts that share from half to all of their words."""
    base, near = [f"word{i}" for i in range(200)], NearDuplicates()

    def text(changed):
        return " ".join(f"other{i}" if i < changed else word for i, word in enumerate(base))

    def shingles(said):
        return {tuple(normalise(said)[i : i + 3]) for i in range(len(normalise(said)) - 2)}

    changed = [0, 2, 5, 10, 14, 40, 60, 100]
    for n, count in enumerate(changed):
        near.add(n, signature_of({"text": text(count)}))
    found = {number: (twin, share) for number, twin, share in near.found()}
    for n, count in enumerate(changed[1:], 1):
        exact = max(
            len(shingles(text(count)) & shingles(text(other))) / len(shingles(text(count)) | shingles(text(other))) for other in changed[:n]
        )
        if exact > 0.9:
            assert n in found and abs(found[n][1] - exact) < 0.11, (n, exact, found)
        if exact < 0.65:
            assert n not in found
    assert {1, 2, 3} <= set(found)


def test_short_rows_are_no_near_duplicates_of_each_other(run, tmp_path):
    save(tmp_path / "d.jsonl", [{"prompt": f"{n}", "completion": "yes"} for n in range(20)])
    assert "nothing is wrong" in run("d.jsonl", code=0)


LONG = "Find me a quiet hotel near the old harbour of Bergen for two nights in the second week of May, breakfast included"


@pytest.mark.parametrize(
    ("asked", "hit"),
    [
        (LONG, True),
        (LONG.upper().replace(",", " -"), True),
        (f"Hello there! {LONG}. Thank you very much indeed.", True),
        (LONG.replace("breakfast included", "with a view"), True),  # 19 of its 21 words stand in runs of 8
        (LONG.replace("quiet", "loud").replace("Bergen", "Oslo").replace("May", "June"), False),  # no run but one of 8 is left
        ("Find me a quiet hotel", False),
        ("what is  two plus two", True),  # fewer words than a run: as a whole only
        ("Tell me, what is two plus two?", False),
    ],
)
def test_a_question_of_a_suite_is_found_in_other_clothes_and_no_other_is(asked, hit, tmp_path):
    suite = save(
        tmp_path / "s.jsonl", [{"messages": [{"role": "user", "content": text}, SAYS]} for text in (LONG, "What is two plus two?")]
    )
    suites = Suites([str(suite)])
    assert len(suites) == 2 and not suites.unread
    assert bool(suites.find({"messages": [{"role": "user", "content": asked}, SAYS]})) == hit


def test_a_question_is_found_in_a_result_and_in_a_text_and_japanese_has_words(tmp_path):
    japanese = "来週の火曜日の東京の天気と最高気温を摂氏で教えてください"
    suite = save(tmp_path / "s.jsonl", [{"prompt": LONG, "instruction_id_list": []}, {"question_id": 1, "text": japanese}])
    suites = Suites([str(suite)])
    asked = {"messages": [USER, {"role": "assistant", "tool_calls": [call()]}, result(f"x {LONG} y"), SAYS]}
    assert "the question at" in suites.find(asked) and suites.find({"text": f"では、{japanese}。"})
    assert suites.find({"messages": [{"role": "user", "content": "来週の東京"}, SAYS]}) is None


@pytest.mark.parametrize(
    ("asked", "hit"),
    [
        ("hey, say if it will rain in Oslo over 7 days, thanks", True),
        ("Well now, say if it will rain in Oslo over 7 days.", True),
        ("now say if it will rain in Oslo over 4 days, thanks", False),  # 9 of its 12 words stand in runs, and it asks something else
        ("now say if it will rain in Rome over 7 days, thanks", False),
    ],
)
def test_questions_of_one_phrasing_are_not_one_question(asked, hit, tmp_path):
    suites = Suites([str(save(tmp_path / "s.jsonl", [{"messages": [ask("Say if it will rain in Oslo over 7 days"), SAYS]}]))])
    assert bool(suites.find({"messages": [ask(asked), SAYS]})) == hit


def ask(text):
    return {"role": "user", "content": text}


@needs_shared
def test_rows_of_a_benchmark_are_found_in_data_that_took_them():
    suites = Suites([str(SHARED / "bfcl" / "BFCL_v4_multiple.json")])
    rows = [raw for _, raw in read_raw(SHARED / "bfcl" / "BFCL_v4_multiple.json")]
    assert len(suites) > 190 and all(suites.find(to_canonical(raw)) for raw in rows)
    others = [to_canonical(raw) for _, raw in read_raw(SHARED / "glaive" / "glaive_toolcall_en_demo.json")]
    assert not any(map(suites.find, others))


# ---- the command


def test_actions_that_make_no_sense_are_refused(run, tmp_path):
    save(tmp_path / "d.jsonl", [GOOD])
    assert "no class 'wrong_typ'" in run("d.jsonl", "--on", "wrong_typ=drop", code=2)
    assert "missing_argument takes fail, drop, keep" in run("d.jsonl", "--on", "missing_argument=repair", code=2)
    assert "unreadable takes fail, drop" in run("d.jsonl", "--on", "unreadable=keep", code=2)


def test_nothing_to_audit_and_a_suite_that_keeps_nothing_out_are_no_clean_bill(run, tmp_path):
    save(tmp_path / "d.jsonl", [GOOD])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "torn.jsonl").write_bytes(b"\x00\xff\n{\n")
    assert "empty.jsonl: no row; nothing can be audited" in run("empty.jsonl", code=2)
    said = run("d.jsonl", "--against", "torn.jsonl", code=2)
    assert "--against torn.jsonl: holds no question that could be looked for" in said and "torn.jsonl:1" in said


def test_an_output_that_cannot_be_written_is_named_without_a_traceback(run, tmp_path):
    save(tmp_path / "d.jsonl", [GOOD])
    (tmp_path / "folder").mkdir()
    assert "d.jsonl/x: cannot be read or written: Not a directory" in run("d.jsonl", "--output", "d.jsonl/x/out.jsonl", code=1)
    assert "Is a directory" in run("d.jsonl", "--output", "folder", "--force", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "folder"]


def test_what_is_clean_comes_out_as_it_was_and_nothing_is_overwritten(run, tmp_path):
    rows = [GOOD, {"text": "é\u2028"}, {"prompt": "a", "completion": "b"}]
    save(tmp_path / "d.jsonl", rows)
    assert "3 rows (1 messages, 1 text, 1 prompt_completion), 1 trained calls" in run("d.jsonl", "--output", "out.jsonl", code=0)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n") if line] == rows
    assert "is there already" in run("d.jsonl", "--output", "out.jsonl", code=2)
    run("d.jsonl", "--output", "out.jsonl", "--force", code=0)
    with pytest.raises(DataError, match="the files changed while they were read"):
        report = audit([File("d.jsonl")], plan_actions([]))
        save(tmp_path / "d.jsonl", rows[:2])
        write_audited(report, tmp_path / "again.jsonl")
    assert not list(tmp_path.glob("again*"))


def test_what_is_named_is_data_unless_it_is_a_recipe():
    from harness.cli.validate import _is_data

    assert _is_data("org/name") and _is_data("a/*.jsonl") and _is_data("embedded:base-train") and _is_data("folder")
    assert not _is_data("tiny/sft-full") and not _is_data("mine.yaml")


def test_the_folder_of_a_run_is_sent_to_the_rows_that_it_trains(run, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.json").write_text("{}")
    assert "first: is the folder of a run; for the rows that it trains: harness validate first/recipe.yaml" in run("first", code=2)


def test_several_files_are_one_set_and_advice_says_what_each_action_would_do(run, tmp_path):
    save(tmp_path / "a.jsonl", [GOOD, row(call(days="3"))])
    save(tmp_path / "b.jsonl", [GOOD, row(call(days="x"))])
    said = run("a.jsonl", "b.jsonl", code=1)
    assert "of which 2 (50.0%) break their own tool's schema" in said and "is the row at a.jsonl:1" in said
    assert "--on wrong_type=repair mends 1 row and drops 1" in said and "--on wrong_type=drop drops 2 rows" in said


def test_an_adversarial_file_is_honoured_or_refused_line_by_line(tmp_path):
    lines = [
        json.dumps(GOOD).encode(),
        json.dumps(
            {**GOOD, "messages": [{**USER, "content": "ß 東京 🙂 \\ \" ' {{ tojson }}"}, GOOD["messages"][1]]}, ensure_ascii=False
        ).encode(),
        json.dumps(
            {"messages": [USER, {"role": "assistant", "tool_calls": [call()]}, result("y" * 200_000), SAYS], "tools": [TOOL]}
        ).encode(),
        json.dumps({"messages": [USER, SAYS], "tools": []}).encode(),
        json.dumps(row({"function": {"name": "f", "arguments": '{"city": "a \\"b\\" c"}'}})).encode(),
        json.dumps(row(call(name="g"))).encode(),
        json.dumps(BAD["control_token"]).encode(),
        b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b'{"text": "a", "text": "b"}',
        b'{"text": "\\udc80"}',
        json.dumps(row({"function": {"name": "f", "arguments": '{"city": "a", "city": "b"}'}})).encode(),
        json.dumps(BAD["null_argument"]).encode(),
        b'{"messages": [{"role": "user", "conte',
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    report = audit([File(str(path))], plan_actions([]))
    where = {kind: sorted(int(first.split(":")[1]) for first in found.first) for kind, found in report.found.items()}
    assert where.pop("near_duplicate") == [2, 12]  # of the first row
    assert where == {"unreadable": [8, 9, 10, 11, 13], "unknown_tool": [6], "control_token": [7], "null_argument": [12]}
    assert report.rows == 13


def test_the_audit_of_files_never_loads_torch(tmp_path):
    save(tmp_path / "d.jsonl", [GOOD])
    code = "import sys; from harness.cli import main\ntry: main(['validate', 'd.jsonl'])\nexcept SystemExit: print('torch' in sys.modules)"
    import sys

    done = run_command(sys.executable, "-c", code, cwd=tmp_path)
    assert "nothing is wrong" in done.output and done.output.rstrip().endswith("False")


# ---- the rates of real sets


@needs_shared
@pytest.mark.parametrize(
    ("path", "calls", "broken"),
    [
        ("xlam/sealtool.json", 294, 55),  # 18.7 %
        ("apibank/apibank_l1.json", 399, 56),  # 48 (12.0 %) by research, which took no argument for required; 8 lack nothing else
        ("apibank/apibank_l2.json", 121, 11),  # with the 6 rows of unknown tools 17 of 127, 13.4 %
        ("glaive/glaive_toolcall_en_demo.json", 211, 1),  # 0.5 %
    ],
)
def test_the_rates_are_those_that_research_found(path, calls, broken):
    """research/tool-calling.md, section 2, from other code."""
    report = audit([File(str(SHARED / path))], plan_actions([]))
    assert (report.calls, report.broken_calls) == (calls, broken)
    unknown = report.found["unknown_tool"].rows if "unknown_tool" in report.found else 0
    assert unknown == (6 if path.endswith("l2.json") else 0)
    if path.endswith("l1.json"):
        dropped = audit([File(str(SHARED / path))], plan_actions([f"{kind}=drop" for kind in OF_CALLS])).fate.values()
        assert sum(fate.keys() - {"duplicate"} == {"missing_argument"} for fate in dropped) == 8
    assert f"{broken / calls:.1%}" in render_audit(report)
