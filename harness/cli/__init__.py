"""The `harness` command. One file per verb, imported when that verb is asked for, so that `harness check` never pays for torch."""

import sys
from importlib import import_module

import click

from harness import __version__
from harness.errors import HarnessError

# Verb -> what it does, in the order of a first day; the help text is here so that `harness --help` imports nothing.
VERBS = {
    "doctor": "Say whether this machine is sound, or ready for a recipe, and what to do where it is not.",
    "quickstart": "Train, adapt and score a tiny tool-calling model on this machine.",
    "check": "Print a recipe as it will run, or say what is wrong with it.",
    "plan": "Say what a recipe will take of GPUs, hosts, disks and time, and whether it fits.",
    "fetch": "Bring what a recipe takes from the hub to the cache, for nodes without a network.",
    "convert": "Write data of one layout in another, and say what was lost.",
    "validate": "Audit data before it is trained: schemas, pairs, control tokens, duplicates, contamination.",
    "prepare": "Tokenise a recipe's data once, on a CPU.",
    "preview": "Show a few rows with the trained tokens marked.",
    "capture": "Run a teacher once over a recipe's data, for every student to come.",
    "generate": "Have a teacher answer a recipe's prompts, for a student's fine-tuning.",
    "run": "Train: start the ranks of a recipe on this machine.",
    "evaluate": "Ask a model or a server what suites ask, and judge its answers.",
    "decide": "Say for each behaviour of a model: prompt, retrieve, fine-tune, or mend the data.",
    "chat": "Talk to a run, a model or a server; its calls are checked, and answered by functions or by you.",
    "score": "Score tool calls that came from anywhere against a suite's answers.",
    "submit": "Send a recipe to Slurm, or render the script that would be sent.",
    "status": "Say how runs stand: state, step, time left, restarts, last commit.",
    "report": "Write the story of a run as one page: curves, lives, goodput, memory, recipe; or serve it while it runs.",
    "logs": "Print or follow what a rank, or a run's Slurm job, has written.",
    "cancel": "End a run's job, at once or when the run has saved.",
    "nodes": "Show what is free on the cluster, and what a job would fit on.",
    "checkpoints": "List, verify or prune a run's checkpoints.",
    "sync": "Send a run's metrics to Weights & Biases, all its lives as one run.",
    "export": "Verify a run's export, merge its adapter into its base, or write it as GGUF.",
    "push": "Hand a run's export over, with a model card: to a hub, or to a folder.",
    "pairs": "Mine preference pairs from a run's own failures.",
}
# Started by our own scripts and by no person.
HIDDEN = ("allocation", "node")


class _Verbs(click.Group):
    def list_commands(self, ctx):
        return list(VERBS)

    def get_command(self, ctx, name):
        return import_module(f"harness.cli.{name}").command if name in VERBS or name in HIDDEN else None

    def resolve_command(self, ctx, args):
        if args and args[0] not in (*VERBS, *HIDDEN) and not args[0].startswith("-"):
            raise click.UsageError(f"no such verb: {args[0]!r}; verbs are {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx, formatter):
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="harness")
def group():
    """From a base model to a reliable tool-calling agent: one recipe, one command."""


def main(argv: list[str] | None = None) -> None:
    """Run the command and leave with its exit code; an error with a name is one message, without a traceback."""
    try:
        sys.exit(group.main(argv, standalone_mode=False) or 0)
    except HarnessError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # `harness preview | head`: the reader has what it wanted.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        # A disk that is full, a folder where a file should be, a name that may not be written: no fault of ours to be traced.
        what = f"{error.filename}: cannot be read or written: {error.strerror}" if error.filename and error.strerror else error
        click.echo(f"{type(error).__name__}: {what}", err=True)
        sys.exit(1)
