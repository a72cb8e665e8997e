"""The pre-flight without Slurm: nodes are processes of this machine, and what no machine here has (GPUs, NCCL) is told by reports."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from harness.checkpoint.ledger import Ledger
from harness.cluster import preflight, probe, space
from harness.cluster.findings import Finding, render_findings
from harness.cluster.preflight import judge
from harness.cluster.schema import Cluster
from harness.errors import LaunchError
from harness.recipe import load, render_recipe
from harness.watchdog import process_state

HOSTS = ("r1", "r2", "r3")
NO_REPORT = "wrote no report: it died, it hangs, or it does not see the run folder"
NODE = """
import os, sys
from pathlib import Path
from harness.cluster import preflight
from harness.cluster.schema import Cluster
index, port, join_s, run, shared = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]
os.environ["SLURMD_NODENAME"] = f"r{index + 1}"
preflight.JOIN_S, preflight.PROBES_S = join_s, join_s + 5
folder, cluster = run / "logs" / "preflight-1.0", Cluster(name="here", shared=(shared,))
sys.exit(preflight.check_node(run, cluster, folder=folder, index=index, count=3, address="127.0.0.1", port=port, processes=1))
"""


class Job:
    """Three nodes that are tried at once; r1 is rank 0's."""

    def __init__(self, tmp_path: Path):
        self.run, self.shared = tmp_path / "run", tmp_path / "shared"
        self.folder = self.run / "logs" / "preflight-1.0"
        self.folder.mkdir(parents=True)
        self.shared.mkdir()
        (self.run / "recipe.yaml").write_text(render_recipe(recipe_of(self.run)))
        for index in range(len(HOSTS)):
            (self.folder / f"begun-{index}").touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, index: int, join_s: float = 25, **environment) -> subprocess.Popen:
        argv = [sys.executable, "-c", NODE, str(index), str(self.port), str(join_s), str(self.run), str(self.shared)]
        return subprocess.Popen(argv, env={**os.environ, **environment})

    def said(self, rank: int) -> str:
        log = self.folder / f"probe-{rank}.log"
        return log.read_text() if log.exists() else ""

    def judge(self) -> list[Finding]:
        return judge(self.folder, HOSTS, Cluster(name="here", shared=(str(self.shared),)))

    def failures(self) -> list[tuple[str, bool, str]]:
        return [(finding.host, finding.blames_node, finding.what) for finding in self.judge() if finding.level == "fail"]


def wait_for(predicate) -> None:
    deadline = time.monotonic() + 30
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def recipe_of(run: Path, *overrides: str):
    return load("tiny/sft-lora", [f"output_dir={run}", *overrides])


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


# ---- nodes that are processes


def test_the_minute_counts_from_when_all_have_begun(tmp_path, monkeypatch):
    began = []

    def begin(index):
        preflight.wait_for_all(tmp_path, index, 3, [])
        began.append(index)

    nodes = [threading.Thread(target=begin, args=[index]) for index in range(3)]
    nodes[0].start()
    nodes[1].start()
    time.sleep(0.3)  # an image is pulled on the third
    assert began == []
    nodes[2].start()
    for node in nodes:
        node.join(10)
    assert len(began) == 3
    monkeypatch.setattr(preflight, "START_S", 0.1)
    preflight.wait_for_all(tmp_path, 0, 4, [])  # one that never comes is not waited for without end
    preflight.wait_for_all(tmp_path, 0, 4, [signal.SIGTERM])


def test_nodes_that_are_well_have_a_line_each_with_the_bandwidth(job):
    begun = time.monotonic()
    assert [node.wait(50) for node in [job.start(index) for index in range(3)]] == [0, 0, 0]
    assert time.monotonic() - begun < 30
    text = render_findings(job.judge())
    # On busy cores a check may come too late, which is a warning, and no node's fault.
    lines = [line for line in text.splitlines() if line.split()[1:2] == ["ok"]]
    assert [line.split()[0] for line in lines] == ["r1", "r2", "r3"]
    assert "FAIL" not in text
    for line in lines:
        rate, bus = re.search(r"all-reduce of 3 ranks ([\d.]+) GB/s \(bus ([\d.]+) GB/s\) by gloo on \w+", line).groups()
        # Each element goes 2 (n - 1) / n times over each node's wire.
        assert float(bus) == pytest.approx(float(rate) * 4 / 3, abs=0.02)
    assert list(job.shared.iterdir()) == []


