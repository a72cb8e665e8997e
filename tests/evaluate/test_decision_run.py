"""The whole of `harness decide` on planted behaviours: real rows, chat template, scorer and files; the model is a table."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from harness.cli import group
from harness.errors import DataError, EvaluationError, RecipeError
from harness.evaluate.decision.costs import find_model, plan_training, read_training
from harness.evaluate.decision.schema import Planned, load_decision
from harness.quickstart.planted import BEHAVIOURS, CALM, INSTRUCTION, NAMES, write_planted

WANTED = {
    "ask for weather": ("keep prompting", "zero-shot"),
    "ask for music": ("keep prompting", "instruction"),
    "weather at a home": ("retrieve", "retrieval"),
    "tables and cars": ("fine-tune with SFT", "adapter"),
    "switch lights": ("fix the schema or the data", None),
}


ITEMS, TUNING = 18, 3
"""Of each behaviour: two more than the least that can show 80 %."""
ASKED = ITEMS * (len(BEHAVIOURS) + 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The planted world, smaller."""
    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder, 0, train=400, adapt=200, items=ITEMS, tuning=TUNING)
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    from harness.quickstart.tokenizer import build_tokenizer

    return build_tokenizer([row for name in NAMES[:2] for row in read_rows(world, name)])


def read_rows(world: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


class Table:
    """What a model of the planted world says, looked up: the gold of the question, where the prompt and the training allow it."""

    training, device, context = False, "cpu", 512

    def __init__(self, world: Path, tokenizer, adapted: bool):
        self.tokenizer, self.adapted, self.asked = tokenizer, adapted, 0
        self.config = SimpleNamespace(max_position_embeddings=Table.context)
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        rows = [row for name in ("decide-items", "decide-tuning", "decide-guards") for row in read_rows(world, name)]
        self.rows = {row["messages"][0]["content"]: row for row in rows}

    def eval(self):
        return self

    def train(self, mode):
        pass

    def named_parameters(self):
        import torch

        return [("weight", torch.zeros(7)), *([("lora_A", torch.zeros(2))] if self.adapted else [])]

    def generate(self, input_ids, max_new_tokens, **_):
        import torch

        prompts = self.tokenizer.batch_decode(input_ids)
        self.asked += len(prompts)
        said = [self.tokenizer(self.say(prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
        width = max(map(len, said)) + 1
        ends = [ids + [self.tokenizer.eos_token_id] * (width - len(ids)) for ids in said]
        return torch.cat([input_ids, torch.tensor(ends)[:, :max_new_tokens]], dim=1)

    def say(self, prompt: str) -> str:
        question = re.findall(r"<\|user\|>(.*?)<\|end\|>", prompt)[-1]
        system, row = prompt.partition("<|user|>")[0], self.rows[question]
        behaviour, gold = row["behaviour"], row["messages"][-1]
        knows = {
            "ask for weather": not self.adapted,
            "ask for music": INSTRUCTION in system and not self.adapted,
            "weather at a home": "lives in" in system and not self.adapted,
            "tables and cars": self.adapted,
        }
        if not knows.get(behaviour, True):
            return CALM.format(style="jazz") if behaviour == "ask for music" else '<tool_call>{"name": "rent'
        if "tool_calls" not in gold:
            return gold["content"]
        return "".join(f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in gold["tool_calls"])


@pytest.fixture
def tables(monkeypatch, tmp_path, world, tokenizer):
    """Models are tables: of `base`, and of `adapter`, which was trained in a run. Returns those that were loaded."""
    import harness.model.export

    loaded: list[Table] = []
    for name in ("base", "adapter"):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "harness.json").write_text(json.dumps({"task": "sft", "files": {"made": name}}))
        lines = [{"step": step, "time": time} for step, time in enumerate((0, 60, 120, 4000, 4060))]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(folder, dtype):
        loaded.append(Table(world, tokenizer, adapted=folder.parent.name == "adapter"))
        return loaded[-1], tokenizer

    monkeypatch.setattr(harness.model.export, "load_for_inference", load)
    return loaded


@pytest.fixture
def decide(tables, tmp_path, world):
    """The command, on the small world and the tables."""
    files = [f"{key}.0.path={world}/decide-{key}.jsonl" for key in ("items", "tuning", "guards")]
    models = [f"model={tmp_path / 'base'}", f"tuned.adapter={tmp_path / 'adapter'}", "--output", str(tmp_path / "out")]

    def command(*overrides: str):
        given = ["decide", "decide/tiny", "plan=null", f"retrieval.documents={world}/decide-documents.jsonl", *files, *models, *overrides]
        return CliRunner().invoke(group, given, catch_exceptions=False)

    return command


def report_in(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_each_planted_behaviour_gets_its_verdict_from_answers_and_what_was_answered_is_not_asked_again(decide, tables, tmp_path):
    done = decide()
    assert done.exit_code == 0, done.output
    report = report_in(tmp_path)
    assert {one["name"]: (one["verdict"], one["arm"]) for one in report["behaviours"]} == WANTED
    assert list(WANTED) == list(BEHAVIOURS)
    # The table's adapter has forgotten the weather, and no guard.
    fell = {(one["behaviour"], one["arm"]) for one in report["regressions"]}
    assert fell == {("ask for weather", "adapter"), ("ask for weather", "adapter+retrieval")}
    assert "must be string" in next(iter(report["behaviours"][-1]["faulty"].values()))
    # Measured: gaps of 60 s, a pause of an hour that is none of it, and as much again before the first line.
    adapter = next(model for model in report["models"] if model["name"] == "adapter")
    assert adapter["training"]["hours"] == pytest.approx(4 * 60 / 3600) and adapter["training"]["task"] == "sft"
    assert (adapter["parameters"], adapter["adapter_parameters"]) == (9, 2)
    for name, (verdict, _) in WANTED.items():
        assert re.search(rf"{name} +{ITEMS} +{verdict}", done.output), done.output
    # Examples were chosen on the tuning rows; the table heeds none of them, and the first way is taken of equals.
    assert report["ways"] == dict.fromkeys(("nearest", "draw 1", "draw 2"), 0.25)
    assert next(arm for arm in report["arms"] if arm["name"] == "few-shot")["what"].endswith("(nearest)")
    # One model after the other.
    assert [(table.adapted, table.asked) for table in tables] == [(False, 5 * ASKED + 3 * 4 * TUNING), (True, 2 * ASKED)]

    page, markdown = ((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md"))
    for one in report["behaviours"]:
        assert one["name"] in page and f"## {one['name']}: {one['verdict']}" in markdown
    assert not re.findall(r'(?:src|href)="(?!#)', page) and not re.search(r"<script|@import|url\(", page)

    # Killed, with one arm not there and one torn: these are asked, and nothing else is.
    (tmp_path / "out" / "arms" / "retrieval.jsonl").unlink()
    torn = tmp_path / "out" / "arms" / "adapter.jsonl"
    torn.write_text(torn.read_text()[:-30])
    tables.clear()
    again = decide()
    assert [table.asked for table in tables] == [ASKED, ASKED] and "instruction: " in again.output
    assert report_in(tmp_path)["behaviours"] == report["behaviours"]
    # Another prompt is asked, and answers that are there are judged by other rules without a model.
    tables.clear()
    done = decide("prompts.at-home=you are at home", "rules.target=0.75")
    assert [table.asked for table in tables] == [ASKED] and "(answered earlier)" in done.output


def test_answers_are_taken_again_when_the_file_of_the_items_has_another_name(decide, tables, tmp_path, world, monkeypatch):
    """Also where one of them holds a line's end of Unicode."""
    say = Table.say
    monkeypatch.setattr(Table, "say", lambda self, prompt: say(self, prompt).replace("Sorry", "So\u2028rry") + "\u2028")
    items = tmp_path / "first.jsonl"
    items.write_text((world / "decide-items.jsonl").read_text())
    assert decide(f"items.0.path={items}").exit_code == 0
    before = report_in(tmp_path)["behaviours"]
    tables.clear()
    items = items.rename(tmp_path / "second.jsonl")
    assert decide(f"items.0.path={items}").exit_code == 0
    after = report_in(tmp_path)["behaviours"]
    assert tables == [] and [one["evidence"] for one in after] == [one["evidence"] for one in before]
    assert after[0]["examples"][0]["id"].startswith("second.jsonl:")


def test_a_model_stops_where_its_tokenizers_turns_end_whatever_its_own_generation_config_says(decide, tables, tmp_path, monkeypatch):
    """A base that was made to go on for ever, under an adapter that has learnt to end its turns: Qwen's bases are so."""
    made = Table.__init__

    def make(self, *arguments, **options):
        made(self, *arguments, **options)
        self.generation_config.eos_token_id = 0

    monkeypatch.setattr(Table, "__init__", make)
    assert decide().exit_code == 0
    assert {one["name"]: one["verdict"] for one in report_in(tmp_path)["behaviours"]} == {name: one for name, (one, _) in WANTED.items()}
    assert {arm["cut_off"] for arm in report_in(tmp_path)["arms"]} == {0}
    assert tables[0].generation_config.repetition_penalty in (None, 1.0)


def test_an_arm_that_the_model_cannot_be_asked_is_left_out_with_the_reason_and_the_plain_one_is_an_error(decide, tmp_path, monkeypatch):
    monkeypatch.setattr(Table, "context", 150)
    assert decide("few_shot.k=3").exit_code == 0
    assert "than the 150 of the model" in report_in(tmp_path)["left_out"]["few-shot"]
    assert "few-shot</b> is left out" in (tmp_path / "out" / "index.html").read_text()
    # Its answers are cut off: the setting is at fault and not the model.
    cut = decide("few_shot.k=1", "generate.max_new_tokens=8")
    assert "zero-shot: " in cut.output and "answers were cut off at generate.max_new_tokens = 8" in cut.output
    assert "answers were cut off at" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(EvaluationError, match=r"rules.fails_in = 4, but only 3 prompts could be asked, .*few-shot \(its longest prompt"):
        decide("few_shot.k=3", "rules.fails_in=4")
    with pytest.raises(EvaluationError, match="zero-shot: its longest prompt has .* generate.max_new_tokens = 600"):
        decide("generate.max_new_tokens=600")


def test_a_model_that_is_not_there_or_not_trained_to_its_end_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="tuned.x = runs/nothing: there is no such folder"):
        find_model("runs/nothing", "tuned.x")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(EvaluationError, match="has no final/ yet"):
        find_model(str(tmp_path), "model")
    assert str(find_model("Qwen/Qwen2.5-7B-Instruct", "model")) == "Qwen/Qwen2.5-7B-Instruct"
    assert read_training(tmp_path / "final", tmp_path).hours is None


def test_hours_of_a_training_that_was_killed_while_it_wrote_a_line_are_those_of_the_others(tmp_path):
    lines = [json.dumps({"step": step, "time": 3600.0 * step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 2, "ti', *lines[1:]]))
    assert read_training(tmp_path / "final", None).hours == 3


def test_a_model_that_was_trained_from_another_base_says_so(tmp_path):
    from harness.evaluate.decision.report import said_of_training
    from harness.model.export import digest_base

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    export = tmp_path / "run" / "final"
    export.mkdir(parents=True)
    for digest, other in ((digest_base(str(tmp_path / "base")), None), ("0" * 64, "runs/earlier")):
        (export / "harness.json").write_text(json.dumps({"task": "sft", "base": "runs/earlier", "base_digest": digest}))
        training = read_training(export, tmp_path / "base")
        assert training.other_base == other
        said = said_of_training({"training": asdict(training)})
        assert ("from another base (runs/earlier)" in said) == (other is not None)


def test_the_training_to_come_is_planned_from_a_stated_speed_and_refused_where_nothing_is_known():
    # 20 steps of 16 rows of 256 tokens at most, on two ranks.
    planned = plan_training(Planned(recipe="tiny/sft-lora", tokens=1000, tokens_per_s=10.0, processes=2))
    assert planned["hours"] == pytest.approx(20 * 16 * 256 / 10 / 3600) and planned["gpu_hours"] == pytest.approx(2 * planned["hours"])
    assert "stated" in planned["basis"]
    with pytest.raises(RecipeError, match="metrics.jsonl cannot be read"):
        plan_training(Planned(recipe="tiny/sft-lora", measured="runs/nothing"))
    with pytest.raises(RecipeError, match="set plan.tokens, or max_steps"):
        plan_training(Planned(recipe="sft/llama3-8b-tools-qlora", tokens_per_s=10.0))


def test_items_among_the_tuning_rows_end_the_command_before_a_model_is_loaded(decide, tables, world):
    with pytest.raises(DataError, match="tuning: 90 of 90 rows ask what an item asks"):
        decide(f"tuning.0.path={world}/decide-items.jsonl")
    assert tables == []


def test_a_report_that_cannot_be_written_ends_the_command_before_a_model_is_loaded(decide, tables, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="out"):
        decide()
    assert tables == []


def test_no_item_asks_what_a_training_row_asks(world):
    trained = {row["messages"][-2]["content"] for name in ("decide-train", "decide-adapt-train") for row in read_rows(world, name)}
    asked = [
        row["messages"][-2]["content"] for name in ("decide-items", "decide-tuning", "decide-guards") for row in read_rows(world, name)
    ]
    assert len(asked) == len(set(asked)) == ASKED + 4 * TUNING and not set(asked) & trained
    assert load_decision("decide/tiny").output_dir == "runs/decide-tiny/report"
