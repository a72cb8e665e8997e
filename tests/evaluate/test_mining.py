"""Preference pairs from a model's failures. The model is planted: a table from question to output, so that every failure is known."""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MICRO_TEMPLATE, REPOSITORY, harness
from transformers import AutoTokenizer

from harness.cli import main
from harness.data import held_out_rows
from harness.data.overlap import Overlap
from harness.data.prompts import question_of
from harness.data.rows import SourceRow, content_digest
from harness.data.sources import load_rows, mix
from harness.embedded import resolve
from harness.evaluate import mining
from harness.evaluate.edits import edits_of
from harness.evaluate.mining import Scribe, known_questions, mine, report_of, select_cases, warnings_about
from harness.recipe import load, render_recipe
from harness.recipe.schema import Source
from harness.run import RunDir
from harness.tasks import pairs as task
from harness.tools import FAILURES, ToolCall, check_call, score

TOOLS = [
    {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "wind": {"type": "number"}},
            "required": ["city"],
        },
    },
    {
        "name": "light",
        "description": "Switch a light",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}, "level": {"type": "number"}},
            "required": ["room", "on"],
        },
    },
]
PARIS, HALL = ("weather", {"city": "Paris", "days": 3}), ("light", {"room": "hall", "on": True, "level": 5})


def hermes(*calls: tuple[str, dict]) -> str:
    return "\n".join(f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>" for name, arguments in calls)


@dataclass(frozen=True)
class Planted:
    question: str
    gold: list[tuple[str, dict]] | str
    said: str
    outcome: str
    """A failure, `right`, or why it becomes no pair."""
    ended: bool = True


BROKEN = '<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": }}</tool_call>'
PLANTED = [
    Planted("malformed", [PARIS], BROKEN, "malformed"),
    Planted("malformed beside words", [PARIS], f"Let me see. {BROKEN}", "malformed"),
    Planted("says it in words", [PARIS], "It rains in Paris.", "no_call"),
    Planted("calls for nothing", "No tool can do that.", hermes(HALL), "unneeded_call"),
    Planted("makes a tool up for nothing", "No tool can do that.", hermes(("joke", {})), "unneeded_call"),
    Planted("forgets the second", [PARIS, HALL], hermes(PARIS), "wrong_count"),
    Planted("takes the other tool", [PARIS], hermes(("light", {"city": "Paris", "days": 3})), "wrong_tool"),
    Planted("makes a tool up", [PARIS], "Wait. " + hermes(("get_wether", {"city": "Paris", "days": 3})), "wrong_tool"),
    Planted("in another notation", [PARIS], '[light(city="Paris", days=3)]', "wrong_tool"),
    Planted("leaves one out", [PARIS], hermes(("weather", {"city": "Paris"})), "missing_argument"),
    Planted("adds one", [PARIS], hermes(("weather", {"city": "Paris", "days": 3, "wind": 1})), "extra_argument"),
    Planted("number as text", [PARIS], hermes(("weather", {"city": "Paris", "days": "3"})), "wrong_type"),
    Planted("true is no number", [HALL], hermes(("light", {"room": "hall", "on": 1, "level": 5})), "wrong_type"),
    Planted("another city", [PARIS], hermes(("weather", {"city": "Rome", "days": 3})), "wrong_value"),
    Planted("a call and then words", [PARIS], hermes(("weather", {"city": "Rome", "days": 3})) + " Done.", "wrong_value"),
    # Secretly right.
    Planted("right", [PARIS], hermes(PARIS), "right"),
    Planted("right in another order", [PARIS, HALL], hermes(HALL, PARIS), "right"),
    Planted("right as another number", [HALL], hermes(("light", {"room": "hall", "on": True, "level": 5.0})), "right"),
    Planted("right by other keys", [PARIS], hermes(("weather", {"days": 3, "city": "Paris"})), "right"),
    Planted("right in other words", "No tool can do that.", "I cannot.", "right"),
    Planted("right in another notation", [PARIS], '[weather(days=3, city="Paris")]', "right"),
    # No pair.
    Planted("cut off", [PARIS], '<tool_call>{"name": "weather", "arg', "cut_off", ended=False),
    Planted("cut off in words", [PARIS], "It is wrong to", "cut_off", ended=False),
    Planted("opens a turn", [PARIS], "It <|user|> rains.", "control_token"),
    Planted("is silent", "No tool can do that.", "", "no_row"),
    Planted("is silent where a call was wanted", [PARIS], "", "no_row"),
    Planted("half a character", [PARIS], "It ra\ufffdns.", "not_text"),
]


@dataclass(frozen=True)
class Said:
    said: str
    ended: bool = True


def row_of(question: str, gold: list[tuple[str, dict]] | str, tools=TOOLS) -> dict:
    turn = {"content": gold} if isinstance(gold, str) else {"tool_calls": [{"name": n, "arguments": a} for n, a in gold]}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", **turn}], "tools": tools}


def read_rows(file: Path, rows: list[dict]) -> list:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(Source(path=str(file))).rows


@pytest.fixture(scope="module")
def own():
    return AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))


