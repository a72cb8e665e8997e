"""`harness evaluate`: a model that has learnt a few rows by heart and a server that answers from a table, through kills and refusals."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from by_heart import learn_by_heart
from conftest import REPOSITORY, harness, run_command
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_files import closed_wandb_files, wandb_history

from harness.cli import main
from harness.data.sources import load_rows
from harness.data.templates import Renderer
from harness.embedded import resolve
from harness.errors import EvaluationError, HarnessError, ModelError, RecipeError, Stopped
from harness.evaluate.items import Item
from harness.evaluate.report import load_results
from harness.evaluate.suites import calls, when2call
from harness.recipe.schema import Source
from harness.tasks import answering
from harness.tasks.answering import Connection, Settings, find_model
from harness.tasks.evaluate import evaluate
from harness.tools import ToolCall, parse_calls
from harness.units import Worker

KNOWN, ASKED = 6, 14
SETTINGS = Settings(max_new_tokens=40, batch_size=4)
WHEN2CALL = {
    "question": "Plan a dinner with Ann on Friday.",
    "answers": {
        "direct": "Dinner is planned.",
        "tool_call": '{"name": "plan_dinner", "arguments": {"people": ["Ann"], "day": "Friday"}}',
        "request_for_info": "With whom?",
        "cannot_answer": "I cannot plan that.",
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, rows of which it knows the first by heart, and questions with four written answers."""
    folder = tmp_path_factory.mktemp("evaluate")
    with open(resolve("embedded:base-train"), encoding="utf-8") as stream:
        rows = [json.loads(line) for line in itertools.islice(stream, ASKED)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:KNOWN]))
    tools = [json.dumps(tool["function"]) for row in rows for tool in row["tools"] if tool["function"]["name"] == "plan_dinner"][:1]
    choices = [
        {**WHEN2CALL, "uuid": f"{n}", "correct_answer": right, "tools": offered}
        for n, (right, offered) in enumerate([("tool_call", tools), ("cannot_answer", []), ("request_for_info", tools)])
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    learn_by_heart(folder / "model", folder / "known.jsonl")
    return folder


def suites(world: Path) -> list[tuple[str, list[Path]]]:
    return [("calls", [world / "rows.jsonl"]), ("when2call", [world / "choices.jsonl"]), ("loss", [world / "rows.jsonl"])]


def run(world, output, worker=Worker(), *, target=None, wanted=None, settings=SETTINGS, connection=Connection(), stop=lambda: None):  # noqa: B008
    asked = wanted or suites(world)
    return evaluate(
        str(target or world / "model"), asked, settings, output, worker, connection=connection, stop=stop, say=lambda text: None
    )


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "out"
    torch.set_num_threads(1)
    run(world, folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def loaded(world):
    return AutoModelForCausalLM.from_pretrained(world / "model").eval(), AutoTokenizer.from_pretrained(world / "model")


# ---- a model


def test_what_the_model_knows_by_heart_is_right_and_what_it_does_not_is_in_its_class(world, reference):
    found = load_results(reference)
    known = calls.load([world / "known.jsonl"]).items
    results = {result.id: result for result in found.results("calls")}
    assert len(results) == ASKED
    assert all(results[item.id].correct and results[item.id].said and results[item.id].prompt_tokens for item in known)
    right = [result for result in results.values() if result.correct]
    assert KNOWN <= len(right) < ASKED and all((result.failure is None) == result.correct for result in results.values())
    categories = found.summary["suites"]["calls"]["categories"]
    assert sum(numbers["correct"] for numbers in categories.values()) == len(right)
    assert sum(sum(numbers["by_class"].values()) for numbers in categories.values()) == ASKED
    assert "overall" not in json.dumps(found.summary)


def test_the_chosen_answer_is_the_most_probable_one_per_character_by_a_sum_of_its_own(world, reference, loaded):
    model, tokenizer = loaded
    rows = [row for row in load_results(reference).rows if row["suite"] == "when2call"]
    assert len(rows) == 3
    items = {item.id: item for item in when2call.load([world / "choices.jsonl"]).items}
    for row in rows:
        item, expected = items[row["id"]], {}
        prompt = tokenizer.apply_chat_template(item.messages, tools=item.tools or None, add_generation_prompt=True, tokenize=False)
        for name, message in item.gold["choices"].items():
            told = {"content": "", **message}
            whole = tokenizer.apply_chat_template([*item.messages, told], tools=item.tools or None, tokenize=False)
            said = whole.removeprefix(prompt).rstrip().removesuffix(tokenizer.eos_token)
            ids, before = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt + said, prompt))
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected[name] = sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids))) / len(said)
        assert row["scores"] == pytest.approx(expected, rel=1e-4)
        assert row["said"] == max(expected, key=expected.get)
    by_tools = {row["id"]: row["measures"] for row in rows}
    assert by_tools["1"].keys() == {"tool_hallucination"} and not by_tools["0"] and not by_tools["2"]