def test_a_node_that_dies_is_named_and_those_that_waited_for_it_are_not(job):
    waiting = [job.start(0, join_s=8), job.start(2, join_s=8)]
    killed = job.start(1)
    killed.kill()
    assert [node.wait(50) for node in waiting] == [0, 0]
    killed.wait()
    assert job.failures() == [("r2", True, NO_REPORT)]


def test_nodes_that_are_told_to_end_because_another_died_report_at_once_and_are_not_named(job):
    waiting = [job.start(0), job.start(2)]
    wait_for(lambda: '"connected"' in job.said(0) and '"connected"' in job.said(2))
    told = time.monotonic()
    for node in waiting:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(50) for node in waiting] == [0, 0]
    assert time.monotonic() - told < 10
    assert job.failures() == [("r2", True, NO_REPORT)]


@pytest.mark.parametrize(
    ("torch_there", "said"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "libcudart.so.12: cannot open"),
        ("import time; time.sleep(600)", "it says nothing"),
    ],
    ids=["broken", "slow"],
)
def test_a_node_on_which_torch_does_not_load_kept_the_others_waiting(job, tmp_path, torch_there, said):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "torch.py").write_text(torch_there)
    nodes = [job.start(0, join_s=8), job.start(1, join_s=8), job.start(2, join_s=8, PYTHONPATH=str(tmp_path / "there"))]
    assert [node.wait(50) for node in nodes] == [0, 0, 0]
    ((host, blamed, what),) = job.failures()
    assert (host, blamed) == ("r3", True)
    assert what.startswith("torch was not loaded: ") and said in what


def test_nodes_with_a_library_of_another_version_are_told_apart_by_what_is_installed(job, tmp_path):
    distribution = tmp_path / "there" / "peft-0.0.1.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    nodes = [job.start(0), job.start(1, PYTHONPATH=str(tmp_path / "there")), job.start(2)]
    assert [node.wait(50) for node in nodes] == [0, 0, 0]
    (odd, unsound) = job.failures()
    assert odd[:2] == unsound[:2] == ("r2", True)
    assert re.fullmatch(r"peft: 0\.0\.1, where most nodes have 0\.2\d\.\d", odd[2])
    assert unsound[2].startswith("peft: 0.0.1; harness was tested with 0.2")


def test_a_port_that_is_taken_is_no_nodes_fault(job):
    with socket.socket() as taken:
        taken.bind(("", job.port))
        taken.listen()
        assert [node.wait(50) for node in [job.start(index, join_s=8) for index in range(3)]] == [0, 0, 0]
    failures = job.failures()
    assert {blamed for _, blamed, _ in failures} == {False}
    assert "address already in use" in dict((host, what) for host, _, what in failures)["r1"].lower()


