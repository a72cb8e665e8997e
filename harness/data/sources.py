"""Files and hub data sets become canonical rows that know where they came from; sources become one mixture with a held-out part.

    load_rows(source, ...)            canonical rows (formats.py) of what reading.py reads, with what was left out and why
    mix(sources, loaded, ...)         max_rows, the held-out split and the weights, in this order

Rows lie in a file meanwhile (rows.py), and memory holds some bytes of each; they are parsed and converted in several processes (spans.py).

Promises. Every raw row ends up in `rows` or in `skipped`, never in neither. Choices depend on the content of the rows and the seed, not on
the order of files: equal rows, and all answers to one question, are always on the same side of the held-out split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.data.formats import LeftOut, broken_calls, detect_format, is_python, to_canonical, trained_calls
from harness.data.pairs import detect_layout, good_side, pair_answers, question, to_preferences
from harness.data.reading import Span, read_spans
from harness.data.rows import Picked, Rows, SourceRow, content_digests
from harness.data.spans import in_order
from harness.errors import DataError

if TYPE_CHECKING:
    import numpy as np

LOOK_AHEAD = 1000  # rows that are still checked after the first bad one, to say whether it is alone


class Source(Protocol):
    """What is read of a recipe's source (harness/recipe); any object with these will do."""

    path: str
    format: str
    name: str | None
    split: str
    weight: float
    max_rows: int | None


@dataclass(frozen=True)
class Skipped:
    location: str
    reason: str


