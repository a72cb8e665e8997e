import json
import shutil
import sys
from pathlib import Path

import click

from harness.errors import ModelError
from harness.recipe import load
from harness.run import RunDir

COMPARED_ROWS = 8
COMPARED_TOKENS = 256
KL_LIMIT = 0.05
"""Nats per token between base + adapter and the merged model, both in bfloat16. Rounding alone stays far below; a wrong base is far above."""
from harness.logs import quieten


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--merge", is_flag=True, help="Merge the adapter into its base in bfloat16, into RUN/merged.")
@click.option("--force", is_flag=True, help="Replace a merged model that is there already.")
def command(run: Path, merge: bool, force: bool):
    """Verify the export of RUN against its digests; with --merge also write the adapter merged into its base, and measure the difference."""
    folder = RunDir(run.expanduser().resolve())
    folder.read_manifest()
    quieten()
    from harness.model import verify_export

    manifest = verify_export(folder.final)
    click.echo(f"{folder.final}: {len(manifest['files'])} files, all as they were exported at step {manifest['step']}")
    if not merge:
        return
    if not manifest["adapter"]:
        raise ModelError(f"{folder.final}: is a whole model, not an adapter; there is nothing to merge")
    if folder.merged.is_dir() and not force:
        raise ModelError(f"{folder.merged}: already holds a merged model; --force replaces it")
    difference = merge_run(folder, manifest)
    click.echo(f"merged into {folder.merged}")
    click.echo(
        "logits before and after: largest difference {max_abs:.3g}, mean {mean_abs:.3g}, KL {kl:.3g} nats per token, over {tokens} tokens".format(
            **difference
        )
    )
    if difference["kl"] > KL_LIMIT:
        click.echo(f"the merge changed the model: KL is above {KL_LIMIT}; is the base what it was in training?", err=True)
        sys.exit(1)


def merge_run(folder: RunDir, manifest: dict) -> dict:
    """Merge onto the recorded base, keep the result only when it is whole, and record the measured difference in its manifest."""
    from harness.embedded import resolve
    from harness.model import MANIFEST, check_export, digest_base, load_tokenizer, merge_adapter

    base = resolve(manifest["base"])
    if manifest["base_digest"] and digest_base(base) != manifest["base_digest"]:
        raise ModelError(f"{base}: is not the base that the adapter was trained on (its digest differs); restore that one, or merging spoils the adapter")
    recipe = load(folder.recipe)
    staging = folder.path / "merged.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    rows = rows_to_compare(folder)
    difference = merge_adapter(folder.final, base, manifest["base_revision"], staging, rows, recipe.model.trust_remote_code)
    difference["tokens"] = sum(map(len, rows))
    load_tokenizer(recipe).save_pretrained(staging)
    files = check_export(staging, None, adapter=False)
    content = {**manifest, "adapter": False, "merged_from": str(folder.final), "difference": difference, "files": files}
    (staging / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    from harness.run import replace_folder

    replace_folder(staging, folder.merged)
    return difference


def rows_to_compare(folder: RunDir) -> list[list[int]]:
    """Token ids of a few rows that the run held out, or of its first training rows."""
    from harness.data.store import load_prepared

    marker = sorted(folder.path.glob("logs/attempt-*/prepared-*.json"))[-1]
    prepared = load_prepared(json.loads(marker.read_text())["folder"])
    rows = prepared.eval if prepared.eval is not None else prepared.train
    return [ids[:COMPARED_TOKENS] for ids in rows[:COMPARED_ROWS]["input_ids"]]
