"""Data: files in several layouts -> canonical rows -> a tokenised, masked, content-addressed data set that ranks map into memory."""

import os
from pathlib import Path

CACHE_VARIABLE = "HARNESS_CACHE"


def cache_root(asked: str | None = None) -> Path:
    """Where everything that can be made again lies: what the recipe says, else $HARNESS_CACHE, else ~/.cache/harness."""
    return Path(asked or os.environ.get(CACHE_VARIABLE) or "~/.cache/harness").expanduser()


def prepare_recipe(recipe, tokenizer, *, packing: bool, training_template=None):
    """Read, mix, hold out and tokenise what a recipe's `data` section names -> store.Prepared; a second call finds the first one's work.

    Raises DataError with the row's location.
    """
    from harness.data.prepare import prepare
    from harness.data.report import Dropped
    from harness.data.sources import load_rows, mix

    data = recipe.data
    loaded = [load_rows(source, data.on_error) for source in data.train]
    mixture = mix(data.train, loaded, eval_fraction=data.eval_fraction, eval_rows=data.eval_rows, seed=data.seed)
    held_out = [load_rows(source, data.on_error) for source in data.eval]
    skipped = Dropped()
    for part in (*loaded, *held_out):
        skipped.add(len(part.skipped), [f"{row.location}: {row.reason}" for row in part.skipped])
    return prepare(
        mixture.train,
        tokenizer,
        cache_dir=cache_root(data.cache_dir) / "data",
        max_length=data.max_length,
        eval=mixture.held_out or mix(data.eval, held_out, seed=data.seed).train,
        too_long=data.too_long,
        train_on=data.train_on,
        on_error=data.on_error,
        packing=packing,
        seed=data.seed,
        num_proc=data.num_proc,
        training_template=training_template,
        skipped=skipped,
    )
