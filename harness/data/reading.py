"""Files and hub data sets as raw rows, each with its location, a span of neighbours at a time.

    read_spans(path, ...)    Spans: rows that other processes may parse
    read_each(path, ...)     (location, raw row) of every row, or the error in its place
    read_raw(path, ...)      the same; an error is raised

Read are .jsonl, .json (an array, or one row per line: many a .json is that), .parquet, each of the first two also as .gz; a folder or a
glob of them; and a hub id. A location is `path:line` (1-based) where rows are lines, `path:row N` (0-based) in arrays and Parquet.
Rows come with the gold calls or tools that BFCL and Seal-Tools keep in a file beside them.

Promise. Memory holds a span, whatever the length of the file; of a .json that is one array, all of it.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data.layouts.beside import with_files_beside
from harness.embedded import PREFIX, resolve
from harness.errors import DataError
from harness.tools import did_you_mean
from harness.tools.schema import distinct_keys

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
ROWS_PER_SPAN = 250


@dataclass(frozen=True)
class Span:
    """Neighbouring rows: `rows[i]` is number `first + i` of `origin` (a file; of a hub data set its name), as a line or as an object."""

    origin: str
    first: int
    rows: list[bytes] | list[dict]
    is_file: bool = True

    def __str__(self) -> str:
        return f"{self.location(0)} and the {len(self.rows) - 1} rows after it"

    def __len__(self) -> int:
        return sum(not _is_blank(row) for row in self.rows)

    def location(self, i: int) -> str:
        return f"{self.origin}:{self.first + i}" if isinstance(self.rows[i], bytes) else f"{self.origin}:row {self.first + i}"

    def read(self) -> Iterator[tuple[str, dict | DataError]]:
        rows = ((self.location(i), row) for i, row in enumerate(self.rows))
        rows = ((where, _parse_line(row) if isinstance(row, bytes) else row) for where, row in rows if not _is_blank(row))
        return with_files_beside(Path(self.origin), rows) if self.is_file else rows


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
    for span in read_spans(path, name, split, base_dir):
        yield from span.read()


def read_spans(path: str, name: str | None = None, split: str = "train", base_dir: Path = Path(".")) -> Iterator[Span]:
    """Raises DataError where a file cannot be read at all, after the rows before."""
    files = _find_files(resolve(path), base_dir)
    if not files:
        yield from _spans(f"{path}:{split}", 0, _read_hub(path, name, split), is_file=False)
        return
    if name is not None:
        raise DataError(f"{path}: name = {name!r} selects a configuration of a hub data set, and this is a local path; leave it out")
    for file in files:
        yield from _spans(str(file), 0, _read_parquet(file)) if file.suffix == ".parquet" else _read_json(file)


def _spans(origin: str, first: int, rows: Iterable, is_file: bool = True) -> Iterator[Span]:
    group: list = []
    try:
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_SPAN:
                yield Span(origin, first, group, is_file)
                first, group = first + len(group), []
    except Exception:  # what was read before it comes first
        if group:
            yield Span(origin, first, group, is_file)
        raise
    if group:
        yield Span(origin, first, group, is_file)


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


def _read_json(file: Path) -> Iterator[Span]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            stream.seek(0)
            is_array = start.startswith(b"[")
            yield from _spans(str(file), 0, _parse_array(file, stream.read())) if is_array else _spans(str(file), 1, stream)
    except (OSError, EOFError, zlib.error) as error:  # not allowed to, or a damaged .gz
        raise DataError(f"{file}: cannot be read to its end ({error})") from None


def _is_blank(row: bytes | dict | DataError) -> bool:
    return isinstance(row, bytes) and not row.strip()


def _parse_line(line: bytes) -> dict | DataError:
    try:
        return _as_row(_parse_json(line.rstrip()))
    except json.JSONDecodeError as error:
        return DataError(f"column {error.colno}: not JSON ({error.msg}); must be one object per line")
    except ValueError as error:
        return DataError(f"not JSON ({error})")


def _parse_array(file: Path, content: bytes) -> Iterator[dict | DataError]:
    try:
        rows = _parse_json(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not JSON ({error.msg}); must be an array of rows") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    yield from map(_as_row, rows)


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


def _read_parquet(file: Path) -> Iterator[dict]:
    import pyarrow as pa  # a quarter of a second that JSON readers need not pay
    import pyarrow.parquet

    index = 0
    try:
        for batch in pa.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in _rows_of(batch):
                yield row
                index += 1
    except pa.ArrowException as error:
        raise DataError(f"{file}:row {index}: not readable as Parquet ({error})") from None


def _read_hub(path: str, name: str | None, split: str) -> Iterator[dict]:
    import datasets  # slow to import, and needed for the hub alone

    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:  # not there, no network, no such configuration or split: datasets says which
        raise DataError(
            f"{path}:{split}: is no local file or folder, and the Hugging Face hub did not give a data set of this name ({error}); "
            "`harness fetch` of the recipe, where there is a network, brings it to the cache; or name a file"
        ) from None
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        yield from _rows_of(batch)


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
