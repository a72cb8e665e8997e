"""Where a process writes: its own log file, and for rank 0 the terminal too; and what libraries say that nobody can act on."""

import contextlib
import logging
import os
import re
import sys
import warnings


class Tee:
    """A text stream that also writes to a log file, where a progress bar's redrawing and colours are left out."""

    _CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, stream, log):
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        # Neither a terminal that was closed nor a full disk is a reason to end a training.
        with contextlib.suppress(OSError):
            self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        with contextlib.suppress(OSError):
            for line in lines:
                # What stands before the last return to the line's start was overwritten on the screen.
                self._log.write(self._CONTROL.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]) + "\n")
            self._log.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def open_log(path, *, to_terminal: bool) -> None:
    """From here on this process writes to its log file; with `to_terminal` to where it wrote before as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the life of the process
    if to_terminal:
        sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
        return
    # At the descriptor, so that what C++ libraries print goes there too.
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def quieten() -> None:
    """Switch off what libraries say on every start and nobody can act on. Warnings about a run are not among it."""
    # A fork after the tokenizers' threads have started deadlocks; the library warns at each one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bar
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_datasets_bar()
    import torch

    if not torch.cuda.is_available():
        # Said here, so that DeepSpeed does not look for every accelerator there is and warn that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
