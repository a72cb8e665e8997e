"""Preference rows of every layout become the pairs, or the answers with labels, that they are; the wrong ones are refused by name."""

import json
from collections import Counter
from typing import get_args

import pytest
from conftest import SHARED, needs_shared

from harness.data.formats import LAYOUTS, detect_format
from harness.data.pairs import PAIR_LAYOUTS, detect_layout, good_side, labelled_answers, pair_answers, to_preferences
from harness.data.reading import read_raw
from harness.data.sources import load_rows, mix
from harness.errors import DataError
from harness.recipe.schema import Source
from harness.recipe.task_rules import PREFERENCE_FORMATS

TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ASKS = {"role": "user", "content": "is it warm in Rome?"}
BRIEF = {"role": "system", "content": "be brief"}


def says(text):
    return {"role": "assistant", "content": text}


def calls(name="get_weather", **arguments):
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def result(text):
    return {"role": "tool", "content": text}


def pair(row, layout="auto"):
    (only,) = to_preferences(row, layout, kind="pairs")
    return only


def source(path, **more):
    return Source(path=str(path), **more)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- the layouts


def test_a_row_may_be_all_text_or_all_messages_or_a_mixture_of_both():
    text = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    assert pair(text) == text
    messages = {"prompt": [ASKS], "chosen": [says("yes")], "rejected": [says("no")]}
    assert pair(messages) == messages
    assert pair({"prompt": [ASKS], "chosen": "yes", "rejected": "no"}) == messages
    assert pair({"prompt": ASKS["content"], "chosen": [says("yes")], "rejected": [says("no")]}) == messages
    assert pair({"prompt": [ASKS], "chosen": says("yes"), "rejected": says("no"), "source": "x", "tools": []}) == messages
    assert pair({**messages, "tools": json.dumps([TOOL])})["tools"] == [TOOL]


def test_two_whole_conversations_are_split_where_the_assistant_begins_to_differ():
    shared = [BRIEF, ASKS, calls(city="Rome"), result("31")]
    whole = {"chosen": [*shared, says("yes")], "rejected": [*shared, says("no")]}
    assert pair({**whole, "tools": [TOOL]}) == {"prompt": shared, "chosen": [says("yes")], "rejected": [says("no")], "tools": [TOOL]}


def test_the_prompt_ends_before_an_answer_that_is_followed_by_different_results_or_words_of_others():
    first, other = ([ASKS, calls(city="Rome"), result(text), says(text)] for text in ("31", "5"))
    row = pair({"chosen": first, "rejected": other, "tools": [TOOL]})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([ASKS], first[1:], other[1:])
    # Of two parallel calls only the second result differs: the prompt may not end between them.
    both = {"role": "assistant", "tool_calls": calls(city="Rome")["tool_calls"] * 2}
    first, other = ([ASKS, both, result("31"), result(text), says(text)] for text in ("31", "5"))
    assert pair({"chosen": first, "rejected": other, "tools": [TOOL]})["prompt"] == [ASKS]
    short = [ASKS, says("yes")]
    assert pair({"chosen": short, "rejected": [*short, ASKS, says("no")]}) == {
        "prompt": [ASKS], "chosen": [says("yes")], "rejected": [says("yes"), ASKS, says("no")],
    }  # fmt: skip


def test_a_prompt_that_the_conversations_repeat_is_not_asked_twice():
    expected = {"prompt": [ASKS], "chosen": [says("yes")], "rejected": [says("no")]}
    whole = {"chosen": [ASKS, says("yes")], "rejected": [ASKS, says("no")]}
    ultrafeedback = {"prompt": ASKS["content"], "prompt_id": "1", "messages": whole["chosen"], **whole}
    assert pair(ultrafeedback) == expected and pair({"prompt": [ASKS], **whole}) == expected
    with pytest.raises(DataError, match="prompt is not what the user says in both conversations"):
        pair({"prompt": "something else", **whole})


