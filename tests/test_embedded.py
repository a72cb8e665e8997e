"""Embedded models and data: made on first use, whole, the same each time."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from harness.embedded import resolve
from harness.errors import RecipeError


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_name_that_is_not_embedded_is_left_alone_and_an_unknown_one_is_refused_with_the_list():
    assert resolve("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    with pytest.raises(RecipeError, match="embedded:tiny-lama: .*embedded:tiny-llama, embedded:tiny-student, embedded:base-train"):
        resolve("embedded:tiny-lama")


def _resolve_there(root: str) -> str:
    os.environ["HARNESS_CACHE"] = root
    return resolve("embedded:tiny-llama")


def test_processes_that_ask_at_once_get_one_whole_folder_that_is_the_same_as_anybody_elses(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_resolve_there, [str(tmp_path)] * 2)
    assert first == second and str(tmp_path) in first
    assert digests(Path(first)) == digests(Path(resolve("embedded:tiny-llama")))
    assert sorted(path.name for path in (tmp_path / "embedded").glob("*/*")) == ["tiny-llama", "world"]  # no scratch folder is left
