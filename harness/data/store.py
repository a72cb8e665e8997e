"""The cache of prepared data: a folder per content, complete or absent.

    <cache_dir>/<digest>/
        manifest.json         what is here: rows and bytes of every file, and the report of how it was made
        train-00000.arrow     an Arrow stream; where there are several, they are read one after the other
        eval-00000.arrow      only where something is held out

Columns of samples: input_ids, labels (-100 where not trained), length, sample (row_digest), location; of packs: packing.py; of pairs and
labelled answers: prepare_pairs.py.

Promise: a folder with that name loads whole or not at all. It is written under another name, flushed to the disk, and then renamed in
one step; the process that loses a race for the name takes the winner's. A reader believes nothing but the manifest, and checks it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets

from harness.data.report import Dropped, PrepareReport
from harness.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
ABANDONED_AFTER_S = 600

_TOKENS = List(Value("int32"))
_PLACE = {"length": Value("int32"), "sample": Value("string"), "location": Value("string")}
SAMPLE_FEATURES = Features({"input_ids": _TOKENS, "labels": _TOKENS, **_PLACE})
PAIR_FEATURES = Features(
    {f"{side}_{column}": _TOKENS for side in ("chosen", "rejected") for column in ("input_ids", "labels")}
    | {"margin": Value("float32"), **_PLACE}
)
LABELLED_FEATURES = Features({"input_ids": _TOKENS, "labels": _TOKENS, "label": Value("bool"), "prompt_length": Value("int32"), **_PLACE})
FEATURES = {"samples": SAMPLE_FEATURES, "pairs": PAIR_FEATURES, "labelled": LABELLED_FEATURES}


@dataclass(frozen=True)
class Prepared:
    """Memory-mapped datasets that training reads as they are."""

    train: Dataset
    eval: Dataset | None
    report: PrepareReport
    folder: Path

    @property
    def digest(self) -> str:
        return self.folder.name

    def with_skipped(self, skipped: Dropped) -> Prepared:
        return replace(self, report=replace(self.report, skipped=skipped))


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends well, and vanishes when it does not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder.parent}: no cache can be made there: {error.strerror}; set HARNESS_CACHE to another folder") from error
    _remove_abandoned(folder)
    scratch = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
        for path in scratch.iterdir():
            _flush(path)
        _flush(scratch)
        _rename(scratch, folder)
        _flush(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{folder.parent}: {error.strerror} while data was prepared; free some, or set HARNESS_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class ArrowStream:
    """An Arrow stream of batches that come as messages, as `RecordBatch.serialize` writes them."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._path, self._schema = path, schema

    def __enter__(self) -> ArrowStream:
        self._file = open(self._path, "wb")  # noqa: SIM115, closed below
        self._file.write(self._schema.serialize())
        return self

    def append(self, message: pa.Buffer | bytes) -> None:
        self._file.write(message)

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            self._file.write(b"\xff\xff\xff\xff\0\0\0\0" if kind is None else b"")  # the end of a stream, as its format says it


def save_manifest(scratch: Path, report: PrepareReport, files: dict[str, list[Path]]) -> None:
    """The last file to be written: `files` are those of each split, in the order of the rows."""
    listed = {
        split: [{"name": path.name, "rows": Dataset.from_file(str(path)).num_rows, "bytes": path.stat().st_size} for path in paths]
        for split, paths in files.items()
    }
    manifest = {"format": FORMAT, "files": listed, "report": asdict(report)}
    (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def load_prepared(folder: str | Path) -> Prepared:
    """Open what `prepare` wrote; never tokenises, and reads no row. Raises DataError if the folder is missing, torn or foreign."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, so this is no prepared data; run `harness prepare RECIPE`") from None
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: not readable ({error}); remove the folder and prepare again") from error
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: format {manifest.get('format')} of prepared data; this version reads {FORMAT}; prepare again")
    splits = {split: _open_split(folder, files) for split, files in manifest["files"].items()}
    return Prepared(splits["train"], splits.get("eval"), PrepareReport.from_json(manifest["report"]), folder)


def is_complete(folder: Path) -> bool:
    try:
        load_prepared(folder)
    except DataError:
        return False
    return True


def _open_split(folder: Path, files: list[dict]) -> Dataset:
    parts = []
    for file in files:
        path = folder / file["name"]
        if not path.exists() or path.stat().st_size != file["bytes"]:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            raise DataError(f"{path}: {found} where the manifest says {file['bytes']} bytes; remove {folder} and prepare again")
        try:
            part = Dataset.from_file(str(path))
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not an Arrow stream ({error}); remove {folder} and prepare again") from error
        if part.num_rows != file["rows"]:
            raise DataError(f"{path}: {part.num_rows} rows where the manifest says {file['rows']}; remove {folder} and prepare again")
        parts.append(part)
    return concatenate_datasets(parts)


def _rename(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:  # the name is taken: by a process that was faster, or by a folder that is torn
        if is_complete(folder):
            return
        folder.rename(scratch.with_name(f"{scratch.name}.torn"))
        scratch.rename(folder)
        shutil.rmtree(scratch.with_name(f"{scratch.name}.torn"), ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Scratch folders of this digest whose process is gone from this host, and in which nothing was written for a while."""
    mine = f".{folder.name}.{socket.gethostname()}."
    for scratch in folder.parent.glob(f"{mine}*"):
        pid = scratch.name.removeprefix(mine).split(".")[0]
        # The age guards against a process of another container under the same host name, whose id means nothing here.
        written = max(path.stat().st_mtime for path in (scratch, *scratch.iterdir()))
        if time.time() - written > ABANDONED_AFTER_S and not psutil.pid_exists(int(pid)):
            shutil.rmtree(scratch, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
