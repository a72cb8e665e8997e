"""Before the model loads, in under a minute: whether every node of a job can do its part, and which one cannot.

Each node tries itself (`check_node`) and writes what it found. The job's first process puts that together (`judge`), because whose version
is the odd one, and who kept the others waiting, no node can know alone. What is asked of one machine by itself is asked by `harness doctor`
(harness.doctor), and answered here in the same words.

    FOLDER/begun-I         node I has begun: its minute counts from when all have
    FOLDER/node-I.json     of node I: its versions, its findings, how far its processes came and how fast they summed, what it saw of the
                           folders that all must share
    FOLDER/probe-R.log     what the process of rank R said (harness.cluster.probe)
    FOLDER/nccl-R.log      NCCL's own log of it
    SHARED/.harness-*/     in each of those folders, while this lasts: `token`, which node 0 writes, and `answer-I`, what node I read there

The promise: a node is blamed, so that a next job may leave it out, only for what another in its place could do better. What is wrong
everywhere (a recipe, a full disk, a folder that is not shared) is nobody's.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness.cluster.findings import Finding, render_findings
from harness.cluster.probe import STAGES
from harness.cluster.schema import Cluster
from harness.cluster.space import check_space
from harness.doctor.accelerator import AREA, cuda_driver, judge_count, judge_gpu
from harness.doctor.check import Check
from harness.doctor.examine import check_node as check_machine
from harness.life import noted_signals
from harness.recipe import Recipe, load
from harness.resources import cache_root
from harness.run import LIBRARIES, RunDir, write_text_atomically
from harness.share import read_share
from harness.sizes import gib
from harness.watchdog import follow_parent

__all__ = ["DEADLINE_S", "START_S", "Finding", "check_node", "judge", "render_findings"]

START_S = 600.0
"""A prolog, the pull of an image and a cold disk come before the first line of ours; nodes wait so long for one another."""
DEADLINE_S = 60.0
"""For all nodes, from when all have begun."""
PROBES_S, JOIN_S, FOLDERS_S = 40.0, 25.0, 8.0
"""Within that: a node's processes; one's wait for the others; the folders."""
POLL_S = 0.05
CLOCKS_S = 2.0
"""Clocks further apart put the lines of two logs out of order, and make a file's time mean nothing."""


# ---- on each node


def check_node(run: Path, cluster: Cluster, *, folder: Path, index: int, count: int, address: str, port: int, processes: int) -> int:
    """Try this node, number `index` of `count` with `processes` ranks each, and write FOLDER/node-INDEX.json. Rank 0 is met at
    address:port. Returns 0 whatever was found: at anything else srun would end the checks of the other nodes."""
    host, recipe = os.environ.get("SLURMD_NODENAME") or platform.node(), load(run / "recipe.yaml")
    shared = shared_folders(run, recipe, cluster, folder)
    on_gpu = cluster.gpus_per_node > 0
    local_ranks = processes if on_gpu else 1
    plans = [
        {
            "rank": index * local_ranks + local,
            "world": count * local_ranks,
            "device": local if on_gpu else None,
            "address": address,
            "port": port,
            "timeout_s": JOIN_S,
            "folder": str(folder),
            "checks_for": str(run / "recipe.yaml") if local == 0 else None,
        }
        for local in range(local_ranks)
    ]
    with noted_signals() as signals:
        wait_for_all(folder, index, count, signals)
        begun = time.monotonic()
        planted = within(FOLDERS_S, {each.path: each.plant_token for each in shared}) if index == 0 else {}
        with probing(plans) as probes:
            facts = versions()
            checks = check_machine(recipe, trains=not read_share(RunDir(run)))
            findings = check_space(host, run, recipe, count * processes) if index == 0 and not read_share(RunDir(run)) else []
            while any(probe.poll() is None for probe in probes) and not signals and time.monotonic() - begun < PROBES_S:
                time.sleep(POLL_S)
            late = [probe.poll() is None for probe in probes]
        # Only now, when node 0 was met and so has written its tokens: a network disk would remember for a while that there was nothing.
        answered = planted or within(FOLDERS_S, {each.path: functools.partial(each.answer_token, index) for each in shared})
    report = {
        "host": host,
        "index": index,
        "versions": facts,
        "findings": [asdict(finding) for finding in findings],
        "checks": [asdict(check) for check in checks],
        "probes": [read_probe(folder / f"probe-{plan['rank']}.log") | {"late": slow} for plan, slow in zip(plans, late, strict=True)],
        "folders": answered,
        "interrupted": bool(signals),
        "free_bytes": shutil.disk_usage(run).free,
        "seconds": time.monotonic() - begun,
    }
    write_text_atomically(folder / f"node-{index}.json", json.dumps(report) + "\n")
    return 0


