"""Data: files in several layouts -> canonical rows -> a tokenised, masked, content-addressed data set that ranks map into memory."""

from collections import Counter
from pathlib import Path

from harness.resources import cache_root
from harness.run import write_text_atomically

KIND_OF_ROWS = {"dpo": "pairs", "reward": "pairs", "kto": "labelled"}
"""What the rows of a task are, where they are not samples of supervised training."""
ASK_ONLY = ("rlhf",)
"""Tasks whose rows are questions, with or without an answer."""


def prepare_recipe(recipe, tokenizer, *, packing: bool, training_template=None, say=print):
    """Read, mix, hold out and tokenise what a recipe's `data` section names -> store.Prepared; a second call finds the first one's work.

    `say` is told what people should know of the rows before they train on them. Pairs and labelled answers are never packed. Raises
    DataError with the row's location.
    """
    from harness.data.prepare import prepare
    from harness.data.report import Dropped, warn_of_lengths
    from harness.data.sources import held_together, load_rows, mix

    data, kind = recipe.data, KIND_OF_ROWS.get(recipe.task, "samples")
    asks = recipe.task in ASK_ONLY
    loaded = [load_rows(source, data.on_error, kind=kind, asks=asks, num_proc=data.num_proc) for source in data.train]
    mixture = mix(data.train, loaded, eval_fraction=data.eval_fraction, eval_rows=data.eval_rows, seed=data.seed)
    held_out = [load_rows(source, data.on_error, kind=kind, asks=asks, num_proc=data.num_proc) for source in data.eval]
    for warning in warnings_about(sum((part.counts for part in (*loaded, *held_out)), Counter())):
        say(warning)
    leaked = len(_shared(mixture.train, held_out))
    if leaked:
        say(
            f"warning: {leaked:,} rows of data.eval are also rows of data.train, so the held-out loss is not held out; remove them from one"
        )
    shared = len(set(_shared(mixture.train, held_out, held_together).tolist())) if kind != "samples" else 0
    if shared:
        say(f"warning: {shared:,} prompts of data.eval are prompts of data.train, so what is held out of them are at most the answers")
    skipped = Dropped()
    for part in (*loaded, *held_out):
        skipped.add(len(part.skipped), [f"{row.location}: {row.reason}" for row in part.skipped])
    cache_dir, kept = cache_root(data.cache_dir) / "data", mixture.held_out or mix(data.eval, held_out, seed=data.seed).train
    if asks:
        from harness.data.questions import prepare_questions

        prepared = prepare_questions(recipe, mixture.train, kept, tokenizer, cache_dir=cache_dir, skipped=skipped)
        return _said(prepared, skipped, (*loaded, *held_out), say)
    prepared = prepare(
        mixture.train,
        tokenizer,
        cache_dir=cache_dir,
        max_length=data.max_length,
        kind=kind,
        eval=kept,
        too_long=data.too_long,
        train_on=data.train_on,
        on_error=data.on_error,
        packing=packing and kind == "samples",
        seed=data.seed,
        num_proc=data.num_proc,
        training_template=training_template,
        skipped=skipped,
    )
    for warning in warn_of_lengths(prepared.report):
        say(warning)
    return _said(prepared, skipped, (*loaded, *held_out), say)


def _shared(train, held_out, part_of=lambda row: row):
    """Digests of the rows of data.eval (or of a part of them) that data.train has as well."""
    import numpy as np

    from harness.data.rows import content_digests

    if not held_out:
        return np.zeros(0, "S16")
    out = np.concatenate([content_digests(part.rows, part_of) for part in held_out])
    return out[np.isin(out, content_digests(train, part_of))]


def _said(prepared, skipped, parts, say):
    if skipped.rows:
        say(f"warning: {skipped.rows:,} rows were skipped; each with its reason: {list_skipped(parts, prepared.folder)}")
    return prepared


def held_out_rows(data, task: str = "sft"):
    """The rows that a recipe's `data` section holds out, as its sources say them: not shortened, not tokenised. Of preference tasks the
    chosen or good answers, as rows of supervised training; of questions those that have an answer."""
    from harness.data.pairs import good_side
    from harness.data.rows import SourceRow
    from harness.data.sources import load_rows, mix

    kind = KIND_OF_ROWS.get(task, "samples")
    sources = data.eval or data.train
    fractions = {} if data.eval else {"eval_fraction": data.eval_fraction, "eval_rows": data.eval_rows}
    loaded = [load_rows(source, data.on_error, kind=kind, asks=task in ASK_ONLY) for source in sources]
    mixture = mix(sources, loaded, seed=data.seed, **fractions)
    rows = mixture.train if data.eval else mixture.held_out
    if task in ASK_ONLY:
        return [row for row in rows if row.row["messages"][-1]["role"] == "assistant"]
    if kind == "samples":
        return rows
    return [SourceRow(row.location, good) for row in rows if (good := good_side(row.row)) is not None]


def list_skipped(parts, folder: Path) -> Path:
    """Write every skipped row, `location: reason`, beside the prepared data."""
    path = folder.with_name(f"{folder.name}.skipped.txt")
    write_text_atomically(path, "".join(f"{row.location}: {row.reason}\n" for part in parts for row in part.skipped))
    return path


def warnings_about(counts: Counter) -> list[str]:
    """Lines about gold calls that would teach a mistake; counted, not refused: public sets break 3 to 19 % of their own schemas."""
    lines = []
    if counts["broken_calls"]:
        broken, calls = counts["broken_calls"], counts["trained_calls"]
        by_kind = {kind.removeprefix("broken/").replace("_", " "): count for kind, count in sorted(counts.items()) if "broken/" in kind}
        kinds = ", ".join(f"{count} {kind}" for kind, count in by_kind.items())
        lines.append(f"warning: {broken} of {calls} gold calls ({broken / calls:.1%}) break their own tool's schema ({kinds})")
    if counts["untooled_calls"]:
        lines.append(
            f"warning: {counts['untooled_calls']:,} calls of good answers stand in rows that offer no tools; a model learns from them to "
            "call what nobody showed it"
        )
    if counts["unpaired"]:
        lines.append(f"warning: {counts['unpaired']:,} labelled answers are in no pair: their prompt has none with the other label")
    if counts["unparsable_answers"]:
        lines.append(f"warning: {counts['unparsable_answers']} APIBench answers are not valid Python")
    return lines