@pytest.mark.parametrize(
    "scores", [{"margin": 2}, {"score_chosen": 8.5, "score_rejected": 6.5}, {"chosen-rating": 3, "rejected-rating": 1, "margin": None}]
)
def test_the_margin_is_given_or_the_difference_of_the_scores(scores):
    assert pair({"prompt": "q", "chosen": "a", "rejected": "b", **scores})["margin"] == 2.0


def test_sharegpt_turns_with_calls_and_results_in_one_text_become_the_turns_that_they_are():
    good = '<think>look</think><tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    row = {
        "system": "be brief",
        "conversations": [{"from": "human", "value": ASKS["content"]}],
        "chosen": {"from": "gpt", "value": f"{good}\n<tool_response>\n31\n</tool_response>\nYes, 31."},
        "rejected": [
            {"from": "function_call", "value": '{"name": "get_wether", "arguments": {}}'},
            {"from": "observation", "value": "no such tool"},
            {"from": "gpt", "value": '<tool_call>{"name": "get_weather"</tool_call>'},
        ],
        "tools": [TOOL],
    }
    assert pair(row) == {
        "prompt": [BRIEF, ASKS],
        "chosen": [{"role": "assistant", "reasoning_content": "look", **calls(city="Rome")}, result("31"), says("Yes, 31.")],
        "rejected": [calls("get_wether"), result("no such tool"), says('<tool_call>{"name": "get_weather"</tool_call>')],
        "tools": [TOOL],
    }
    with pytest.raises(DataError, match=r'chosen\[0\]: the assistant\'s call cannot be read: \{"name": "get_weather"'):
        pair({**row, "chosen": row["rejected"][2]})


def test_when2call_gives_a_pair_for_each_wrong_answer_and_its_calls_are_calls():
    answers = {
        "direct": "It is warm.",
        "tool_call": '{"name": "get_weather", "arguments": {"city": "Rome"}}',
        "request_for_info": "Which Rome?",
        "cannot_answer": "I cannot.",
    }
    row = {"question": ASKS["content"], "answers": answers, "correct_answer": "tool_call", "tools": [json.dumps(TOOL["function"])]}
    pairs = to_preferences(row, kind="pairs")
    assert [p["rejected"] for p in pairs] == [[says(answers[name])] for name in ("direct", "request_for_info", "cannot_answer")]
    assert all(p["prompt"] == [ASKS] and p["chosen"] == [calls(city="Rome")] and p["tools"] == [TOOL] for p in pairs)
    labels = to_preferences(row, kind="labelled")
    assert [(a["completion"], a["label"]) for a in labels] == [
        ([calls(city="Rome")], True), *(([says(answers[name])], False) for name in ("direct", "request_for_info", "cannot_answer"))
    ]  # fmt: skip
    with pytest.raises(DataError, match='correct_answer is "abstain"; must be one of the answers direct, tool_call'):
        to_preferences({**row, "correct_answer": "abstain"}, kind="pairs")


def test_when2calls_training_pairs_have_their_calls_between_marks():
    row = {
        "messages": [ASKS],
        "chosen_response": {
            "role": "assistant",
            "content": '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>',
        },
        "rejected_response": says("<TOOLCALL>[get_weather</TOOLCALL>"),
        "tools": [json.dumps(TOOL["function"])],
    }
    read = pair(row)
    assert (read["chosen"], read["rejected"]) == ([calls(city="Rome")], [says("<TOOLCALL>[get_weather</TOOLCALL>")])


def test_an_answer_with_a_label_is_what_follows_the_last_words_of_the_user():
    talk = [BRIEF, ASKS, says("yes"), ASKS, calls(city="Rome"), result("31"), says("yes")]
    expected = {"prompt": talk[:4], "completion": talk[4:], "label": True, "tools": [TOOL]}
    assert to_preferences({"messages": talk, "label": True, "tools": [TOOL]}, kind="labelled") == [expected]
    assert to_preferences({**expected, "id": 7}, kind="labelled") == [expected]
    assert to_preferences({"conversations": talk, "label": True, "tools": [TOOL]}, kind="labelled") == [expected]
    assert to_preferences({"prompt": "q", "completion": "a", "label": False}, kind="labelled") == [
        {"prompt": "q", "completion": "a", "label": False}
    ]


