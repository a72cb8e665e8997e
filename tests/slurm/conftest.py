"""The clusters of these tests: `slurm_cluster` (proctrack/cgroup, as in production), `slurm_cluster_linuxproc`, or `each_tracking`, both.

The whole session starts at most one of each. A test gets it empty, with the environment of its commands in this process too.
"""

import atexit
import functools
import os
from pathlib import Path

import pytest

from slurm.rig import Rig, why_not


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slurm)
            # `make test` is for a machine without Slurm as well, and for a quarter of an hour; `make test-slurm` has these.
            item.add_marker(pytest.mark.slow)


@functools.cache
def shared_rig(tracking: str) -> Rig:
    """One for the whole session: it takes seconds to start."""
    rig = Rig(tracking)
    atexit.register(rig.down)
    return rig.up()


def lend(tracking: str, monkeypatch):
    reason = why_not(tracking)
    if reason:
        pytest.skip(reason)
    rig = shared_rig(tracking)
    for name in set(os.environ) - set(rig.environment):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", rig.environment["SLURM_CONF"])
    yield rig
    rig.reset()


@pytest.fixture
def slurm_cluster(monkeypatch):
    yield from lend("cgroup", monkeypatch)


@pytest.fixture
def slurm_cluster_linuxproc(monkeypatch):
    yield from lend("linuxproc", monkeypatch)


@pytest.fixture(params=["cgroup", pytest.param("linuxproc", marks=pytest.mark.exhaustive)])
def each_tracking(request, monkeypatch):
    yield from lend(request.param, monkeypatch)
