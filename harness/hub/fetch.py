"""From a recipe's needs to files in the shared cache: planned, downloaded, compared with the hub's digests, recorded.

huggingface_hub keeps a file that is cut off only while its process lives. So the bytes come here by its own request, into

    $HF_HUB_CACHE/TYPEs--ID/blobs/DIGEST.harness     a file that is not whole yet; the next `harness fetch` asks for the rest of it

and are renamed to what huggingface_hub calls them once their digest is the hub's. All else (what lies where, links, branches) is its own.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, RecipeError, Stopped
from harness.hub.cache import INDEX, WEIGHTS, hub_cache, repository_folder
from harness.hub.explain import explained
from harness.hub.needs import Need
from harness.hub.record import digest_file, save_record
from harness.sizes import gib

WORKERS = 8
OTHER_WEIGHTS = (
    *(f"*.{kind}" for kind in "bin pt pth ckpt h5 msgpack onnx onnx_data gguf ot tflite mlmodel nemo".split()),
    *("*.fp16.safetensors", "*.fp32.safetensors", "consolidated*.safetensors"),
)
"""Weights in formats that harness does not load, and second copies of them."""
SMALL_BELOW = (".json", ".jinja", ".py", ".txt", ".model")
"""Of a model's subfolders only these: code, chat templates, vocabularies. Weights of it are not there."""
DATA_COPIES = 2
"""The files of a data set, and the tables that `datasets` makes of them."""


@dataclass(frozen=True)
class HubFile:
    path: str
    size: int
    digest: str
    algorithm: str
    """sha256 of what the hub stores as LFS or Xet; of small files git's own, sha1 of a blob."""


@dataclass(frozen=True)
class Fetch:
    """What of one repository is to be here."""

    need: Need
    commit: str
    files: tuple[HubFile, ...]
    skipped_bytes: int
    """Of files that are left where they are."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> list[HubFile]:
        return [file for file in self.files if not (self.blob(file).is_file() or self.local(file).is_file())]

    @property
    def missing_bytes(self) -> int:
        return bytes_to_come([self])

    def blob(self, file: HubFile) -> Path:
        return repository_folder(self.need) / "blobs" / file.digest

    def local(self, file: HubFile) -> Path:
        return repository_folder(self.need) / "snapshots" / self.commit / file.path


def partial_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.harness")


def size_of(file: Path) -> int:
    # Asked once: another fetch may give it its name in between.
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


# ---- before


def plan_fetch(need: Need) -> Fetch:
    """Asks the hub for names, sizes and digests. Raises HarnessError, RecipeError for what is not there."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with explained(need), quietly():
        api = HfApi()
        commit = api.repo_info(need.id, repo_type=need.repo_type, revision=need.revision, timeout=30).sha
        tree = api.list_repo_tree(need.id, recursive=True, revision=commit, repo_type=need.repo_type)
        there = {entry.path: _hub_file(entry) for entry in tree if isinstance(entry, RepoFile)}
        wanted = _dataset_files(need, commit, there) if need.kind == "dataset" else choose_files(need, list(there))
    files = tuple(file for path, file in there.items() if path in wanted)
    return Fetch(need, commit, files, sum(file.size for path, file in there.items() if path not in wanted))


def _hub_file(entry: Any) -> HubFile:
    if entry.lfs is not None:
        return HubFile(entry.path, entry.lfs.size, entry.lfs.sha256, "sha256")
    return HubFile(entry.path, entry.size, entry.blob_id, "git-sha1")


def choose_files(need: Need, paths: list[str]) -> set[str]:
    """What transformers reads of a model, or of a tokenizer alone. Raises RecipeError for a model without safetensors."""
    kept = {path for path in paths if "/" not in path or path.endswith(SMALL_BELOW)}
    kept = {path for path in kept if not any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in OTHER_WEIGHTS)}
    if need.kind == "tokenizer":
        return {path for path in kept if not path.endswith(".safetensors")}
    if not {WEIGHTS, INDEX} & kept:
        raise RecipeError(
            f"{need.key} = {need.id}: holds no {WEIGHTS}, and harness reads weights in no other format (a .bin can run code as it is "
            "opened); name a revision that has them: the hub's bot offers one as refs/pr/N"
        )
    return kept


def _dataset_files(need: Need, commit: str, there: dict[str, HubFile]) -> set[str]:
    """What `datasets` would read for this configuration, and the card that describes it."""
    import datasets

    builder = datasets.load_dataset_builder(need.id, need.name)
    # hf://datasets/ID@COMMIT/PATH
    data = {str(file).partition(f"@{commit}/")[2] for files in (builder.config.data_files or {}).values() for file in files}
    return (data & set(there) or set(there)) | ({"README.md", ".huggingface.yaml"} & set(there))