@pytest.fixture(scope="module", params=["own", "plain-tools"])
def tokenizer(request):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    if request.param == "plain-tools":
        tokenizer.chat_template = (REPOSITORY / "configs" / "templates" / "plain-tools.jinja").read_text()
    return tokenizer


def key_of(row) -> str:
    return content_digest(question_of(row.row))


def mined_from(rows, said: dict[str, list[Said]], tokenizer, **options):
    """said: by what the user asks."""
    scribe = Scribe(tokenizer)
    cases, left_out = select_cases(rows, Overlap(), scribe, 4096)
    answers = {key_of(row): said[row.row["messages"][0]["content"]] for row in rows}
    return mine(cases, answers, scribe, **{"seed": 0, **options}), left_out


def mine_planted(tokenizer, tmp_path, planted=PLANTED, **options):
    rows = read_rows(tmp_path / "rows.jsonl", [row_of(plant.question, plant.gold) for plant in planted])
    return mined_from(rows, {plant.question: [Said(plant.said, plant.ended)] for plant in planted}, tokenizer, **options)


def written(tokenizer, pair: dict, side: str) -> str:
    """What a student would be trained to say: by the tokenizer's own rendering, without the code that mined it."""
    options = {"tools": pair.get("tools"), "tokenize": False}
    prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, **options)
    [turn] = pair[side]
    whole = tokenizer.apply_chat_template([*pair["prompt"], {"content": "", **turn}], **options)
    assert whole.startswith(prompt)
    said, end, rest = whole[len(prompt) :].partition(tokenizer.eos_token)
    assert end and not rest.strip()
    return said


def check_pair(tokenizer, pair: dict) -> None:
    """Raises unless chosen is right, and rejected wrong with the pair's class, as they will be trained."""
    assert set(pair) - {"tools"} == {"prompt", "chosen", "rejected", "class", "source"}
    [chosen] = pair["chosen"]
    gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in chosen.get("tool_calls", ())]
    verdict = score(written(tokenizer, pair, "chosen"), gold, pair.get("tools", []))
    assert verdict.exact and verdict.valid_schema in (None, True)
    assert score(written(tokenizer, pair, "rejected"), gold, pair.get("tools", [])).failure == pair["class"]


# ---- what a planted model is known to have done


def test_every_class_is_found_and_none_is_mislabelled(tokenizer, tmp_path):
    mined, left_out = mine_planted(tokenizer, tmp_path)
    expected = {plant.question: plant.outcome for plant in PLANTED if plant.outcome in FAILURES}
    # Silence is no turn that a preference row could hold; test_what_is_right… has that it is counted.
    assert set(expected.values()) == set(FAILURES) - {"no_answer"}
    found = {pair.row()["prompt"][0]["content"]: pair.row()["class"] for pair in mined.pairs}
    assert found == expected and len(mined.pairs) == len(expected)
    assert not left_out and mined.asked == mined.answers == len(PLANTED)
    for pair in mined.pairs:
        check_pair(tokenizer, pair.row())
        line = [plant.question for plant in PLANTED].index(pair.row()["prompt"][0]["content"]) + 1
        assert pair.row()["source"].endswith(f"rows.jsonl:{line}")


def test_what_is_right_and_what_was_cut_off_becomes_no_pair_and_is_counted(tokenizer, tmp_path):
    mined, _ = mine_planted(tokenizer, tmp_path)
    assert mined.right == sum(plant.outcome == "right" for plant in PLANTED)
    others = Counter(plant.outcome for plant in PLANTED if plant.outcome not in (*FAILURES, "right"))
    assert Counter(entry.reason for entry in mined.left_out) == others


