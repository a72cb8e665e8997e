"""What suites ask and what they call right: on real rows, and on rows that are judged here by hand."""

import json
import random
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared

from harness.errors import DataError, EvaluationError, RecipeError
from harness.evaluate.items import Item, Result
from harness.evaluate.report import Results, compare, load_results, summarise_category
from harness.evaluate.suites import SUITES, apibench, bfcl, calls, find_suite, loss, structured, when2call
from harness.tasks.answering import Settings
from harness.tasks.evaluate import choose_items, key_of, load_suites
from harness.tools import read_gold, render_gold

BFCL, APIBENCH = SHARED / "bfcl", SHARED / "apibench"
WHEN2CALL = SHARED / "when2call" / "when2call_test_llm_judge.jsonl"
STRUCTURED = SHARED / "structured_outputs"


def rows_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def save(folder: Path, name: str, rows: list[dict]) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def hermes(*made: tuple[str, dict]) -> str:
    return "\n".join(f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>" for name, arguments in made)


def test_every_suite_is_a_module_of_its_own_and_another_name_is_refused():
    for name in SUITES:
        suite = find_suite(name)
        assert suite.NEEDS in ("answers", "choices", "loss") and callable(suite.load) and hasattr(suite, "NOTE")
        assert suite.NEEDS == "loss" or callable(suite.judge)
    with pytest.raises(RecipeError, match='no such suite; did you mean "bfcl"'):
        find_suite("bfc")


# ---- BFCL


@needs_shared
def test_gold_is_right_in_every_category_of_bfcl_and_the_next_questions_gold_is_not():
    loaded = bfcl.load([BFCL])
    assert len(loaded.items) == 1240 and len(loaded.files) == 9
    wrong = 0
    for category in ("simple_python", "multiple", "parallel", "parallel_multiple"):
        items = [item for item in loaded.items if item.category == category][::8]
        said = []
        for item in items:
            question = item.gold["question"]
            gold = render_gold(read_gold(question.gold, question.functions))
            said.append(hermes(*((call.name, call.arguments) for call in gold)))
        verdicts = [bfcl.judge(item, text) for item, text in zip(items, said, strict=True)]
        assert [verdict.failure for verdict in verdicts] == [None] * len(items)
        assert all(verdict.measures == {"strict": (1, 1)} for verdict in verdicts)
        wrong += sum(bfcl.judge(item, text).failure is not None for item, text in zip(items, said[1:], strict=False))
    assert wrong == 50 + 3 * 25 - 4  # the last of each category has no next one


@needs_shared
def test_a_broken_call_is_an_abstention_to_the_leaderboard_and_none_to_strict():
    item = next(item for item in bfcl.load([BFCL / "BFCL_v4_irrelevance.json"]).items)
    assert item.messages[-1]["role"] == "user" and item.tools[0]["function"]["parameters"]["type"] == "object"
    verdict = bfcl.judge(item, '<tool_call>{"name": "f", "argum')
    assert verdict.failure is None and verdict.measures == {"strict": (0, 1)}
    assert bfcl.judge(item, hermes((item.tools[0]["function"]["name"], {}))).failure == "needless_call"


@needs_shared
def test_bfcl_questions_without_their_answers_are_refused(tmp_path):
    (tmp_path / "BFCL_v4_multiple.json").write_bytes((BFCL / "BFCL_v4_multiple.json").read_bytes())
    with pytest.raises(DataError, match='"multiple_0" has no answer; its file must lie in possible_answer/'):
        bfcl.load([tmp_path])


# ---- APIBench


@needs_shared
@pytest.mark.parametrize(
    ("hub", "right", "items"), [("torchhub", 186, 186), ("tensorflowhub", 658, 685), ("huggingface", 858, 904)]
)  # what is missing: entries with one api_call and several domains, of which the first counts, and gold that is no Python
def test_what_gold_gets_in_apibench(hub, right, items):
    gold = rows_in(APIBENCH / apibench.EVAL_FILES[hub])
    asked = [item for item in apibench.load([APIBENCH]).items if item.category == hub]
    verdicts = [apibench.judge(item, gold[int(item.id.rpartition("_")[2]) - 1]["api_call"]) for item in asked]
    assert (sum(verdict.failure is None for verdict in verdicts), len(verdicts)) == (right, items)


APIS = [
    apibench.Api("torch.hub.load", ("pytorch/vision", "resnet18"), "Classification"),
    apibench.Api("torch.hub.load", ("snakers4/silero-models", "silero_tts"), "Text-to-Speech"),
]


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("torch.hub.load(repo_or_dir='pytorch/vision', model='resnet18', pretrained=True)", None),
        ('Sure:\n```python\nimport torch\nmodel = torch.hub.load("pytorch/vision:v0.10.0", "resnet18")\n```', None),
        ("<<<api_call>>>: torch.hub.load('pytorch/vision', 'resnet18'), <<<api_provider>>>: PyTorch(x)", None),
        # Not Python, and as it stands in the published gold.
        ("torch.hub.load(repo_or_dir='pytorch/vision', 'v', model='resnet18')", None),
        ("torch.hub.load('snakers4/silero-models', 'silero_tts')", "wrong_domain"),
        ("torch.hub.load('pytorch/vision', 'resnet9000')", "hallucination"),
        # The right arguments in a call of another function: the published script takes this for an entry.
        ("keras.load('pytorch/vision', 'resnet18')", "hallucination"),
        ("I would use resnet18 of pytorch/vision.", "no_call"),
        ("<<<api_call>>>: none <<<api_provider>>>: torch.hub.load('pytorch/vision', 'resnet18')", "no_call"),
        ("", "no_call"),
        ("f(" * 3000 + ")" * 3000, "no_call"),
    ],
)
def test_an_api_is_right_when_an_entry_of_its_function_and_key_arguments_has_the_domain(text, failure):
    item = Item("torchhub_1", "torchhub", [], [], {"domain": "Classification", "apis": APIS})
    verdict = apibench.judge(item, text)
    assert verdict.failure == failure
    assert verdict.measures == {"hallucination": (int(failure == "hallucination"), 1)}


