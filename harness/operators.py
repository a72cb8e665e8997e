"""DeepSpeed's operators, which it compiles on their first use, 45-60 s each: `python -m harness.operators` compiles them now.

On a CPU they are the gathers through shared memory (any ZeRO stage) and CPUAdam (zero3-offload); on a GPU only CPUAdam is needed.
"""

import os
import sys
import time


def needed_operators() -> list[str]:
    """Class names in deepspeed.ops.op_builder."""
    import torch

    return ["CPUAdamBuilder"] if torch.cuda.is_available() else ["ShareMemCommBuilder", "CPUAdamBuilder"]


def is_compiled(name: str) -> bool:
    """Whether the operator's library lies in torch's cache of extensions already."""
    from pathlib import Path

    from torch.utils.cpp_extension import _get_build_directory

    module = _builder(name).name
    return (Path(_get_build_directory(module, verbose=False)) / f"{module}.so").is_file()


def _builder(name: str):
    from deepspeed.ops import op_builder

    return getattr(op_builder, name, None)() if hasattr(op_builder, name) else getattr(op_builder.cpu, name)()


def announce_compiling(*, offloads: bool, say=print) -> None:
    """Say, before DeepSpeed starts to compile in silence, that it will and how long that takes."""
    wanted = [name for name in needed_operators() if offloads or name != "CPUAdamBuilder"]
    missing = [name.removesuffix("Builder") for name in wanted if not is_compiled(name)]
    if missing:
        say(f"DeepSpeed compiles {' and '.join(missing)} now, once per machine: about a minute each")


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