def test_a_pair_is_two_labelled_answers():
    row = {"prompt": [ASKS], "chosen": [says("yes")], "rejected": [says("no")], "tools": [TOOL], "margin": 1.0}
    assert to_preferences(row, kind="labelled") == labelled_answers(row)
    assert [(a["completion"], a["label"], a["tools"]) for a in labelled_answers(row)] == [
        ([says("yes")], True, [TOOL]),
        ([says("no")], False, [TOOL]),
    ]
    good, bad = map(good_side, labelled_answers(row))
    assert good == good_side(row) == {"messages": [ASKS, says("yes")], "tools": [TOOL], "train_from": 1} and bad is None


# ---- which layout


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        (["prompt", "chosen", "rejected", "messages", "score_chosen"], "preference"),
        (["chosen", "rejected"], "preference"),
        (["conversations", "chosen", "rejected", "tools"], "sharegpt"),
        (["prompt", "completion", "label"], "kto"),
        (["messages", "label"], "kto"),
        (["conversations", "label", "behavior"], "toolpref"),
        (["uuid", "question", "answers", "correct_answer", "tools"], "when2call"),
        (["tools", "messages", "chosen_response", "rejected_response"], "when2call"),
    ],
)
def test_the_keys_tell_the_layout(keys, layout):
    assert detect_layout(dict.fromkeys(keys)) == layout


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["messages", "tools"], r"a row of supervised training: there is nothing to prefer.*must be one of the layouts preference: prompt"),
        (["instruction", "models", "completions"], "UltraFeedback before its pairs were made; which of its scores"),
        (["chosen", "rejected", "messages", "label"], "fit preference and kto; say which"),
        ([], "keys are none"),
    ],
)
def test_a_row_without_a_preference_is_told_what_is_read(keys, message):
    with pytest.raises(DataError, match=message):
        detect_layout(dict.fromkeys(keys))


def test_supervised_training_refuses_pairs_and_bad_answers_by_name(tmp_path):
    with pytest.raises(DataError, match="a preference pair, which supervised training does not read; tasks dpo, reward and kto do"):
        detect_format({"chosen": [], "rejected": []})
    labelled = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    with pytest.raises(DataError, match="2: label is false: a bad answer, which supervised training would teach; use task kto"):
        load_rows(source(write(tmp_path / "rows.jsonl", labelled)))
    only_good = load_rows(source(tmp_path / "rows.jsonl", format="kto"))
    assert [row.row for row in only_good.rows] == [{"prompt": "q", "completion": "a"}] and len(only_good.skipped) == 1


def test_every_layout_has_its_name_in_a_recipe():
    named = get_args(Source.model_fields["format"].annotation)
    assert set(named) == {"auto", *LAYOUTS, *PAIR_LAYOUTS} and set(PREFERENCE_FORMATS) == set(PAIR_LAYOUTS)
    with pytest.raises(DataError, match="when2call rows have question, answers"):
        to_preferences({"chosen": "a", "rejected": "b"}, "when2call", kind="pairs")


# ---- what is refused