def test_the_loss_is_that_of_transformers_over_the_trained_tokens(world, reference, loaded):
    model, tokenizer = loaded
    nats = tokens = 0
    for source in load_rows(Source(path=str(world / "rows.jsonl"))).rows:
        rendered = Renderer(tokenizer).render(source.row)
        labels = [token if trained else -100 for token, trained in zip(rendered.ids, rendered.mask, strict=True)]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([rendered.ids]), labels=torch.tensor([labels])).loss.item()
        nats, tokens = nats + mean * sum(rendered.mask), tokens + sum(rendered.mask)
    found = load_results(reference).summary["suites"]["loss"]["categories"]["held_out"]
    assert found["answer_tokens"] == tokens and found["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def test_a_conversation_without_room_for_an_answer_counts_as_not_right_and_says_why(world, tmp_path):
    long = {"messages": [{"role": "user", "content": "dinner " * 600}, {"role": "assistant", "content": "Yes."}]}
    file = tmp_path / "rows.jsonl"
    file.write_text((world / "known.jsonl").read_text() + json.dumps(long) + "\n")
    run(world, tmp_path / "out", wanted=[("calls", [file])])
    row = next(row for row in load_results(tmp_path / "out").rows if row["failure"] == "too_long")
    assert row["correct"] is False and "positions" in row["detail"]
    file.write_text(json.dumps(long) + "\n")
    with pytest.raises(EvaluationError, match="not one of 1 items could be asked; the first: asks in"):
        run(world, tmp_path / "alone", wanted=[("calls", [file])])
    # The question alone fits.
    file.write_text((world / "known.jsonl").read_text())
    settings = replace(SETTINGS, max_new_tokens=512)
    with pytest.raises(EvaluationError, match="not one of .* items could be asked; the first: asks in .*; of 512 positions 512 are the"):
        run(world, tmp_path / "none", wanted=[("calls", [file])], settings=settings)


# ---- units and workers


def test_a_killed_evaluation_goes_on_to_the_same_bytes(world, reference, tmp_path):
    folder, asked = tmp_path / "out", itertools.count()
    with pytest.raises(Stopped, match=r"stopped \(SIGTERM\): 1 of 9 units are there; the same command goes on"):
        run(world, folder, Worker(2, 4), stop=lambda: "SIGTERM" if next(asked) else None)
    process = os.fork()
    if process == 0:
        synced, fsync = itertools.count(1), os.fsync
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL) if next(synced) == 3 else fsync(descriptor)
        run(world, folder)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    units = [name for name in files(folder) if name.startswith("units/unit")]
    assert len(units) == 2 and any(name.endswith(".tmp") for name in files(folder)) and not (folder / "items.jsonl").exists()
    run(world, folder, Worker(1, 2))
    assert {name: data for name, data in files(folder).items() if not name.endswith(".tmp")} == files(reference)


def test_what_is_complete_is_judged_again_without_the_model(world, reference, monkeypatch):
    monkeypatch.setattr("harness.model.export.load_for_inference", None)
    before = files(reference)
    run(world, reference)
    assert files(reference) == before


