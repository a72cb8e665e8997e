"""The rank program behind launch/train.py: its arguments, its log file, and how it ends.

A rank writes its own log (logs/attempt-K/rank-R.log); rank 0 also speaks to the terminal. An error with a name ends it with that error's
exit code, and its traceback stands in the log alone; any other is shown whole.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from harness.errors import HarnessError
from harness.logs import quieten
from harness.overrides import dashed_overrides
from harness.recipe import load
from harness.run import ATTEMPT_VARIABLE, RankReport, smoke_recipe


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        usage="%(prog)s --recipe RECIPE [--smoke] [--fresh] [key=value ...] [--key.path value ...]",
        description="one rank of a training run",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a recipe file, or the name of a shipped one")
    parser.add_argument("--smoke", action="store_true", help="two steps on the longest rows, then stop")
    parser.add_argument("--fresh", action="store_true", help="delete what lies in the run folder first")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # What argparse does not know it leaves in its order; as a positional of its own, the 7 of `--train.seed 7` would be torn from its key.
    options, options.overrides = parser.parse_known_args(argv)
    return options


def main(argv: list[str] | None = None) -> int:
    """Exit code of this rank: 0 done, 2 the recipe or data is wrong, 1 anything else, 143 ended by SIGTERM.

    Started by `harness run`, which prints the first failing rank's error last, a rank says nothing more on the terminal once its report is
    written. Started by hand, it prints its own error, and leaves it where torchrun's summary finds it.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    use_one_gpu(os.environ)
    terminal = os.fdopen(os.dup(2), "w")
    elastic = get_error_handler()
    elastic.initialize()
    parents_attempt = os.environ.get(ATTEMPT_VARIABLE)
    report = RankReport(int(os.environ.get("RANK", 0)), Path(parents_attempt) if parents_attempt else None)
    leave_on_sigterm(report)
    try:
        quieten()
        from harness.tasks.job import train_recipe

        recipe = load(options.recipe, dashed_overrides(options.overrides))
        if options.smoke and ATTEMPT_VARIABLE not in os.environ:
            recipe, options.fresh = smoke_recipe(recipe), True
        train_recipe(recipe, report, smoke=options.smoke, fresh=options.fresh)
    except BaseException as error:
        elastic.record_exception(error)
        reported = report.failed(error)
        if not isinstance(error, Exception):
            raise
        if ATTEMPT_VARIABLE not in os.environ or not reported:
            named = isinstance(error, HarnessError)
            print(f"{type(error).__name__}: {error}" if named else traceback.format_exc(), file=terminal, flush=True)
        return error.exit_code if isinstance(error, HarnessError) else 1
    report.enter("finished")
    return 0


def use_one_gpu(environment: dict[str, str]) -> None:
    """Let a process that no launcher has started see the first GPU alone: with several in sight TRL refuses to train, because transformers
    would spread each batch over all of them. Before CUDA starts, which reads the variable once."""
    if int(environment.get("WORLD_SIZE", 1)) == 1 and "LOCAL_RANK" not in environment:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def leave_on_sigterm(report: RankReport) -> None:
    """On SIGTERM write that this rank was ended, and end, also while it waits in a collective.

    A handler in Python runs only between two of the main thread's instructions, and a collective is one; the byte that the interpreter
    writes at once wakes a thread. Without the note the rank that was killed could not be told from those that the launcher then ended.
    """
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def leave() -> None:
        while signal.SIGTERM not in wake.recv(64):
            pass
        report.ended_by("SIGTERM")
        woken.close()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=leave, name="leave-on-sigterm", daemon=True).start()