GOOD = {"prompt": [ASKS], "chosen": [says("yes")], "rejected": [says("no")], "tools": [TOOL]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chosen": [calls("get_wether")]},
            r'chosen\[0\]: tool call "get_wether" is not among the row\'s tools; did you mean "get_weather"',
        ),
        ({"chosen": [calls()], "tools": None}, r"chosen\[0\]: tool call .* is made, but the row offers no tools"),
        ({"chosen": [says("a"), result("31"), says("b")]}, r"chosen\[1\]: a tool result without a call"),
        ({"prompt": [ASKS, result("31")]}, r"prompt\[1\]: a tool result without a call"),
        ({"chosen": [calls(), result("31")]}, "chosen ends with a message of the tool; must be the assistant's"),
        ({"rejected": [ASKS, says("no")]}, "rejected begins with a message of the user; must be the assistant's"),
        ({"rejected": []}, "rejected is empty: nobody answers"),
        ({"rejected": [says("")]}, r"rejected\[0\]: the assistant says nothing"),
        ({"rejected": "no"}, "chosen is a list and rejected is text; must be alike"),
        ({"rejected": 5}, r"rejected\[0\] is a number; must be an object"),
        ({"prompt": []}, "prompt is empty; there is no question"),
        ({"prompt": [ASKS, says("well")]}, "prompt ends with a message of the assistant; must end with the user's or a tool's"),
        (
            {"prompt": None, "chosen": [BRIEF, ASKS, says("a")], "rejected": [ASKS, says("b")]},
            "chosen and rejected have no question in common",
        ),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "chosen and rejected are text, and there is no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "tools stand beside a text prompt"),
        ({"prompt": "q", "chosen": "", "rejected": "b", "tools": None}, "chosen is empty; there is nothing to compare"),
        ({"score_chosen": 1, "score_rejected": 2}, "score_chosen = 1 is below score_rejected = 2"),
        ({"margin": "large"}, "margin is text; must be a number"),
        ({"margin": float("nan")}, "margin is nan; must be a number"),
    ],
)
def test_a_wrong_pair_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        to_preferences({key: value for key, value in (GOOD | changes).items() if value is not None}, "preference", kind="pairs")


@pytest.mark.parametrize("label", [1, 0, "True", "good", None])
def test_a_label_is_true_or_false(label):
    with pytest.raises(DataError, match=r"label is .*; must be true \(a good answer\) or false \(a bad one\)"):
        to_preferences({"prompt": "q", "completion": "a", "label": label}, kind="labelled")


def test_what_is_rejected_or_bad_may_call_what_does_not_exist():
    wrong = [calls("make_coffee", cups="many"), result("no such tool"), says("oh"), result("31"), says("done")]
    assert pair({**GOOD, "rejected": wrong})["rejected"] == wrong
    row = {"prompt": [ASKS], "completion": wrong, "label": False, "tools": [TOOL]}
    assert to_preferences(row, kind="labelled") == [row]
    with pytest.raises(DataError, match=r'completion\[0\]: tool call "make_coffee" is not among'):
        to_preferences({**row, "completion": wrong[:1], "label": True}, kind="labelled")


# ---- pairing, reading, mixing


def test_labelled_answers_to_one_question_are_paired_in_their_order_and_none_is_lost():
    def answer(text, label, asks=ASKS, **more):
        return {"prompt": [asks], "completion": [says(text)], "label": label, **more}

    other = {"role": "user", "content": "another"}
    answers = [answer("g1", True), answer("b1", False), answer("g2", True), answer("g3", True), answer("b2", False)]
    alone = [answer("g", True, other), answer("b", False, other, tools=[TOOL])]  # other tools, another question
    pairs, lonely = pair_answers([(f"d.jsonl:{n}", row) for n, row in enumerate([*answers, *alone], 1)])
    words = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for _, row in pairs]
    assert words == [("g1", "b1"), ("g2", "b2"), ("g3", "b1")] and lonely == 2
    assert [place for place, _ in pairs] == ["d.jsonl:1+2", "d.jsonl:3+5", "d.jsonl:4+2"]
    (place, _), *_ = pair_answers([("a/x.jsonl:1", answers[0]), ("b/x.jsonl:1", answers[1])])[0]
    assert place == "a/x.jsonl:1+b/x.jsonl:1"


def test_rows_know_which_part_of_a_raw_row_they_are_and_bad_ones_are_listed(tmp_path):
    when2call = {"question": "q", "answers": {"direct": "a", "cannot_answer": "b", "tool_call": "{}"}, "correct_answer": "direct"}
    rows = [when2call, {"prompt": "q", "chosen": "a", "rejected": ""}, GOOD, {"prompt": "q", "completion": "a", "label": True}]
    loaded = load_rows(source(write(tmp_path / "rows.jsonl", rows)), "skip", kind="pairs")
    assert [row.location.rpartition(":")[2] for row in loaded.rows] == ["1#1", "1#2", "3"]
    assert [skipped.reason for skipped in loaded.skipped] == ["rejected is empty; there is nothing to compare"]
    assert loaded.counts["unpaired"] == 1 and (loaded.counts["read"], loaded.counts["kept"], loaded.counts["skipped"]) == (4, 3, 1)
    with pytest.raises(DataError, match=r"rows.jsonl:2: rejected is empty"):
        load_rows(source(tmp_path / "rows.jsonl"), kind="pairs")
    with pytest.raises(DataError, match=r"no row is left of 1; no question \(system message, tools and all\) has both a good and a bad"):
        load_rows(source(write(tmp_path / "good.jsonl", rows[3:])), kind="pairs")