def test_a_malformed_answer_is_kept_word_for_word_and_calls_that_can_be_read_are_structured(own, tmp_path):
    mined, _ = mine_planted(own, tmp_path)
    rejected = {pair.row()["prompt"][0]["content"]: pair.row()["rejected"][0] for pair in mined.pairs}
    assert rejected["malformed beside words"] == {"role": "assistant", "content": f"Let me see. {BROKEN}"}
    assert rejected["a call and then words"]["content"].endswith("</tool_call> Done.")
    call = {"type": "function", "function": {"name": "get_wether", "arguments": {"city": "Paris", "days": 3}}}
    assert rejected["makes a tool up"] == {"role": "assistant", "content": "Wait.", "tool_calls": [call]}
    assert rejected["in another notation"]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "days": 3}


@pytest.mark.parametrize("compared", ["words and class", "class alone"])
def test_a_template_that_does_not_write_what_was_said_makes_no_pair_of_it(compared, tmp_path, monkeypatch):
    if compared == "class alone":
        monkeypatch.setattr(mining, "_says_the_same", lambda *args, **options: True)
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    # What is said in words ends before the mark of a call, so that a broken call would be trained as none.
    cut = "(message.content or '').split('<tool_call>')[0] or ('none' if message.content else '')"
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content or ''", cut)
    mined, _ = mine_planted(tokenizer, tmp_path)
    spoilt = [plant.question for plant in PLANTED if plant.outcome == "malformed"] + ["a call and then words"]
    found = {pair.row()["prompt"][0]["content"] for pair in mined.pairs}
    assert not found & set(spoilt)
    assert sum(entry.reason == "round_trip" for entry in mined.left_out) == len(spoilt)


