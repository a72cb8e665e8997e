"""The rank program behind launch/train.py: its arguments, its log file, and how it ends.

A rank writes its own log (logs/attempt-K/rank-R.log); rank 0 also speaks to the terminal. An error with a name ends it with that error's
exit code, and its traceback stands in the log alone; any other is shown whole. A rank that was asked to stop leaves with 75.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from harness.checkpoint.door import Signals
from harness.errors import HarnessError, Stopped
from harness.logs import quieten
from harness.overrides import dashed_overrides
from harness.recipe import load
from harness.run import ATTEMPT_VARIABLE, LAUNCH_VARIABLE, RankReport, rank_reports, smoke_recipe
from harness.watchdog import follow_parent, process_state

LOOK_EVERY_S = 0.5


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        usage="%(prog)s --recipe RECIPE [--smoke] [--resume | --fresh] [--allow-change KEY] [key=value ...] [--key.path value ...]",
        description="one rank of a training run",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a recipe file, or the name of a shipped one")
    parser.add_argument("--smoke", action="store_true", help="two steps on the longest rows, then stop")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue, and refuse to begin")
    begin.add_argument("--fresh", action="store_true", help="delete what lies in the run folder first")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="continue although this setting has changed")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    # What argparse does not know it leaves in its order; as a positional of its own, the 7 of `--train.seed 7` would be torn from its key.
    options, options.overrides = parser.parse_known_args(argv)
    if options.smoke and (options.resume or options.allow_change):
        parser.error("--smoke begins a run of its own, so --resume and --allow-change mean nothing there")
    return options


def main(argv: list[str] | None = None) -> int:
    """Exit code of this rank: 0 done, 2 the recipe or data is wrong, 75 stopped and can be continued, 143 ended by SIGTERM, 1 otherwise.

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
    if LAUNCH_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        follow_parent(signal.SIGKILL)
    signals = Signals()
    signals.install()
    leave_on_sigterm(report)
    try:
        quieten()
        from harness.tasks.job import train_recipe

        recipe = load(options.recipe, dashed_overrides(options.overrides))
        if options.smoke and ATTEMPT_VARIABLE not in os.environ:
            recipe, options.fresh = smoke_recipe(recipe), True
        train_recipe(
            recipe,
            report,
            signals,
            smoke=options.smoke,
            fresh=options.fresh,
            must_resume=options.resume,
            allowed=tuple(options.allow_change),
        )
    except Stopped as stopped:
        report.stopped(str(stopped))
        if report.rank == 0 and ATTEMPT_VARIABLE not in os.environ:
            print(stopped, flush=True)
        # torch elastic takes 75 for a failure, ends the other ranks and prints a page of it; `harness run` reads how the life ended.
        quiet = ATTEMPT_VARIABLE in os.environ and "TORCHELASTIC_RUN_ID" in os.environ
        # Python's own way out takes as long as an import, and a launcher ends whoever is not through when the first one has gone.
        sys.stdout.flush()
        os._exit(0 if quiet else stopped.exit_code)
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
    """On SIGTERM leave at once where there is nothing to save: before the training, and when another rank of this machine has failed,
    because no vote can be held any more and the launcher is ending the rest. Otherwise the signal is the stop door's.

    A handler in Python runs only between two of the main thread's instructions, and a collective is one; the byte that the interpreter
    writes at once wakes a thread. It leaves a note, without which the rank that was killed could not be told from those that the launcher
    then ended.
    """
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)

    def leave() -> None:
        while signal.SIGTERM not in wake.recv(64):
            pass
        wake.settimeout(LOOK_EVERY_S)
        while may_be_saved(report):
            try:
                wake.recv(64)
            except TimeoutError:
                continue
        report.ended_by("SIGTERM")
        woken.close()
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=leave, name="leave-on-sigterm", daemon=True).start()


def may_be_saved(report: RankReport) -> bool:
    """This rank is training, or on its way out, and no rank of this attempt has failed or, on this machine, is gone."""
    if report.attempt is None or not report.phase.startswith(("training", "evaluating", "saving", "leaving", "stopped", "finished")):
        return False
    if any((report.attempt / "errors").glob("rank-*.json")):
        return False
    first = report.rank - int(os.environ.get("LOCAL_RANK", 0))
    here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    others = [other for other in rank_reports(report.attempt, "alive", here) if "stopped" not in other]
    return not any(process_state(other["pid"]) in (None, "Z", "X") and other["phase"] != "finished" for other in others)
