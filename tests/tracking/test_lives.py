"""A run over several lives: what they repeat is told apart and compared, and all of them become one W&B run."""

import gzip
import json
import math
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import harness, run_command
from wandb_files import closed_wandb_files, machine_without_wandb, records, section, wandb_history  # noqa: F401 - an autouse fixture

from harness.recipe import load
from harness.run import RunDir
from harness.tracking import read_metrics
from harness.tracking.callback import TrackingCallback
from harness.tracking.metrics import MetricsFile, loss_curve

OFF = section(mode="disabled")


def live(folder, lines, *, tracking=OFF, exit_code=0, **about) -> None:
    """One life of a run: `lines` are (step, what the trainer logs)."""
    callback = TrackingCallback(folder, tracking, {}, True, **about)
    for step, logs in lines:
        callback.log(step, logs)
    callback.finish(exit_code)


def losses(first: int, last: int, offset: float = 0.0):
    return [(step, {"loss": 5.0 - step / 3 + offset}) for step in range(first, last + 1)]


class Alarms(list):
    def __call__(self, *alarm):
        self.append(alarm)


# ---- what is repeated


def test_a_repeated_point_goes_to_replay_on_wandb_and_counts_in_the_file_under_its_own_key(tmp_path):
    live(tmp_path, losses(1, 4), tracking=section())
    live(tmp_path, losses(3, 6), tracking=section(), resumed_from=2)
    history = [line for file in closed_wandb_files(tmp_path, lives=2) for line in wandb_history(file)]
    assert [line["step"] for line in history if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in history if "replay/train/loss" in line] == [3, 4]
    assert [line["_step"] for line in history] == list(range(8))
    lines = read_metrics(tmp_path)
    assert [(line["step"], line.get("replays")) for line in lines[3:6]] == [(4, None), (3, ["train/loss"]), (4, ["train/loss"])]
    assert loss_curve(lines, "train/loss")[0] == [1, 2, 3, 4, 5, 6]


def test_a_step_whose_evaluation_the_earlier_life_did_not_reach_is_new_for_the_evaluation_alone(tmp_path):
    live(tmp_path, [(10, {"loss": 2.0, "epoch": 0.5})])
    live(tmp_path, [(10, {"loss": 2.0, "epoch": 0.5}), (10, {"eval_loss": 1.0, "epoch": 0.5})], resumed_from=5)
    assert [line.get("replays") for line in read_metrics(tmp_path)] == [None, ["train/loss", "train/epoch"], ["train/epoch"]]


def test_two_lines_of_one_step_in_one_life_repeat_nothing(tmp_path):
    live(tmp_path, [(10, {"loss": 2.0, "epoch": 0.5}), (10, {"eval_loss": 1.0, "epoch": 0.5})])
    assert not any("replays" in line for line in read_metrics(tmp_path))


def test_a_value_that_differs_in_its_last_bit_is_an_alarm_and_one_warning_for_the_step(tmp_path, caplog):
    live(
        tmp_path,
        [(3, {"loss": 2.1, "grad_norm": 0.5, "learning_rate": 1e-4, "speed/step_s": 1.0}), (3, {"eval_loss": 1.0, "eval_runtime": 9.0})],
    )
    alarms = Alarms()
    again = {"loss": math.nextafter(2.1, 3), "grad_norm": 0.25, "learning_rate": 1e-4, "speed/step_s": 2.0}
    live(tmp_path, [(3, again), (3, {"eval_loss": 1.0, "eval_runtime": 8.0})], resumed_from=2, alarm=alarms)
    assert alarms == [(3, "train/loss", 2.1, math.nextafter(2.1, 3)), (3, "train/grad_norm", 0.5, 0.25)]
    assert [record.getMessage() for record in caplog.records] == [
        "step 3 came out otherwise than before the resume: "
        "train/loss was 2.1 and is 2.1000000000000005, train/grad_norm was 0.5 and is 0.25"
    ]
    assert [line.get("replay/differs") for line in read_metrics(tmp_path)] == [None, None, 2, None]


def test_values_that_are_what_they_were_are_no_alarm_also_when_they_were_no_numbers(tmp_path, caplog):
    lines = [(3, {"loss": 0.1 + 0.2, "grad_norm": math.nan}), (4, {"loss": 1 / 3, "grad_norm": math.inf})]
    live(tmp_path, lines)
    alarms = Alarms()
    live(tmp_path, lines, resumed_from=2, alarm=alarms)
    assert alarms == [] and caplog.records == []


def test_a_number_where_there_was_none_differs(tmp_path):
    live(tmp_path, [(3, {"loss": math.nan})])
    for exact in (True, False):
        alarms = Alarms()
        live(tmp_path, [(3, {"loss": 2.0})], resumed_from=2, exact=exact, alarm=alarms)
        assert alarms == ([(3, "train/loss", None, 2.0)] if exact else [])  # the second time it is compared with the later of the two


