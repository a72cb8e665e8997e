"""DeepSpeed's operators, which it compiles on their first use, 45-60 s each: `python -m harness.operators` compiles them now.

On a CPU they are the gathers through shared memory (any ZeRO stage) and CPUAdam (zero3-offload); on a GPU only CPUAdam is needed.
"""

import os
import sys
import time
from pathlib import Path

LOADING_S, COMPILING_S = 60, 600
"""How long a process may hold an operator's lock: to load what is compiled (about a second), and to compile it."""


def needed_operators() -> list[str]:
    """Class names in deepspeed.ops.op_builder."""
    import torch

    return ["CPUAdamBuilder"] if torch.cuda.is_available() else ["ShareMemCommBuilder", "CPUAdamBuilder"]


def is_compiled(name: str) -> bool:
    """Whether the operator's library lies in torch's cache of extensions already."""
    return (_build_folder(name) / f"{_builder(name).name}.so").is_file()


def _build_folder(name: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(_builder(name).name, verbose=False))


def _builder(name: str):
    from deepspeed.ops import op_builder

    return getattr(op_builder, name, None)() if hasattr(op_builder, name) else getattr(op_builder.cpu, name)()


def announce_compiling(*, offloads: bool, say=print) -> None:
    """Say, before DeepSpeed starts to compile in silence, that it will and how long that takes."""
    wanted = [name for name in needed_operators() if offloads or name != "CPUAdamBuilder"]
    missing = [name.removesuffix("Builder") for name in wanted if not is_compiled(name)]
    if missing:
        say(f"DeepSpeed compiles {' and '.join(missing)} now, once per machine: about a minute each")


def release_abandoned_locks(*, offloads: bool, say=print, poll_s: float = 0.5) -> None:
    """Remove the lock of a process that was killed while it loaded or compiled an operator: torch would wait for it for ever, in silence.

    The lock does not say whose it is, so its age decides; a younger one is waited for.
    """
    for name in needed_operators():
        if name == "CPUAdamBuilder" and not offloads:
            continue
        lock = _build_folder(name) / "lock"
        while (made := _modified(lock)) is not None:
            if time.time() - made > (LOADING_S if is_compiled(name) else COMPILING_S):
                say(f"removed {lock}, which a process that was killed has left")
                lock.unlink(missing_ok=True)
            else:
                time.sleep(poll_s)


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    release_abandoned_locks(offloads=True)
    for name in needed_operators():
        if is_compiled(name):
            continue
        label, begun = name.removesuffix("Builder"), time.monotonic()
        print(f"compiling DeepSpeed's {label} ...", flush=True)
        try:
            _builder(name).load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            # Only DeepSpeed backends need them, and each says so itself when it is used.
            reason = str(error).splitlines()[0]
            print(f"  failed ({reason}); DeepSpeed backends will not start until a C++ compiler is there", file=sys.stderr)
            continue
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
