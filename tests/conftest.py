"""What the tests share: real data beside the checkout, one cache for the session, and the `harness` command as a person runs it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = (REPOSITORY.parent / "shared" / "data").resolve()
STORIES = SHARED / "tinymodels" / "stories260K-hf"
XLAM = SHARED / "xlam" / "sealtool.json"
MICRO_TEMPLATE = Path(__file__).parent / "micro.jinja"
"""A chat template of few tokens, for a model whose context is 512."""

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    import shutil

    gpu = os.path.isdir("/proc/driver/nvidia/gpus") and os.listdir("/proc/driver/nvidia/gpus")
    for item in items:
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))
        if item.get_closest_marker("slurm") and not shutil.which("slurmctld"):
            item.add_marker(pytest.mark.skip(reason="needs Slurm: apt-get install slurm-wlm munge"))


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real data in {SHARED}, which is not part of the repository")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Everything that is prepared or embedded goes to a folder of this session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HARNESS_CACHE"] = str(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    code: int
    output: str
    """stdout and stderr as they came."""


def run_command(*argv: str, timeout_s: int = 300, cwd: Path | None = None, **environment: str) -> Finished:
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, cwd=cwd, env={**os.environ, **environment}
    )
    return Finished(done.returncode, done.stdout)


def harness(*arguments: str, **options) -> Finished:
    """The command in a process of its own."""
    return run_command(sys.executable, "-m", "harness", *map(str, arguments), **options)


def metrics(run: Path, key: str) -> dict[int, float]:
    """step -> value of one key of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
