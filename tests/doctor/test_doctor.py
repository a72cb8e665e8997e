"""`harness doctor`: what it says of Python's world, disks and the network, side by side, and how it ends."""

import importlib.metadata
import json
import re
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPOSITORY, harness

from harness.cluster.slurm import COMMANDS, check_commands
from harness.doctor import examine, machine, network, places
from harness.doctor.check import Check, render_area
from harness.doctor.examine import Task
from harness.recipe import load

# ---- the command


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of the command for all that is asked of it."""
    begun = time.monotonic()
    done = harness("doctor", "--json", cwd=tmp_path_factory.mktemp("here"), WANDB_API_KEY="", HF_HUB_OFFLINE="1")
    return done, time.monotonic() - begun


def test_a_sound_machine_ends_with_0_and_says_every_check_as_json(whole):
    done, _ = whole
    found = json.loads(done.output)
    assert done.code == 0 and found["sound"], done.output
    names = {check["name"] for check in found["checks"]}
    assert names >= {
        "Python",
        "libraries",
        "compiler",
        "runs folder",
        "cache",
        "temp folder",
        "hub",
        "W&B",
        "torch",
        "attention",
        "DeepSpeed",
    }
    assert names >= {"4-bit", "Slurm", "shm"}
    assert {check["level"] for check in found["checks"]} <= {"ok", "warn"}
    assert all(check["remedy"] for check in found["checks"] if check["level"] != "ok")


def test_it_takes_seconds(whole):
    assert json.loads(whole[0].output)["seconds"] < 30  # four or five alone on two cores; these tests share them


def test_a_recipe_that_cannot_run_here_ends_with_1_and_the_remedy(tmp_path):
    none = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = harness("doctor", "tiny/sft-lora", "model.name_or_path=org/model", "tracking.mode=disabled", cwd=tmp_path, **none)
    assert done.code == 1
    assert re.search(
        r"  fail  model +org/model is not in the cache \(.*/hub\), and HF_HUB_OFFLINE is set\n +→ `harness fetch RECIPE`", done.output
    )
    assert re.search(r"\nnot ready for this recipe: 1 of \d+ checks failed", done.output)
    assert "4-bit" not in done.output and "Slurm" not in done.output  # this recipe needs neither


def test_a_recipe_has_the_checks_that_it_needs(monkeypatch):
    def heavy(*overrides):
        return examine.plan_heavy(load("tiny/sft-lora", overrides))

    assert heavy() == ["torch", "gpus", "attention"]
    assert heavy("backend=zero2") == ["torch", "gpus", "attention", "operators"]
    assert heavy("train.optim=adamw_8bit")[-1] == "four_bit"
    assert examine.plan_heavy(load("tiny/sft-qlora"))[-1] == "four_bit"
    for there, level in ((None, "fail"), (object(), "ok")):
        monkeypatch.setattr(examine, "find_spec", lambda package, there=there: there)
        (found,) = examine.check_packages(load("tiny/sft-full", ["train.use_liger_kernel=true"]))
        assert (found.name, found.level) == ("packages", level) and "liger_kernel" in found.what


# ---- libraries


@pytest.fixture
def versions(monkeypatch):
    """What is installed, other than it is."""
    changed, really = {}, machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: changed.get(name, really(name)))
    return changed


def test_libraries_are_compared_with_what_the_tests_were_run_with(versions):
    assert [check.level for check in machine.check_libraries()] == ["ok"]
    versions["datasets"] = "5.3.0"
    (check,) = machine.check_libraries()
    assert check.level == "warn" and "datasets 5.3.0 (5.2.0)" in check.what
    assert str(REPOSITORY / "constraints.txt") in check.remedy
    versions["torch"] = importlib.metadata.version("torch").partition("+")[0] + "+cu130"  # another build, the same version
    assert len(machine.check_libraries()) == 1


@pytest.mark.parametrize(("version", "level"), [(None, "fail"), ("0.11.0", "fail"), ("1.99.0", "warn")], ids=["missing", "old", "newer"])
def test_a_library_that_is_missing_or_too_old_is_a_failure_and_a_newer_one_a_warning(versions, version, level):
    versions["trl"] = version
    ((check),) = machine.check_libraries()
    assert (check.name, check.level) == ("trl", level)
    assert check.remedy.startswith("pip install 'trl") and "1.16" in check.remedy


def test_a_machine_without_a_compiler_is_told_what_it_is_for(monkeypatch):
    monkeypatch.setattr(machine, "find_compiler", lambda: None)
    (check,) = machine.check_compiler()
    assert check.level == "warn" and "DeepSpeed" in check.remedy


# ---- places

Usage = namedtuple("Usage", "total used free")


def place(path: Path, wanted_bytes: int = 1) -> places.Place:
    return places.Place("cache", path, wanted_bytes, "another disk: HARNESS_CACHE=FOLDER")


def test_a_folder_that_is_not_there_is_judged_by_the_one_in_which_it_will_be_made(tmp_path):
    (check,) = places.check_place(place(tmp_path / "a" / "b"))
    assert check.level in ("ok", "warn") and f"(to be made in {tmp_path})" in check.what and "MiB/s" in check.what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rate", "free", "level"),
    [(2**30, 2**40, "ok"), (2**20, 2**40, "warn"), (2**30, 2**20, "warn"), (OSError(30, "Read-only file system"), 0, "fail")],
)
def test_a_place_is_judged_by_its_speed_and_what_is_free(tmp_path, monkeypatch, rate, free, level):
    def measure(folder):
        if isinstance(rate, OSError):
            raise rate
        return rate

    monkeypatch.setattr(places, "write_rate", measure)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    (check,) = places.check_place(place(tmp_path, 2**30))
    assert check.level == level and str(tmp_path) in check.what
    assert level != "fail" or "Read-only file system" in check.what


def test_a_file_in_the_way_of_a_folder_is_a_failure(tmp_path):
    (tmp_path / "runs").write_text("")
    for path in (tmp_path / "runs", tmp_path / "runs" / "first"):
        (check,) = places.check_place(place(path))
        assert check.level == "fail" and "Not a directory" in check.what


def test_little_shared_memory_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(places.shutil, "disk_usage", lambda folder: Usage(0, 0, 64 * 2**20))
    (check,) = places.check_shared_memory()
    assert check.level == "warn" and "--shm-size" in check.remedy


# ---- the network


class Wandb(BaseHTTPRequestHandler):
    """Knows one key."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        import base64

        key = base64.b64decode(self.headers.get("Authorization", "Basic ").split()[1] if self.headers.get("Authorization") else "").decode()
        viewer = {"username": "ada"} if key == "api:right" else None
        body = json.dumps({"data": {"viewer": viewer}}).encode()
        self.send_response(200 if key != "api:refused" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("key", "level"), [("right", "ok"), ("wrong", "fail"), ("refused", "fail")])
