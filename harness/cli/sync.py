from pathlib import Path

import click

from harness.run import RunDir


@click.command("sync")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be sent; write nothing and send nothing.")
def command(run: Path, dry_run: bool):
    """Send the metrics of RUN to Weights & Biases: all its lives as one run. It can be done again after further lives."""
    from harness.tracking import sync

    lives = sync.read_lives(RunDir(run.expanduser().resolve()))
    click.echo(lives.describe())
    if dry_run:
        click.echo("nothing was written, nothing was sent (--dry-run)")
        return
    recorded = sync.record(lives)
    click.echo(f"joined in {recorded}")
    if sync.can_send():
        sync.send(recorded)
    else:
        click.echo(f"not sent: this machine has no W&B key (WANDB_API_KEY or `wandb login`). Where there is one:\nwandb sync {recorded}")