# ---- When2Call


@needs_shared
def test_when2call_has_four_answers_to_each_of_its_rows():
    items = when2call.load([WHEN2CALL]).items
    assert len(items) == len({item.id for item in items}) == 300
    assert all(list(item.gold["choices"]) == list(when2call.CHOICES) for item in items)
    assert all("tool_calls" in item.gold["choices"]["tool_call"] for item in items)
    verdicts = [when2call.judge(item, "tool_call") for item in items]
    assert sum(verdict.failure is None for verdict in verdicts) == 100
    # The paper's rate is over the rows that offer no tools.
    without = [verdict for verdict in verdicts if verdict.measures]
    assert len(without) == 17 and all(verdict.measures == {"tool_hallucination": (1, 1)} for verdict in without)
    assert {verdict.failure for verdict in verdicts} == {None, "chose_tool_call"}


# ---- structured outputs


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
EXPECTED = {"city": "Rome", "days": 3, "with": ["Ann", {"age": 4}]}


def own_item(tmp_path, **row) -> Item:
    asked = {"messages": [{"role": "user", "content": "Rome, three days."}], "schema": SCHEMA, **row}
    return structured.load([save(tmp_path, "own.jsonl", [asked])]).items[0]


@pytest.mark.parametrize(
    ("text", "failure", "valid"),
    [
        ('{"city": "Rome", "days": 3}', None, 1),
        ('<think>hm</think>\n{"city": "Rome"}<|im_end|>', None, 1),
        ('{"city": "Rome", "days": "3"}', "schema", 0),
        ('{"days": 3}', "schema", 0),
        ('```json\n{"city": "Rome"}\n```', "fenced", 0),
        ('Here: {"city": "Rome"}', "not_json", 0),
        ("[" * 100_000, "not_json", 0),
        ('{"city": "Rome", "more": NaN}', "not_json", 0),
        (" ", "empty", 0),
    ],
)
def test_structured_output_is_json_that_the_schema_takes_and_nothing_around_it(tmp_path, text, failure, valid):
    verdict = structured.judge(own_item(tmp_path), text)
    assert (verdict.failure, verdict.measures) == (failure, {"valid": (valid, 1)})