def test_all_answers_to_a_question_are_on_one_side_of_the_held_out_split(tmp_path):
    rows = [{"prompt": f"question {n % 20}", "chosen": f"a {n}", "rejected": "b"} for n in range(60)]
    path = source(write(tmp_path / "rows.jsonl", rows))
    for kind in ("pairs", "labelled"):
        mixture = mix([path], [load_rows(path, kind=kind)], seed=1, eval_fraction=0.2)
        asked = [{row.row["prompt"] for row in part} for part in (mixture.train, mixture.held_out)]
        assert not asked[0] & asked[1] and len(asked[1]) == 4


# ---- real files


@needs_shared
def test_all_toolpref_files_read_and_pair_by_their_whole_prompt():
    """A second derivation of the pairs: prompts that carry both labels, from the raw rows alone. The system message counts: in ask_first it
    holds another session for each label, and answers repeat it, so a pair would teach to prefer session ids."""
    found = {}
    for path in sorted((SHARED / "toolpref").glob("*.jsonl")):
        labels: dict[str, Counter] = {}
        for _, row in read_raw(path):
            if row["conversations"][-1]["role"] == "assistant":
                labels.setdefault(json.dumps(row["conversations"][:-1]), Counter())[row["label"]] += 1
        expected = sum(max(both.values()) for both in labels.values() if len(both) == 2)
        loaded = load_rows(source(path), "skip", kind="labelled")
        assert len(loaded.rows) == sum(sum(both.values()) for both in labels.values()) and loaded.counts["skipped"] <= 2
        if expected:
            pairs = load_rows(source(path), "skip", kind="pairs").rows
            assert len(pairs) == expected
            assert all(row.row["chosen"] != row.row["rejected"] and "tools" not in row.row for row in pairs)
        found[path.name.split("_v")[0]] = (len(loaded.rows), sum(len(both) == 2 for both in labels.values()))
    assert found == {
        "ask_first": (100, 0),
        "error_recovery": (590, 200),
        "strategic_tool_selection": (534, 226),
        "verification_before_action": (628, 278),
    }


@needs_shared
def test_when2call_gives_900_pairs_and_1200_labelled_answers():
    path = source(SHARED / "when2call" / "when2call_test_llm_judge.jsonl")
    pairs = load_rows(path, kind="pairs")
    kinds = Counter((bool(p.row["chosen"][0].get("tool_calls")), bool(p.row["rejected"][0].get("tool_calls"))) for p in pairs.rows)
    assert kinds == {(True, False): 300, (False, True): 200, (False, False): 400}
    assert (pairs.counts["trained_calls"], pairs.counts["broken_calls"]) == (100, 4)
    labels = load_rows(path, kind="labelled").rows
    assert Counter(row.row["label"] for row in labels) == {True: 300, False: 900}
    assert labels[3].location.endswith(":1#4") and labels[4].location.endswith(":2#1")


@needs_shared
def test_the_sample_of_llama_factorys_pairs_has_its_results_as_turns():
    (row,) = load_rows(source(SHARED / "formats" / "fc_dpo_sample.jsonl"), kind="pairs").rows
    assert [m["role"] for m in row.row["chosen"]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [m["role"] for m in row.row["rejected"]] == ["assistant", "tool", "assistant"]
    raw = next(read_raw(SHARED / "formats" / "fc_dpo_sample.jsonl"))[1]
    assert raw["chosen"]["value"].endswith(row.row["chosen"][-1]["content"])
    assert [m["tool_calls"][0]["function"]["name"] for m in row.row["chosen"] if "tool_calls" in m] == [
        "diagnose_weak_points", "generate_questions",
    ]  # fmt: skip