@pytest.mark.slow
def test_processes_of_the_command_and_ranks_of_a_launcher_write_the_same_and_one_of_them_tells(world, reference, tmp_path):
    folder = tmp_path / "out"
    options = [part for name, paths in suites(world) for part in ("--suite", f"{name}={paths[0]}")]
    options += ["--output", str(folder), "--max-new-tokens", "40", "--batch-size", "4"]
    done = harness("evaluate", world / "model", *options, "--processes", "2")
    assert done.code == 0, done.output
    assert "[0/2] unit" in done.output and "[1/2] unit" in done.output
    assert files(folder) == files(reference)
    done = run_command(
        sys.executable, str(REPOSITORY / "launch" / "evaluate.py"), str(world / "model"), *options, "--against", str(reference),
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0",
    )  # fmt: skip
    assert done.code == 0, done.output
    assert done.output.count("suite      category") == 2 and "nats per token" in done.output
    assert f"against {reference}, on the same items" in done.output and "p (Holm)" in done.output
    comparison = json.loads((folder / "comparison.json").read_text())
    assert all(one["p"] == 1.0 and one["only_this"] == 0 for one in comparison["categories"] if "p" in one)
    assert comparison["other_settings"] == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": Settings(max_new_tokens=41, batch_size=4)}, "settings.max_new_tokens is 40, and of this command 41"),
        ({"target": "embedded:tiny-llama"}, "target.model is"),
        ({"wanted": "fewer"}, "suite.calls is"),
    ],
)
def test_an_output_of_other_answers_is_refused(world, reference, tmp_path, change, words):
    if change.get("wanted"):
        change = {"wanted": [("calls", [world / "known.jsonl"]), *suites(world)[1:]]}
    with pytest.raises(EvaluationError, match=words) as refused:
        run(world, reference, **change)
    assert str(refused.value).endswith("choose another --output")


def test_an_output_in_which_nothing_was_answered_yet_may_be_removed(world, reference, tmp_path):
    (tmp_path / "out" / "units").mkdir(parents=True)
    (tmp_path / "out" / "evaluate.json").write_bytes((reference / "evaluate.json").read_bytes())
    with pytest.raises(EvaluationError, match=r"; choose another --output, or, as nothing is answered there yet: rm -r .*/out$"):
        run(world, tmp_path / "out", settings=Settings(max_new_tokens=41, batch_size=4))


def test_gold_that_changed_under_an_output_is_refused_too(world, tmp_path):
    file = tmp_path / "choices.jsonl"
    file.write_bytes((world / "choices.jsonl").read_bytes())
    run(world, tmp_path / "out", wanted=[("when2call", [file])])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # Another right answer; and the same one, of which another word is written.
    for change in (lambda row: {"correct_answer": "direct"}, lambda row: {"answers": row["answers"] | {"direct": "Indeed."}}):
        file.write_text("".join(json.dumps(row | change(row)) + "\n" for row in rows))
        with pytest.raises(EvaluationError, match="suite.when2call is"):
            run(world, tmp_path / "out", wanted=[("when2call", [file])])