def test_a_template_that_changes_words_makes_no_pair_of_them_though_they_fail_alike(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content or ''", "(message.content or '') | upper")
    mined, _ = mine_planted(tokenizer, tmp_path)
    reasons = {entry.source.rpartition(":")[2]: entry.reason for entry in mined.left_out}
    for number, plant in enumerate(PLANTED, 1):
        if plant.outcome == "no_call" or plant.question == "makes a tool up":
            assert reasons[str(number)] == "round_trip"


def test_a_template_whose_calls_are_not_read_back_proves_no_gold(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.chat_template = MICRO_TEMPLATE.read_text()
    mined, left_out = mine_planted(tokenizer, tmp_path)
    wanted = [plant for plant in PLANTED if not isinstance(plant.gold, str)]
    assert Counter(entry.reason for entry in left_out) == {"gold_not_right": len(wanted)}
    assert not mined.pairs


# ---- several answers, several rows


def test_of_several_answers_each_class_gives_one_pair_the_nearest_in_length(own, tmp_path):
    rows = read_rows(tmp_path / "rows.jsonl", [row_of("weather", [PARIS])])
    long = {"city": "Rome and all that lies around it and further on", "days": 3}
    answers = [hermes(("weather", long)), hermes(("weather", {**PARIS[1], "city": "Rome"})), "It rains.", "It rains.", hermes(PARIS)]
    mined, _ = mined_from(rows, {"weather": [Said(text) for text in answers]}, own)
    assert [pair.failure for pair in mined.pairs] == ["wrong_value", "no_call"]
    assert mined.pairs[0].rejected["tool_calls"][0]["function"]["arguments"]["city"] == "Rome"
    assert mined.pairs[0].gap_tokens == 0
    assert Counter(entry.reason for entry in mined.left_out) == {"repeated_failure": 2}
    assert mined.right == 1


def test_a_question_with_two_golds_is_not_asked_because_each_is_right_for_one(own, tmp_path):
    other = ("weather", {"city": "Paris", "days": 4})
    same = ("weather", {"days": 3.0, "city": "Paris"})
    rows = [row_of("twice", [PARIS]), row_of("twice", [other]), row_of("once", [PARIS]), row_of("once", [same])]
    rows += [row_of("words or call", [PARIS]), row_of("words or call", "No."), row_of("words", "No."), row_of("words", "Never.")]
    cases, left_out = select_cases(read_rows(tmp_path / "rows.jsonl", rows), Overlap(), Scribe(own), 4096)
    assert sorted(case.question["messages"][0]["content"] for case in cases) == ["once", "words"]
    assert Counter(entry.reason for entry in left_out) == {"several_golds": 4, "repeated_question": 2}


def test_a_row_that_cannot_be_proven_is_left_out_with_its_reason(own, tmp_path):
    late = row_of("", "No.")
    late["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = [
        row_of("breaks its schema", [("weather", {"city": "Paris", "days": "3"})]),
        row_of("ends <|end|> early", [PARIS]),
        row_of("long", "word " * 5000),
        late,
        {"prompt": "q", "completion": "a"},
        row_of("good", [PARIS]),
    ]
    cases, left_out = select_cases(read_rows(tmp_path / "rows.jsonl", rows), Overlap(), Scribe(own), 512)
    assert [entry.reason for entry in sorted(left_out, key=lambda entry: int(entry.source.rpartition(":")[2]))] == [
        "gold_not_right",
        "control_token",
        "too_long",
        "asks_nothing",
        "no_conversation",
    ]
    assert 'weather.days: is "3" (text); must be integer' in [entry.detail for entry in left_out]
    assert [case.question["messages"][0]["content"] for case in cases] == ["good"]


def test_the_most_of_a_class_is_drawn_by_content_and_seed_and_not_by_order(own, tmp_path):
    planted = [Planted(f"question {n}", [PARIS], hermes(("light", {"n": n})), "wrong_tool") for n in range(20)]
    planted += [Planted(f"words {n}", [PARIS], f"It rains {n}.", "no_call") for n in range(3)]

    def chosen(planted, **options):
        mined, _ = mine_planted(own, tmp_path, planted, max_per_class=5, **options)
        assert Counter(pair.failure for pair in mined.pairs) == {"wrong_tool": 5, "no_call": 3}
        assert sum(entry.reason == "over_the_limit" for entry in mined.left_out) == 15
        return [pair.row()["prompt"][0]["content"] for pair in mined.pairs]

    assert chosen(planted) == chosen(planted[::-1])
    assert chosen(planted) != chosen(planted, seed=1)


def test_only_the_classes_that_are_asked_for_become_pairs(own, tmp_path):
    mined, _ = mine_planted(own, tmp_path, classes=("wrong_tool", "wrong_count"))
    assert Counter(pair.failure for pair in mined.pairs) == {"wrong_tool": 3, "wrong_count": 1}
    failing = sum(plant.outcome in FAILURES for plant in PLANTED)
    assert sum(entry.reason == "other_class" for entry in mined.left_out) == failing - 4


# ---- how they differ in length


def test_a_class_whose_sides_differ_in_length_is_warned_of(own, tmp_path):
    planted = [Planted(f"long {n}", [PARIS], "It rains. " * 40 + str(n), "no_call") for n in range(3)]
    planted += [Planted(f"like {n}", [PARIS], hermes(("weather", {"city": "Rome", "days": n + 4})), "wrong_value") for n in range(3)]
    mined, left_out = mine_planted(own, tmp_path, planted)
    report = report_of(mined, left_out, {})
    by_hand = {
        name: [
            len(own(written(own, pair.row(), "chosen"))["input_ids"]) - len(own(written(own, pair.row(), "rejected"))["input_ids"])
            for pair in mined.pairs
            if pair.failure == name
        ]
        for name in report["classes"]
    }
    for name, gaps in by_hand.items():
        assert report["classes"][name]["gap_tokens"] == pytest.approx(sum(gaps) / len(gaps), abs=0.01)
    assert report["classes"]["wrong_value"]["gap_tokens"] == 0 and report["classes"]["no_call"]["chosen_is_shorter"] == 3
    warned, remedy = warnings_about(report)
    assert re.search(r"no_call: chosen is [\d.]+ tokens shorter than rejected on average", warned)
    assert "generate.samples_per_prompt" in remedy and "--classes" in remedy


# ---- edits of the gold


def test_an_edit_fails_with_exactly_its_class_and_every_kind_is_made(tokenizer, tmp_path):
    planted = [
        Planted(f"{kind} {n}", gold, said, "right")
        for n in range(30)
        for kind, gold, said in (
            ("call", [PARIS], hermes(PARIS)),
            ("calls", [PARIS, HALL], hermes(HALL, PARIS)),
            ("words", "No.", "I cannot."),
        )
    ]
    planted += [Planted("fails", [PARIS], "It rains.", "no_call"), Planted("cut", [PARIS], "It", "cut_off", ended=False)]
    mined, _ = mine_planted(tokenizer, tmp_path, planted, edits=True)
    edited = [pair for pair in mined.pairs if pair.edited]
    assert len(edited) == 90
    kinds = {"wrong_tool", "missing_argument", "extra_argument", "wrong_type", "unneeded_call"}
    assert {pair.failure for pair in edited} == kinds
    for pair in mined.pairs:
        check_pair(tokenizer, pair.row())
    # The model's own failures stay its own, and what was cut off was no right answer.
    assert [pair.failure for pair in mined.pairs if not pair.edited] == ["no_call"]
    assert mined.pairs and not any(pair.edited for pair in mine_planted(tokenizer, tmp_path, planted)[0].pairs)


def test_a_question_that_the_model_gets_wrong_once_keeps_its_own_failure_and_gets_no_edit(tokenizer, tmp_path):
    rows = read_rows(tmp_path / "rows.jsonl", [row_of("both", [PARIS])])
    mined, _ = mined_from(rows, {"both": [Said(hermes(PARIS), True), Said("It rains.", True)]}, tokenizer, edits=True)
    assert [(pair.failure, pair.edited) for pair in mined.pairs] == [("no_call", False)] and mined.right == 1


def test_edits_of_the_world_are_what_they_say_and_change_one_call():
    rows = load_rows(Source(path="embedded:base-train")).rows[:200]
    found = Counter()
    for row in rows:
        question, turn = question_of(row.row), row.row["messages"][-1]
        gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())]
        for edit in edits_of(question, gold):
            said = hermes(*((call.name, call.arguments) for call in edit.calls))
            assert score(said, gold, row.row["tools"]).failure == edit.failure
            problems = {problem.kind for call in edit.calls for problem in check_call(call, row.row["tools"])}
            # Another tool's arguments may break its schema or not; the other kinds are wrong by the schema, too, or right by it.
            assert edit.failure == "wrong_tool" or (problems >= {edit.failure} if gold else not problems)
            found[edit.failure] += 1
    assert found.keys() == {"wrong_tool", "missing_argument", "extra_argument", "wrong_type", "unneeded_call"}
    assert min(found.values()) > 10