def bytes_to_come(fetches: Iterable[Fetch]) -> int:
    """Of all together: two splits of a data set are of the same files."""
    missing = {each.blob(file): file.size for each in fetches for file in each.missing}
    return sum(size - size_of(partial_of(blob)) for blob, size in missing.items())


def check_room(fetches: list[Fetch]) -> None:
    """Raises HarnessError when the cache's disk has not the room."""
    wanted = bytes_to_come([each for each in fetches if each.need.kind != "dataset"])
    wanted += DATA_COPIES * bytes_to_come([each for each in fetches if each.need.kind == "dataset"])
    folder = next(each for each in (hub_cache(), *hub_cache().parents) if each.is_dir())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise HarnessError(
            f"{hub_cache()}: {gib(free)} free, and {gib(wanted)} are to come; free some (`hf cache prune`), or set HF_HOME to a larger "
            "disk, here and where the run is submitted"
        )


# ---- the bytes


def download(fetch: Fetch, advance: Callable[[int], None] = lambda count: None) -> None:
    """Bring what is missing, link it as huggingface_hub does, and of a data set make its tables. advance: told of every byte that came."""
    stop = threading.Event()

    def told(count: int) -> None:
        # So that Ctrl-C does not wait for files of many GB.
        if stop.is_set():
            raise Stopped(f"{fetch.need.shown}: stopped; the same command goes on")
        advance(count)

    with explained(fetch.need), quietly(), ThreadPoolExecutor(WORKERS) as workers:
        jobs = [workers.submit(_complete_blob, fetch, file, told) for file in fetch.missing]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            stop.set()
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    with explained(fetch.need), quietly():
        from huggingface_hub import snapshot_download

        # A pattern's own signs stand for themselves in brackets.
        exactly = ["".join(f"[{sign}]" if sign in "*?[" else sign for sign in file.path) for file in fetch.files]
        for revision in dict.fromkeys((fetch.need.revision or "main", fetch.commit)):
            snapshot_download(fetch.need.id, repo_type=fetch.need.repo_type, revision=revision, allow_patterns=exactly)
        if fetch.need.kind == "dataset":
            import datasets

            datasets.utils.logging.disable_progress_bar()
            datasets.load_dataset(fetch.need.id, fetch.need.name, split=fetch.need.split)


def _complete_blob(fetch: Fetch, file: HubFile, advance: Callable[[int], None]) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob = fetch.blob(file)
    partial = partial_of(blob)
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        # The hub gives these by Xet alone, which huggingface_hub speaks; it begins again where it was killed.
        return
    url = hf_hub_url(fetch.need.id, file.path, repo_type=fetch.need.repo_type, revision=fetch.commit)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as stream:
        # Where a disk has no locks, two fetches at once spoil one another's bytes, which the digest tells.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        if blob.is_file():
            # Another fetch was first.
            partial.unlink(missing_ok=True)
            return
        # Not tell(): who had the lock before has written since this was opened.
        there = stream.seek(0, os.SEEK_END)
        if there > file.size:
            stream.truncate(0)
            there = 0
        http_get(url, stream, resume_size=there, headers=build_hf_headers(), expected_size=file.size, tqdm_class=bar_that_tells(advance))
        stream.flush()
        os.fsync(stream.fileno())
        if digest_file(partial, file.algorithm) != file.digest:
            partial.unlink()
            raise HarnessError(
                f"{fetch.need.shown}: {file.path} came with another digest than the hub says, and was thrown away; the same command asks "
                "for it again (does a proxy change what it passes on?)"
            )
        os.replace(partial, blob)


def bar_that_tells(advance: Callable[[int], None]) -> type:
    """What stands for tqdm where huggingface_hub shows a bar of its own for each file."""

    class Bar:
        def __init__(self, *arguments, **named):
            pass

        def update(self, count: float | None = 1) -> None:
            advance(int(count or 0))

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def __getattr__(self, name):
            return lambda *arguments, **named: None

    return Bar


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and hints of both libraries: what went wrong comes as one error."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    were_disabled, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not were_disabled:
            enable_progress_bars()


def record_fetch(fetch: Fetch) -> Path:
    """Compare every file with the hub's digest, and write down what it was. Returns the file. Raises HarnessError where one differs.

    A file that was written down before, and has the same size and time since, is not read again."""
    return save_record(
        fetch.need, fetch.commit, [(file.path, fetch.local(file), file.size, file.algorithm, file.digest) for file in fetch.files]
    )
