"""The page and the command: nothing is loaded from elsewhere, nothing of a run is taken for HTML, and whatever a folder holds is shown."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from planted_run import Planted, interrupted

from harness.cli.report import command
from harness.errors import HarnessError, LaunchError
from harness.recipe import load
from harness.report import live
from harness.report.live import Server
from harness.run import RunDir

EVIL = '</script><img src=x onerror="alert(1)"><svg/onload=alert(2)>&amp;'
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Its elements, with a check that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.open, self.scripts = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    @property
    def points(self) -> list[dict]:
        return [json.loads(script) for script in self.scripts if script.lstrip().startswith("{")]

    def check_alone(self) -> None:
        """No element, attribute, style or script that would load something."""
        for tag, attributes in self.elements:
            assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "video", "audio"), tag
            for name, value in attributes.items():
                assert name not in ("src", "srcset", "href", "xlink:href", "action", "data") or value.startswith("#"), (tag, name, value)
                assert not name.startswith("on"), (tag, name)
        for style in re.findall(r"<style>(.*?)</style>", self.text, re.DOTALL):
            assert not re.search(r"url\(|@import|@font-face|//", style)
        assert not [script for script in self.scripts if re.search(r"https?:|import\s*\(|XMLHttpRequest|WebSocket|eval\(", script)]
        policy = next(attributes["content"] for tag, attributes in self.elements if attributes.get("http-equiv"))
        assert policy.startswith("default-src 'none'") and "http" not in policy

    def check_pictures(self) -> int:
        """Every picture is XML, and no place in one is not a number. How many there are."""
        pictures = re.findall(r'<svg class="plot".*?</svg>(?:(?=<)(?!<(?:text|circle|line|g))|.*?</svg>)', self.text, re.DOTALL)
        for picture in pictures:
            for element in ElementTree.fromstring(picture).iter():
                for name, value in element.attrib.items():
                    if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"):
                        assert not re.search(r"nan|inf", value), (element.tag, name, value)
                    if name in ("width", "height"):
                        assert float(value.rstrip("%")) >= 0, value
        return len(pictures)


def report(*arguments, code: int = 0) -> str:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if isinstance(done.exception, HarnessError):
        assert done.exception.exit_code == code, done.exception
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


def page_of(*runs, file=None) -> Page:
    output = report(*runs, *(["-o", file] if file else []))
    page = Page(Path(re.search(r"the report: (.*)", output)[1]).read_text(encoding="utf-8"))
    page.check_alone()
    assert page.check_pictures() == page.text.count('<svg class="plot"')
    return page


# ---- what stands on it


def test_the_page_of_a_run_lies_in_its_folder_and_says_what_was_counted(tmp_path):
    run = interrupted(tmp_path / "run")
    page = page_of(run.path)
    assert (run.path / "report.html").read_text() == page.text
    for said in ("goodput 19 % of 1 min 26 s", "rank 0 was killed from outside", "a life goes on from here", "lost, and made again"):
        assert said in page.text, said
    assert re.search(r"steps that were kept <b>19 %</b> 16 s.*steps that were lost <b>9 %</b> 8.0 s", page.text)
    (points,) = page.points
    assert {"f": "number", "s": [2, 4, 6, 8], "v": [4.0, 3.0, 2.0, 1.0]} in points["curves"].values() and points["steps"] == [0, 8]


def test_a_run_can_go_on_where_its_report_lies(tmp_path):
    run = interrupted(tmp_path / "run")
    report(run.path)
    RunDir(run.path)._check_place()


def test_nothing_that_stands_in_a_run_is_taken_for_html(tmp_path):
    recipe = f"task: sft\nmodel: {{name_or_path: {json.dumps(EVIL)}}}\ndata: {{train: {json.dumps(EVIL)}}}\ntrain: {{max_steps: 5}}\n"
    run = Planted(tmp_path / "<b>run", recipe=recipe).manifest(
        backend=EVIL, git_commit=EVIL, versions={EVIL: EVIL}, lineage=[{"task": EVIL, "base": EVIL, EVIL: EVIL, "teacher": {EVIL: EVIL}}]
    )
    run.event(0, "run_began", 1, run=EVIL).event(1, "life_began", 1, world_size=1, backend=EVIL, resumed_from=None)
    run.event(2, "save_failed", 1, step=1, rank=0, error=EVIL).event(3, "life_ended", 1, life="attempt-1", then="stop", why=EVIL)
    run.event(3, "committed", 1, step=1, reason=EVIL, bytes=1, save_s=0.1).ended(1, "stopped", EVIL, 1)
    run.ended(2, f'"{EVIL}').event(3, "life_began", 2, world_size=1, resumed_from=1)
    run.line(2, 1, train_loss=1.0, **{f"train/{EVIL}": 2.0, f"train/rewards/{EVIL}/mean": 1.0}, non_finite=f"train/{EVIL}=nan")
    other = interrupted(tmp_path / "other")
    for page in (page_of(run.path), page_of(run.path, other.path, file=tmp_path / "both.html")):
        assert "onerror" in page.text, "the test shows nothing"
        assert not [tag for tag, _ in page.elements if tag in ("img", "b>run")]
        assert sum(tag == "script" for tag, _ in page.elements) == 1 + len(page.points)


def test_a_name_that_is_no_utf8_does_not_cost_the_page(tmp_path):
    run = interrupted(tmp_path / "run").event(87, "save_failed", 2, error="[Errno 13] caf\udce9")
    assert "caf?" in page_of(run.path).text


def test_metrics_of_every_task_are_drawn_and_what_no_picture_names_stands_in_a_table(tmp_path):
    run = Planted(tmp_path / "run")
    keys = {
        "train/rewards/margins": "margin of preference",
        "eval/logps/accuracies": "pairs in which the chosen answer …",
        "train/logps/chosen_drift": "log-probability since the start",
        "distill/kl": "divergence from the teacher",
        "eval/top1_agreement": "agreement with the teacher",
        "train/reward": "reward",
        "train/rewards/length/mean": "rewards, each",
        "tools/exact_match": "tool calls, of samples",
        "eval/exact_match": "tool calls, held out",
        "eval/calibration_error": "calibration error, held out",
        "speed/mfu": "model FLOP utilisation",
        "train/grad_norm": "gradient norm",
    }
    for step in (1, 2):
        run.line(step, step, train_loss=1.0, **dict.fromkeys([*keys, "train/odd_one"], 0.5 / step))
    page = page_of(run.path)
    for title in keys.values():
        assert f'<span class="title">{title}' in page.text, title
    assert "<code>train/odd_one</code>" in page.text and "<code>train/reward</code>" not in page.text


def test_a_divergence_is_from_the_teacher_only_where_there_is_one(tmp_path):
    run = Planted(tmp_path / "run")
    for step in (1, 2):
        run.line(step, step, train_loss=1.0, **{"train/kl": 0.1, "eval/kl": 0.2 * step})
    page = page_of(run.path)
    assert "divergence from the reference" in page.text and "divergence from the teacher" not in page.text


def test_several_runs_are_drawn_over_each_other_and_losses_of_different_tasks_are_not(tmp_path):
    runs = [Planted(tmp_path / "all" / name, rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    dpo = 'task: dpo\nmodel: {name_or_path: "embedded:tiny-llama"}\ndata: {train: "embedded:pairs-train"}\ntrain: {max_steps: 5}\n'
    runs.append(Planted(tmp_path / "all" / "c", recipe=dpo))
    for at, run in enumerate(runs):
        run.event(at, "run_began", 1, run=run.path.name).line(at + 5, 1, train_loss=1.0 + at).line(at + 9, 2 + at, train_loss=0.5)
    page = page_of(tmp_path / "all")
    assert (tmp_path / "all" / "report.html").is_file() and not (tmp_path / "all" / "a" / "report.html").exists()
    sft, of_dpo = page.points
    assert sft["steps"] == [0, 3] and len([one for one in sft["curves"].values() if one["v"] == [1.0, 0.5] or one["v"] == [2.0, 0.5]]) == 2
    assert of_dpo["steps"] == [0, 4] and "Curves: sft" in page.text and "Curves: dpo" in page.text
    assert re.search(r"<code>train.learning_rate</code></td><td><code>0.001</code></td><td><code>0.002</code></td>", page.text)


def test_a_long_run_stays_below_two_megabytes_with_its_one_peak(tmp_path):
    run = Planted(tmp_path / "run")
    keys = ("train/loss", "train/grad_norm", "train/learning_rate", "speed/tokens_per_s", "train/entropy", "memory/peak_gib", "speed/mfu")
    with open(run.path / "metrics.jsonl", "w") as file:
        for step in range(1, 30_001):
            value = 777_777.0 if step == 12_345 else 1 + step % 97 / 97
            file.write(json.dumps({"step": step, "time": run.began + step, **dict.fromkeys(keys, value)}) + "\n")
    page = page_of(run.path)
    assert len(page.text.encode()) < 2_000_000
    of_loss = next(iter(page.points[0]["curves"].values()))
    assert 777_780.0 in of_loss["v"] and of_loss["s"][of_loss["v"].index(777_780.0)] == 12_345


# ---- folders in every state


def test_a_run_without_a_step_a_life_or_anything_is_shown(tmp_path):
    new = Planted(tmp_path / "new")
    assert "Not begun." in report(new.path)
    began = Planted(tmp_path / "began").ended(1, None).event(0, "run_began", 1, run="x")
    assert "no step yet" in report(began.path)
    page_of(tmp_path)


def test_a_recipe_of_another_version_is_shown_as_it_stands(tmp_path):
    run = Planted(tmp_path / "run", recipe="task: sft\nfuture: {setting: 7}\n").line(1, 1, train_loss=1.0)
    page = page_of(run.path)
    assert "cannot load the recipe" in page.text and "<code>future.setting</code>" in page.text
    broken = Planted(tmp_path / "broken", recipe="task: [\n").line(1, 1, train_loss=1.0)
    assert "recipe.yaml cannot be read" in page_of(broken.path).text


def test_an_altered_ledger_and_a_torn_run_json_cost_what_they_would_have_said(tmp_path):
    run = Planted(tmp_path / "run").line(1, 1, train_loss=2.0).line(2, 2, train_loss=1.0)
    (run.path / "ledger.jsonl").write_text("something else\n")
    (run.path / "run.json").write_text('{"world')
    page = page_of(run.path)
    assert "the ledger cannot be read" in page.text and "train loss 2 → 1" in page.text


def test_what_is_no_run_is_refused_with_what_would_be_right(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no run; give a run folder" in report(tmp_path / "empty", code=2)
    assert "is no folder" in report(tmp_path / "nowhere", code=2)
    assert "Missing argument" in report(code=2)


def test_options_that_cannot_go_together_are_refused(tmp_path):
    run = interrupted(tmp_path / "run")
    assert "--live writes nothing" in report(run.path, "--live", "-o", tmp_path / "x.html", code=2)
    assert "--port is of --live" in report(run.path, "--port", 8000, code=2)
    assert "is a folder" in report(run.path, "-o", tmp_path, code=2)
    assert "--json prints" in report(run.path, "--json", "-o", tmp_path / "x.html", code=2)


def test_a_folder_that_cannot_be_written_is_refused_with_the_way_out(tmp_path):
    run = interrupted(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "--output FILE" in report(run.path, "-o", tmp_path / "file" / "x.html", code=2)


def test_the_same_numbers_are_there_for_programs(tmp_path):
    run = interrupted(tmp_path / "run")
    said = json.loads(report(run.path, "--json"))
    (one,) = said["runs"]
    assert said["format"] == 1 and one["state"] == "done" and (one["step"], one["lost_steps"]) == (8, 4)
    assert one["time"]["goodput"] == pytest.approx(16 / 86) and one["time"]["parts_s"]["lost"] == 8
    assert one["metrics"]["train/loss"] == {"first": 4.0, "last": 1.0, "low": 1.0, "high": 4.0, "median": 3.0, "count": 4}
    assert [life["ended"] for life in one["lives"]] == ["killed", "finished"]
    assert not (run.path / "report.html").exists()


def test_a_pipelines_folder_is_all_of_its_stages(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("stages: {}\n")
    interrupted(tmp_path / "base")
    interrupted(tmp_path / "sweep" / "000")
    page = page_of(tmp_path)
    assert "base" in page.text and "000" in page.text and "2 runs: 2 done" in page.text


def test_the_recipes_that_the_tests_plant_are_real_ones(tmp_path):
    assert load(interrupted(tmp_path / "run").path / "recipe.yaml").train.max_steps == 8


# ---- a page that is served


@pytest.fixture
def served(tmp_path):
    run = interrupted(tmp_path / "run")
    with Server([RunDir(run.path)], None) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield run, server
        server.shutdown()
        thread.join()


def ask(url: str, **headers) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode(), answer.headers["ETag"]
    except urllib.error.HTTPError as error:
        return error.code, "", ""


def test_a_served_page_follows_the_run_and_writes_nothing(served, monkeypatch):
    monkeypatch.setattr("harness.report.live.AT_LEAST_S", 0.0)
    run, server = served
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    _, whole, _ = ask(server.url)
    page = Page(whole)
    page.check_alone()
    status, body, tag = ask(server.url + "body")
    assert status == 200 and whole.count(body) == 1 and 'class="live"' in body
    assert ask(server.url + "body", **{"If-None-Match": tag})[0] == 304
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    run.line(100, 10, train_loss=0.125)
    status, grown, _ = ask(server.url + "body", **{"If-None-Match": tag})
    assert status == 200 and "0.125" in grown and "0.125" not in body


def test_a_served_page_is_drawn_once_and_never_while_new_lines_are_taken_in(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "AT_LEAST_S", 0)
    run, drawn, overlapped = interrupted(tmp_path / "run"), [], []

    def draw(stories, **named):
        before = len(stories[0].columns)
        threading.Event().wait(0.05)
        overlapped.append(len(stories[0].columns) - before)
        drawn.append(before)
        return f"{before} lines"

    monkeypatch.setattr(live, "render_body", draw)
    page = live.Page([RunDir(run.path)], "")
    assert page.body() == page.body() and len(drawn) == 1
    run.line(90, 9, train_loss=1.0)
    first = threading.Thread(target=page.body)
    first.start()
    for step in range(10, 20):
        run.line(90 + step, step, train_loss=1.0)
        page.body()
    first.join()
    assert not any(overlapped)


def test_a_run_that_cannot_be_read_is_said_to_each_who_asks(tmp_path):
    (Planted(tmp_path / "run").path / "metrics.jsonl").mkdir()
    page = live.Page([RunDir(tmp_path / "run")], "")
    for _ in range(2):
        with pytest.raises(OSError, match="Is a directory"):
            page.body()


def test_a_served_page_is_for_this_machine_and_for_those_who_know_its_address(served):
    _, server = served
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server.url, Host="evil.example")[0] == 403
    for path in ("", "body", "x/", f"{server.token}", f"{server.token}/../recipe.yaml", f"{server.token}/recipe.yaml"):
        assert ask(f"http://127.0.0.1:{server.port}/{path}")[0] == 404, path


def test_a_port_that_is_taken_is_refused(served):
    run, server = served
    with pytest.raises(LaunchError, match=f"--port {server.port}: .*in use"):
        Server([RunDir(run.path)], server.port)


def test_ctrl_c_ends_the_live_view_as_a_success(tmp_path):
    run = interrupted(tmp_path / "run")
    argv = [sys.executable, "-m", "harness", "report", str(run.path), "--live"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        url = re.search(r"live: (http://127\.0\.0\.1:(\d+)/\S+/)", process.stdout.readline())
        assert f"ssh -N -L {url[2]}:127.0.0.1:{url[2]}" in process.stdout.readline() and process.stdout.readline()
        assert ask(url[1])[0] == 200
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and "ended; nothing was written" in said