@pytest.mark.parametrize(
    ("said", "failure", "fields"),
    [
        (EXPECTED, None, 4),
        ({**EXPECTED, "days": 3.0}, None, 4),
        ({**EXPECTED, "days": 4}, "field", 3),
        ({"city": "Rome"}, "field", 1),
        ({**EXPECTED, "more": 1}, "field", 4),
        ({**EXPECTED, "days": "3"}, "schema", 3),
        ({**EXPECTED, "with": ["Ann"]}, "field", 3),
    ],
)
def test_fields_are_counted_by_their_path_and_all_have_to_be_equal(tmp_path, said, failure, fields):
    verdict = structured.judge(own_item(tmp_path, expected=EXPECTED), json.dumps(said))
    assert (verdict.failure, verdict.measures["fields"]) == (failure, (fields, 4))


def instance_of(schema: dict) -> object:
    """The least that a schema takes."""
    kind = schema["type"] if isinstance(schema.get("type"), str) else schema["type"][0]
    if kind == "object":
        return {name: instance_of(part) for name, part in schema.get("properties", {}).items()}
    return {"array": [], "string": "x", "integer": 1, "number": 1.5, "boolean": True, "null": None}[kind]


@needs_shared
def test_nemo_gyms_tool_calls_are_judged_inside_their_wrapper():
    file = STRUCTURED / "structured_outputs_v4_example.jsonl"
    loaded = structured.load([file])
    assert len(loaded.items) == 5 and not loaded.left_out
    for item, raw in zip(loaded.items, rows_in(file), strict=True):
        key = raw["tool_payload_key"]
        payload = instance_of(json.loads(raw["schema_str"]))
        arguments = {key: payload} if key else payload
        assert structured.judge(item, hermes((raw["tool_name"], arguments))).failure is None
        assert structured.judge(item, hermes((raw["tool_name"], {"x": payload}))).failure == "schema"
        assert structured.judge(item, hermes(("other", arguments))).failure == "wrong_tool"
        assert structured.judge(item, json.dumps(arguments)).failure == "no_call"
        assert structured.judge(item, hermes((raw["tool_name"], arguments)) * 2).failure == "wrong_count"


def test_of_nemo_gyms_schemas_all_properties_are_required_and_no_others_taken_at_any_depth(tmp_path):
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    raw = {
        "responses_create_params": {"input": [{"role": "user", "content": "As JSON."}]},
        "schema_type": "json",
        "schema_str": json.dumps({"type": "object", "properties": {"b": {"type": "array", "items": inner}}}),
    }
    (item,) = structured.load([save(tmp_path, "n.jsonl", [raw])]).items
    # A property that is called as a keyword is.
    of_an_agent = json.dumps({"type": "object", "properties": {"properties": {"type": "array", "items": inner}}})
    (agents,) = structured.load([save(tmp_path, "p.jsonl", [{**raw, "schema_str": of_an_agent}])]).items
    assert structured.judge(agents, '{"properties": [{"a": 1}]}').failure is None
    assert structured.judge(agents, '{"properties": [{}]}').failure == structured.judge(agents, "{}").failure == "schema"
    with pytest.raises(DataError, match=r"q\.jsonl:1: responses_create_params has no list of messages"):
        structured.load([save(tmp_path, "q.jsonl", [{**raw, "responses_create_params": {"input": "As JSON."}}])])
    for text, failure in (
        ('{"b": [{"a": 1}]}', None),
        ('{"b": [{"a": 1, "c": 2}]}', "schema"),
        ('{"b": [{"a": 1}], "c": 2}', "schema"),
        ('{"b": [{}]}', "schema"),
        ("{}", "schema"),
    ):
        assert structured.judge(item, text).failure == failure, text


