import json
import shutil
import sys
from pathlib import Path

import click

from harness.errors import ModelError, RecipeError
from harness.logs import quieten
from harness.recipe import load
from harness.run import RunDir, replace_folder

GGUF_TYPES = ("f32", "bf16", "f16", "q8_0")
COMPARED_WITH = {"adapter": "base + adapter", "trained_4bit": "the 4-bit model that was trained"}


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--merge", is_flag=True, help="Merge the adapter into its base in bfloat16, into RUN/merged.")
@click.option("--gguf", type=click.Choice(GGUF_TYPES), help="Convert the whole model (of an adapter the merged one) into RUN/gguf-TYPE.")
@click.option(
    "--converter", type=click.Path(path_type=Path), help="llama.cpp's convert_hf_to_gguf.py, or its folder.  [default: $LLAMA_CPP, PATH]"
)
@click.option("--force", is_flag=True, help="Replace a merged or converted model that is there already.")
def command(run: Path, merge: bool, gguf: str | None, converter: Path | None, force: bool):
    """Verify the export of RUN (an adapter alone, or a whole model) against its digests; with --merge also merge the adapter into its base,
    and measure what that changed; with --gguf also write the model for llama.cpp."""
    if converter and not gguf:
        raise RecipeError("--converter is for --gguf, and that is not given")
    folder = RunDir(run.expanduser().resolve())
    folder.read_manifest()
    quieten()
    from harness.model.export import verify_export
    from harness.model.gguf import find_converter

    manifest = verify_export(folder.final)
    if gguf and manifest["task"] == "reward":
        raise ModelError(f"{folder.final}: ends in a score, which llama.cpp's converter would leave out; serve it by transformers")
    # Before a merge that takes minutes.
    found = find_converter(converter) if gguf else None
    click.echo(f"{folder.final}: {len(manifest['files'])} files, all as they were exported at step {manifest['step']}")
    if merge:
        merge_and_tell(folder, manifest, force)
    if gguf:
        convert_and_tell(folder, manifest, gguf, found, force)


def merge_and_tell(folder: RunDir, manifest: dict, force: bool) -> None:
    from harness.model.export import KL_LIMIT

    if not manifest["adapter"]:
        raise ModelError(f"{folder.final}: is a whole model, not an adapter; there is nothing to merge")
    if folder.merged.is_dir() and not force:
        raise ModelError(f"{folder.merged}: already holds a merged model; --force replaces it")
    differences, compared = merge_run(folder, manifest)
    scores = manifest["task"] == "reward"
    click.echo(f"merged into {folder.merged}; its {'scores' if scores else 'logits'} over {compared} {'pairs' if scores else 'tokens'},")
    for name, found in differences.items():
        click.echo(
            f"  against {COMPARED_WITH[name]}: largest difference {found['max_abs']:.3g}, mean {found['mean_abs']:.3g}, "
            f"KL {found['kl']:.3g} nats per {'pair' if scores else 'token'}"
        )
    if not differences["adapter"]["kl"] <= KL_LIMIT:
        click.echo(f"the merge changed the model: KL is above {KL_LIMIT}; is the base what it was in training?", err=True)
        sys.exit(1)


def convert_and_tell(folder: RunDir, manifest: dict, dtype: str, converter: Path, force: bool) -> None:
    from harness.model.export import verify_export
    from harness.model.gguf import save_gguf

    source, target = folder.merged if manifest["adapter"] else folder.final, folder.gguf(dtype)
    if not source.is_dir():
        raise ModelError(f"{folder.final}: is an adapter; merge it first: harness export {folder.path} --merge --gguf {dtype}")
    if target.is_dir() and not force:
        raise ModelError(f"{target}: already holds a converted model; --force replaces it")
    file, tensors = save_gguf(source, target, folder.path.name, dtype, converter, verify_export(source))
    click.echo(f"converted {source} into {file}: {tensors} tensors, {file.stat().st_size:,} bytes")


def merge_run(folder: RunDir, manifest: dict) -> tuple[dict, int]:
    """Merge onto the recorded base, keep the result only when it is whole, and record the measured differences in its manifest.

    Returns them and the number of tokens (of a reward model: of pairs) that they were measured on.
    """
    from transformers import AutoTokenizer

    from harness.embedded import resolve
    from harness.model import load_tokenizer
    from harness.model.export import MANIFEST, check_export, digest_base, ends_in_score, merge_adapter

    base = resolve(manifest["base"])
    if manifest["base_digest"] and digest_base(base) != manifest["base_digest"]:
        raise ModelError(
            f"{base}: is not the base that the adapter was trained on (its digest differs); restore that one, or merging spoils the adapter"
        )
    recipe = load(folder.recipe)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": manifest["base_revision"]})})
    staging = folder.path / "merged.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    rows, scores = prepared_rows(folder), ends_in_score(folder.final)
    # A reward model's pad token may be another than its base's (harness.model.reward.settle_pad), and its config names it.
    tokenizer = AutoTokenizer.from_pretrained(folder.final) if scores else load_tokenizer(recipe)
    pad = tokenizer.pad_token_id if scores else None
    differences = merge_adapter(folder.final, base, recipe, manifest["dtype"], staging, rows, pad_token_id=pad)
    tokenizer.save_pretrained(staging)
    files = check_export(staging, None, adapter=False)
    made = {"adapter": False, "dtype": "bfloat16", "merged_from": str(folder.final), "differences": differences, "files": files}
    (staging / MANIFEST).write_text(json.dumps({**manifest, **made}, indent=2) + "\n")
    replace_folder(staging, folder.merged)
    return differences, len(rows) if scores else sum(map(len, rows))


def prepared_rows(folder: RunDir) -> list:
    from harness.data.store import load_prepared
    from harness.model.export import ends_in_score, rows_to_compare

    marker = sorted(folder.path.glob("logs/attempt-*/prepared-*.json"))[-1]
    return rows_to_compare(load_prepared(json.loads(marker.read_text())["folder"]), pairs=ends_in_score(folder.final))
