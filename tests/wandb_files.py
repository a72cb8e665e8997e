"""What the tests of tracking share: a machine without W&B of its own, a recipe's tracking section, and what a .wandb file holds."""

import json
import os
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def machine_without_wandb(monkeypatch, tmp_path):
    """No key, no settings and no running W&B helper of the person who runs the tests; nothing leaves the machine."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def section(**changes):
    plain = dict(project="p", entity=None, name=None, group=None, tags=("a", "b"), mode="auto")
    return SimpleNamespace(**{**plain, **changes})


def records(wandb_file: Path):
    """The records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB, chunks of crc, length, kind), protobuf inside."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = wandb_file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def closed_wandb_files(run_folder: Path, lives: int = 1) -> list[Path]:
    """The .wandb files, once each has its exit record: W&B's helper process writes the end some milliseconds after `finish`."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        files = sorted((run_folder / "wandb").glob("offline-run-*/*.wandb"))
        if len(files) == lives and all(any(record.HasField("exit") for record in records(file)) for file in files):
            return files
        time.sleep(0.02)
    raise AssertionError(f"no {lives} closed .wandb files in {run_folder}")


def wandb_history(wandb_file: Path) -> list[dict]:
    return [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records(wandb_file)
        if record.HasField("history")
    ]