def test_a_probe_dies_with_its_node(job):
    node = job.start(0)
    wait_for(lambda: "connected" in job.said(0))
    (child,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    node.kill()
    node.wait()
    wait_for(lambda: process_state(int(child)) in (None, "Z"))


# ---- what reports say together


def report(index: int, **facts) -> dict:
    """Of a node on which all is well."""
    clean = {
        "host": HOSTS[index],
        "index": index,
        "versions": {"torch": "2.13.0"},
        "findings": [],
        "checks": [],
        "probes": [done_probe()],
        "folders": {},
        "interrupted": False,
        "free_bytes": 2**40,
        "seconds": 5.0,
    }
    return clean | facts


def done_probe(**facts) -> dict:
    return {
        "stage": "reduced",
        "said": "",
        "all_reduce_s": 0.01,
        "all_reduce_bytes": 2**24,
        "clock": 1000.0,
        "transport": "gloo on eth0",
    } | facts


def gpu_probe(**facts) -> dict:
    gpu = {
        "visible": 2,
        "built_for": "13.0",
        "gpu": "H100",
        "gpu_free_bytes": 79 * 2**30,
        "gpu_total_bytes": 80 * 2**30,
        "multiplies": True,
    }
    return done_probe(transport="NET/IB, P2P") | gpu | facts


def judged(tmp_path, *reports: dict, **cluster) -> list[Finding]:
    for each in reports:
        (tmp_path / f"node-{each['index']}.json").write_text(json.dumps(each))
    return judge(tmp_path, HOSTS[: len(reports)], Cluster(name="here", **cluster))


def wrong(findings: list[Finding]) -> list[tuple[str, str, bool, str]]:
    return [(finding.host, finding.level, finding.blames_node, finding.what) for finding in findings if finding.level != "ok"]


def test_the_odd_version_is_the_one_that_most_nodes_do_not_have(tmp_path):
    reports = [report(0, versions={"torch": "2.12.0"}), report(1), report(2)]
    assert wrong(judged(tmp_path, *reports)) == [("r1", "fail", True, "torch: 2.12.0, where most nodes have 2.13.0")]


def test_of_two_nodes_with_different_versions_neither_is_to_blame(tmp_path):
    reports = [report(0, versions={"torch": "2.12.0"}), report(1)]
    assert wrong(judged(tmp_path, *reports)) == [("r2", "fail", False, "torch: 2.13.0, where r1 has 2.12.0")]


def test_when_no_node_reports_no_node_is_to_blame(tmp_path):
    assert wrong(judge(tmp_path, HOSTS, Cluster(name="here"))) == [(host, "fail", False, NO_REPORT) for host in HOSTS]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"visible": 1, "stage": "loaded", "said": "there is no such GPU"}, "GPU: 1 of 2 GPUs are visible"),
        ({"gpu_free_bytes": 60 * 2**30}, "GPU 1: H100: 20.0 GiB of 80.0 GiB are in use by others"),
        ({"multiplies": False}, "GPU 1: H100: multiplies wrongly"),
    ],
    ids=["lost", "in use", "broken"],
)
def test_a_gpu_that_is_lost_or_used_or_broken_is_its_nodes_fault(tmp_path, bad, what):
    reports = [report(0, probes=[gpu_probe(), gpu_probe()]), report(1, probes=[gpu_probe(), gpu_probe(**bad)])]
    failures = wrong(judged(tmp_path, *reports, gpus_per_node=2))
    assert failures[0] == ("r2", "fail", True, what)
    assert {host for host, *_ in failures} == {"r2"}


def test_a_torch_for_cpus_is_no_nodes_fault(tmp_path):
    probes = [{"stage": "loaded", "said": "there is no such GPU", "visible": 0, "built_for": None}]
    failures = wrong(judged(tmp_path, report(0, probes=probes), report(1, probes=probes), gpus_per_node=1))
    assert ("r1", "fail", False, "torch: built for CPUs alone") in failures
    assert not any(blamed for _, _, blamed, _ in failures)


def test_a_clock_that_is_off_is_a_warning(tmp_path):
    reports = [report(index, probes=[done_probe(clock=clock)]) for index, clock in enumerate((1000.0, 1004.5, 1001.0))]
    assert wrong(judged(tmp_path, *reports)) == [("r2", "warn", False, "its clock is +3.5 s off the others'")]


def test_ranks_that_met_and_could_not_sum_blame_the_network_and_no_node(tmp_path):
    late = {"stage": "connected", "said": "RuntimeError: Connection refused"}
    findings = judged(tmp_path, *[report(index, probes=[late]) for index in range(3)])
    assert wrong(findings) == [(host, "fail", False, "the ranks did not meet: RuntimeError: Connection refused") for host in HOSTS]
    assert "network.interface" in findings[0].remedy


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("required", [("r2", "fail", True, "all-reduce went over a socket (NET/Socket, P2P)")]),
        ("auto", [("r2", "warn", False, "all-reduce went over a socket (NET/Socket, P2P)")]),
        ("off", []),
    ],
)
def test_a_socket_in_place_of_infiniband(tmp_path, asked, expected):
    probes = [[gpu_probe(transport=way)] * 2 for way in ("NET/IB, P2P", "NET/Socket, P2P", "NET/IB, P2P")]
    reports = [report(index, probes=each) for index, each in enumerate(probes)]
    assert wrong(judged(tmp_path, *reports, gpus_per_node=2, network={"infiniband": asked})) == expected


def test_sockets_everywhere_are_no_nodes_fault_and_gloo_is_one(tmp_path):
    reports = [report(index) for index in range(2)]
    expected = [(host, "fail", False, "all-reduce went over a socket (gloo on eth0)") for host in HOSTS[:2]]
    assert wrong(judged(tmp_path, *reports, network={"infiniband": "required"})) == expected


