"""The pre-flight as a job runs it, on a real cluster: a step of the shim on every node, one of which may not be well."""

import os
import shlex
import socket
import sys
import time
from pathlib import Path

import pytest

from harness.cluster.findings import Finding, render_findings
from harness.cluster.preflight import DEADLINE_S, judge
from harness.cluster.schema import load_cluster, render_cluster
from harness.recipe import load, render_recipe
from slurm.rig import Rig


class Preflight:
    """A run folder, and the step that a job of it begins with."""

    def __init__(self, rig: Rig, tmp_path: Path):
        self.rig, self.run, self.shared = rig, tmp_path / "run", tmp_path / "shared"
        self.folder = self.run / "logs" / "preflight-1.0"
        self.folder.mkdir(parents=True)
        self.shared.mkdir()
        self.cluster = load_cluster("cpu", [f"shared=[{self.shared}]"])
        (self.run / "cluster.yaml").write_text(render_cluster(self.cluster))
        (self.run / "recipe.yaml").write_text(render_recipe(load("tiny/sft-lora", [f"output_dir={self.run}"])))

    def findings(self, before: str = ":") -> list[Finding]:
        """Run the step on three nodes, with `before` (bash) done on each of them first, and judge it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"ADDRESS": "127.0.0.1", "PORT": free.getsockname()[1]}
        where |= {"ATTEMPT": self.folder, "OWNER": "1.0", "PROCESSES": 1, "GRACE_S": 10, "LEAD_S": 60}
        exports = [f"export HARNESS_NODE_{name}={shlex.quote(str(value))}" for name, value in where.items()]
        node = shlex.join([sys.executable, "-m", "harness", "node", str(self.run), "--preflight"])
        srun = "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0"
        job = self.rig.submit("\n".join([*exports, f"{srun} bash -c {shlex.quote(f'{before}; exec {node}')}"]), "-N3", "--export=ALL")
        self.rig.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=DEADLINE_S + 30)
        return judge(self.folder, ("r1", "r2", "r3"), self.cluster)


@pytest.fixture
def preflight(slurm_cluster, tmp_path):
    return Preflight(slurm_cluster, tmp_path)


def failures(findings: list[Finding]) -> list[tuple[str, bool, str]]:
    return [(finding.host, finding.blames_node, finding.what) for finding in findings if finding.level == "fail"]


def test_three_nodes_that_are_well_are_tried_in_seconds(preflight):
    begun = time.monotonic()
    findings = preflight.findings()
    took_s = time.monotonic() - begun
    print(f"three nodes were tried in {took_s:.1f} s, srun and the queue included\n{render_findings(findings)}")
    assert [(finding.host, finding.level) for finding in findings] == [("r1", "ok"), ("r2", "ok"), ("r3", "ok")]
    assert all("all-reduce of 3 ranks" in finding.what and "GB/s" in finding.what for finding in findings)
    assert took_s < DEADLINE_S
    assert os.listdir(preflight.shared) == []


def test_a_node_that_dies_is_the_one_that_is_named(preflight):
    ((host, blamed, what),) = failures(preflight.findings('[ "$SLURMD_NODENAME" = r2 ] && sleep 4 && kill -9 $$'))
    assert (host, blamed) == ("r2", True)
    assert what.startswith("wrote no report")


@pytest.mark.parametrize(
    ("mount", "what"),
    [
        ("mount -t tmpfs none {0}", "what r1 wrote there does not show"),
        ("mount --bind {0} {0} && mount -o remount,bind,ro {0}", "Read-only file system"),
    ],
    ids=["not mounted", "read-only"],
)
def test_a_node_whose_disk_is_not_as_on_the_others_is_named(preflight, mount, what):
    mounts = mount.format(shlex.quote(str(preflight.shared)))
    # The shim is started again, in a view of the disks of its own.
    alone = f'if [ "$SLURMD_NODENAME" = r3 ] && [ -z "$ALONE" ]; then ALONE=1 exec unshare -m bash -c {shlex.quote(mounts)}" && $NODE"; fi'
    node = shlex.join([sys.executable, "-m", "harness", "node", str(preflight.run), "--preflight"])
    assert failures(preflight.findings(f"export NODE={shlex.quote(node)}; {alone}")) == [("r3", True, f"{preflight.shared}: {what}")]