# ---- evaluation stays out

HELD_OUT = "please book a table for nine guests in Lisbon on Friday evening by the window because my mother has her birthday"
LEAKS = {
    "as it is": (HELD_OUT, True),
    "in other letters and signs": (HELD_OUT.upper().replace(" ", ",  ") + "!", True),
    "with a word changed": (HELD_OUT.replace("Friday", "Sunday"), True),
    "inside of a long text": (f"Hello there, I have been here before and liked it a lot. {HELD_OUT}. Thank you all so very much!", True),
    "its beginning alone": (HELD_OUT[:46], True),
    "with every fourth word changed": (" ".join(w if n % 4 else "other" for n, w in enumerate(HELD_OUT.split())), False),
    "of the same kind": ("please book a table for two in Rome", False),
    "with one phrase in common": (
        "what does it cost to book a table for nine guests in Lisbon? we come from far away to see the sea",
        False,
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_an_evaluation_question_is_known_again(name, own, tmp_path):
    text, is_leak = LEAKS[name]
    known = known_questions(read_rows(tmp_path / "eval.jsonl", [row_of(HELD_OUT, [PARIS]), row_of("short", "No.")]))
    rows = read_rows(tmp_path / "rows.jsonl", [row_of(text, [HALL], TOOLS[::-1]), row_of("kept", [PARIS])])
    cases, left_out = select_cases(rows, known, Scribe(own), 4096)
    assert [entry.reason for entry in left_out] == ["evaluation"] * is_leak
    assert len(cases) == 2 - is_leak
    if is_leak:
        assert re.fullmatch(r"(the same as|\d+% in runs of 8 words with) .*eval.jsonl:1", left_out[0].detail)


def test_words_are_compared_in_scripts_without_blanks_too():
    known = Overlap()
    known.add("请帮我预订今天晚上七点的两人餐桌", "x")
    assert known.find("请帮我预订今天晚上七点的三人餐桌").startswith("75% in runs of 8")
    assert known.find("今天天气怎么样") is None
    assert "请帮我预订,今天晚上七点的两人餐桌!" in known


# ---- the command


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder whose export is the planted model: a tokenizer, and a table in the place of weights."""
    rows = [row_of(plant.question, plant.gold) for plant in PLANTED]
    (tmp_path / "mining.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [row_of(HELD_OUT, [PARIS]), row_of("another", [HALL])]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    sources = [f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={tmp_path / 'eval.jsonl'}"]
    recipe = load("tiny/sft-full", [*sources, f"output_dir={tmp_path / 'run'}"])
    folder = RunDir.create(recipe)
    folder.write_manifest(recipe)
    AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama")).save_pretrained(folder.final)
    (folder.final / "harness.json").write_text(json.dumps({"files": {}, "step": 7, "base": "tiny", "recipe_digest": "d"}))

    def planted(recipe, worker, *, stop, say):
        asked = load_rows(recipe.data.train[0], asks=True).rows
        table = {plant.question: Said(plant.said, plant.ended) for plant in PLANTED}
        return {key_of(row): [table[row.row["messages"][-1]["content"]]] for row in asked}

    monkeypatch.setattr(task, "ask_prompts", planted)
    monkeypatch.chdir(tmp_path)
    return folder.path


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main(["pairs", *map(str, arguments)])
    return left.value.code


def test_the_command_writes_proven_pairs_and_what_they_were_made_from(run, own, capsys):
    mining = run.parent / "mining.jsonl"
    # A held-out question among the mined ones, and one that nearly is.
    with open(mining, "a") as stream:
        for text in (HELD_OUT, HELD_OUT.replace("Friday", "Sunday")):
            stream.write(json.dumps(row_of(text, [PARIS])) + "\n")
    assert command(run, "--data", mining) == 0
    pairs = [json.loads(line) for line in (run / "pairs" / "pairs.jsonl").read_text().splitlines()]
    expected = Counter(plant.outcome for plant in PLANTED if plant.outcome in FAILURES)
    assert Counter(pair["class"] for pair in pairs) == expected
    for pair in pairs:
        check_pair(own, pair)
    read = load_rows(Source(path=str(run / "pairs" / "pairs.jsonl")), kind="pairs").rows
    assert [row.row for row in read] == [{key: value for key, value in pair.items() if key not in ("class", "source")} for pair in pairs]
    assert "Lisbon" not in (run / "pairs" / "pairs.jsonl").read_text() + (run / "pairs" / "questions.jsonl").read_text()
    report = json.loads((run / "pairs" / "pairs.report.json").read_text())
    assert report["left_out"] == {"evaluation": 2, "cut_off": 2, "control_token": 1, "not_text": 1, "no_row": 2}
    assert {name: found["pairs"] for name, found in report["classes"].items()} == expected
    assert report["model"] == str(run / "final") and report["step"] == 7 and report["seed"] == 42
    assert report["questions_trained_on"] == 2 and report["held_out_rows"] == 2 and len(report["data"]) == 1
    left_out = [json.loads(line) for line in (run / "pairs" / "left-out.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in left_out) == report["left_out"]
    said = capsys.readouterr().out
    assert "left out: 2 rows that are evaluation questions, or nearly" in said
    assert re.search(r"wrong_tool +3 ", said) and f"{len(pairs)} pairs: {run / 'pairs' / 'pairs.jsonl'}" in said


def test_the_run_folder_is_still_a_runs_alone_with_pairs_in_it(run):
    assert command(run, "--data", run.parent / "mining.jsonl") == 0
    RunDir.create(load(run / "recipe.yaml"))


@pytest.mark.parametrize(
    "arguments, words, code",
    [
        (["--data", "eval.jsonl"], "eval.jsonl: is an evaluation file (data.eval)", 2),
        (["--data", "copy.jsonl"], "copy.jsonl: each of its 2 questions is one that is held out for evaluation", 2),
        (["--data", "mining.jsonl", "--exclude", "mining.jsonl"], "is an evaluation file (--exclude)", 2),
        (["--data", "mining.jsonl", "--classes", "wrong_tol"], '"wrong_tol" is no failure; did you mean "wrong_tool"?', 2),
        (["--data", "mining.jsonl", "data.train=other.jsonl"], "data.train=other.jsonl: harness pairs takes keys of `generate`", 2),
        (["--data", "mining.jsonl", "generate.samples_per_prompt=4"], "at temperature 0 nothing is drawn", 2),
        (["--data", "mining.jsonl", "generate.device_map=auto", "--processes", "2"], "one process takes all GPUs", 2),
        (["--data", "nothing.jsonl"], "nothing.jsonl: no such file", 2),
        (["--data", "right.jsonl"], "no pair: all 1 answers are right; give harder questions with --data", 1),
        (["--data", "broken.jsonl"], "no question is left of 1 rows (gold_not_right)", 2),
        (["--data", "cut.jsonl"], "no pair of 1 answers; left-out.jsonl beside it says why", 1),
    ],
)
def test_what_cannot_be_mined_is_refused_with_the_reason(run, capsys, arguments, words, code):
    shutil.copy("eval.jsonl", "copy.jsonl")
    Path("right.jsonl").write_text(json.dumps(row_of("right", [PARIS])))
    Path("cut.jsonl").write_text(json.dumps(row_of("cut off", [PARIS])))
    Path("broken.jsonl").write_text(json.dumps(row_of("right", [("weather", {"town": "Paris"})])))
    assert command(run, *arguments) == code
    assert words in capsys.readouterr().err


def rewrite_recipe(run: Path, *overrides: str) -> None:
    (run / "recipe.yaml").write_text(render_recipe(load(run / "recipe.yaml", overrides)))


def test_a_run_that_holds_nothing_out_is_warned_of(run, capsys):
    rewrite_recipe(run, "data.eval=[]", "train.eval_steps=null")
    assert command(run, "--data", "mining.jsonl") == 0
    assert "warning: the run held nothing out and no --exclude is given" in capsys.readouterr().out
    Path("mixed.jsonl").write_text(Path("eval.jsonl").read_text() + json.dumps({"text": "once"}) + "\n")
    assert command(run, "--data", "mining.jsonl", "--exclude", "mixed.jsonl") == 0
    said = capsys.readouterr().out
    assert "the run held nothing out" not in said
    assert "warning: 1 rows of --exclude mixed.jsonl keep nothing out; the first: mixed.jsonl:3: a row of text has no turn" in said


def test_questions_to_be_kept_out_need_no_answers(run):
    asked = row_of(HELD_OUT, [PARIS])
    with open("mining.jsonl", "a") as stream:
        stream.write(json.dumps(asked) + "\n")
    rewrite_recipe(run, "data.eval=[]", "train.eval_steps=null")
    Path("bare.jsonl").write_text(json.dumps({**asked, "messages": asked["messages"][:1]}) + "\n")
    assert command(run, "--data", "mining.jsonl", "--exclude", "bare.jsonl") == 0
    assert "Lisbon" not in (run / "pairs" / "pairs.jsonl").read_text()


def test_a_run_of_preferences_keeps_its_held_out_pairs_from_the_next_round(run):
    assert command(run, "--data", "mining.jsonl") == 0
    pairs = (run / "pairs" / "pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(pairs[1:]))
    Path("held-out.jsonl").write_text(pairs[0])
    rewrite_recipe(
        run, "task=dpo", "model.init=null", "model.name_or_path=embedded:tiny-llama", "data.train=pairs.jsonl", "data.eval=held-out.jsonl"
    )
    assert command(run, "--data", "mining.jsonl") == 0
    again = (run / "pairs" / "pairs.jsonl").read_text().splitlines(keepends=True)
    assert again == pairs[1:]
    assert json.loads((run / "pairs" / "pairs.report.json").read_text())["questions_trained_on"] == len(pairs) - 1


def test_the_command_says_how_long_questions_may_be_and_else_the_run(run, capsys):
    rewrite_recipe(run, "data.max_length=32", "data.packing=false")
    assert command(run, "--data", "mining.jsonl") == 2
    assert "no question is left" in capsys.readouterr().err
    assert command(run, "--data", "mining.jsonl", "data.max_length=128") == 0
    assert load(run / "pairs" / "generate.yaml").data.max_length > 128
    report = json.loads((run / "pairs" / "pairs.report.json").read_text())
    assert report["pairs"] and "too_long" not in report["left_out"]


def test_a_run_that_writes_no_answers_is_refused(run, capsys):
    text = (run / "recipe.yaml").read_text()
    assert text.startswith("task: sft\n")
    (run / "recipe.yaml").write_text(text.replace("task: sft\n", "task: reward\n", 1))
    assert command(run, "--data", "mining.jsonl") == 2
    assert "such a model scores answers and writes none" in capsys.readouterr().err


def test_a_run_of_reinforcement_learning_holds_out_the_rows_of_its_recipe():
    trained, held_out = task.rows_of(load("tiny/rlhf-rloo"))
    assert trained and held_out and not {content_digest(row.row) for row in trained} & {content_digest(row.row) for row in held_out}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_run_of_reinforcement_learning_holds_out_the_prompts_of_its_training_though_some_have_no_answer(tmp_path, monkeypatch, on_error):
    monkeypatch.chdir(tmp_path)
    asked = [row_of(f"question number {n}", [PARIS]) for n in range(40)]
    rows = [{**row, "messages": row["messages"][:1]} if n % 2 else row for n, row in enumerate(asked)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.train=prompts.jsonl", "data.eval=[]", "data.eval_rows=10", f"data.on_error={on_error}"]
    recipe = load("tiny/rlhf-rloo", overrides)
    loaded = [load_rows(source, asks=True) for source in recipe.data.train]
    in_training = mix(recipe.data.train, loaded, seed=recipe.data.seed, eval_rows=10).held_out
    _, held_out = task.rows_of(recipe)
    assert sorted(row.location for row in held_out) == sorted(row.location for row in in_training)
    assert any(len(row.row["messages"]) == 1 for row in held_out)
    answered = [row.location for row in in_training if len(row.row["messages"]) == 2]
    assert [row.location for row in held_out_rows(recipe.data, "rlhf")] == answered and answered


def test_a_text_that_is_held_out_keeps_its_question_out():
    known = known_questions([SourceRow("eval.jsonl:1", {"prompt": "What is the weather in Rome?", "completion": " Warm."})])
    assert known.find("what is the weather in rome") and not known.find("what is the weather in Oslo")


def test_a_model_that_was_changed_after_its_export_is_not_mined(run, capsys):
    manifest = json.loads((run / "final" / "harness.json").read_text())
    (run / "final" / "harness.json").write_text(json.dumps({**manifest, "files": {"tokenizer.json": "0" * 64}}))
    assert command(run, "--data", "mining.jsonl") == 1
    assert "is not what was exported" in capsys.readouterr().err


# ---- a model that was trained a little


@pytest.mark.slow
def test_a_run_that_has_learnt_little_is_mined_by_two_processes_and_every_pair_is_proven(tmp_path, own):
    settings = ["data.train.0.max_rows=48", "train.max_steps=100", "train.learning_rate=8e-3", "tracking.mode=disabled"]
    run = tmp_path / "run"
    done = harness("run", "tiny/sft-full", *settings, f"output_dir={run}")
    assert done.code == 0, done.output
    lines = Path(resolve("embedded:base-train")).read_text().splitlines()[-96:]
    held_out = Path(resolve("embedded:base-eval")).read_text().splitlines()
    (tmp_path / "mining.jsonl").write_text("".join(line + "\n" for line in (*lines, *held_out)))
    drawn = ["generate.samples_per_prompt=3", "generate.temperature=0.8", "generate.unit_rows=32"]
    asking = ["pairs", run, "--data", tmp_path / "mining.jsonl", "--edits", *drawn]
    done = harness(*asking, "--processes", "2")
    assert done.code == 0, done.output
    assert "[0/2] " in done.output and "[1/2] " in done.output
    text = (run / "pairs" / "pairs.jsonl").read_text()
    pairs = [json.loads(line) for line in text.splitlines()]
    assert len({pair["class"] for pair in pairs}) >= 5 and len(pairs) >= 50
    for pair in pairs:
        check_pair(own, pair)
    evaluated = {row.row["messages"][0]["content"] for row in held_out_rows(load(run / "recipe.yaml").data)}
    assert len(evaluated) == 40
    assert not evaluated & {pair["prompt"][0]["content"] for pair in pairs}
    # The same answers, by one process that asks nothing anew.
    again = harness(*asking)
    assert again.code == 0 and "tokens in" not in again.output
    assert (run / "pairs" / "pairs.jsonl").read_text() == text


def test_pairs_are_not_written_among_the_files_of_a_run(tmp_path, capsys):
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        with pytest.raises(SystemExit) as ended:
            main(["pairs", str(tmp_path / "first"), "--data", "rows.jsonl", "--output-dir", str(tmp_path / name)])
        assert ended.value.code == 2 and "is a run's own folder; give one of its own" in capsys.readouterr().err
        assert [file.name for file in (tmp_path / name).iterdir()] == ["run.json"]