# ---- what harness doctor says


def check(name: str, level: str, what: str = "of its own") -> dict:
    return {"area": "accelerator", "name": name, "level": level, "what": what, "remedy": "mend it"}


def test_an_environment_that_is_unsound_on_one_node_is_its_fault_and_on_all_nobodys(tmp_path):
    sound, broken = done_probe(checks=[check("4-bit", "ok")]), done_probe(checks=[check("4-bit", "fail", "computes wrongly")])
    alone = judged(tmp_path, report(0, probes=[sound]), report(1, probes=[broken]), report(2, probes=[sound]))
    assert wrong(alone) == [("r2", "fail", True, "4-bit: computes wrongly")] and alone[1].remedy == "mend it"
    everywhere = judged(tmp_path, *[report(index, probes=[broken]) for index in range(3)])
    assert wrong(everywhere) == [(host, "fail", False, "4-bit: computes wrongly") for host in HOSTS]


def test_what_all_nodes_warn_of_is_said_once_and_stops_nothing(tmp_path):
    reports = [report(index, checks=[check("libraries", "warn", "not the tested ones")]) for index in range(3)]
    assert wrong(judged(tmp_path, *reports)) == [("r1", "warn", False, "libraries: not the tested ones (on all nodes)")]


def test_a_node_whose_process_dies_in_a_check_is_named_with_the_check(tmp_path):
    died = done_probe(checks=[check("torch", "ok")], checking="four_bit", late=False, said="Illegal instruction")
    ((host, level, blamed, what),) = wrong(judged(tmp_path, report(0), report(1, probes=[died])))
    assert (host, level, blamed) == ("r2", "fail", True)
    assert what == "four_bit: the process that tried it died: Illegal instruction"
    ((_, level, blamed, what),) = wrong(judged(tmp_path, report(0), report(1, probes=[died | {"late": True}])))
    assert (level, blamed, what) == ("warn", False, "four_bit: was not done within 40 s")  # a cold disk is no reason to end a job
    assert wrong(judged(tmp_path, report(0), report(1, probes=[died], interrupted=True)))[0][1:3] == ("warn", False)


def test_a_node_that_lacks_the_model_of_an_offline_job_is_named_before_the_model_loads(job, tmp_path):
    recipe = recipe_of(job.run, "model.name_or_path=org/model")
    (job.run / "recipe.yaml").write_text(render_recipe(recipe))
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).touch()
    there = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    nodes = [job.start(0, **there), job.start(1, **there | {"HF_HUB_CACHE": str(tmp_path / "none")}), job.start(2, **there)]
    assert [node.wait(50) for node in nodes] == [0, 0, 0]
    ((host, blamed, what),) = job.failures()
    assert (host, blamed) == ("r2", True)
    assert what == f"model: org/model is not in the cache ({tmp_path / 'none'}), and HF_HUB_OFFLINE is set"


# ---- folders


class Folders:
    """One shared folder, and reports of three nodes on it."""

    def __init__(self, tmp_path: Path, *, is_cache: bool = False):
        self.path, self.tmp_path = tmp_path / "shared", tmp_path
        self.folder = preflight.SharedFolder(str(self.path), self.path / ".harness-x", is_cache)
        self.path.mkdir()
        self.planted = self.folder.plant_token()
        self.answers = [self.planted, *(self.folder.answer_token(index) for index in (1, 2))]

    def failures(self) -> list[tuple[str, str, bool, str]]:
        reports = [report(index, folders={str(self.path): answer}) for index, answer in enumerate(self.answers)]
        found = wrong(judged(self.tmp_path, *reports))
        return [(*rest, what.removeprefix(f"{self.path}: ")) for *rest, what in found]


UNSEEN = {"token": None}
ABSENT = {"error": "No such file or directory", "missing": True}
READ_ONLY = {"error": "Read-only file system", "missing": False}


def test_a_folder_that_all_see_and_answer_in_is_left_as_it_was(tmp_path):
    folders = Folders(tmp_path)
    assert folders.failures() == [] and list(folders.path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (UNSEEN, "what r1 wrote there does not show"),
        ({"token": "another"}, "what r1 wrote there does not show"),
        (ABSENT, "No such file or directory"),
        (READ_ONLY, "Read-only file system"),
        ({"error": "does not answer within 8 s", "missing": False}, "does not answer within 8 s"),
    ],
)
def test_a_node_that_alone_does_not_share_a_folder_is_to_blame(tmp_path, answer, what):
    folders = Folders(tmp_path)
    folders.answers[2] = answer
    assert folders.failures() == [("r3", "fail", True, what)]


