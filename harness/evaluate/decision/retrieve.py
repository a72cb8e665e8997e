"""BM25 over a few thousand passages or tool documents: what a retrieval arm shows the model.

A passages file is JSON Lines; a row is {"text": …, "title": …?}, or a tool in any of the dialects that harness.tools reads, which is shown
as one line: its name, what it is for, and its parameters' schema.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.data.reading import read_raw
from harness.errors import DataError
from harness.tools import normalise_tool

K1, B = 1.5, 0.75
"""As in Robertson and Zaragoza 2009, and in every search engine's defaults or near them: how soon a repeated word stops counting, and how
much a long document pays for its length."""


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and of digits; of an identifier each part (`get_weather` is `get`, `weather`)."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


@dataclass
class Index:
    documents: list[str]

    def __post_init__(self) -> None:
        self._counts = [Counter(words_of(document)) for document in self.documents]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean_length = sum(self._lengths) / len(self._lengths) if self._lengths else 1.0
        self._containing = Counter(word for counts in self._counts for word in counts)

    def nearest(self, query: str, top: int, but: int | None = None) -> list[int]:
        """Indices of the `top` best documents, the best first, equals in their order; never one that shares no word with the query.
        but: a document that is left out."""
        wanted = set(words_of(query))
        scored = [(self._score(wanted, at), at) for at in range(len(self.documents)) if at != but]
        return [at for score, at in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:top] if score > 0]

    def _score(self, wanted: set[str], at: int) -> float:
        counts = self._counts[at]
        length = 1 - B + B * self._lengths[at] / self._mean_length if self._lengths[at] else 1.0
        return sum(self._rarity(word) * counts[word] * (K1 + 1) / (counts[word] + K1 * length) for word in wanted if counts[word])

    def _rarity(self, word: str) -> float:
        """Inverse document frequency, in the form that is never negative."""
        having = self._containing[word]
        return math.log(1 + (len(self.documents) - having + 0.5) / (having + 0.5))


def load_documents(path: str | Path) -> list[str]:
    """Raises DataError with the row's place for one that is neither a passage nor a tool, and for a file without a row."""
    documents = [_document(where, row) for where, row in read_raw(path)]
    if not documents:
        raise DataError(f"{path}: has no row; nothing can be retrieved")
    return documents


def _document(where: str, row: dict) -> str:
    if isinstance(row.get("text"), str) and row["text"].strip():
        title = row.get("title")
        return f"{title}: {row['text']}" if isinstance(title, str) and title else row["text"]
    try:
        function = normalise_tool(row)["function"]
    except DataError as error:
        raise DataError(f'{where}: is neither a passage {{"text": …}} nor a tool ({error})') from None
    said = f" {function['description']}" if "description" in function else ""
    return f"{function['name']}:{said} {json.dumps(function.get('parameters', {}), ensure_ascii=False)}"
