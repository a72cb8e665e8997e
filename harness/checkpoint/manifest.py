"""manifest.json, written last into a checkpoint: what it is, and the size and digest of every file of it.

    {
      "format": "harness-checkpoint-1",
      "step": 300, "world_size": 2, "recipe_digest": …,       what the run was there (harness.checkpoint.commit writes it)
      "files": [{"path": "model.safetensors", "bytes": 412, "xxh3_128": "…32 hex digits…"}, …],
      "digest": "…32 hex digits…"
    }

A path is relative to the checkpoint's folder. "digest" stands last: the xxh3_128 of the manifest's own bytes with 32 zeros in its place.

The promise: one byte that is not as it was written, in any file or in the manifest itself, is found. The digests are against accidents (a
disk, a copy, a kill), not against somebody who means to deceive and can compute them too.
"""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from harness.errors import CheckpointError
from harness.run import write_text_atomically

MANIFEST = "manifest.json"
FORMAT = "harness-checkpoint-1"

THREADS = 8
"""Flushes wait while hashes compute. On 2 cores a write and then this takes about as long as a plain write and fsync: 0.9 to 1.2 of its
bandwidth with 4 threads or 8, and 0.6 to 0.9 with one."""
READ_BYTES = 8 * 2**20
ZEROS = "0" * 32
OWN_DIGEST = re.compile(rb'(?<="digest": ")[0-9a-f]{32}(?="\n}\n\Z)')
READ_IF_PRESENT = re.compile(r".*\.(safetensors|bin|pt|pth|distcp|index\.json)|adapter_config\.json|latest|latest_universal|\.metadata")
"""Names that transformers, PEFT, DeepSpeed or torch.distributed.checkpoint look for, and read in place of what was committed or besides it.
Any other stranger (an uploader's marker, a note) does no harm and is let be."""


# ---- files


def digest_files(root: Path, paths: Iterable[str], *, durable: bool) -> list[dict]:
    """{"path", "bytes", "xxh3_128"} of each of the paths below `root`, in their order.

    durable: each file is also flushed to the disk, while it is being hashed, and then each folder that it lies in, up to `root`: when this
    returns, the files outlive a power cut. Raises OSError, which names the file.
    """
    paths = list(paths)
    check_paths(root, paths)
    for path in paths:
        # To open a pipe would wait for ever.
        if not stat.S_ISREG((root / path).stat().st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(root / path))
    flushes, hashes = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for path in paths:
            # Two tasks for a file: the flush waits for the disk while the hash is computed from memory.
            if durable:
                flushes.append(pool.submit(flush, root / path))
            hashes.append(pool.submit(_digest_file, root / path))
        digests = [task.result() for task in hashes]
        for task in flushes:
            task.result()
    if durable:
        for folder in sorted({folder for path in paths for folder in Path(path).parents}, reverse=True):
            flush(root / folder)
    return [{"path": path, "bytes": size, "xxh3_128": digest} for path, (size, digest) in zip(paths, digests, strict=True)]


def check_paths(root: Path, paths: Iterable[str]) -> None:
    """Raises CheckpointError for a path that leads out of the folder."""
    for path in paths:
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise CheckpointError(f"{root}: {path!r} leads out of the checkpoint's folder; its files lie below it")


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_file(path: Path) -> tuple[int, str]:
    digest, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(min(READ_BYTES, path.stat().st_size + 1)))
    with open(path, "rb", buffering=0) as stream, _naming(path):
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return size, digest.hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the disk while a file is open does not say which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# ---- the manifest


def render_manifest(content: dict) -> str:
    """The text of manifest.json, with its format first and the digest of the text itself last."""
    facts = {key: value for key, value in content.items() if key not in ("format", "digest")}
    text = json.dumps({"format": FORMAT, **facts, "digest": ZEROS}, indent=2) + "\n"
    return text.removesuffix(f'{ZEROS}"\n}}\n') + f'{xxhash.xxh3_128_hexdigest(text.encode())}"\n}}\n'


def write_manifest(folder: Path, content: dict) -> None:
    """Write manifest.json in one step, and wait until it and its name are on the disk."""
    write_text_atomically(folder / MANIFEST, render_manifest(content))
    flush(folder)


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. Raises CheckpointError when it is absent, altered, or of a format that is not known here."""
    file = folder / MANIFEST
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was not committed by harness or was torn since") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    recorded = OWN_DIGEST.search(data)
    if not recorded:
        raise CheckpointError(f"{file}: does not end with its own digest; it is cut off or altered")
    found = xxhash.xxh3_128_hexdigest(data[: recorded.start()] + ZEROS.encode() + data[recorded.end() :])
    if found != recorded.group().decode():
        raise CheckpointError(f"{file}: is altered: the digest of its text is {found}, and it was written with {recorded.group().decode()}")
    content = json.loads(data)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is of the format {content.get('format')!r}; this version of harness reads {FORMAT!r}")
    check_paths(folder, [entry["path"] for entry in content["files"]])
    return content


def check_files(folder: Path, manifest: dict, *, digests: bool) -> None:
    """Raises CheckpointError that names the first file which is not what was committed: by its size, and with `digests` by every byte.

    The sizes of all come first, because they cost nothing. Stranger files that a loader would read are refused too.
    """
    try:
        for entry in manifest["files"]:
            _check_size(folder / entry["path"], entry["bytes"])
        _check_strangers(folder, {entry["path"] for entry in manifest["files"]})
        if digests:
            found = digest_files(folder, [entry["path"] for entry in manifest["files"]], durable=False)
            for entry, now in zip(manifest["files"], found, strict=True):
                if now["xxh3_128"] != entry["xxh3_128"]:
                    raise CheckpointError(
                        f"{folder / entry['path']}: is altered: its xxh3_128 is {now['xxh3_128']}, and {entry['xxh3_128']} was committed"
                    )
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _check_size(file: Path, committed: int) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is gone; {committed:,} bytes were committed") from None
    if found != committed:
        raise CheckpointError(f"{file}: has {found:,} bytes; {committed:,} were committed")


def _check_strangers(folder: Path, committed: set[str]) -> None:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if path not in committed and READ_IF_PRESENT.fullmatch(file.name):
            raise CheckpointError(f"{file}: was not committed, and a loader would read it; take it out of the folder")