def test_a_node_whose_answer_does_not_arrive_is_to_blame(tmp_path):
    folders = Folders(tmp_path)
    (folders.folder.place / "answer-2").unlink()
    assert folders.failures() == [("r3", "fail", True, "what it wrote there does not show on r1")]


def test_a_folder_that_nobody_shares_is_no_nodes_fault_unless_it_is_not_there(tmp_path):
    folders = Folders(tmp_path)
    folders.answers[1:] = [UNSEEN, UNSEEN]
    assert [(host, blamed) for host, _, blamed, _ in folders.failures()] == [("r2", False), ("r3", False)]
    folders.folder.plant_token()
    folders.answers[1:] = [UNSEEN, ABSENT]
    assert [(host, blamed) for host, _, blamed, _ in folders.failures()] == [("r2", False), ("r3", True)]


def test_a_folder_that_the_first_node_alone_lacks_is_its_fault(tmp_path):
    folders = Folders(tmp_path)
    folders.answers[:] = [ABSENT, UNSEEN, UNSEEN]
    assert folders.failures() == [("r1", "fail", True, "No such file or directory")]
    folders.answers[:] = [ABSENT, ABSENT, ABSENT]
    assert folders.failures() == [("r1", "fail", False, "No such file or directory")]


def test_a_cache_that_is_not_shared_is_a_warning_because_nodes_can_prepare_alone(tmp_path):
    folders = Folders(tmp_path, is_cache=True)
    folders.answers[2] = UNSEEN
    assert folders.failures() == [("r3", "warn", False, "what r1 wrote there does not show")]


def test_a_disk_that_hangs_holds_up_nobody(tmp_path):
    begun = time.monotonic()
    found = preflight.within(0.3, {"hangs": lambda: time.sleep(600), "is not there": (tmp_path / "none").stat})
    assert time.monotonic() - begun < 2
    assert found["hangs"]["error"].startswith("does not answer within") and not found["hangs"]["missing"]
    assert found["is not there"] == {"error": "No such file or directory", "missing": True}


def test_the_folders_that_must_be_shared_are_the_runs_the_clusters_and_the_cache(tmp_path):
    recipe = recipe_of(tmp_path / "run", f"data.cache_dir={tmp_path}/cache")
    cluster = Cluster(name="here", shared=("/data", str(tmp_path / "cache")))
    found = preflight.shared_folders(tmp_path / "run", recipe, cluster, tmp_path / "run" / "logs" / "preflight-7.0")
    assert [(each.path, str(each.place), each.is_cache) for each in found] == [
        (f"{tmp_path}/cache", f"{tmp_path}/cache/.harness-preflight-7.0", False),
        ("/data", "/data/.harness-preflight-7.0", False),
        (f"{tmp_path}/run", f"{tmp_path}/run/logs/preflight-7.0/tokens", False),
    ]


# ---- space

Disk = namedtuple("Disk", "f_bavail f_frsize f_files f_favail")


def space_of(run: Path, monkeypatch, *overrides: str, free: int, files: int = 10**6) -> list[tuple[str, str]]:
    monkeypatch.setattr(os, "statvfs", lambda path: Disk(free, 1, 10**7, files))
    return [(found.level, found.what) for found in space.check_space("r1", run, recipe_of(run, *overrides), world_size=2)]


def commit(run: Path, size: int) -> None:
    Ledger(run / "ledger.jsonl", 1).append("committed", step=1, bytes=size)


def test_room_is_needed_for_those_that_are_kept_and_one_more(tmp_path, monkeypatch):
    commit(tmp_path, 2**30)
    assert space_of(tmp_path, monkeypatch, "checkpoint.keep=2", free=3 * 2**30) == []
    ((level, what),) = space_of(tmp_path, monkeypatch, "checkpoint.keep=2", free=3 * 2**30 - 1)
    assert level == "fail"
    assert what == f"{tmp_path}: 3.0 GiB are free, and 3 more checkpoints of 1.0 GiB (as large as the last) take 3.0 GiB"