def wait_for_all(folder: Path, index: int, count: int, signals: list) -> None:
    """Until every node has begun, or has had START_S for it."""
    write_text_atomically(folder / f"begun-{index}", "")
    deadline = time.monotonic() + START_S
    while sum(1 for _ in folder.glob("begun-*")) < count and not signals and time.monotonic() < deadline:
        time.sleep(POLL_S)


def versions() -> dict[str, str]:
    """Of everything that must be the same on all nodes."""
    found = {"python": platform.python_version(), "harness": f"{harness.__version__} (files {source_digest()})"}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    found["CUDA driver"] = cuda_driver()
    return found


def source_digest() -> str:
    """Of the code that runs here: a commit would not tell of what was changed since, nor of a node without git."""
    digest, package = hashlib.sha256(), Path(harness.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def probing(plans: list[dict]) -> Iterator[list[subprocess.Popen]]:
    """A process for each plan; whatever still runs at the end of the block is killed, as it is when this process dies."""
    probes = []
    try:
        for plan in plans:
            with open(Path(plan["folder"]) / f"probe-{plan['rank']}.log", "wb") as log:
                argv = [sys.executable, "-m", "harness.cluster.probe", json.dumps(plan)]
                environment = {"OMP_NUM_THREADS": "1", **os.environ}
                probes.append(
                    subprocess.Popen(argv, stdout=log, stderr=log, env=environment, preexec_fn=lambda: follow_parent(signal.SIGKILL))
                )
        yield probes
    finally:
        for probe in probes:
            probe.kill()
            probe.wait()


def read_probe(log: Path) -> dict:
    """The facts that a probe told, and as `said` the last other line of it, which is its error if it had one."""
    facts: dict[str, Any] = {"stage": None, "said": ""}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
        elif line.strip():
            facts["said"] = line.strip()
    return facts


# ---- folders that all nodes share


@dataclass(frozen=True)
class SharedFolder:
    """A folder that must be the same on all nodes, and the place in it where they try that."""

    path: str
    place: Path
    is_cache: bool = False
    """The prepared data's: it is made where it is missing, and a node that does not see it can prepare the data again."""

    def plant_token(self) -> dict:
        if self.is_cache:
            self.place.parent.mkdir(parents=True, exist_ok=True)
        self.place.mkdir(exist_ok=True)
        token = secrets.token_hex(8)
        write_text_atomically(self.place / "token", token)
        return asdict(self) | {"place": str(self.place), "token": token}

    def answer_token(self, index: int) -> dict:
        """Read the token and write it again, as this node's answer. The token is None when it does not show."""
        self.place.parent.stat()
        deadline = time.monotonic() + FOLDERS_S - 1
        while not (self.place / "token").is_file():
            if time.monotonic() > deadline:
                return {"token": None}
            time.sleep(POLL_S)
        token = (self.place / "token").read_text()
        write_text_atomically(self.place / f"answer-{index}", token)
        return {"token": token}


def shared_folders(run: Path, recipe: Recipe, cluster: Cluster, folder: Path) -> list[SharedFolder]:
    """The run folder, those that the cluster file names, and the cache; each once."""
    mark, cache = f".harness-{folder.name}", cache_root(recipe.data.cache_dir)
    named = [SharedFolder(path, Path(path) / mark) for path in cluster.shared]
    found = [SharedFolder(str(cache), cache / mark, is_cache=True), *named, SharedFolder(str(run), folder / "tokens")]
    return list({each.path: each for each in found}.values())


def within(seconds: float, acts: dict[str, Callable[[], dict]]) -> dict[str, dict]:
    """What each act returns, all at once; {"error", "missing"} for one that raises OSError or, as on a disk that hangs, does not return."""
    results = {name: {"error": f"does not answer within {seconds:.0f} s", "missing": False} for name in acts}

    def run(name: str, act: Callable[[], dict]) -> None:
        try:
            results[name] = act()
        except OSError as error:
            results[name] = {"error": error.strerror, "missing": isinstance(error, FileNotFoundError)}

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in acts.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    return dict(results)


# ---- in the job's first process


def judge(folder: Path, hosts: tuple[str, ...], cluster: Cluster) -> list[Finding]:
    """What the nodes' reports say together, in the order of `hosts`: a line for each node that passed, and for each thing that is wrong."""
    reports = [json.loads(file.read_text()) for index in range(len(hosts)) if (file := folder / f"node-{index}.json").is_file()]
    findings = find_missing(hosts, reports) + [Finding(**finding) for report in reports for finding in report["findings"]]
    for find in (find_versions, find_gpus, find_unsound, find_folders, find_clocks):
        findings += find(reports)
    findings += find_meeting(reports, has_missing=len(reports) < len(hosts)) + find_transport(reports, cluster)
    failed = {finding.host for finding in findings if finding.level == "fail"}
    findings += [summarise(report, reports) for report in reports if report["host"] not in failed]
    return sorted(findings, key=lambda finding: (hosts.index(finding.host), finding.level != "ok"))


def find_missing(hosts: tuple[str, ...], reports: list[dict]) -> list[Finding]:
    """Nodes that died, hang, or cannot reach the run folder. When none has reported, the cause is no node's."""
    reported = {report["host"] for report in reports}
    what = "wrote no report: it died, it hangs, or it does not see the run folder"
    return [
        Finding(host, "fail", what, "srun may have said more, above", blames_node=bool(reports)) for host in hosts if host not in reported
    ]


def find_versions(reports: list[dict]) -> list[Finding]:
    """What is not as on most nodes; without a majority, what is not as on the first, and then it is no node's fault."""
    findings = []
    for name in reports[0]["versions"] if reports else ():
        found = {report["host"]: report["versions"][name] for report in reports}
        (usual, times), *_ = Counter(found.values()).most_common(1)
        by_majority = 2 * times > len(found)
        if not by_majority:
            usual = found[reports[0]["host"]]
        others = "most nodes have" if by_majority else f"{reports[0]['host']} has"
        findings += [
            Finding(host, "fail", f"{name}: {version}, where {others} {usual}", "give all nodes one environment", blames_node=by_majority)
            for host, version in found.items()
            if version != usual
        ]
    return findings


def find_gpus(reports: list[dict]) -> list[Finding]:
    """GPUs that are not there, are in use by others, or do not compute."""
    findings = []
    for report in reports:
        asked, found = len(report["probes"]), []
        for visible, built_for in {(probe["visible"], probe["built_for"]) for probe in report["probes"] if "visible" in probe}:
            if visible < asked:
                found.append((judge_count(visible, asked, built_for), built_for is not None))
        for number, probe in enumerate(report["probes"]):
            if "gpu" in probe:
                found += [(check, True) for check in judge_gpu(number, probe) if check.level == "fail"]
        findings += [
            Finding(report["host"], "fail", f"{check.name}: {check.what}", check.remedy, blames_node=blamed) for check, blamed in found
        ]
    return findings


def find_unsound(reports: list[dict]) -> list[Finding]:
    """What `harness doctor` would say there, in its words. A node is blamed for what fails on it and not on another; of what all warn of
    one line is enough."""
    checks = {report["host"]: [Check(**check) for check in report["checks"]] + _probes_checks(report) for report in reports}
    wrong = {host: [check for check in found if check.level != "ok"] for host, found in checks.items()}
    failing = {host: {(check.area, check.name) for check in found if check.level == "fail"} for host, found in wrong.items()}
    warned = Counter((check.area, check.name, check.what) for found in wrong.values() for check in found if check.level == "warn")
    findings, said = [], set()
    for host, found in wrong.items():
        for check in found:
            key = check.area, check.name, check.what
            everywhere = check.level == "warn" and warned[key] == len(reports) > 1
            if everywhere and key in said:
                continue
            said.add(key)
            place = (check.area, check.name)
            blamed = check.level == "fail" and any(place not in others for others in failing.values())
            what = f"{check.name}: {check.what}{' (on all nodes)' if everywhere else ''}"
            findings.append(Finding(host, check.level, what, check.remedy, blames_node=blamed))
    return findings


def _probes_checks(report: dict) -> list[Check]:
    """Those of the node's first process, and the one in which it died, or was ended with the step."""
    probe = report["probes"][0]
    checks = [Check(**check) for check in probe.get("checks", ())]
    name = probe.get("checking")
    if name and (probe["late"] or report["interrupted"]):
        # A cold disk, perhaps; what matters to the ranks was tried before.
        checks.append(Check(AREA, name, "warn", f"was not done within {PROBES_S:.0f} s", "is the environment on a slow disk?"))
    elif name:
        what = f"the process that tried it died: {probe['said'] or 'it says nothing'}"
        checks.append(Check(AREA, name, "fail", what, "`harness doctor` there says more"))
    return checks


def find_folders(reports: list[dict]) -> list[Finding]:
    """Folders that are not the same everywhere. Takes away what the check has left in them."""
    first = next((report for report in reports if report["index"] == 0), None)
    findings = []
    for path, planted in first["folders"].items() if first else ():
        if "error" in planted:
            is_elsewhere = any(not report["folders"][path].get("missing") for report in reports if report is not first)
            blamed = planted["missing"] and is_elsewhere
            findings.append(Finding(first["host"], "fail", f"{path}: {planted['error']}", _FOLDER_REMEDY, blames_node=blamed))
            continue
        problems = {report["host"]: problem for report in reports if (problem := _folder_problem(path, planted, report, first["host"]))}
        for host, (what, is_missing) in problems.items():
            if planted["is_cache"]:
                findings.append(
                    Finding(
                        host, "warn", f"{path}: {what}", "this node prepares the data for itself; cache_dir on a shared disk spares that"
                    )
                )
            else:
                blamed = is_missing or 2 * len(problems) < len(reports)
                findings.append(Finding(host, "fail", f"{path}: {what}", _FOLDER_REMEDY, blames_node=blamed))
        shutil.rmtree(planted["place"], ignore_errors=True)
    return findings


_FOLDER_REMEDY = "every node must see and write this folder; is it on a shared disk, and is that mounted there?"


def _folder_problem(path: str, planted: dict, report: dict, first: str) -> tuple[str, bool] | None:
    """(what is wrong with a folder on a node, whether it is not there at all)."""
    if report["index"] == 0:
        return None
    answered = report["folders"][path]
    if "error" in answered:
        return answered["error"], answered["missing"]
    if answered["token"] != planted["token"]:
        return f"what {first} wrote there does not show", False
    answer = Path(planted["place"]) / f"answer-{report['index']}"
    if not answer.is_file() or answer.read_text() != planted["token"]:
        return f"what it wrote there does not show on {first}", False
    return None


def find_clocks(reports: list[dict]) -> list[Finding]:
    """Clocks that are off the middle one, all having been read at the end of one all-reduce."""
    clocks = {report["host"]: probe["clock"] for report in reports for probe in report["probes"][:1] if "clock" in probe}
    middle = statistics.median(clocks.values()) if clocks else 0.0
    return [
        Finding(host, "warn", f"its clock is {clock - middle:+.1f} s off the others'", "is chrony or ntpd running there?")
        for host, clock in clocks.items()
        if abs(clock - middle) > CLOCKS_S
    ]


def find_meeting(reports: list[dict], *, has_missing: bool) -> list[Finding]:
    """Who kept the all-reduce from happening: the nodes that came least far, where others came further. Who only waited for them, or for a
    node that wrote no report, is not named."""
    came = {report["host"]: min((_stages(probe), probe["said"]) for probe in report["probes"]) for report in reports}
    late = {host: come for host, come in came.items() if come[0] < len(STAGES)}
    if not late:
        return []
    least, most = min(stages for stages, _ in came.values()), max(stages for stages, _ in came.values())
    kept_waiting = least < min(most, _stages({"stage": "connected"}))
    if not kept_waiting and has_missing:
        return []
    interrupted = {report["host"] for report in reports if report["interrupted"] and has_missing}
    remedy = "the rest of what it said stands in probe-R.log beside the report" if kept_waiting else _NETWORK_REMEDY
    return [
        Finding(host, "fail", f"{_NOT_REACHED[stages]}: {said or 'it says nothing'}", remedy, blames_node=kept_waiting)
        for host, (stages, said) in late.items()
        if host not in interrupted and (stages == least or not kept_waiting)
    ]


_NOT_REACHED = (
    "Python did not start",
    "torch was not loaded",
    "the device was not ready",
    "rank 0 was not reached",
    "the ranks did not meet",
    "the all-reduce failed",
)
"""By how many of STAGES a process came through."""
_NETWORK_REMEDY = "nodes must reach each other on every port; network.interface in the cluster file says over which interface"


def _stages(probe: dict) -> int:
    return STAGES.index(probe["stage"]) + 1 if probe["stage"] else 0


def find_transport(reports: list[dict], cluster: Cluster) -> list[Finding]:
    """Sockets, where InfiniBand was asked for or may be there."""
    ways = {
        report["host"]: ", ".join(sorted({probe["transport"] for probe in report["probes"] if "transport" in probe})) for report in reports
    }
    by_socket = [host for host, way in ways.items() if "NET/Socket" in way or way.startswith("gloo")]
    asked = cluster.network.infiniband
    if asked == "required":
        remedy, blamed = "does `ibstat` there show a port that is active? else network.infiniband: auto", len(by_socket) < len(ways)
        return [Finding(host, "fail", f"all-reduce went over a socket ({ways[host]})", remedy, blames_node=blamed) for host in by_socket]
    if asked == "auto":
        remedy = "slow, where there is InfiniBand; network.infiniband: off says that there is none"
        nccl = [host for host in by_socket if not ways[host].startswith("gloo")]
        return [Finding(host, "warn", f"all-reduce went over a socket ({ways[host]})", remedy) for host in nccl]
    return []


def summarise(report: dict, reports: list[dict]) -> Finding:
    """The line of a node on which nothing failed."""
    probes = report["probes"]
    parts = [f"{len(probes)} x {probes[0]['gpu']}, free"] if "gpu" in probes[0] else []
    if "all_reduce_s" in probes[0]:
        ranks = sum(len(report["probes"]) for report in reports)
        slowest = max(probe["all_reduce_s"] for probe in probes)
        rate = probes[0]["all_reduce_bytes"] / slowest / 1e9
        bus = rate * 2 * (ranks - 1) / ranks
        parts.append(f"all-reduce of {ranks} ranks {rate:.2f} GB/s (bus {bus:.2f} GB/s) by {probes[0]['transport']}")
    parts += [f"{gib(report['free_bytes'])} free", f"checked in {report['seconds']:.1f} s"]
    return Finding(report["host"], "ok", "; ".join(parts))