def test_other_ranks_may_round_otherwise_but_not_by_more_than_a_thousandth(tmp_path):
    live(tmp_path, losses(1, 2))
    alarms = Alarms()
    live(tmp_path, [(1, {"loss": (5.0 - 1 / 3) * 1.0009}), (2, {"loss": (5.0 - 2 / 3) * 1.002})], resumed_from=0, exact=False, alarm=alarms)
    assert [(step, key) for step, key, *_ in alarms] == [(2, "train/loss")]


def test_steps_that_see_other_data_than_before_are_repeated_but_not_compared(tmp_path):
    live(tmp_path, losses(1, 6))
    alarms = Alarms()
    live(tmp_path, losses(3, 6, offset=1.0), resumed_from=2, compare_until=4, alarm=alarms)
    assert [step for step, *_ in alarms] == [3, 4]
    assert [line["step"] for line in read_metrics(tmp_path) if "replays" in line] == [3, 4, 5, 6]


def test_a_metrics_file_that_ends_at_any_byte_costs_the_next_life_nothing(tmp_path):
    file = MetricsFile(tmp_path, now=lambda: 0.0)
    file.append(1, {"train/loss": 3.0})
    file.append(2, {"train/loss": 2.5, "run/facts": {"a": {"b": 1}}})
    file.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        following = MetricsFile(tmp_path)
        following.append(2, {"train/loss": 2.0})
        following.close()
        kept = end >= len(whole) - 1  # all of it, with its end of line or without
        assert [line.get("train/loss") for line in read_metrics(tmp_path)] == [3.0, 2.5, 2.0] if kept else [3.0, 2.0], end
        assert len(following.earlier) == (2 if kept else 1)
        assert following.rows == len(path.read_bytes().splitlines())