def test_checkpoints_that_lie_there_need_no_room_again(tmp_path, monkeypatch):
    commit(tmp_path, 2**30)
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert space_of(tmp_path, monkeypatch, "checkpoint.keep=2", free=2**30) == []
    assert space_of(tmp_path, monkeypatch, "checkpoint.keep=2", free=2**30 - 1)[0][0] == "fail"


def test_a_first_checkpoint_is_estimated_by_the_models_files(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(1000, 500, dtype=torch.bfloat16), "b": torch.zeros(500)}, model / "model.safetensors")
    (model / "model-torn.safetensors").write_bytes(b"\xff" * 20)
    whole = ("model.lora=null", f"model.name_or_path={model}", "checkpoint.keep=1")
    size = 16 * (1000 * 500 + 500)
    assert space_of(tmp_path, monkeypatch, *whole, free=2 * size) == []
    assert space_of(tmp_path, monkeypatch, *whole, free=2 * size - 1)[0][0] == "warn"
    ((level, what),) = space_of(tmp_path, monkeypatch, *whole, free=size - 1)
    assert level == "fail" and "(an estimate, at most)" in what
    adapter = (f"model.name_or_path={model}", "model.lora.r=4", "model.lora.modules_to_save=[b]", "checkpoint.keep=1")
    size = 16 * (4 * (1000 + 500) + 500)
    assert space_of(tmp_path, monkeypatch, *adapter, free=2 * size) == []
    assert space_of(tmp_path, monkeypatch, *adapter, free=2 * size - 1)[0][0] == "warn"


def test_a_model_that_does_not_lie_here_has_no_size_yet(tmp_path, monkeypatch):
    assert space_of(tmp_path, monkeypatch, "model.name_or_path=some/model", free=1) == []
    assert space_of(tmp_path, monkeypatch, free=1) == []


def test_a_disk_without_inodes_holds_no_checkpoints(tmp_path, monkeypatch):
    ((level, what),) = space_of(tmp_path, monkeypatch, "checkpoint.keep=1", free=2**40, files=100)
    assert (level, what) == ("fail", f"{tmp_path}: 100 more files can be made, and checkpoints take up to 112")


def test_a_ledger_that_is_none_is_told_and_no_nodes_fault(tmp_path, monkeypatch):
    (tmp_path / "ledger.jsonl").write_text("nonsense\n")
    ((level, what),) = space_of(tmp_path, monkeypatch, free=2**40)
    assert level == "fail" and "is not an event of a run" in what


# ---- one process


NCCL_LOG = """\
h1:11:22 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
h1:11:22 [0] NCCL INFO Channel 06/0 : 36[4] -> 20[4] [send] via NET/IBext_v8/3
h1:11:22 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] via P2P/CUMEM/read
h1:11:22 [0] NCCL INFO Channel 01/0 : 1[1] -> 0[0] via SHM/direct/direct
"""


def test_the_way_that_nccl_takes_is_read_from_its_channels():
    assert probe.nccl_transport(NCCL_LOG) == "NET/IBext_v8, P2P, SHM"
    assert probe.nccl_transport("h1 NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0") == "NET/Socket"
    assert probe.nccl_transport("h1 NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/AWS Libfabric/0/GDRDMA") == "NET/AWS Libfabric"
    assert probe.nccl_transport("") == "unknown"


def test_a_sum_that_is_wrong_is_an_error(monkeypatch):
    import torch.distributed as dist

    from harness.distributed import measure_all_reduce

    def measure():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        stages = []
        where = {"address": "127.0.0.1", "port": port, "timeout_s": 10, "device": None, "size_bytes": 4096, "repeats": 3}
        return measure_all_reduce(rank=0, world=1, reached=stages.append, **where), stages

    measured, stages = measure()
    assert measured["all_reduce_bytes"] == 4096 and stages == ["connected", "joined"]
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor[7].add_(1))
    with pytest.raises(LaunchError, match="the sum of 1 ones over all ranks has elements from 1 to 2"):
        measure()
    dist.destroy_process_group()


def test_findings_are_a_table_with_remedies():
    findings = [Finding("r1", "ok", "fine"), Finding("r10", "fail", "1 of 2 GPUs are visible", "`dmesg` there may say why", True)]
    assert render_findings(findings) == ("r1   ok    fine\nr10  FAIL  1 of 2 GPUs are visible\n           `dmesg` there may say why")
