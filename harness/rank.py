"""The rank program behind launch/train.py: its arguments, its log file, and how it ends.

A rank writes its own log (logs/attempt-K/rank-R.log); rank 0 also speaks to the terminal. An error with a name ends it with that error's
exit code and no traceback; any other is shown whole.
"""

import argparse
import os
import sys

from harness.errors import HarnessError
from harness.logs import quieten
from harness.overrides import dashed_overrides
from harness.recipe import load
from harness.run import ATTEMPT_VARIABLE


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
    options, overrides = parser.parse_known_args(argv)
    options.overrides = dashed_overrides(overrides)
    return options


def main(argv: list[str] | None = None) -> int:
    """Exit code of this rank: 0 done, 2 the recipe or data is wrong, 1 anything else.

    Started by `harness run`, which prints the first failing rank's error last, a rank says nothing more on the terminal. Started by hand, it
    prints its own error, and lets other exceptions through, so that torchrun's summary shows their traceback.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_main)(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    quieten()
    has_parent = ATTEMPT_VARIABLE in os.environ
    terminal = os.fdopen(os.dup(2), "w")
    try:
        options = parse_arguments(argv)
        recipe = load(options.recipe, options.overrides)
        from harness.tasks.job import train_recipe

        train_recipe(recipe, smoke=options.smoke, fresh=options.fresh)
    except HarnessError as error:
        if not has_parent:
            print(f"{type(error).__name__}: {error}", file=terminal, flush=True)
        return error.exit_code
    except Exception:
        if not has_parent:
            raise
        return 1
    return 0
