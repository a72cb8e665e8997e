"""The rank program behind launch/train.py: its arguments, its log file, and how it ends.

A rank writes its own log (logs/attempt-K/rank-R.log); rank 0 also speaks to the terminal. An error with a name ends it with that error's
exit code and no traceback; any other is shown whole.
"""

import argparse
import logging
import os
import sys
import warnings

from harness.errors import HarnessError
from harness.overrides import dashed_overrides
from harness.recipe import load
from harness.run import ATTEMPT_VARIABLE


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/train.py", description="one rank of a training run")
    parser.add_argument("--recipe", required=True, help="a recipe file, or the name of a shipped one")
    parser.add_argument("--smoke", action="store_true", help="two steps on the longest rows, then stop")
    parser.add_argument("--fresh", action="store_true", help="delete what lies in the run folder first")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    options, dashed = parser.parse_known_args(argv)
    options.overrides += dashed_overrides(dashed)
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
