from pathlib import Path

import click

from harness.run import RunDir


@click.command("sync")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
def command(run: Path, dry_run: bool):
    """Send to Weights & Biases what it has not of RUN, all its lives as one run. Without a key here: say how to send it from elsewhere."""
    from harness.tracking import sync

    lives = sync.read_lives(RunDir(run.expanduser().resolve()))
    has_key = sync.can_send()
    sent = sync.ask_what_is_sent(lives) if has_key else sync.check_nothing_sent(lives)
    click.echo(sync.describe(lives, sent))
    if dry_run or not lives.behind(sent):
        return
    recorded = sync.record(lives, sent)
    if has_key:
        sync.send(recorded)
    else:
        click.echo("joined, not sent: this machine has no W&B key (WANDB_API_KEY or `wandb login`); where there is one:")
        click.echo(f"wandb sync {recorded}")