def test_a_wandb_key_is_tried_on_its_server(server, key, level):
    check = network.judge_wandb(server, key)
    assert check.level == level and server in check.what
    assert level != "ok" or "as ada" in check.what


def test_a_server_that_is_not_there_is_a_warning_within_seconds():
    begun = time.monotonic()
    check = network.judge_wandb("http://127.0.0.1:9", "right")
    assert check.level == "warn" and "sync" in check.remedy
    assert network.ask("http://127.0.0.1:9") and time.monotonic() - begun < 3


def test_a_name_server_that_is_silent_is_a_hub_that_is_not_reached_and_no_check_that_hangs(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **named: go.wait(20) and [])
    monkeypatch.setattr(network, "NETWORK_S", 0.1)
    begun = time.monotonic()
    assert network.ask("https://huggingface.co/api") == "no answer within 0.1 s" and time.monotonic() - begun < 5
    go.set()


def test_wandb_that_is_switched_off_and_a_hub_that_must_not_be_asked_are_no_fault(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert network.check_wandb()[0].level == "ok"
    monkeypatch.setattr(network, "is_offline", lambda: True)
    monkeypatch.setattr(network, "ask", lambda url: pytest.fail("the hub was asked"))
    (check,) = network.check_hub()
    assert check.level == "ok" and "HF_HUB_OFFLINE" in check.what


def test_a_hub_that_is_not_reached_is_a_warning_that_leads_to_fetch(monkeypatch):
    monkeypatch.setattr(network, "is_offline", lambda: False)
    monkeypatch.setattr(network, "ask", lambda url: "Connection refused")
    (check,) = network.check_hub()
    assert check.level == "warn" and "harness fetch" in check.remedy
    (missing,) = network.check_inputs(load("tiny/sft-lora", ["model.name_or_path=org/none-of-that-name"]))
    assert missing.level == "fail" and "is not reached" in missing.what
    monkeypatch.setattr(network, "ask", lambda url: None)
    (missing,) = network.check_inputs(load("tiny/sft-lora", ["model.name_or_path=org/none-of-that-name"]))
    assert missing.level == "warn" and "would load it from" in missing.what


# ---- side by side


def test_an_area_is_shown_as_soon_as_it_and_those_before_it_are_done():
    go = threading.Event()
    tasks = [
        Task("first", "a", lambda: [Check("first", "a", "ok", "")]),
        Task("second", "b", lambda: [Check("second", "b", "ok", str(go.wait(5)))]),
    ]
    areas = examine.examine(tasks, None)
    assert next(areas)[0] == "first"
    go.set()
    assert next(areas) == ("second", [Check("second", "b", "ok", "True")])


def test_a_check_that_hangs_or_raises_is_a_failure_of_its_own(monkeypatch):
    monkeypatch.setattr(examine, "LIGHT_S", 0.3)
    tasks = [Task("disks", "hangs", lambda: time.sleep(60)), Task("disks", "raises", lambda: 1 / 0), Task("disks", "fine", list)]
    begun = time.monotonic()
    ((_, checks),) = examine.examine(tasks, None)
    assert time.monotonic() - begun < 5
    assert [(check.name, check.level) for check in checks] == [("hangs", "fail"), ("raises", "fail")]
    assert "ZeroDivisionError" in checks[1].what


# ---- how it reads


def test_an_area_is_a_table_whose_long_lines_go_on_below_themselves():
    checks = [Check("places", "cache", "ok", "fine"), Check("places", "runs", "warn", "slow " * 12, "another disk")]
    lines = render_area("places", checks, width=60).splitlines()
    assert lines[:2] == ["places", "  ok    cache         fine"]
    assert all(len(line) <= 60 for line in lines) and lines[-1] == " " * 22 + "→ another disk"
    assert render_area("places", checks[1:], width=None).splitlines()[1].endswith("slow slow ")


# ---- Slurm


@pytest.mark.parametrize(
    ("commands", "ping", "level", "said"),
    [
        ((), "", "ok", "not here"),
        (("sbatch", "squeue"), "", "fail", "srun, scontrol, sinfo, sacct not on PATH"),
        (COMMANDS, "echo 'Slurmctld(primary) at login is UP'", "ok", "slurm 24; Slurmctld(primary) at login is UP"),
        (COMMANDS, "echo 'scontrol: error: no route' >&2; exit 1", "warn", "no controller answers (scontrol: error: no route)"),
    ],
    ids=["none", "some", "up", "down"],
)
def test_slurms_commands_are_all_there_or_none_and_its_controller_answers(tmp_path, monkeypatch, commands, ping, level, said):
    for name in commands:
        does = {"scontrol": ping, "sinfo": "echo slurm 24"}.get(name, ":")
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (check,) = check_commands()
    assert check.level == level and said in check.what
