import os
import sys

import click

from harness.checkpoint.door import Signals
from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.cli.run import visible_gpus
from harness.cli.workers import supervise
from harness.distributed import local_rank, rank, world_size
from harness.errors import RecipeError
from harness.launcher import Machines
from harness.logs import quieten
from harness.recipe import Recipe


@click.command("generate", context_settings=RECIPE_CONTEXT)
@click.option("--shards", type=click.IntRange(1), default=1, help="So many workers share the work, on any machines.  [default: 1]")
@click.option("--shard", type=click.IntRange(0), default=0, help="Which of them this is, from 0.  [default: 0]")
@click.option("--processes", type=click.IntRange(1), help="On this machine, each with a whole model.  [default: one per GPU]")
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...], shards: int, shard: int, processes: int | None):
    """Have RECIPE's model answer the rows of its data, and keep the valid answers as rows for `task: sft`.

    The work is in units: whoever is killed loses the one that was being done, and the same command goes on, with any number of workers.
    Ctrl-C (or SIGTERM, SIGUSR1) ends the running unit and leaves with 75.
    """
    resolved = load_recipe(recipe, overrides)
    machines = Machines(processes or (1 if resolved.generate.device_map else max(1, visible_gpus())))
    check_generate(resolved, machines.processes, shards, shard)
    if "RANK" in os.environ or machines.processes == 1:
        generate_here(resolved, shards, shard)
        return
    argv = [sys.executable, "-m", "harness", "generate", recipe, *overrides, "--shards", str(shards), "--shard", str(shard)]
    sys.exit(supervise(argv, machines, {}, together=False))


def check_generate(recipe: Recipe, processes: int, shards: int, shard: int) -> None:
    """Raises RecipeError for a recipe or options of which nothing can be generated."""
    if recipe.task != "generate":
        raise RecipeError(f"task = {recipe.task}; it trains, and answers nothing; set task: generate")
    if shard >= shards:
        raise RecipeError(f"--shard {shard}; with --shards {shards} it goes from 0 to {shards - 1}")
    if recipe.generate.device_map and processes > 1:
        raise RecipeError(
            f"generate.device_map = {recipe.generate.device_map}; one process takes all GPUs of its machine, and {processes} were asked "
            "for; use --processes 1"
        )


def generate_here(recipe: Recipe, shards: int, shard: int) -> None:
    """As one worker, in this process."""
    signals = Signals()
    signals.install()
    quieten()
    import torch

    from harness.tasks.generate import answer_prompts
    from harness.units import Worker

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    worker = Worker(shard * world_size() + rank(), shards * world_size())
    label = f"[{worker.index}/{worker.count}] " if worker.count > 1 else ""

    def tell(text: str) -> None:
        click.echo("".join(f"{label}{line}\n" for line in text.splitlines()), nl=False)

    answer_prompts(recipe, worker, stop=lambda: signals.got and signals.got.name, say=tell)