def test_weights_that_changed_under_an_output_are_refused(world, reference, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(world / "model" / "model.safetensors")
    original = (world / "model" / "model.safetensors").read_bytes()
    try:
        save_file(
            {name: tensor + 1e-3 for name, tensor in tensors.items()}, world / "model" / "model.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(EvaluationError, match="target.weights is"):
            run(world, reference)
    finally:
        (world / "model" / "model.safetensors").write_bytes(original)


def test_a_unit_that_is_not_whole_is_named(world, tmp_path):
    wanted = [("loss", [world / "known.jsonl"])]
    run(world, tmp_path / "out", wanted=wanted)
    unit = tmp_path / "out" / "units" / "unit-00001.jsonl"
    whole = unit.read_text()
    unit.write_text(whole[:-9])
    with pytest.raises(EvaluationError, match=r"unit-00001\.jsonl: cannot be read .*; remove it, and the same command writes it again"):
        run(world, tmp_path / "out", wanted=wanted)
    # Whole, and of other items: those of its neighbour, or in another order.
    for text in ((unit.parent / "unit-00000.jsonl").read_text(), "".join(reversed(whole.splitlines(keepends=True)))):
        unit.write_text(text)
        with pytest.raises(EvaluationError, match=r"unit-00001\.jsonl: does not hold the answers to its items"):
            run(world, tmp_path / "out", wanted=wanted)


# ---- a server


class ChatServer:
    """As a context it answers chat completions by the last words of the user: a message, or a status."""

    def __init__(self, table: dict[str, dict | int], names=("small",)):
        self.table, self.names, self.questions = table, names, []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._send(200, {"data": [{"id": name} for name in outer.names]})

            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.questions.append(question)
                found = outer.table.get(question["messages"][-1]["content"], {"content": "I do not know."})
                if isinstance(found, int):
                    self._send(found, {"error": {"message": "Invalid 'tools[0].function.name'"}})
                    return
                choice = {"index": 0, "message": {"role": "assistant", **found}, "finish_reason": "stop"}
                self._send(200, {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}})

            def _send(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()


def table_of(world: Path) -> dict:
    """Gold for the rows that want a call: structured, as text, and once broken."""
    table = {}
    for n, line in enumerate((world / "rows.jsonl").read_text().splitlines()):
        *asked, answer = json.loads(line)["messages"]
        if "tool_calls" not in answer:
            continue
        functions = [call["function"] for call in answer["tool_calls"]]
        texts = [json.dumps(function["arguments"]) for function in functions]
        if n % 2:
            made = [
                {"id": "1", "type": "function", "function": {"name": f["name"], "arguments": t}}
                for f, t in zip(functions, texts, strict=True)
            ]
            table[asked[-1]["content"]] = {"content": None, "tool_calls": made}
        else:
            said = (f'<tool_call>{{"name": "{f["name"]}", "arguments": {t}}}</tool_call>' for f, t in zip(functions, texts, strict=True))
            table[asked[-1]["content"]] = {"content": "\n".join(said)}
    broken = next(key for key, message in table.items() if "tool_calls" in message)
    table[broken]["tool_calls"][0]["function"]["arguments"] = '{"people": ["A'
    return table


def test_calls_of_a_server_are_read_structured_and_as_text(world, tmp_path):
    table = table_of(world)
    with ChatServer(table) as server:
        summary = run(world, tmp_path / "out", target=server.url, wanted=suites(world)[:1])
        wanted = summary["suites"]["calls"]["categories"]
        assert wanted["calls"]["n"] == len(table) and wanted["calls"]["by_class"] == {"right": len(table) - 1, "malformed": 1}
        assert wanted["calls"]["prompt_tokens"] == 11 * len(table)
        if "no_calls" in wanted:
            assert wanted["no_calls"]["rate"] == 1.0
        assert all(q["model"] == "small" and q["temperature"] == 0 and q["max_tokens"] == 40 and q["tools"] for q in server.questions)
        assert summary["target"] == {"url": server.url, "model": "small"}


def test_what_a_gateway_says_in_place_of_an_answer_is_told(monkeypatch):
    monkeypatch.setattr(answering, "_asked", lambda *_: {"data": [], "error": {"message": "no credits are left"}})
    served = answering.Served("http://h:1/v1", Settings(), Connection(model="m"))
    with pytest.raises(EvaluationError, match=r"without choices\[0\].message \(.*no credits are left"):
        served.answer("answers", [Item("1", "c", [{"role": "user", "content": "?"}], [], {})], 0)


def test_half_of_a_character_in_a_call_does_not_end_an_evaluation(tmp_path):
    call = {"type": "function", "function": {"name": "trip", "arguments": {"to": "Rome"}}}
    tool = {"type": "function", "function": {"name": "trip", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}}
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    made = {"type": "function", "function": {"name": "trip", "arguments": '{"to": "\\ud83d"}'}}
    with ChatServer({"?": {"content": "\ud83d", "tool_calls": [made]}}) as server:
        run(None, tmp_path / "out", target=server.url, wanted=[("calls", [tmp_path / "rows.jsonl"])])
    (found,) = load_results(tmp_path / "out").rows
    assert found["failure"] == "wrong_value" and "\ud83d" in found["detail"] and found["said"].startswith("\ud83d")


def test_what_a_server_refuses_is_counted_and_a_suite_of_which_it_takes_nothing_is_an_error(world, tmp_path):
    table = table_of(world)
    first = next(iter(table))
    with ChatServer({**table, first: 400}) as server:
        summary = run(world, tmp_path / "out", target=server.url, wanted=suites(world)[:1])
        assert summary["suites"]["calls"]["categories"]["calls"]["by_class"]["refused"] == 1
    questions = [json.loads(line)["messages"][0]["content"] for line in (world / "rows.jsonl").read_text().splitlines()]
    with ChatServer(dict.fromkeys(questions, 400)) as server, pytest.raises(EvaluationError, match="answers 400 .*Invalid 'tools"):
        run(world, tmp_path / "none", target=server.url, wanted=suites(world)[:1])
    with ChatServer(dict.fromkeys(questions, 401)) as server, pytest.raises(EvaluationError, match=r"answers 401.*--api-key-variable"):
        run(world, tmp_path / "key", target=server.url, wanted=suites(world)[:1])


@pytest.mark.parametrize("usage", ["many", {"prompt_tokens": "many"}, [1]])
def test_a_server_that_speaks_otherwise_is_named(monkeypatch, usage):
    monkeypatch.setattr(answering, "_asked", lambda *_: {"data": [], "choices": [{"message": {"content": "x"}}], "usage": usage})
    served = answering.Served("http://h:1/v1", Settings(), Connection(model="m"))
    with pytest.raises(EvaluationError, match="http://h:1/v1/chat/completions: answers without .* OpenAI-compatible"):
        served.answer("answers", [Item("1", "c", [{"role": "user", "content": "?"}], [], {})], 0)


def test_a_conversation_with_results_goes_to_a_server_as_openai_has_it_and_a_call_may_come_back_without_arguments(monkeypatch):
    bodies, call = [], {"function": {"name": "now"}}

    def asked(client, path, body, patience):
        bodies.append(body)
        return {"data": []} if body is None else {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}

    monkeypatch.setattr(answering, "_asked", asked)
    made = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("now", "here")]
    messages = [{"role": "user", "content": "?"}]
    messages += [{"role": "assistant", "tool_calls": made}, {"role": "tool", "content": "12:00"}, {"role": "tool", "content": "Rome"}] * 2
    served = answering.Served("http://h:1/v1", Settings(), Connection(model="m"))
    for call["function"]["arguments"] in (None, "", {}):
        (said,) = served.answer("answers", [Item("1", "c", messages, [], {})], 0)
        assert parse_calls(said.said).calls == [ToolCall("now", {})]
    sent = bodies[-1]["messages"]
    ids = [call["id"] for message in sent for call in message.get("tool_calls", ())]
    assert len(set(ids)) == 4 and ids == [message["tool_call_id"] for message in sent if message["role"] == "tool"]
    assert all(call["function"]["arguments"] == "{}" for message in sent for call in message.get("tool_calls", ()))


@pytest.mark.parametrize(("suite", "index"), [("when2call", 1), ("loss", 2)])
def test_a_server_is_refused_where_log_probabilities_are_needed(world, tmp_path, suite, index):
    with (
        ChatServer({}) as server,
        pytest.raises(EvaluationError, match=f"--suite {suite}: .*needs log-probabilities .* give the model itself"),
    ):
        run(world, tmp_path / "out", target=server.url, wanted=[suites(world)[index]])
    assert not (tmp_path / "out").exists()


def test_of_several_models_of_a_server_one_has_to_be_named(world, tmp_path):
    with ChatServer({}, names=("a", "b")) as server:
        with pytest.raises(EvaluationError, match="serves a, b; say which with --model"):
            run(world, tmp_path / "out", target=server.url, wanted=suites(world)[:1])
        summary = run(world, tmp_path / "out", target=server.url, wanted=suites(world)[:1], connection=Connection(model="b"))
        assert summary["target"]["model"] == "b"


@pytest.mark.parametrize("model", [None, "m"])
def test_a_server_that_is_not_there_is_said_within_seconds(world, tmp_path, model):
    with ChatServer({}) as server:
        gone = server.url
    begun = time.monotonic()
    with pytest.raises(EvaluationError, match="/models: cannot be reached .*, 3 times in a row; start the server, or correct URL"):
        run(world, tmp_path / "out", target=gone, wanted=suites(world)[:1], connection=Connection(model=model))
    assert time.monotonic() - begun < 20 and not (tmp_path / "out").exists()


# ---- what is refused before anything is asked


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--suite", "calls"], RecipeError, "must be NAME=PATH"),
        (["--suite", "cals=x.jsonl"], RecipeError, 'did you mean "calls"'),
        (["--suite", "calls=x.jsonl"], RecipeError, "no such file or folder"),
        (["--suite", "calls=tests"], RecipeError, "is a folder; give its files"),
        (["--suite", "calls=x", "--shards", "2", "--shard", "2"], RecipeError, "goes from 0 to 1"),
        (["--suite", "calls=x", "--model", "a"], RecipeError, "are for a URL"),
        (["--suite", "calls=x", "--against", "tests"], EvaluationError, "holds no summary.json"),
    ],
)
def test_a_command_that_is_wrong_ends_before_a_model_is_looked_for(tmp_path, monkeypatch, capsys, arguments, error, words):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "embedded:tiny-llama", *arguments, "--output", str(tmp_path / "out")])
    assert ended.value.code == (2 if error is RecipeError else 1)
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        ({"run.json": "{}"}, ModelError, "this run has no final/ yet"),
        ({"notes.txt": ""}, RecipeError, "holds no run.json, config.json or adapter_config.json"),
        (None, RecipeError, "there is no such folder"),
    ],
)
def test_a_target_that_is_none_is_named(world, tmp_path, made, error, words):
    target = tmp_path / "target"
    if made is not None:
        target.mkdir()
        for name, text in made.items():
            (target / name).write_text(text)
    with pytest.raises(error, match=words):
        run(world, tmp_path / "out", target=target)


