import os
import sys
from pathlib import Path

import click


@click.command("allocation")
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path):
    """What a job's script becomes: has the ranks of RUN live on the job's nodes until it is done, or must wait for other nodes."""
    from harness.cluster.allocation import Allocation
    from harness.run import RunDir

    sys.exit(Allocation(RunDir(run), dict(os.environ)).main())
