"""A model as GGUF, which llama.cpp and what stands on it read: by llama.cpp's own converter, in a process of its own.

    gguf-TYPE/NAME-TYPE.gguf     beside it harness.json, as in every export

The converter is no package: it lies in llama.cpp's sources and reads more architectures with every week, so that a copy of ours would be
behind. What it has written is reopened: the header counts its tensors, and the file holds at least their bytes.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from harness.errors import ModelError, RecipeError
from harness.model.export import MANIFEST, digest_file
from harness.run import replace_folder

NAME, VARIABLE = "convert_hf_to_gguf.py", "LLAMA_CPP"
TYPES = {"f32": 4, "bf16": 2, "f16": 2, "q8_0": 1}
"""What the converter writes by itself, and the least bytes of a weight. Smaller types are made of these by llama.cpp's llama-quantize."""
TOLD_LINES = 8


def find_converter(given: Path | None) -> Path:
    """`given`, or llama.cpp's folder in $LLAMA_CPP, or what is on the PATH. Raises RecipeError that says how to get it."""
    folder, on_path = os.environ.get(VARIABLE), shutil.which(NAME)
    named = given.expanduser() if given else Path(folder).expanduser() if folder else Path(on_path) if on_path else None
    if named is None:
        raise RecipeError(
            f"--gguf needs llama.cpp's {NAME}, and there is none on the PATH; get it by `git clone "
            f"https://github.com/ggml-org/llama.cpp`, then set {VARIABLE} to that folder, or give the file as --converter"
        )
    found = named / NAME if named.is_dir() else named
    if not found.is_file():
        raise RecipeError(f"{'--converter' if given else VARIABLE} = {named}; there is no {NAME}; give llama.cpp's folder, or the file")
    return found.resolve()


def save_gguf(source: Path, target: Path, name: str, dtype: str, converter: Path, manifest: dict) -> tuple[Path, int]:
    """Convert the whole model in `source`, reopen what was written, and put it and its manifest into `target`.

    dtype: one of TYPES. manifest: of `source`. Returns the file and how many tensors it holds. Raises ModelError where the converter fails,
    with what it says, and where it wrote something else than the model.
    """
    staging = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    file = staging / f"{name}-{dtype}.gguf"
    started = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    argv = [*started, str(source), "--outfile", str(file), "--outtype", dtype]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise ModelError(f"{converter}: ended with {done.returncode} on {source}; its last words:\n{_last_words(done.stdout)}")
    tensors = check_gguf(file, weights=_weights_in(source), least_bytes=TYPES[dtype])
    files = {one.name: digest_file(one) for one in sorted(staging.iterdir())}
    made = {"adapter": False, "dtype": dtype, "converted_from": str(source), "files": files}
    (staging / MANIFEST).write_text(json.dumps({**manifest, **made}, indent=2) + "\n")
    replace_folder(staging, target)
    return target / file.name, tensors


def check_gguf(file: Path, *, weights: int, least_bytes: int) -> int:
    """The number of tensors that the header tells. Raises ModelError unless it is a GGUF file that can hold so many weights."""
    if not file.is_file():
        raise ModelError(f"{file}: the converter says that it is done, and wrote no such file; is it llama.cpp's {NAME}?")
    with open(file, "rb") as stream:
        head = stream.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelError(f"{file}: is no GGUF file; it begins with {head[:4]!r}")
    _, tensors, _ = struct.unpack("<IQQ", head[4:])
    size = file.stat().st_size
    if not tensors or size < weights * least_bytes:
        raise ModelError(
            f"{file}: holds {tensors} tensors in {size:,} bytes; the model's {weights:,} weights need {weights * least_bytes:,}"
        )
    return tensors


def _weights_in(folder: Path) -> int:
    import math

    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - no mapping
    return count


def _last_words(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-TOLD_LINES:]) or "  (nothing)"
