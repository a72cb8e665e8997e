"""A manifest proves every byte of a checkpoint, its own included; each test damages one thing and expects it to be named."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import xxhash

from harness.checkpoint import manifest as manifests
from harness.checkpoint.manifest import MANIFEST, check_files, digest_files, read_manifest, render_manifest, write_manifest
from harness.errors import CheckpointError

# As transformers and DeepSpeed lay a checkpoint out, with an empty file, which TRL's README.md can be.
FILES = {
    "model.safetensors": bytes(range(256)) * 40,
    "optimizer.pt": b"PK\x03\x04" + b"moments" * 500,
    "scheduler.pt": b"schedule",
    "trainer_state.json": b'{"global_step": 4}',
    "rng_state_0.pth": b"\x00" * 64,
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"shard" * 100,
    "global_step4/deep/er/mp_rank_00_model_states.pt": b"w",
    "README.md": b"",
}


def commit(folder: Path, files: dict[str, bytes] = FILES, **content) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    write_manifest(folder, {"step": 4, **content, "files": digest_files(folder, files, durable=False)})
    return folder


@pytest.fixture
def folder(tmp_path):
    return commit(tmp_path / "checkpoint-4")


def check(folder: Path, *, digests: bool = True) -> None:
    check_files(folder, read_manifest(folder), digests=digests)


def flip(file: Path, position: int, bits: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ bits]))


def test_a_checkpoint_is_whole_as_it_was_written(folder):
    check(folder)
    content = read_manifest(folder)
    assert [entry["path"] for entry in content["files"]] == list(FILES)
    assert [entry["bytes"] for entry in content["files"]] == [len(data) for data in FILES.values()]
    assert (
        content["files"][-1]["xxh3_128"] == "99aa06d3014798d86001c324468d497f"
    )  # of no bytes at all, as xxHash's own test vectors have it


@pytest.mark.parametrize("path", FILES)
def test_a_flipped_bit_is_found_in_every_file_wherever_it_is(folder, path):
    for position in {0, len(FILES[path]) // 2, len(FILES[path]) - 1} if FILES[path] else ():
        flip(folder / path, position, 1)
        check(folder, digests=False)
        with pytest.raises(CheckpointError, match=f"{path}: is altered: its xxh3_128 is [0-9a-f]{{32}}, and [0-9a-f]{{32}} was committed"):
            check(folder)
        flip(folder / path, position, 1)
    check(folder)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_cut_off_grown_or_gone_is_found_by_its_size_alone(folder, path, digests):
    data = FILES[path]
    for found in filter(lambda found: found != data, (data[:-1], data[: len(data) // 2], b"", data + b"\0")):
        (folder / path).write_bytes(found)
        with pytest.raises(CheckpointError, match=f"{path}: has {len(found):,} bytes; {len(data):,} were committed"):
            check(folder, digests=digests)
    (folder / path).unlink()
    with pytest.raises(CheckpointError, match=f"{path}: is gone; {len(data):,} bytes were committed"):
        check(folder, digests=digests)


@pytest.mark.parametrize("path", [path for path, data in FILES.items() if data.strip(b"\0")])
def test_a_file_of_zeros_as_a_power_cut_leaves_it_is_found(folder, path):
    (folder / path).write_bytes(bytes(len(FILES[path])))
    with pytest.raises(CheckpointError, match=f"{path}: is altered"):
        check(folder)


def test_two_files_that_changed_places_are_found(tmp_path):
    folder = commit(tmp_path, {"a.pt": b"one", "b.pt": b"two"})
    (folder / "a.pt").rename(folder / "c")
    (folder / "b.pt").rename(folder / "a.pt")
    (folder / "c").rename(folder / "b.pt")
    with pytest.raises(CheckpointError, match="a.pt: is altered"):
        check(folder)


def test_a_size_that_is_wrong_is_said_before_any_byte_is_read(folder, monkeypatch):
    flip(folder / "model.safetensors", 0, 1)
    (folder / "scheduler.pt").write_bytes(b"")
    monkeypatch.setattr(manifests, "digest_files", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="scheduler.pt: has 0 bytes"):
        check(folder)


def test_every_byte_of_the_manifest_is_proven(tmp_path):
    folder = commit(tmp_path / "checkpoint-4", {"adapter_model.safetensors": b"w"}, recipe={"seed": 42, "name": "ü"}, time=1.5)
    file = folder / MANIFEST
    whole = file.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        for bits in (1, 32):  # 32 makes a capital of a letter, so that a hex digit keeps its value
            flip(file, position, bits)
            with contextlib.suppress(CheckpointError):
                unnoticed.append((position, read_manifest(folder)))
            flip(file, position, bits)
    assert unnoticed == []
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="does not end with its own digest; it is cut off or altered"):
            read_manifest(folder)
    for other in (bytes(len(whole)), whole + b"\n", whole + whole, b"{}\n"):
        file.write_bytes(other)
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(folder)
    file.write_bytes(whole)
    assert read_manifest(folder)["recipe"] == {"seed": 42, "name": "ü"}


def test_the_digest_of_a_manifest_is_that_of_its_text_with_zeros_in_its_place(folder):
    text = (folder / MANIFEST).read_text()
    digest = json.loads(text)["digest"]
    assert xxhash.xxh3_128(text.replace(digest, 32 * "0").encode()).hexdigest() == digest


def test_a_manifest_that_was_read_can_be_written_again(folder):
    content = read_manifest(folder)
    assert render_manifest(content) == (folder / MANIFEST).read_text()
    write_manifest(folder, {**content, "reason": "asked"})
    assert read_manifest(folder)["reason"] == "asked"


def test_a_manifest_can_hold_a_digest_of_zeros_and_text_that_looks_like_its_end(tmp_path):
    recipe = {"digest": "0" * 32, "text": '"digest": "' + "0" * 32 + '"\n}\n'}
    assert read_manifest(commit(tmp_path / "checkpoint-4", recipe=recipe))["recipe"] == recipe


def test_a_folder_without_a_manifest_and_one_of_another_format_say_so(folder, monkeypatch):
    monkeypatch.setattr(manifests, "FORMAT", "harness-checkpoint-9")
    with pytest.raises(CheckpointError, match="of the format 'harness-checkpoint-1'; this version of harness reads 'harness-checkpoint-9'"):
        read_manifest(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        read_manifest(folder)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", ".."])
def test_a_path_that_leads_out_of_the_folder_is_refused_by_reader_and_writer(tmp_path, path):
    (tmp_path / "secret").write_bytes(b"s")
    folder = commit(tmp_path / "checkpoint-4", {"a.pt": b"a"})
    write_manifest(folder, {"step": 4, "files": [{"path": path, "bytes": 1, "xxh3_128": "0" * 32}]})
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        read_manifest(folder)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        digest_files(folder, [path], durable=False)


@pytest.mark.parametrize(
    "path",
    [
        "adapter_model.safetensors",
        "adapter_model.bin",
        "optimizer.bin",
        "scaler.pt",
        "rng_state.pth",
        "model.safetensors.index.json",
        "adapter_config.json",
        "latest",
        "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "pytorch_model_fsdp_0/.metadata",
        "pytorch_model_fsdp_0/__0_0.distcp",
    ],
)
def test_a_stranger_that_a_loader_would_read_is_refused(folder, path):
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{path}: was not committed, and a loader would read it"):
        check(folder, digests=False)


def test_an_uploaders_marker_does_not_spoil_a_checkpoint(folder):
    for name in (".uploaded", "NOTES.md", "upload.json", ".manifest.json.4711", ".nfs0001"):
        (folder / name).write_text("x")
    check(folder)


def test_what_cannot_be_read_is_named(folder, tmp_path):
    """/proc/self/mem is a regular file of no bytes whose first byte is an input/output error, as on a dying disk."""
    broken = tmp_path / "checkpoint-5"
    broken.mkdir()
    (broken / "optimizer.pt").symlink_to("/proc/self/mem")
    write_manifest(broken, {"step": 5, "files": [{"path": "optimizer.pt", "bytes": 0, "xxh3_128": "0" * 32}]})
    with pytest.raises(CheckpointError, match="optimizer.pt: cannot be read: Input/output error"):
        check(broken)
    (folder / "scheduler.pt").unlink()
    (folder / "scheduler.pt").mkdir()
    with pytest.raises(CheckpointError, match="scheduler.pt: "):
        check(folder)
    (broken / MANIFEST).unlink()
    (broken / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="manifest.json: cannot be read: Is a directory"):
        read_manifest(broken)


def test_a_pipe_in_place_of_a_file_never_blocks(tmp_path):
    os.mkfifo(tmp_path / "scheduler.pt")
    with pytest.raises(OSError, match="is not a regular file.*scheduler.pt"):
        digest_files(tmp_path, ["scheduler.pt"], durable=True)


def test_a_file_larger_than_one_read_is_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "READ_BYTES", 1000)
    data = hashlib.shake_128(b"seed").digest(2500)
    (tmp_path / "model.safetensors").write_bytes(data)
    [entry] = digest_files(tmp_path, ["model.safetensors"], durable=False)
    assert entry == {"path": "model.safetensors", "bytes": 2500, "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


@pytest.fixture
def fsynced(monkeypatch):
    """The paths that were flushed, in order."""
    paths, fsync = [], os.fsync

    def record(descriptor):
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


def test_durable_flushes_every_file_and_then_every_folder_on_the_way_up(folder, fsynced):
    digest_files(folder, FILES, durable=True)
    assert set(fsynced[: len(FILES)]) == {str(folder / path) for path in FILES}
    assert fsynced[len(FILES) :] == [str(folder / path) for path in ("global_step4/deep/er", "global_step4/deep", "global_step4")] + [
        str(folder)
    ]
    fsynced.clear()
    digest_files(folder, FILES, durable=False)
    assert fsynced == []


def test_a_manifest_is_flushed_before_it_has_its_name_and_its_folder_after(folder, fsynced, monkeypatch):
    named, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (named.append(len(fsynced)), replace(old, new)))
    write_manifest(folder, {"step": 4, "files": []})
    assert named == [1] and len(fsynced) == 2 and fsynced[1] == str(folder)


def test_a_disk_that_does_not_take_the_bytes_fails_the_save_and_names_the_file(folder, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("optimizer.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*checkpoint-4/optimizer.pt"):
        digest_files(folder, FILES, durable=True)