@dataclass
class LoadedRows:
    """`counts`: read, kept, skipped (raw rows, of which one may give several canonical ones; of these `left_out`, those that their layout
    itself says are not to be imitated), one `layout/<name>` each; trained_calls and broken_calls (against their tool's schema), with the
    kind of break in `broken/<kind>`; unparsable_answers (APIBench answers that are not Python). Of preference rows besides: untooled_calls
    (of good answers whose rows offer no tools) and unpaired (labelled answers whose question has none with the other label)."""

    rows: Sequence[SourceRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


@dataclass
class Mixture:
    train: Sequence[SourceRow]
    held_out: Sequence[SourceRow]


# ---- loading


def load_rows(
    source: Source,
    on_error: str = "fail",
    base_dir: str | Path = ".",
    *,
    asks: bool = False,
    kind: str = "samples",
    num_proc: int | None = None,
) -> LoadedRows:
    """Reads a source into canonical rows. `on_error`: "fail" raises DataError for the first bad row, "skip" leaves bad rows out, listed.

    asks: rows are questions, as in `to_canonical`. kind: "samples" of supervised training, or of preferences "pairs" or "labelled" answers.
    num_proc: as in spans.py. Raises DataError in both cases where a file cannot be read at all and where no row is left.
    """
    if on_error not in ("fail", "skip"):
        raise DataError(f'data.on_error = "{on_error}"; must be fail or skip')
    take = _take if kind == "samples" else partial(_take_preferences, kind=kind)
    take = partial(take, layout=source.format, **({"asks": asks} if kind == "samples" else {}))
    spans = read_spans(source.path, source.name, source.split, Path(base_dir))
    parts = in_order(partial(_load_span, take=take), spans, num_proc, "read")
    loaded = LoadedRows(Rows())
    for part in parts:
        if part.bad and on_error == "fail":
            raise _first_bad(part, parts)
        for row in part.rows:
            loaded.rows.append(row)
        loaded.skipped += part.skipped
        loaded.counts.update(part.counts)
    if kind == "pairs":
        _pair_labelled(loaded)
    if not loaded.rows:
        first = f"; the first: {loaded.skipped[0].location}: {loaded.skipped[0].reason}" if loaded.skipped else ""
        first = (
            f"; no question (system message, tools and all) has both a good and a bad answer{first}" if loaded.counts["unpaired"] else first
        )
        raise DataError(f"{source.path}: no row is left of {loaded.counts['read']}{first}")
    return loaded


@dataclass
class _Part(LoadedRows):
    """Of one span. bad: the raw rows that are to blame, as (number in the span, what was skipped)."""

    bad: list[tuple[int, Skipped]] = field(default_factory=list)


def _load_span(span: Span, *, take: Callable) -> _Part:
    part = _Part()
    for number, (location, raw) in enumerate(span.read()):
        before = _bad(part)
        take(location, raw, loaded=part)
        if _bad(part) > before:
            part.bad.append((number, part.skipped[-1]))
    for row in part.rows:
        row.text  # noqa: B018, it is written here, where there are processes to share the work
    return part


def _bad(loaded: LoadedRows) -> int:
    return len(loaded.skipped) - loaded.counts["left_out"]


def _take(location: str, raw: dict | DataError, *, layout: str, loaded: LoadedRows, asks: bool) -> None:
    with _counted(location, loaded):
        raw = _readable(raw)
        if layout == "auto":
            layout = detect_format(raw)
            if layout == "kto" and raw["label"] is False:
                raise DataError(
                    "label is false: a bad answer, which supervised training would teach; use task kto, or `format: kto` of the source, "
                    "which leaves such rows out (if it means something else, name another `format`)"
                )
        row = to_canonical(raw, layout, asks=asks)
        loaded.rows.append(SourceRow(location, row))
        loaded.counts[f"layout/{layout}"] += 1
        _count_calls(row, loaded.counts)
        if layout == "apibench" and not is_python(row["messages"][-1]["content"]):
            loaded.counts["unparsable_answers"] += 1


def _take_preferences(location: str, raw: dict | DataError, *, layout: str, loaded: LoadedRows, kind: str) -> None:
    with _counted(location, loaded):
        raw = _readable(raw)
        layout = detect_layout(raw) if layout == "auto" else layout
        rows = to_preferences(raw, layout, kind=kind)
        loaded.rows += [SourceRow(f"{location}#{n}" if len(rows) > 1 else location, row) for n, row in enumerate(rows, 1)]
        loaded.counts[f"layout/{layout}"] += 1
        if (good := good_side(rows[0])) is None:
            return
        if "tools" in good:
            _count_calls(good, loaded.counts)
        else:
            loaded.counts["untooled_calls"] += len(trained_calls(good))


@contextmanager
def _counted(location: str, loaded: LoadedRows) -> Iterator[None]:
    """One raw row: kept when the block ends, skipped where it raises DataError."""
    loaded.counts["read"] += 1
    try:
        yield
    except (DataError, RecursionError) as error:
        loaded.skipped.append(Skipped(location, str(error) if isinstance(error, DataError) else "nested too deeply"))
        loaded.counts["skipped"] += 1
        loaded.counts["left_out"] += isinstance(error, LeftOut)
    else:
        loaded.counts["kept"] += 1


def _readable(raw: dict | DataError) -> dict:
    if isinstance(raw, DataError):
        raise raw
    return raw


def _count_calls(row: dict, counts: Counter) -> None:
    counts["trained_calls"] += len(trained_calls(row))
    for problem in broken_calls(row):
        counts["broken_calls"] += 1
        counts[f"broken/{problem.kind}"] += 1


def _pair_labelled(loaded: LoadedRows) -> None:
    """Pairs in the place of a source's labelled answers, after those that were pairs already."""
    labelled = [(row.location, row.row) for row in loaded.rows if "label" in row.row]
    pairs, loaded.counts["unpaired"] = pair_answers(labelled)
    if labelled:
        loaded.rows = Rows([row for row in loaded.rows if "label" not in row.row] + [SourceRow(*pair) for pair in pairs])


def _first_bad(part: _Part, rest: Iterator[_Part]) -> DataError:
    """The error for the first bad row, saying whether it is alone: one broken row is repaired by hand, a thousand are another layout."""
    (first, skipped), *others = part.bad
    seen, bad = part.counts["read"] - first - 1, len(others)
    for part in rest:
        if seen >= LOOK_AHEAD:
            break
        bad += sum(seen + number < LOOK_AHEAD for number, _ in part.bad)
        seen += part.counts["read"]
    seen = min(seen, LOOK_AHEAD)
    more = f"\n{bad} of the next {seen} rows are bad too; `data.on_error: skip` leaves bad rows out and lists them" if bad else ""
    return DataError(f"{skipped.location}: {skipped.reason}{more}")


# ---- mixing


def mix(
    sources: Sequence[Source],
    loaded: Sequence[LoadedRows],
    *,
    seed: int,
    eval_fraction: float | None = None,
    eval_rows: int | None = None,
) -> Mixture:
    """One training set and its held-out part from the sources of a recipe, source after source (the trainer shuffles).

    First `max_rows` of each source, then the held-out split over all of them together, so that a row of one source cannot be trained
    through another, and last the weights, so that a row is held out once however often it would have been trained.
    """
    import numpy as np

    parts = [_choose(part.rows, source.max_rows, seed, "max_rows") for source, part in zip(sources, loaded, strict=True)]
    held_out: Sequence[SourceRow] = []
    if eval_fraction is not None or eval_rows is not None:
        everything = Picked(parts)
        out = _held_out(everything, eval_fraction, eval_rows, seed)
        held_out = Picked([everything], np.flatnonzero(out))
        ends = np.cumsum([len(part) for part in parts])
        parts = [Picked([part], np.flatnonzero(~own)) for part, own in zip(parts, np.split(out, ends[:-1]), strict=True)]
    train = Picked([_weighted(source, part, seed) for source, part in zip(sources, parts, strict=True)])
    return Mixture(train, held_out)


def split_held_out(
    rows: Sequence[SourceRow], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[Sequence[SourceRow], Sequence[SourceRow]]:
    """(train, held out). Give `fraction` or `count`.

    Which rows are held out depends on their content and the seed, not on their order. Equal rows stay together, so the held-out part can
    be larger than asked for by the copies of its last row. Raises DataError if nothing would be left to train.
    """
    import numpy as np

    out = _held_out(rows, fraction, count, seed)
    return Picked([rows], np.flatnonzero(~out)), Picked([rows], np.flatnonzero(out))


def _held_out(rows: Sequence[SourceRow], fraction: float | None, count: int | None, seed: int) -> np.ndarray:
    """Which rows are held out, as booleans."""
    import numpy as np

    if (fraction is None) == (count is None):
        raise DataError("the held-out split needs one of data.eval_fraction and data.eval_rows")
    wanted = count if count is not None else max(1, round(fraction * len(rows)))
    digests, which, copies = np.unique(content_digests(rows, held_together), return_inverse=True, return_counts=True)
    order = np.argsort(_lots(digests, seed, "held_out"))
    before = np.cumsum(copies[order]) - copies[order]
    taken = order[before < wanted]
    if copies[taken].sum() >= len(rows):
        raise DataError(f"the held-out split takes {copies[taken].sum()} of {len(rows)} rows and leaves none to train; ask for fewer")
    return np.isin(which, taken)


def held_together(row: dict) -> dict:
    """What all rows share that must be on one side of the held-out split: the question of preference rows, else the whole row."""
    return question(row) if "chosen" in row or "label" in row else row


def _weighted(source: Source, rows: Sequence[SourceRow], seed: int) -> Sequence[SourceRow]:
    whole, part = divmod(source.weight, 1)
    some = _choose(rows, round(part * len(rows)), seed, "weight")
    if rows and not whole and not some:
        raise DataError(f"{source.path}: weight = {source.weight} of {len(rows)} rows leaves none; raise it or leave the source out")
    return Picked([rows] * int(whole) + [some])


def _choose(rows: Sequence[SourceRow], count: int | None, seed: int, purpose: str) -> Sequence[SourceRow]:
    """`count` of the rows (None: all), drawn by lot, in their order."""
    import numpy as np

    if count is None or count >= len(rows):
        return rows
    lots = _lots(content_digests(rows), seed, purpose) if count else np.empty(0)
    return Picked([rows], np.sort(np.argsort(lots, kind="stable")[:count]))


def _lots(digests: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """The places of rows in a draw. Each purpose draws its own, or the rows of a half would also be the ones held out."""
    import numpy as np

    content, lots = digests.tobytes(), bytearray()
    for start in range(0, len(content), 16):
        lots += hashlib.sha256(f"{purpose}:{seed}:{content[start : start + 16].hex()}".encode()).digest()
    return np.frombuffer(bytes(lots), "S32")
