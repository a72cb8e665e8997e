"""Files and hub data sets become canonical rows that know where they came from; sources become one mixture with a held-out part.

    read_raw(path)                    rows as they stand, one after the other, each with its location (and with the gold calls or tools that
                                      BFCL and Seal-Tools keep in a file beside them)
    load_rows(source, ...)            the same as canonical rows (formats.py), with what was left out and why
    mix(sources, loaded, ...)         max_rows, the held-out split and the weights, in this order

Read are .jsonl, .json (an array, or one row per line: many a .json is that), .parquet, each of the first two also as .gz; a folder or a
glob of them; and a hub id. A location is `path:line` (1-based) where rows are lines, `path:row N` (0-based) in arrays and Parquet.

Promises. Every raw row ends up in `rows` or in `skipped`, never in neither. Choices depend on the content of the rows and the seed, not on
the order of files: equal rows, and all answers to one question, are always on the same side of the held-out split.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.data.formats import LeftOut, broken_calls, detect_format, is_python, to_canonical, trained_calls
from harness.data.layouts.beside import with_files_beside
from harness.data.pairs import detect_layout, good_side, pair_answers, question, to_preferences
from harness.embedded import PREFIX, resolve
from harness.errors import DataError
from harness.tools import did_you_mean
from harness.tools.schema import distinct_keys

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
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
class SourceRow:
    """`row` is canonical, and shares its tools with other rows: read it, do not write to it."""

    location: str
    row: dict


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

    rows: list[SourceRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


@dataclass
class Mixture:
    train: list[SourceRow]
    held_out: list[SourceRow]


# ---- reading


def read_raw(path: str | Path, name: str | None = None, split: str = "train", base_dir: str | Path = ".") -> Iterator[tuple[str, dict]]:
    """(location, raw row) of every row behind a path or hub id, streamed unless a .json is one array. Raises DataError at a bad row."""
    for location, row in read_each(str(path), name, split, Path(base_dir)):
        if isinstance(row, DataError):
            raise DataError(f"{location}: {row}")
        yield location, row


def read_each(
    path: str, name: str | None = None, split: str = "train", base_dir: Path = Path(".")
) -> Iterator[tuple[str, dict | DataError]]:
    """Like `read_raw`, but a bad row comes out as its error (without the location) and the reading goes on."""
    files = _find_files(resolve(path), base_dir)
    if not files:
        yield from _read_hub(path, name, split)
        return
    if name is not None:
        raise DataError(f"{path}: name = {name!r} selects a configuration of a hub data set, and this is a local path; leave it out")
    for file in files:
        yield from with_files_beside(file, _read_parquet(file) if file.suffix == ".parquet" else _read_json(file))


def is_hub_id(path: str, base_dir: Path = Path(".")) -> bool:
    """Whether the hub is asked for this path: it could be an id, and nothing of the name lies here."""
    try:
        return not path.startswith(PREFIX) and not _find_files(path, base_dir)
    except DataError:
        return False


def _find_files(path: str, base_dir: Path) -> list[Path]:
    """The files behind a path, sorted; none if it can only be a hub id. Raises DataError if it is neither."""
    full = base_dir / Path(path).expanduser()
    if full.is_file():
        if not full.name.endswith(SUFFIXES):
            raise DataError(f"{path}: cannot read this kind of file; must be {', '.join(SUFFIXES)}")
        return [full]
    if full.is_dir():
        files = sorted(file for file in full.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} (`{path}/**/*.jsonl` reads subfolders)")
        return files
    if glob.has_magic(path):
        files = sorted(file for file in map(Path, glob.glob(str(full), recursive=True)) if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{path}: the pattern matches no data file under {base_dir.resolve()}; must match {', '.join(SUFFIXES)}")
        return files
    could_be_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not path.endswith(SUFFIXES)
    if could_be_hub_id and not ("/" in path and full.parent.is_dir()):
        return []
    beside = [file.name for file in full.parent.iterdir()] if full.parent.is_dir() else []
    raise DataError(f"{path}: no such file under {base_dir.resolve()}{did_you_mean(full.name, beside)}")


def _read_json(file: Path) -> Iterator[tuple[str, dict | DataError]]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            stream.seek(0)
            yield from _read_array(file, stream.read()) if start.startswith(b"[") else _read_lines(file, stream)
    except (OSError, EOFError, zlib.error) as error:  # not allowed to, or a damaged .gz
        raise DataError(f"{file}: cannot be read to its end ({error})") from None


def _read_lines(file: Path, stream: Iterable[bytes]) -> Iterator[tuple[str, dict | DataError]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            location = f"{file}:{number}"
            try:
                yield location, _as_row(_parse_json(line.rstrip()))
            except json.JSONDecodeError as error:
                yield location, DataError(f"column {error.colno}: not JSON ({error.msg}); must be one object per line")
            except ValueError as error:
                yield location, DataError(f"not JSON ({error})")


def _read_array(file: Path, content: bytes) -> Iterator[tuple[str, dict | DataError]]:
    try:
        rows = _parse_json(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not JSON ({error.msg}); must be an array of rows") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    for index, row in enumerate(rows):
        yield f"{file}:row {index}", _as_row(row)


def _parse_json(content: bytes) -> object:
    """Raises ValueError, of which JSONDecodeError and UnicodeDecodeError are kinds."""
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=distinct_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _as_row(value: object) -> dict | DataError:
    return value if isinstance(value, dict) else DataError(f"the row is {json.dumps(value)[:60]}; must be an object")


def _read_parquet(file: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa  # a quarter of a second that JSON readers need not pay
    import pyarrow.parquet

    index = 0
    try:
        for batch in pa.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in _rows_of(batch):
                yield f"{file}:row {index}", row
                index += 1
    except pa.ArrowException as error:
        raise DataError(f"{file}:row {index}: not readable as Parquet ({error})") from None


def _read_hub(path: str, name: str | None, split: str) -> Iterator[tuple[str, dict]]:
    import datasets  # slow to import, and needed for the hub alone

    shown = f"{path}:{split}"
    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:  # not there, no network, no such configuration or split: datasets says which
        raise DataError(
            f"{shown}: is no local file or folder, and the Hugging Face hub did not give a data set of this name ({error}); "
            "`harness fetch` of the recipe, where there is a network, brings it to the cache; or name a file"
        ) from None
    index = 0
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for row in _rows_of(batch):
            yield f"{shown}:row {index}", row
            index += 1


def _rows_of(table: pa.RecordBatch | pa.Table) -> Iterator[dict]:
    """Rows without what Arrow invents: in a struct column every row has every field, null where it had none, and a model trained on that
    writes `"host": null` into its calls. So a null field of a struct is absent. JSON columns are decoded, and keep their nulls."""
    types = dict(zip(table.schema.names, table.schema.types, strict=True))
    for row in table.to_pylist():
        yield {key: _value(value, types[key]) for key, value in row.items() if value is not None}


def _value(value: object, kind: pa.DataType) -> object:
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {key: _value(item, kind.field(key).type) for key, item in value.items() if item is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_value(item, kind.value_type) for item in value]
    return value


# ---- loading


def load_rows(
    source: Source, on_error: str = "fail", base_dir: str | Path = ".", *, asks: bool = False, kind: str = "samples"
) -> LoadedRows:
    """Reads a source into canonical rows. `on_error`: "fail" raises DataError for the first bad row, "skip" leaves bad rows out, listed.

    asks: rows are questions, as in `to_canonical`. kind: "samples" of supervised training, or of preferences "pairs" or "labelled" answers.
    Raises DataError in both cases where a file cannot be read at all and where no row is left.
    """
    if on_error not in ("fail", "skip"):
        raise DataError(f'data.on_error = "{on_error}"; must be fail or skip')
    loaded = LoadedRows()
    raw_rows = read_each(source.path, source.name, source.split, Path(base_dir))
    take = _take if kind == "samples" else partial(_take_preferences, kind=kind)
    take = partial(take, layout=source.format, loaded=loaded, **({"asks": asks} if kind == "samples" else {}))
    for location, raw in raw_rows:
        take(location, raw)
        if _bad(loaded) and on_error == "fail":
            raise _first_bad(location, raw_rows, take, loaded)
    if kind == "pairs":
        _pair_labelled(loaded)
    if not loaded.rows:
        first = f"; the first: {loaded.skipped[0].location}: {loaded.skipped[0].reason}" if loaded.skipped else ""
        first = (
            f"; no question (system message, tools and all) has both a good and a bad answer{first}" if loaded.counts["unpaired"] else first
        )
        raise DataError(f"{source.path}: no row is left of {loaded.counts['read']}{first}")
    return loaded


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
    loaded.rows = [row for row in loaded.rows if "label" not in row.row] + [SourceRow(*pair) for pair in pairs]


def _first_bad(location: str, rest: Iterator[tuple[str, dict | DataError]], take: Callable, loaded: LoadedRows) -> DataError:
    """The error for the first bad row, saying whether it is alone: one broken row is repaired by hand, a thousand are another layout."""
    reason, seen = loaded.skipped[-1].reason, 0
    for seen, (where, raw) in enumerate(islice(rest, LOOK_AHEAD), 1):  # noqa: B007, the count is read after the loop
        take(where, raw)
    others = _bad(loaded) - 1
    more = f"\n{others} of the next {seen} rows are bad too; `data.on_error: skip` leaves bad rows out and lists them" if others else ""
    return DataError(f"{location}: {reason}{more}")


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
    parts = [_choose(part.rows, source.max_rows, seed, "max_rows") for source, part in zip(sources, loaded, strict=True)]
    held_out: list[SourceRow] = []
    if eval_fraction is not None or eval_rows is not None:
        everything = [row for part in parts for row in part]
        out = iter(_held_out(everything, eval_fraction, eval_rows, seed))
        kept: list[list[SourceRow]] = []
        for part in parts:
            kept.append([])
            for row in part:
                (held_out if next(out) else kept[-1]).append(row)
        parts = kept
    train = [row for source, part in zip(sources, parts, strict=True) for row in _weighted(source, part, seed)]
    return Mixture(train, held_out)


def split_held_out(
    rows: Sequence[SourceRow], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[list[SourceRow], list[SourceRow]]:
    """(train, held out). Give `fraction` or `count`.

    Which rows are held out depends on their content and the seed, not on their order. Equal rows stay together, so the held-out part can
    be larger than asked for by the copies of its last row. Raises DataError if nothing would be left to train.
    """
    out = _held_out(rows, fraction, count, seed)
    train = [row for row, is_out in zip(rows, out, strict=True) if not is_out]
    held_out = [row for row, is_out in zip(rows, out, strict=True) if is_out]
    return train, held_out


def _held_out(rows: Sequence[SourceRow], fraction: float | None, count: int | None, seed: int) -> list[bool]:
    """Which rows are held out."""
    if (fraction is None) == (count is None):
        raise DataError("the held-out split needs one of data.eval_fraction and data.eval_rows")
    wanted = count if count is not None else max(1, round(fraction * len(rows)))
    digests = [content_digest(held_together(row.row)) for row in rows]
    copies = Counter(digests)
    out: set[str] = set()
    held_out = 0
    for digest in sorted(copies, key=lambda digest: _lot(digest, seed, "held_out")):
        if held_out >= wanted:
            break
        out.add(digest)
        held_out += copies[digest]
    if held_out >= len(rows):
        raise DataError(f"the held-out split takes {held_out} of {len(rows)} rows and leaves none to train; ask for fewer")
    return [digest in out for digest in digests]


def held_together(row: dict) -> dict:
    """What all rows share that must be on one side of the held-out split: the question of preference rows, else the whole row."""
    return question(row) if "chosen" in row or "label" in row else row


def _weighted(source: Source, rows: list[SourceRow], seed: int) -> list[SourceRow]:
    whole, part = divmod(source.weight, 1)
    some = _choose(rows, round(part * len(rows)), seed, "weight")
    if rows and not whole and not some:
        raise DataError(f"{source.path}: weight = {source.weight} of {len(rows)} rows leaves none; raise it or leave the source out")
    return rows * int(whole) + some


def _choose(rows: list[SourceRow], count: int | None, seed: int, purpose: str) -> list[SourceRow]:
    """`count` of the rows (None: all), drawn by lot, in their order."""
    if count is None or count >= len(rows):
        return rows
    chosen = sorted(range(len(rows)), key=lambda i: _lot(content_digest(rows[i].row), seed, purpose))[:count]
    return [rows[i] for i in sorted(chosen)]


def _lot(digest: str, seed: int, purpose: str) -> bytes:
    """A row's place in a draw. Each purpose draws its own, or the rows of a half would also be the ones held out."""
    return hashlib.sha256(f"{purpose}:{seed}:{digest}".encode()).digest()


def content_digest(row: dict) -> str:
    """What a row says, in 32 hex digits. Not the order of its keys: rows that differ in that alone are duplicates, and must not leak."""
    return hashlib.sha256(_json_bytes(row, sort_keys=True)).hexdigest()[:32]


def data_fingerprint(rows: Iterable[SourceRow]) -> str:
    """The rows in their order, in 32 hex digits. The order of keys counts here: templates write it into the tokens."""
    total = hashlib.sha256()
    for row in rows:
        total.update(hashlib.sha256(_json_bytes(row.row, sort_keys=False)).digest())
    return total.hexdigest()[:32]


def _json_bytes(row: dict, sort_keys: bool) -> bytes:
    return json.dumps(row, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