@needs_shared
def test_other_formats_than_json_are_left_out_and_counted():
    loaded = structured.load([STRUCTURED / "structured_outputs_v3_example.jsonl"])
    assert len(loaded.items) == 1
    assert loaded.left_out == {f"answers in {kind}, which is not judged here": n for kind, n in (("toml", 1), ("csv", 2), ("yaml", 1))}


@needs_shared
def test_what_nemo_gym_gave_no_reward_for_stood_in_a_fence():
    item = Item("x", "text", [], [], {"schema": {}, "tool": None, "key": None})
    for raw in rows_in(STRUCTURED / "example_rollouts.jsonl"):
        text = "".join(part["text"] for output in raw["response"]["output"] for part in output["content"])
        assert structured.judge(item, text).failure == (None if raw["reward"] else "fenced")


def test_a_schema_that_is_none_is_refused_with_its_line(tmp_path):
    file = save(tmp_path, "bad.jsonl", [{"messages": [{"role": "user", "content": "?"}], "schema": {"type": "dict"}}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: schema: is no JSON Schema"):
        structured.load([file])


# ---- one's own


TOOL = {"type": "function", "function": {"name": "trip", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}}


def conversation(answer: dict, **more) -> dict:
    return {"messages": [{"role": "user", "content": "To Rome."}, {"role": "assistant", **answer}], "tools": [TOOL], **more}


def test_a_conversation_is_asked_without_its_last_turn_which_is_what_is_right(tmp_path):
    call = {"tool_calls": [{"type": "function", "function": {"name": "trip", "arguments": {"to": "Rome"}}}]}
    rows = [conversation(call), conversation(call), conversation({"content": "Gladly."}), conversation(call, category="hard")]
    loaded = calls.load([save(tmp_path, "rows.jsonl", rows)])
    # The same conversation is one item, whatever it is called.
    assert [item.category for item in loaded.items] == ["calls", "no_calls"] and loaded.left_out == {"the same row again": 2}
    wants, words = loaded.items
    assert wants.messages == [{"role": "user", "content": "To Rome."}] and "Rome" not in json.dumps(wants.tools)
    assert calls.judge(wants, hermes(("trip", {"to": "Rome"}))) == calls.Verdict(None, "", {"valid_schema": (1, 1)})
    assert calls.judge(wants, hermes(("trip", {"to": 3}))).failure == "wrong_type"
    assert calls.judge(wants, "To Rome!").failure == "no_call"
    assert calls.judge(words, "To Rome!").failure is None
    assert calls.judge(words, "").failure == "no_answer"


def test_names_are_shown_with_underscores_in_conversations_and_structured_calls_too(tmp_path):
    def tool(name: str) -> dict:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}

    call = {"tool_calls": [{"type": "function", "function": {"name": "math.root", "arguments": {"n": 4}}}]}
    row = conversation(call)
    row["messages"] += [{"role": "tool", "name": "math.root", "content": "2"}, {"role": "assistant", **call}]
    raw = {
        "schema_type": "json",
        "response_mode": "tool_call",
        "schema_str": '{"type": "object", "properties": {"n": {"type": "integer"}}}',
    }
    raw |= {"tool_name": "math.root", "responses_create_params": {"input": row["messages"][:1], "tools": [tool("math.root")]}}
    own, nemo = save(tmp_path, "own.jsonl", [{**row, "tools": [tool("math.root")]}]), save(tmp_path, "nemo.jsonl", [raw])
    for suite, file in ((calls, own), (structured, nemo)):
        (plain,), (shown,) = suite.load([file]).items, suite.load([file], underscore_names=True).items
        assert shown.id == plain.id and "math.root" not in json.dumps([shown.messages, shown.tools, key_of(shown)])
        right, wrong = hermes(("math_root", {"n": 4})), hermes(("math.root", {"n": 4}))
        assert suite.judge(shown, right).failure is None and suite.judge(shown, wrong).failure == "wrong_tool"
        assert suite.judge(plain, wrong).failure is None


def test_a_row_that_is_no_conversation_is_refused_with_its_line_and_read_for_its_loss(tmp_path):
    file = save(tmp_path, "rows.jsonl", [{"text": "once"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a row of text; must be a conversation"):
        calls.load([file])
    assert loss.load([file]).items[0].gold == {"row": {"text": "once"}}


# ---- which items


def test_rows_of_one_id_that_ask_different_things_are_refused_and_the_same_row_counts_once(tmp_path):
    row = {"id": "7", "messages": [{"role": "user", "content": "?"}], "schema": SCHEMA}
    one, other = (save(tmp_path, f"{n}.jsonl", [{**row, **more}]) for n, more in enumerate(({}, {"expected": {"city": "Rome"}})))
    assert structured.load([one, one]).left_out == {"the same row again": 1}
    with pytest.raises(DataError, match=r'1\.jsonl:1: the id "7" stands in .*0\.jsonl:1 already, with another row'):
        structured.load([one, other])


def test_files_without_a_question_and_a_question_that_would_count_twice_are_refused(tmp_path):
    empty = save(tmp_path, "empty.jsonl", [])
    answers = {choice: "words" for choice in when2call.CHOICES} | {"tool_call": '{"name": "f", "arguments": {}}'}
    row = {"uuid": "u", "question": "?", "correct_answer": "direct", "answers": answers, "tools": []}
    file = save(tmp_path, "rows.jsonl", [row])
    assert len(load_suites([("when2call", [file])], Settings())[0].items) == 1
    for files, words in (([empty], "empty.jsonl: holds nothing that could be asked"), ([file, file], "u is there 2 times")):
        with pytest.raises(DataError, match=words):
            load_suites([("when2call", files)], Settings())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # It would be chosen always: the log-probability of nothing is 0.
        ({"answers": {"direct": " "}}, "each of the answers must be text that is not empty"),
        ({"answers": {"cannot_answer": None}}, "each of the answers must be text that is not empty"),
        ({"tools": ["{bad"]}, "a tool is text that is not JSON"),
    ],
)
def test_a_row_of_when2call_that_cannot_be_asked_is_named_with_its_line(tmp_path, change, words):
    answers = {choice: "words" for choice in when2call.CHOICES} | {"tool_call": '{"name": "f", "arguments": {}}'}
    row = {"uuid": "u", "question": "?", "correct_answer": "direct", "tools": [], **change, "answers": answers | change.get("answers", {})}
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{words}"):
        when2call.load([save(tmp_path, "rows.jsonl", [row])])


def test_items_are_chosen_by_their_content_so_many_of_each_category():
    items = [Item(f"{n}", "ab"[n % 2], [{"role": "user", "content": f"{n}" * (n + 1)}], [], {}) for n in range(20)]
    shuffled = random.Random(0).sample(items, 20)
    few, more = choose_items(items, 3), choose_items(items, 5)
    assert choose_items(shuffled, 3) == few and len(few) == 6 and len(more) == 10
    assert {item.id for item in few} < {item.id for item in more}
    assert [item.category for item in few].count("a") == 3
    assert len(choose_items(items, None)) == 20 and len({key_of(item) for item in items}) == 20


# ---- numbers


def row(id: str, correct: bool | None, failure: str | None = None, *, category="c", suite="calls", key="k", **more) -> dict:
    plain = {
        "suite": suite,
        "id": id,
        "category": category,
        "correct": correct,
        "failure": failure,
        "detail": "",
        "measures": {},
        "key": key,
    }
    return plain | {"said": "", "prompt_tokens": 10, "answer_tokens": 5, "ended": True, "loss": None, "scores": {}} | more


def test_a_category_by_hand():
    rows = [
        row("1", True, measures={"strict": (1, 1), "fields": (3, 4)}),
        row("2", False, "malformed", measures={"strict": (0, 1), "fields": (1, 1)}, ended=False),
        row("3", False, "too_long"),
    ]
    found = summarise_category(rows)
    assert (found["n"], found["correct"], found["rate"]) == (3, 1, 1 / 3)
    assert found["interval"] == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert found["by_class"] == {"right": 1, "malformed": 1, "too_long": 1}
    assert found["measures"]["strict"] == {"count": 1, "of": 2, "rate": 0.5, "interval": pytest.approx((0.0945, 0.9055), abs=1e-4)}
    assert found["measures"]["fields"] == {"count": 4, "of": 5, "rate": 0.8, "interval": None}
    assert (found["cut_off"], found["asked_in_vain"], found["prompt_tokens"], found["answer_tokens"]) == (1, 1, 30, 15)


def test_a_loss_is_the_mean_over_tokens_and_not_over_rows():
    found = summarise_category([row("1", None, loss=2.0, answer_tokens=1), row("2", None, loss=4.0, answer_tokens=7)])
    assert found["loss"] == 0.75 and found["perplexity"] == pytest.approx(2.117)
    assert (found["n"], found["read"]) == (2, 2) and "rate" not in found


def results(folder: str, rows: list[dict], **settings) -> Results:
    return Results(Path(folder), {"settings": {"temperature": 0.0, **settings}, "suites": {"calls": {"files": {"f": "1"}}}}, rows)


def test_two_evaluations_are_compared_item_by_item_and_many_categories_cost_significance():
    first = [row(f"{n}", n < 10, category="a") for n in range(12)] + [row(f"b{n}", n < 6, category="b") for n in range(8)]
    second = [row(f"{n}", n < 2, category="a") for n in range(13)] + [row(f"b{n}", n > 5, category="b") for n in range(8)]
    found = compare(results("one", first), results("two", second, temperature=1.0))
    a, b = found["categories"]
    assert (a["both"], a["only_this"], a["only_against"], a["neither"]) == (2, 8, 0, 2)
    assert a["p"] == 2 / 2**8 and a["p_holm"] == 2 * 2 / 2**8
    assert (b["only_this"], b["only_against"]) == (6, 2) and b["p"] == 2 * (1 + 8 + 28) / 2**8 == b["p_holm"]
    assert (a["rate"], a["rate_against"]) == (10 / 12, 2 / 12)
    assert (found["only_in_this"], found["only_in_against"]) == (0, 1)
    assert found["other_settings"] == {"temperature": [0.0, 1.0]}


def test_what_was_asked_otherwise_is_not_compared():
    with pytest.raises(EvaluationError, match='another question as calls "1" than one'):
        compare(results("one", [row("1", True)]), results("two", [row("1", True, key="other")]))
    with pytest.raises(EvaluationError, match="shares no item"):
        compare(results("one", [row("1", True)]), results("two", [row("2", True)]))


def test_results_are_read_again_as_what_they_were():
    found = results("one", [row("1", True), row("2", False, "no_call"), row("3", None, suite="loss")])
    assert found.results("calls") == [Result("1", "c", True, None, "", 10, 5), Result("2", "c", False, "no_call", "", 10, 5)]
    assert found.results("loss") == []


def test_results_that_are_not_whole_are_named_with_the_remedy(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "items.jsonl").write_text('{"id": "1"}\n{"id": ')
    with pytest.raises(EvaluationError, match="its summary.json or items.jsonl is not whole .* give its evaluation's command again"):
        load_results(tmp_path)
