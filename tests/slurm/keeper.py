"""Starts the daemons of a test's Slurm, takes in every process that they leave behind, and ends them all when it is left alone.

    python keeper.py FOLDER < one JSON argv per line; the pid of what was started comes back, one per line

The daemons, and the jobs that they start and orphan, are its descendants whatever they do (it is their subreaper): it reaps them, which in
a container nobody else would, so that no job waits for a zombie. When its stdin closes, which a test's process cannot fail to do however
it ends, it kills every descendant, deletes the rig's folder and leaves. The promise: nothing of a rig outlives its test's process by more
than seconds.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
REAP_EVERY_S = 0.05
FREEZER = Path("/sys/fs/cgroup/freezer")


def main(folder: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    to_log = [
        (os.POSIX_SPAWN_OPEN, 1, f"{folder}/log/daemons.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    to_log += [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    unread = b""
    while True:
        reap()
        if not select.select([0], [], [], REAP_EVERY_S)[0]:
            continue
        received = os.read(0, 1 << 16)
        if not received:
            break
        *lines, unread = (unread + received).split(b"\n")
        for argv in map(json.loads, lines):
            print(os.posix_spawnp(argv[0], argv, os.environ, file_actions=to_log), flush=True)
    while left := descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            thaw(pid)
        reap()
        time.sleep(0.01)
    shutil.rmtree(folder, ignore_errors=True)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants() -> list[int]:
    """Of this process, at any depth."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found += children.get(pid, [])
    return found


def thaw(pid: int) -> None:
    """Slurm freezes a step while it kills it; what is frozen when Slurm itself is killed could not die."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            controllers, path = line.split(":", 2)[1:]
            if controllers == "freezer" and path.startswith("/slurm"):
                (FREEZER / path[1:] / "freezer.state").write_text("THAWED")


if __name__ == "__main__":
    main(sys.argv[1])
