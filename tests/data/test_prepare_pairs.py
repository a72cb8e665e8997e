"""Pairs and labelled answers as they are trained: only the policy's words, on both sides, and never a pair with nothing to learn."""

import json
import math

import pytest
from chat_tokenizer import chat_tokenizer
from conftest import SHARED, needs_shared
from test_templates import TOOLS, call
from transformers import AutoTokenizer

from harness.data import held_out_rows, prepare_recipe
from harness.data.pairs import side
from harness.data.prepare import prepare, row_digest
from harness.data.prepare_pairs import SIDES
from harness.data.preview import render_preview
from harness.data.report import render_report
from harness.data.rows import SourceRow
from harness.data.sources import load_rows
from harness.data.store import FEATURES
from harness.data.templates import render
from harness.embedded import resolve
from harness.errors import DataError
from harness.recipe import load
from harness.recipe.schema import Source
from harness.tasks.trainer import with_filler

ASKS = {"role": "user", "content": "weather in Paris?"}


def says(text):
    return {"role": "assistant", "content": text}


def calls(city, name="get_weather"):
    return {"role": "assistant", "tool_calls": [call(city, name)]}


def result(text):
    return {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": text}


MIDDLE = {
    "prompt": [{"role": "system", "content": "You are a helpful assistant."}, ASKS],
    "chosen": [calls("Paris"), result("21 SECRETRESULT"), says("It is 21 degrees.")],
    "rejected": [calls("Paris", "get_wether"), result("OTHERRESULT"), says("It is warm, maybe.")],
    "tools": TOOLS,
    "margin": 1.5,
}
PLAIN = {"prompt": [ASKS], "chosen": [says("Sunny.")], "rejected": [says("No.")]}
TEXT = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
GOOD = {"prompt": [ASKS], "completion": [says("Sunny.")], "label": True}
BAD = {**GOOD, "completion": MIDDLE["rejected"], "label": False, "tools": TOOLS}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("qwen2_5_training")


def prepared(rows, tokenizer, folder, kind="pairs", **more):
    rows = [SourceRow(f"d.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    return prepare(rows, tokenizer, cache_dir=folder, kind=kind, **{"max_length": 512, **more})


def words(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


# ---- masks


def test_both_sides_are_what_supervised_training_makes_of_the_same_conversation(tokenizer, tmp_path):
    rows = [MIDDLE, PLAIN, TEXT]
    data = prepared(rows, tokenizer, tmp_path).train
    assert data.features == FEATURES["pairs"]
    for row, sample in zip(rows, data, strict=True):
        for name in SIDES:
            rendered = render(tokenizer, side(row, name))
            assert sample[f"{name}_input_ids"] == rendered.ids
            trained = [token if bit else -100 for token, bit in zip(rendered.ids, rendered.mask, strict=True)]
            assert sample[f"{name}_labels"] == trained and trained[0] == -100
        assert sample["length"] == max(len(sample[f"{name}_input_ids"]) for name in SIDES)
        assert (sample["margin"], sample["sample"]) == (row.get("margin"), row_digest(row))
    assert data["location"][:] == ["d.jsonl:1", "d.jsonl:2", "d.jsonl:3"]


def test_only_the_assistants_words_are_trained_on_either_side_whatever_stands_between_them(tokenizer, tmp_path):
    """A second derivation: the words themselves, not the mask that was made for them."""
    (sample,) = prepared([MIDDLE], tokenizer, tmp_path).train
    made = '<tool_call>{{"name": "{}", "arguments": {{"city": "Paris"}}}}</tool_call><|im_end|>'
    chosen, rejected = (words(tokenizer, sample[f"{name}_labels"]).replace("\n", "") for name in SIDES)
    assert chosen == made.format("get_weather") + "It is 21 degrees.<|im_end|>"
    assert rejected == made.format("get_wether") + "It is warm, maybe.<|im_end|>"
    whole = tokenizer.decode(sample["chosen_input_ids"])
    assert "SECRETRESULT" in whole and "OTHERRESULT" in tokenizer.decode(sample["rejected_input_ids"])
    # Tokens of the results and of the prompt, found by their own text, have no label anywhere.
    for name, secret in (("chosen", "SECRETRESULT"), ("rejected", "OTHERRESULT"), ("chosen", ASKS["content"])):
        ids, labels = sample[f"{name}_input_ids"], sample[f"{name}_labels"]
        hits = [i for i in range(len(ids)) if secret[:1] and secret in tokenizer.decode(ids[: i + 1])][:1]
        assert hits and all(label == -100 for label in labels[max(0, hits[0] - 3) : hits[0] + 1])


def test_a_changed_result_changes_the_context_and_no_label(tokenizer, tmp_path):
    other = {**MIDDLE, "chosen": [MIDDLE["chosen"][0], result("99 degrees, and more words"), MIDDLE["chosen"][2]]}
    first, second = prepared([MIDDLE, other], tokenizer, tmp_path).train
    assert first["chosen_input_ids"] != second["chosen_input_ids"] and first["rejected_labels"] == second["rejected_labels"]
    assert [x for x in first["chosen_labels"] if x != -100] == [x for x in second["chosen_labels"] if x != -100]


def test_a_labelled_answer_has_its_label_and_the_length_of_its_prompt(tokenizer, tmp_path):
    data = prepared([GOOD, BAD, {"prompt": "2 + 2 =", "completion": " 5", "label": False}], tokenizer, tmp_path, "labelled")
    assert data.train.features == FEATURES["labelled"] and data.train["label"][:] == [True, False, False]
    for row, sample in zip([GOOD, BAD], data.train, strict=False):
        asked = tokenizer.apply_chat_template(row["prompt"], tools=row.get("tools"), add_generation_prompt=True, return_dict=False)
        assert sample["input_ids"][: sample["prompt_length"]] == asked
        assert words(tokenizer, sample["labels"][: sample["prompt_length"]]).strip() == ""
        assert sample["labels"][sample["prompt_length"]] != -100
        assert sample["sample"] == row_digest(row)
    assert tokenizer.decode(data.train[2]["input_ids"][: data.train[2]["prompt_length"]]) == "2 + 2 ="
    assert (data.report.train.good_rows, data.report.train.bad_rows) == (1, 2)
    assert "labels          1 good, 2 bad" in render_report(data.report)


# ---- refused


def test_a_pair_whose_answers_are_the_same_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"d.jsonl:1: the two answers are the same; there is nothing to prefer"):
        prepared([{**PLAIN, "rejected": PLAIN["chosen"]}], tokenizer, tmp_path)


def test_a_pair_that_differs_only_in_tool_results_is_refused_and_one_that_differs_in_words_too_is_not(tokenizer, tmp_path):
    alike = {**MIDDLE, "rejected": [MIDDLE["chosen"][0], result("OTHERRESULT"), MIDDLE["chosen"][2]]}
    with pytest.raises(DataError, match=r"d.jsonl:2: the two answers differ only in what the policy does not say \(tool results"):
        prepared([MIDDLE, alike], tokenizer, tmp_path)
    kept = prepared([MIDDLE, alike, alike], tokenizer, tmp_path, on_error="skip")
    (dropped,) = kept.report.train.dropped.items()
    assert dropped[0] == "the two answers are trained alike" and dropped[1].rows == 2
    assert "d.jsonl:2: the two answers differ only" in render_report(kept.report) and kept.train["location"][:] == ["d.jsonl:1"]
    different = {**alike, "rejected": [*alike["rejected"][:2], says("Something else.")]}
    assert len(prepared([different], tokenizer, tmp_path).train) == 1


@pytest.mark.parametrize(("rows", "message"), [([GOOD], "all 1 answers are good; .* add bad ones"), ([BAD, BAD], "all 2 answers are bad")])
def test_labels_of_one_kind_only_are_refused(tokenizer, tmp_path, rows, message):
    with pytest.raises(DataError, match=f"data.train: {message}"):
        prepared(rows, tokenizer, tmp_path, "labelled")
    held_out = [SourceRow("e.jsonl:1", row) for row in rows]
    with pytest.raises(DataError, match=f"data.eval: {message.replace('bad ones', 'bad ones, or hold out more')}"):
        prepared([GOOD, BAD], tokenizer, tmp_path, "labelled", eval=held_out)


# ---- long ones


def long_answer(turns, last):
    calls_made = [message for n in range(turns) for message in (calls(f"city {n}"), result(f"RESULT {n} " * 20))]
    return [*calls_made, says(last)]


def test_a_long_pair_keeps_as_many_turns_on_both_sides_and_is_counted(tokenizer, tmp_path):
    row = {**MIDDLE, "chosen": long_answer(4, "Fine."), "rejected": [says("I guess"), ASKS, *long_answer(3, "Bad.")]}
    full = prepared([row], tokenizer, tmp_path, max_length=4096)
    assert full.report.train.shortened_rows == 0
    cut = prepared([row], tokenizer, tmp_path, max_length=full.train[0]["length"] - 1)
    (sample,) = cut.train
    kept = [words(tokenizer, sample[f"{name}_labels"]).count("<|im_end|>") for name in SIDES]
    assert kept == [4, 4] and sample["length"] < full.train[0]["length"]
    assert "Fine." not in tokenizer.decode(sample["chosen_input_ids"])
    assert cut.report.train.shortened_rows == 1
    # chosen: nine messages become seven (four calls, three results); rejected: nine become eight less the last result and its call.
    lost = sum(len(row[name]) for name in SIDES) - sum(len(_messages(tokenizer, sample, name)) for name in SIDES)
    assert cut.report.train.dropped_messages == lost
    assert "shortened       1 rows" in render_report(cut.report)


def test_a_long_answer_beside_a_short_one_keeps_as_many_turns_as_that_has(tokenizer, tmp_path):
    row = {**MIDDLE, "chosen": long_answer(4, "Fine."), "rejected": [says("I guess.")]}
    (sample,) = prepared([row], tokenizer, tmp_path).train
    kept = [words(tokenizer, sample[f"{name}_labels"]) for name in SIDES]
    assert [text.count("<|im_end|>") for text in kept] == [1, 1] and '"city 0"' in kept[0] and "I guess." in kept[1]


def _messages(tokenizer, sample, name):
    """The messages of an answer, from the text: as many as there are headers after those of the prompt."""
    text = tokenizer.decode(sample[f"{name}_input_ids"])
    return text.split("<|im_start|>")[1 + len(MIDDLE["prompt"]) :]


def test_a_long_pair_that_would_be_alike_or_too_long_when_cut_goes_whole(tokenizer, tmp_path):
    late = {**MIDDLE, "chosen": long_answer(2, "Fine."), "rejected": long_answer(2, "Bad, very bad.")}
    huge = {**PLAIN, "prompt": [{"role": "user", "content": "word " * 500}]}
    length = prepared([late], tokenizer, tmp_path, max_length=4096).train[0]["length"]
    cut = prepared([MIDDLE, late, huge], tokenizer, tmp_path, max_length=length - 1)
    dropped = {reason: counts.locations for reason, counts in cut.report.train.dropped.items()}
    assert dropped == {
        "the two answers are trained alike once they are cut to max_length": ["d.jsonl:2"],
        "longer than max_length": ["d.jsonl:3"],
    }
    whole = prepared(
        [MIDDLE, {**late, "rejected": long_answer(3, "Bad.")}], tokenizer, tmp_path, max_length=length - 1, too_long="drop_row"
    )
    assert whole.train["location"][:] == ["d.jsonl:1"]
    with pytest.raises(DataError, match=r"d.jsonl:1: chosen \d+ and rejected \d+ tokens; data.max_length is"):
        prepared([late], tokenizer, tmp_path, max_length=length - 1, too_long="fail")


def test_a_labelled_answer_is_never_cut_because_its_label_is_about_the_whole(tokenizer, tmp_path):
    long = {**BAD, "completion": long_answer(4, "Bad."), "tools": TOOLS}
    data = prepared([GOOD, BAD, long], tokenizer, tmp_path, "labelled")
    assert data.report.train.dropped["longer than max_length"].locations == ["d.jsonl:3"] and data.report.train.shortened_rows == 0


# ---- the folder, the report


def test_the_folder_is_another_for_another_kind_and_found_again(tokenizer, tmp_path):
    pairs = prepared([MIDDLE, PLAIN], tokenizer, tmp_path)
    labels = prepared([GOOD, BAD], tokenizer, tmp_path, "labelled")
    samples = prepared(
        [{key: GOOD[key] for key in ("prompt", "completion")} | {"prompt": "a", "completion": "b"}], tokenizer, tmp_path, "samples"
    )
    assert len({pairs.folder, labels.folder, samples.folder}) == 3
    again = prepared([MIDDLE, PLAIN], tokenizer, tmp_path)
    assert again.folder == pairs.folder and again.report == pairs.report
    assert prepared([MIDDLE, {**PLAIN, "margin": 1.0}], tokenizer, tmp_path).folder != pairs.folder


def test_the_report_counts_trained_tokens_of_each_side_and_processes_agree(tokenizer, tmp_path):
    data = prepared([MIDDLE, PLAIN, TEXT] * 5, tokenizer, tmp_path / "a")
    counts = data.report.train
    for name in SIDES:
        trained = sum(label != -100 for labels in data.train[f"{name}_labels"] for label in labels)
        assert getattr(counts, f"{name}_tokens") == trained
    assert counts.trained_tokens == counts.chosen_tokens + counts.rejected_tokens
    assert counts.tokens == sum(len(ids) for name in SIDES for ids in data.train[f"{name}_input_ids"])
    assert (counts.rows, counts.shared_prompts, counts.margins) == (15, 15, 5)
    gap = 2 * (counts.chosen_tokens - counts.rejected_tokens) / counts.trained_tokens
    assert f"({gap:+.1%} of the mean)" in render_report(data.report) and "train: 15 of 15 pairs" in render_report(data.report)
    twice = prepared([MIDDLE, PLAIN, TEXT] * 5, tokenizer, tmp_path / "b", num_proc=2)
    assert twice.report == data.report and twice.train[:] == data.train[:]


def test_rows_that_only_fill_a_batch_have_no_label_on_either_side(tokenizer, tmp_path):
    data = prepared([MIDDLE, PLAIN], tokenizer, tmp_path).train
    filled = with_filler(data, 2)
    assert len(filled) == 4 and filled.features == data.features
    assert {label for name in SIDES for labels in filled[2:][f"{name}_labels"] for label in labels} == {-100}
    assert filled[2]["chosen_input_ids"] == data[1]["chosen_input_ids"]


def test_the_preview_shows_the_prompt_once_and_what_is_trained_on_both_sides(tokenizer, tmp_path):
    text = render_preview(tokenizer, prepared([MIDDLE, PLAIN], tokenizer, tmp_path).train, rows=1, color=False)
    assert text.count("weather in Paris?") == 1 and text.count("── row 1") == 3 and "row 2" not in text
    chosen, rejected = (text.split(f"row 1, {name}: ")[1] for name in SIDES)
    assert chosen.count("⟦") == 4 and "It is 21 degrees.<|im_end|>↵\n⟧" in chosen and "It is warm, maybe.<|im_end|>↵\n⟧" in rejected
    assert "⟦" not in text.split("row 1, chosen")[0]
    labels = render_preview(tokenizer, prepared([GOOD, BAD], tokenizer, tmp_path, "labelled").train, color=False)
    assert "d.jsonl:1, good, " in labels and "d.jsonl:2, bad, " in labels


# ---- from a recipe


def told(tmp_path, task, rows, held_out=None, **data):
    for name, part in (("rows", rows), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part or []))
    files = {"train": str(tmp_path / "rows.jsonl")} | ({"eval": str(tmp_path / "eval.jsonl")} if held_out else {})
    recipe = {
        "task": task,
        "model": {"name_or_path": "embedded:tiny-llama"},
        "data": {**files, **data, "cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    recipe, lines = load(tmp_path / "recipe.yaml"), []
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    return recipe, prepare_recipe(recipe, tokenizer, packing=True, say=lines.append), lines


def chat(question, chosen, rejected):
    return {"prompt": [{"role": "user", "content": question}], "chosen": [says(chosen)], "rejected": [says(rejected)]}


def test_the_task_of_a_recipe_decides_what_its_rows_are(tmp_path):
    rows = [chat("a", "aye", "nay"), chat("b", "aye", "nay")]
    for task, columns in (("dpo", "pairs"), ("reward", "pairs"), ("kto", "labelled")):
        _, data, lines = told(tmp_path, task, rows)
        assert data.train.features == FEATURES[columns] and not lines


def test_a_large_gap_in_length_is_said_with_its_reason(tmp_path):
    _, data, (line,) = told(tmp_path, "dpo", [chat("a", "well, this is a long answer to that", "no")])
    counts = data.report.train
    assert line.startswith(f"warning: data.train: chosen answers have {counts.chosen_tokens} trained tokens on average, rejected ones ")
    assert f" {counts.rejected_tokens}; length is the shortcut" in line
    assert abs(counts.chosen_tokens - counts.rejected_tokens) > 0.25 * (counts.chosen_tokens + counts.rejected_tokens) / 2


def test_prompts_of_held_out_rows_that_are_trained_with_other_answers_are_counted(tmp_path):
    held_out = [chat("a", "yes", "perhaps"), chat("a", "yes", "or not"), chat("c", "yes", "no")]
    _, _, lines = told(tmp_path, "dpo", [chat("a", "yes", "no"), chat("b", "yes", "no")], held_out)
    assert "warning: 1 prompts of data.eval are prompts of data.train, so what is held out of them are at most the answers" in lines


def test_calls_without_tools_and_answers_without_a_partner_are_counted(tmp_path):
    toolpref = [
        {"conversations": [ASKS, calls("Paris")], "label": True},
        {"conversations": [ASKS, says("No.")], "label": False},
        {"conversations": [{**ASKS, "content": "b"}, says("Yes.")], "label": True},
    ]
    _, data, lines = told(tmp_path, "dpo", toolpref)
    assert len(data.train) == 1
    assert lines[0].startswith("warning: 1 calls of good answers stand in rows that offer no tools")
    assert lines[1].startswith("warning: 1 labelled answers are in no pair")


def test_held_out_calls_are_the_chosen_or_good_ones(tmp_path):
    rows = [{**MIDDLE, "prompt": [{"role": "user", "content": f"weather in city {n}?"}]} for n in range(10)]
    recipe, data, _ = told(tmp_path, "dpo", rows, eval_rows=3)
    held_out = held_out_rows(recipe.data, "dpo")
    assert [row.location for row in held_out] == data.eval["location"][:] and len(held_out) == 3
    assert all(row.row["messages"][1:] == MIDDLE["chosen"] and row.row["tools"] == TOOLS for row in held_out)
    labelled = held_out_rows(recipe.data, "kto")
    assert len(labelled) == 2  # of three rows and more that are held out: two good answers and two bad ones to the same prompts
    assert {row.row["messages"][0]["content"] for row in labelled} < {row.row["messages"][0]["content"] for row in held_out}


# ---- real rows


@needs_shared
def test_real_pairs_train_what_the_assistant_says_and_nothing_else(tmp_path):
    """Of every 30th pair the trained text is compared with the words and the calls of the row."""
    tokenizer = chat_tokenizer("qwen2_5_training")
    rows = [
        row
        for file in (
            "when2call/when2call_test_llm_judge.jsonl",
            "toolpref/verification_before_action_v1.5.jsonl",
            "formats/fc_dpo_sample.jsonl",
        )
        for row in load_rows(Source(path=str(SHARED / file)), kind="pairs").rows[::30]
    ]
    data = prepare(rows, tokenizer, cache_dir=tmp_path, kind="pairs", max_length=20_000, num_proc=1)
    assert len(data.train) == len(rows) == 41 and data.report.train.shared_prompts == 41
    for source, sample in zip(rows, data.train, strict=True):
        for name in SIDES:
            text, answer = words(tokenizer, sample[f"{name}_labels"]), source.row[name]
            spoken = [m for m in answer if m["role"] == "assistant"]
            assert text.count("<|im_end|>") == len(spoken)
            plain = sum(len(m.get("content", "").strip()) for m in spoken)
            made = [c["function"] for m in spoken for c in m.get("tool_calls", ())]
            for message in spoken:
                assert message.get("content", "").strip() in text
            for results in (m["content"] for m in answer if m["role"] == "tool"):
                assert results not in text
            found = [json.loads(block.split("</tool_call>")[0]) for block in text.split("<tool_call>")[1:]]
            assert found == [{"name": c["name"], "arguments": c["arguments"]} for c in made]
            framing = len("<tool_call>\n\n</tool_call>\n<|im_end|>") * (len(made) + len(spoken))
            assert len(text) <= plain + framing + sum(2 * len(json.dumps(c)) for c in made)
    assert all(math.isnan(margin) for margin in data.train.with_format("numpy")["margin"][:])
