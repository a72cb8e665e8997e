import sys
from pathlib import Path

import click


@click.command("node")
@click.option("--preflight", is_flag=True, help="Look at this node in place of training on it.")
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path, preflight: bool):
    """What srun starts on each node of a job: this node's ranks of RUN."""
    from harness.cluster import node
    from harness.run import RunDir

    sys.exit(node.check_this_node(RunDir(run)) if preflight else node.live_on_node(RunDir(run)))
