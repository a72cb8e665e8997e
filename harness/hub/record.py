"""The digests of what was fetched, in a file beside the cache; with them every byte can be checked where there is no network."""

import hashlib
import json
from pathlib import Path

from harness.errors import HarnessError
from harness.hub.cache import find_commit, find_missing, hub_cache, repository_folder
from harness.hub.needs import Need
from harness.run import write_text_atomically

FOLDER = "harness-fetched"
CHUNK_BYTES = 8 * 2**20


def record_file(need: Need) -> Path:
    return hub_cache().parent / FOLDER / f"{repository_folder(need).name}.json"


def load_record(need: Need) -> dict:
    file = record_file(need)
    return json.loads(file.read_text()) if file.is_file() else {"revisions": {}, "commits": {}}


def save_record(need: Need, commit: str, files: list[tuple[str, Path, int, str, str]]) -> Path:
    """files: (path in the repository, where it lies, size, algorithm, digest). Raises HarnessError where one is not what the hub says."""
    record = load_record(need)
    before = record["commits"].get(commit, {})
    entries, problems = {}, []
    for path, local, size, algorithm, digest in files:
        entry = {"size": size, "algorithm": algorithm, "digest": digest, "mtime": local.stat().st_mtime}
        if before.get(path) != entry:
            problems += find_problem(need, path, local, entry)
        entries[path] = entry
    if problems:
        raise HarnessError("\n".join(problems))
    record["revisions"][need.revision or "main"] = commit
    # What another configuration of a data set has brought stays.
    record["commits"][commit] = before | entries
    file = record_file(need)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise HarnessError(f"{file}: cannot be written: {error.strerror}; the files are here, and without it cannot be verified") from None
    return file


def verify_record(need: Need) -> tuple[int, int]:
    """Read every file that was fetched and compare its digest; asks no network. Returns (files, bytes). Raises HarnessError that names each
    file that is not what it was, and where what the need asks for was never fetched."""
    record = load_record(need)
    commit = record["revisions"].get(need.revision or "main")
    loads = commit if need.kind == "dataset" else find_commit(need)
    if commit is None or loads not in record["commits"]:
        raise HarnessError(f"{need.key} = {need.shown}: was not fetched to {hub_cache()}; run `harness fetch` where there is a network")
    files, problems = record["commits"][loads], []
    for path, entry in files.items():
        problems += find_problem(need, path, repository_folder(need) / "snapshots" / loads / path, entry)
    if problems:
        raise HarnessError("\n".join(problems))
    missing = find_missing(need)
    if missing:
        # All that was fetched is whole, but that was for another recipe: the tokenizer alone, another configuration.
        raise HarnessError(f"{need.key} = {need.shown}: {missing} ({hub_cache()}); run `harness fetch` where there is a network")
    return len(files), sum(entry["size"] for entry in files.values())


def find_problem(need: Need, path: str, local: Path, entry: dict) -> list[str]:
    """What is wrong with one file, in one line; empty when it is what the hub has."""
    remedy = "`harness fetch`, where there is a network, brings it again"
    if not local.is_file():
        return [f"{need.shown}: {path} is not there any more ({local}); {remedy}"]
    if local.stat().st_size == entry["size"] and digest_file(local, entry["algorithm"]) == entry["digest"]:
        return []
    return [
        f"{need.shown}: {path} is not what the hub has ({entry['algorithm']} {entry['digest'][:12]}…, {entry['size']:,} bytes); "
        f"delete {local.resolve()}; {remedy}"
    ]


def digest_file(file: Path, algorithm: str) -> str:
    """sha256 of the bytes; for git-sha1 that of a git blob, whose length stands before them."""
    digest = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
