import os
import sys

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.cli.run import default_processes
from harness.cli.workers import supervise
from harness.distributed import world_size
from harness.launcher import Machines
from harness.logs import quieten
from harness.recipe import Recipe
from harness.recipe.backend import Backend, load_backend
from harness.resources import shipped
from harness.share import Share, check_share, processes_of
from harness.watched import Watched

PREPARED_VARIABLE = "HARNESS_PREPARED"
"""Set for the processes that this command starts: the folder of the data, which they need not prepare again."""


@click.command("capture", context_settings=RECIPE_CONTEXT)
@click.option("--shards", type=click.IntRange(1), default=1, help="So many workers share the work, on any machines.  [default: 1]")
@click.option("--shard", type=click.IntRange(0), default=0, help="Which of them this is, from 0.  [default: 0]")
@click.option(
    "--backend", help="Instead of the recipe's. Under zero3 all processes share one teacher, under any other each has a whole one."
)
@click.option("--processes", type=click.IntRange(1), help="On this machine.  [default: 1, or one per GPU with a backend of several ranks]")
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...], shards: int, shard: int, backend: str | None, processes: int | None):
    """Run RECIPE's teacher once over its data, and keep what it says of the trained tokens, for every student and epoch to come.

    The work is in units: whoever is killed loses the one that was being done, and the same command goes on, with any number of workers.
    Ctrl-C (or SIGTERM, SIGUSR1) ends the running unit and leaves with 75.
    """
    overrides = (*overrides, f"backend={backend}") if backend else overrides
    resolved = load_recipe(recipe, overrides)
    ruling = load_backend(resolved.backend)
    if "RANK" in os.environ:
        check_share(resolved, Share("capture", shards, shard), world_size())
        capture_here(resolved, ruling, shards, shard)
        return
    machines = Machines.from_environment(processes or processes_of(resolved, default_processes(resolved)), dict(os.environ))
    check_share(resolved, Share("capture", shards, shard), machines.world_size)
    if machines.world_size == 1:
        capture_here(resolved, ruling, shards, shard)
        return
    prepared = _prepare(resolved).folder
    argv = [sys.executable, str(shipped("launch", "capture.py")), recipe, *overrides, "--shards", str(shards), "--shard", str(shard)]
    variables = {PREPARED_VARIABLE: str(prepared)}
    sys.exit(supervise(argv, machines, variables, together=shares_teacher(resolved, ruling, machines.world_size)))


def shares_teacher(recipe: Recipe, backend: Backend, processes: int) -> bool:
    """Whether the processes have one teacher together. One alone has it whole, unless the backend keeps part of it on the host; a served
    one is in none of them."""
    return not recipe.teacher.server and backend.zero_stage == 3 and (processes > 1 or backend.offloads)


def _prepare(recipe: Recipe):
    """The data that the teacher is asked about, unpacked; from the parent's folder where there is a parent."""
    from harness.data import prepare_recipe
    from harness.data.report import render_report
    from harness.data.store import load_prepared
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    if PREPARED_VARIABLE in os.environ:
        return load_prepared(os.environ[PREPARED_VARIABLE])
    quieten()
    prepared = prepare_recipe(recipe, load_tokenizer(recipe), packing=False, training_template=training_template)
    click.echo(render_report(prepared.report))
    return prepared


# ---- this process


def capture_here(recipe: Recipe, backend: Backend, shards: int, shard: int) -> None:
    """Capture in this process: as one worker, or as a rank of a group that shares a teacher."""
    with Watched(recipe) as watched:
        quieten()
        import torch

        from harness import distributed
        from harness.model import load_tokenizer
        from harness.teacher.capture import capture
        from harness.units import Worker

        together = shares_teacher(recipe, backend, world_size())
        if torch.cuda.is_available():
            torch.cuda.set_device(distributed.local_rank())
        else:
            # With other threads a CPU adds in another order, and the bytes shall not depend on how many workers share it.
            torch.set_num_threads(1)
        if together:
            _join(recipe)
            worker = Worker(shard, shards)
        else:
            worker = Worker(shard * world_size() + distributed.rank(), shards * world_size())
            # From here on it is on its own, though it was started beside others.
            os.environ["WORLD_SIZE"], os.environ["RANK"] = "1", "0"
        label = f"[{worker.index}/{worker.count}] " if worker.count > 1 else ""

        def tell(text: str) -> None:
            if distributed.is_main():
                click.echo("".join(f"{label}{line}\n" for line in text.splitlines()), nl=False)

        try:
            watched.enter("loading data")
            tokenizer, prepared = load_tokenizer(recipe), _prepare(recipe)
            watched.enter("capturing")
            capture(
                recipe,
                tokenizer,
                prepared,
                worker,
                sharded_by=backend if together else None,
                stop=watched.stop,
                say=tell,
                begun=watched.begun,
                beat=watched.beat,
            )
        finally:
            distributed.shutdown()


def _join(recipe: Recipe) -> None:
    import torch

    from harness import distributed
    from harness.launcher import rule_backend
    from harness.operators import release_abandoned_locks
    from harness.teacher.resident import teacher_recipe

    ruled = rule_backend(teacher_recipe(recipe), os.environ, has_gpu=torch.cuda.is_available())
    if distributed.local_rank() == 0:
        release_abandoned_locks(offloads=ruled.backend.offloads, say=click.echo)
    patience_s = max(recipe.train.ddp_timeout, recipe.watchdog.start_s)
    distributed.start(recipe.train.ddp_timeout, decisions_s=patience_s, group_of_one=True)