# ---- one W&B run of all lives


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run's history takes. Lines are written where the request says, which asks for their number first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.history: list[dict] = []
        self.config: dict = {}
        self.summary: dict = {}
        self.refuses = "nothing"
        """What a query holds that is answered with 403."""
        self.exit_code = None

    @property
    def environment(self) -> dict[str, str]:
        # urllib3 and Go both keep away from a proxy for this address
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": "0123456789" * 4, "NO_PROXY": "127.0.0.1"}

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/graphql":
            return {"data": self.query(**{"variables": {}, **json.loads(body)})}
        if path.endswith("/file_stream"):
            sent = json.loads(body)
            self.exit_code = sent.get("exitcode", self.exit_code)
            if stream := sent.get("files", {}).get("wandb-history.jsonl"):
                self.history[stream["offset"] : stream["offset"] + len(stream["content"])] = map(json.loads, stream["content"])
            if stream := sent.get("files", {}).get("wandb-summary.json"):
                self.summary = json.loads(stream["content"][-1])
        return {}

    def query(self, query: str, variables: dict, **_) -> dict:
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
        if "upsertBucket" in query:
            self.config = json.loads(variables["config"]) if variables.get("config") else self.config
            run = {"id": "B", "name": variables["name"], "displayName": "d", "config": "{}", "project": project}
            return {"upsertBucket": {"inserted": not self.history, "bucket": {**run, "historyLineCount": len(self.history)}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.environment['WANDB_BASE_URL']}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query:
            there = {"id": "B", "name": variables["name"], "displayName": "d", "config": "{}", "summaryMetrics": "{}", "tags": []}
            there |= {"historyLineCount": len(self.history), "historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]])}
            there |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            return {"model": {**project, "bucket": there if self.history else None}}
        if "historyKeys" in query:
            last = {"lastStep": max((line["_step"] for line in self.history), default=-1)}
            there = {"name": variables["name"], "state": "finished", "historyLineCount": len(self.history), "historyKeys": last}
            return {"project": {"run": there if self.history else None}}
        return {"viewer": {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}} if "viewer" in query else {}


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(403 if self.server.refuses.encode() in body else 200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """A run folder in which nothing was logged yet."""
    return begin(tmp_path / "run").path


def begin(path: Path, *overrides: str) -> RunDir:
    recipe = load("tiny/sft-lora", [f"output_dir={path}", "tracking.project=p", "model.revision=s3cret-revision", *overrides])
    run = RunDir.create(recipe)
    run.open_attempt()
    run.write_manifest(recipe, backend="ddp", backend_ruled_by="recipe", world_size=2, attempt=1, smoke=False)
    return run


def offline_lives(folder: Path) -> list[dict]:
    """Life 1 logs 5 steps and dies in the line of the sixth; life 2 goes on from step 3. Returns the rows that W&B is to have."""
    live(folder, losses(1, 5), tracking=section(), exit_code=1, attempt=1)
    with (folder / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 6, "time": 1760')
    live(folder, [*losses(4, 6), (6, {"loss": math.nan})], tracking=section(), exit_code=75, attempt=2, resumed_from=3)
    values = {row: {"step": row + 1, "train/loss": 5.0 - (row + 1) / 3} for row in range(5)}
    values |= {row: {"step": row - 2, "replay/train/loss": 5.0 - (row - 2) / 3} for row in (6, 7)}
    values |= {8: {"step": 6, "train/loss": 3.0}, 9: {"step": 6, "train/loss": "NaN", "non_finite": "train/loss=nan"}}
    return [{"_step": row, **line} for row, line in values.items()]


def said(history: list[dict]) -> list[dict]:
    """Without what W&B adds of its own, and NaN comparable with itself."""
    lines = [{key: value for key, value in line.items() if key not in ("_timestamp", "_runtime")} for line in history]
    return [{key: "NaN" if value != value else value for key, value in line.items()} for line in lines]


ONLINE_LIFE = """
    import json, sys
    from pathlib import Path
    from types import SimpleNamespace
    from harness.tracking.callback import TrackingCallback
    folder, resumed_from, steps, exit_code = json.loads(sys.argv[1])
    tracking = SimpleNamespace(project="p", entity=None, name=None, group=None, tags=(), mode="online")
    callback = TrackingCallback(Path(folder), tracking, {}, True, resumed_from=resumed_from)
    for step in steps:
        callback.log(step, {"loss": 5.0 - step / 3})
    callback.finish(exit_code)
"""


def online_life(server, folder: Path, *, resumed_from: int | None, steps: range, exit_code: int = 0) -> None:
    """In a process of its own: W&B keeps the server and the key of the first run of a process."""
    what = json.dumps([str(folder), resumed_from, list(steps), exit_code])
    done = run_command(sys.executable, "-c", textwrap.dedent(ONLINE_LIFE), what, **{**server.environment, "WANDB_MODE": "online"})
    assert done.code == 0 and "W&B" not in done.output, done.output


def joined_file(folder: Path) -> Path:
    [file] = (folder / "wandb" / "joined").rglob("*.wandb")
    return file


def test_offline_lives_become_one_run_with_every_line_once_the_recipe_and_no_secret(folder):
    rows = offline_lives(folder)
    done = harness("sync", folder, SOME_SERVICE_TOKEN="s3cret-revision", WANDB_RESUME="allow")
    assert done.code == 0, done.output
    assert f"9 lines in {folder / 'metrics.jsonl'}, 2 of them repeat an earlier life; 9 to send" in done.output
    file = joined_file(folder)
    assert f"wandb sync {file}" in done.output  # this machine has no key
    found = list(records(file))
    history = wandb_history(file)
    assert said(history) == rows
    assert [line["_timestamp"] for line in history] == [line["time"] for line in read_metrics(folder)]
    [run] = {record.run.SerializeToString(): record.run for record in found if record.HasField("run")}.values()
    assert run.run_id == json.loads((folder / "wandb.json").read_text())["id"]
    assert run.project == "p" and run.display_name == "run"
    assert not run.resume  # or `wandb sync` would add every line a second time to those of the server
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"] == load(folder / "recipe.yaml").model_dump(mode="json")["train"]
    assert config["harness"]["backend"] == "ddp" and config["harness"]["attempt"] == 1
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [75]
    assert any(record.HasField("preempting") for record in found)
    assert config["model"]["revision"] == "[redacted]"
    assert b"s3cret-revision" not in b"".join(path.read_bytes() for path in file.parent.rglob("*") if path.is_file())


def test_what_was_sent_is_sent_again_after_another_life_and_no_line_stands_there_twice(folder, server):
    rows = offline_lives(folder)
    # WANDB_RESUME would have the lines added to those that are there.
    for _ in range(2):
        done = harness("sync", folder, WANDB_RESUME="allow", **server.environment)
        assert done.code == 0 and "Finished syncing" in done.output, done.output
        assert said(server.history) == rows
        summary = said([server.summary])[0]
        assert summary["train/loss"] == rows[-1]["train/loss"] and summary["replay/train/loss"] == rows[6]["replay/train/loss"]
        assert "W&B has them all" in harness("sync", folder, **server.environment).output
        live(folder, losses(7, 8), tracking=section(), attempt=3, resumed_from=6)
        rows += [{"_step": 10, "step": 7, "train/loss": 5.0 - 7 / 3}, {"_step": 11, "step": 8, "train/loss": 5.0 - 8 / 3}]
    assert server.exit_code == 75  # not done yet, and nothing that failed


@pytest.mark.slow
def test_online_lives_go_on_in_one_run_and_syncing_them_changes_nothing(folder, server):
    online_life(server, folder, resumed_from=None, steps=range(1, 6), exit_code=75)
    online_life(server, folder, resumed_from=3, steps=range(4, 8))
    sent = said(server.history)
    assert [line["_step"] for line in sent] == list(range(9))
    assert [line["step"] for line in sent if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in sent if "replay/train/loss" in line] == [4, 5]
    assert harness("sync", folder, **server.environment).code == 0
    assert said(server.history) == sent
    live(folder, losses(8, 9), tracking=section(), resumed_from=7)  # a node without a network
    assert harness("sync", folder, **server.environment).code == 0
    online_life(server, folder, resumed_from=9, steps=range(10, 12))
    assert [(line["_step"], line["step"]) for line in said(server.history)[9:]] == [(9, 8), (10, 9), (11, 10), (12, 11)]


def test_lines_from_before_the_last_that_wandb_has_are_said_to_be_lacking_and_a_new_id_has_all(folder, server):
    live(folder, losses(1, 3), tracking=section())
    server.history = [{"_step": 3, "step": 4, "train/loss": 1.0}]  # an online life, before the offline one was sent
    live(folder, losses(4, 5))
    done = harness("sync", folder, **server.environment)
    assert done.code == 0 and "W&B lacks 3 lines before the last that it has" in done.output, done.output
    assert [line["_step"] for line in server.history] == [3, 4]
    (folder / "wandb.json").unlink()
    server.history = []
    assert harness("sync", folder, **server.environment).code == 0
    assert [line["_step"] for line in server.history] == [0, 1, 2, 3, 4]


def test_a_server_that_refuses_is_an_error_and_not_taken_for_a_run_that_was_sent(folder, server):
    live(folder, losses(1, 3))
    server.refuses = "upsertBucket"
    done = harness("sync", folder, **server.environment)
    assert done.code == 1 and "not sent, for the reason above" in done.output, done.output
    server.refuses = "historyKeys"
    done = harness("sync", folder, **server.environment)
    assert done.code == 1 and "W&B does not say what it has" in done.output, done.output
    assert server.history == []


def test_without_a_key_nothing_is_joined_that_wandb_may_have(folder):
    live(folder, losses(1, 3), tracking=section())
    for mode in ("offline", "disabled"):  # the second takes the place of the first
        first = harness("sync", folder, WANDB_MODE=mode)
        assert first.code == 0 and str(joined_file(folder)) in first.output, first.output
    joined_file(folder).with_suffix(".wandb.synced").touch()  # as `wandb sync` does
    second = harness("sync", folder)
    assert second.code == 1 and "so that no line is sent twice" in second.output
    assert joined_file(folder).with_suffix(".wandb.synced").is_file()


def test_a_run_that_is_done_is_sent_with_its_export(folder):
    live(folder, losses(1, 3), tracking=section())
    final = folder / "final"
    final.mkdir()
    (final / "adapter_model.safetensors").write_bytes(b"weights")
    (final / "harness.json").write_text(json.dumps({"base": "llama", "data": "d1", "step": 3, "files": {"adapter_model.safetensors": "x"}}))
    assert harness("sync", folder).code == 0
    found = list(records(joined_file(folder)))
    [artifact] = [record.artifact for record in found if record.HasField("artifact")]
    assert artifact.type == "model" and json.loads(artifact.metadata) == {"base": "llama", "data": "d1", "step": 3}
    assert artifact.manifest.contents[0].local_path == str(final / "adapter_model.safetensors")
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]


def test_a_dry_run_says_what_would_be_sent_and_joins_nothing(folder):
    live(folder, losses(1, 3))
    done = harness("sync", folder, "--dry-run")
    assert done.code == 0 and "; 3 to send" in done.output
    assert not (folder / "wandb").exists()


def test_what_cannot_be_synced_is_said(tmp_path, folder):
    done = harness("sync", tmp_path)
    assert done.code == 2 and "holds no run.json, so no run of harness began here" in done.output
    done = harness("sync", folder)
    assert done.code == 1 and "metrics.jsonl: not there" in done.output
    (folder / "metrics.jsonl").write_text('{"step": 1, "ti')
    done = harness("sync", folder)
    assert done.code == 1 and "holds no whole line" in done.output
    run = begin(tmp_path / "off", "tracking.mode=disabled")
    live(run.path, losses(1, 2))
    done = harness("sync", run.path)
    assert done.code == 2 and "tracking.mode = disabled" in done.output


def test_a_variable_of_wandb_that_says_what_cannot_be_costs_wandb_and_not_the_run(tmp_path):
    program = """
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from harness.tracking.wandb_run import WandbRun
        assert WandbRun.start(Path(sys.argv[1]), SimpleNamespace(mode="auto"), {}) is None
    """
    done = run_command(sys.executable, "-c", textwrap.dedent(program), str(tmp_path), WANDB_MODE="on")
    assert done.code == 0 and "W&B: cannot read its settings on this machine" in done.output, done.output
