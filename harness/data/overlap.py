"""Whether a text repeats one of a set of texts: evaluation questions must not come back as rows that are trained, not even nearly.

Two texts are the same when their words are: letters in any case, digits, and each sign of a script that is written without blanks;
punctuation and white space do not count. They overlap when runs of WORDS words that stand in both cover more than SHARE of the shorter one.

Eight words and a half are what Tülu 3 (arXiv 2411.15124, 3.3) settled on for instructions: longer runs miss a question that was put into
other words at one end, and shorter ones, or a smaller share, take every question of one phrasing for one question. So does one run where
it is more than half of all there is: of a text of fewer than two runs every word has to stand in the other as well ("… over 4 days" is
not "… over 7 days"). A text of fewer words than a run is compared as a whole alone.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

WORDS = 8
SHARE = 0.5
# Kana, Chinese characters, Hangul: where no blank parts words, a sign counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


class Overlap:
    """A set of texts that knows which other texts repeat one of them."""

    def __init__(self, words: int = WORDS, share: float = SHARE):
        self._words, self._share = words, share
        self._whole: dict[bytes, str] = {}
        self._runs: dict[int, list[int]] = {}
        self._texts: list[tuple[str, list[str]]] = []

    def add(self, text: str, name: str = "") -> None:
        """name: what `find` calls it."""
        words = normalise(text)
        if (digest := _digest(words)) in self._whole:
            return
        self._whole[digest] = name
        for run in set(self._runs_of(words)):
            self._runs.setdefault(run, []).append(len(self._texts))
        self._texts.append((name, words))

    def __contains__(self, text: str) -> bool:
        """Whether one of the texts is the same."""
        return _digest(normalise(text)) in self._whole

    def find(self, text: str) -> str | None:
        """Why the text may not be used: `the same as NAME`, or `NN% in runs of 8 words with NAME`; None when it repeats nothing."""
        words = normalise(text)
        if (name := self._whole.get(_digest(words))) is not None:
            return f"the same as {name}"
        covered: dict[int, set[int]] = {}
        for start, run in enumerate(self._runs_of(words)):
            for other in self._runs.get(run, ()):
                covered.setdefault(other, set()).update(range(start, start + self._words))
        shares = [(len(places) / min(len(words), len(self._texts[other][1])), other) for other, places in covered.items()]
        for share, other in sorted(shares, reverse=True):
            name, others = self._texts[other]
            if share > self._share and self._says_all(*sorted((words, others), key=len)):
                return f"{min(share, 1.0):.0%} in runs of {self._words} words with {name}"
        return None

    def _says_all(self, shorter: list[str], longer: list[str]) -> bool:
        """Whether the longer of two texts has every word of the shorter; of two runs or more that is not asked."""
        return len(shorter) >= 2 * self._words or set(shorter) <= set(longer)

    def _runs_of(self, words: list[str]) -> list[int]:
        """Of each place the run that begins there. By Python's hash: a collision costs a row among billions."""
        return [hash(tuple(words[start : start + self._words])) for start in range(len(words) - self._words + 1)]


def normalise(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _digest(words: list[str]) -> bytes:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).digest()[:16]