def test_a_misspelt_run_and_an_address_without_http_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.tasks.answering._commit_of", lambda name: pytest.fail(f"{name} is asked of the hub"))
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/run.json").write_text("{}")
    with pytest.raises(RecipeError, match="runs/frist: there is no such folder; did you mean runs/first?"):
        find_model("runs/frist")
    with pytest.raises(RecipeError, match="a server is named by its URL: http://localhost:8000/v1"):
        find_model("localhost:8000")


def test_a_hub_that_is_not_there_is_waited_for_once(monkeypatch):
    asked = []

    def cached_file(name, file, local_files_only=False):
        asked.append(local_files_only)
        raise OSError("no connection") from LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    with pytest.raises(ModelError, match="org/model: no such model on the hub, or it cannot be reached"):
        find_model("org/model")
    assert asked == [False, True]


def test_a_model_that_gives_scores_is_not_asked_for_words(world, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(world / "model", target)
    (target / "harness.json").write_text('{"task": "reward"}')
    with pytest.raises(ModelError, match="is a reward model, which gives scores"):
        run(world, tmp_path / "out", target=target)


def test_a_suite_that_no_server_answers_is_refused_before_one_is_waited_for(world, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.tasks.evaluate.Served", lambda *arguments: pytest.fail("a server is asked"))
    with pytest.raises(EvaluationError, match="--suite when2call: .*which no chat API tells"):
        run(world, tmp_path / "out", target="http://127.0.0.1:9/v1", wanted=suites(world)[1:2])


def test_a_template_that_does_not_show_tools_is_refused(world, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(world / "model", target)
    (target / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(HarnessError, match="does not show tools to the model"):
        run(world, tmp_path / "out", target=target, wanted=suites(world)[:1])


def test_what_the_chat_template_does_not_take_is_counted_as_refused_in_every_kind_of_suite(world, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(world / "model", target)
    template = target / "chat_template.jinja"
    refusal = "{% if messages[0].content == 'Not this.' %}{{ raise_exception('not this one') }}{% endif %}"
    template.write_text(refusal + template.read_text(encoding="utf-8"))
    row = json.loads((world / "rows.jsonl").read_text().splitlines()[0])
    known = next(json.loads(line) for line in (world / "choices.jsonl").read_text().splitlines())
    bad = {**row, "messages": [{"role": "user", "content": "Not this."}, *row["messages"][1:]]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (bad, row)))
    (tmp_path / "choices.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in ({**known, "question": "Not this.", "uuid": "bad"}, known))
    )
    wanted = [("calls", [tmp_path / "rows.jsonl"]), ("when2call", [tmp_path / "choices.jsonl"]), ("loss", [tmp_path / "rows.jsonl"])]
    run(world, tmp_path / "out", target=target, wanted=wanted)
    rows = load_results(tmp_path / "out").rows
    assert len(rows) == 6 and [row["suite"] for row in rows if row["failure"] == "refused"] == ["calls", "when2call", "loss"]
    assert all("not this one" in row["detail"] for row in rows if row["failure"] == "refused")
    assert [row["loss"] is None for row in rows if row["suite"] == "loss"].count(True) == 1


# ---- W&B


@pytest.mark.slow
def test_the_numbers_and_the_failing_rows_go_to_a_wandb_run(world, reference, tmp_path, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "out"
    shutil.copytree(reference, folder)
    options = [part for name, paths in suites(world) for part in ("--suite", f"{name}={paths[0]}")]
    with pytest.raises(SystemExit) as ended:
        main(
            ["evaluate", str(world / "model"), *options, "--output", str(folder), "--max-new-tokens", "40", "--batch-size", "4"]
            + ["--processes", "1", "--wandb", "p", "--json"]
        )
    assert ended.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    (line,) = wandb_history(closed_wandb_files(folder)[0])
    assert line["calls/calls/rate"] == summary["suites"]["calls"]["categories"]["calls"]["rate"]
    assert line["loss/held_out/loss"] == summary["suites"]["loss"]["categories"]["held_out"]["loss"]
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/failing_*.table.json")
    failing = [row["id"] for row in load_results(folder).rows if row["failure"]]
    assert failing and [row[2] for row in json.loads(table.read_text())["data"]] == failing
