"""DeepSpeed's operators: a lock that a killed process has left must not stop every run that comes after."""

import os
import threading
import time

import pytest

from harness import operators


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "needed_operators", lambda: ["ShareMemCommBuilder"])
    monkeypatch.setattr(operators, "_build_folder", lambda name: tmp_path)
    monkeypatch.setattr(operators, "is_compiled", lambda name: True)
    lock = tmp_path / "lock"
    lock.touch()
    return lock


def test_an_old_lock_is_removed_and_said(lock):
    long_ago = time.time() - operators.LOADING_S - 1
    os.utime(lock, (long_ago, long_ago))
    said = []
    operators.release_abandoned_locks(offloads=False, say=said.append)
    assert not lock.exists() and len(said) == 1 and str(lock) in said[0]


def test_a_young_lock_is_waited_for_and_left_to_its_owner(lock):
    threading.Timer(0.2, lock.unlink).start()
    said = []
    operators.release_abandoned_locks(offloads=False, say=said.append, poll_s=0.02)
    assert not lock.exists() and not said
