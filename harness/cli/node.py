import sys
from pathlib import Path

import click


@click.command("node")
@click.option("--preflight", is_flag=True, help="Look at this node in place of training on it.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("verb", nargs=-1)
def command(run: Path, preflight: bool, verb: tuple[str, ...]):
    """What srun starts on each node of a job: this node's ranks of RUN; or, after --, another verb of harness."""
    from harness.cluster import node
    from harness.run import RunDir

    if verb:
        sys.exit(node.run_on_node(list(verb)))
    sys.exit(node.check_this_node(RunDir(run)) if preflight else node.live_on_node(RunDir(run)))
