"""Text becomes tokens that know their characters. Lines that come again, as tools do in every row, are tokenised once.

A text may be cut at a line break where neither side of it is blank when the tokenizer is one of those that always begin anew there:
byte-level BPE that splits words by one of PATTERNS (GPT-2's, Llama 3's, Qwen's, …). None of these goes over such a place, whatever stands
around it, so the tokens of the parts are those of the whole; tests/data/test_encode.py tries it. For other tokenizers texts are not cut.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from harness.errors import DataError

Span = tuple[int, int]  # [start, end), in characters

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}{_REST}",  # Llama 3, GPT-4, OLMo 2, SmolLM3
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{_REST}",  # Qwen 2 to 3
}
"""GPT-2's own stands in the ByteLevel of tokenizers, where that splits (`use_regex`)."""
KEPT_TOKENS = 500_000  # of lines, at 12 bytes each

_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class Part:
    """int32 each: `starts[t]`, `ends[t]` are the characters of token t, from the beginning of the part."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Tokens:
    """One tokenised text: `starts[t]`, `ends[t]` are the characters of token t."""

    def __init__(self, text: str, parts: list[tuple[int, Part]]):
        """parts: each with the character at which it begins."""
        self.text = text
        self.ids: list[int] = np.concatenate([part.ids for _, part in parts] or [[]]).tolist()
        self.starts = np.concatenate([part.starts + at for at, part in parts] or [[]])
        self.ends = np.concatenate([part.ends + at for at, part in parts] or [[]])

    def inside(self, span: Span) -> range:
        """Tokens that lie in the span; one that straddles an edge counts only if its foreign characters are white space."""
        first, last = bisect_left(self.starts, span[0]), bisect_left(self.starts, span[1])
        if first and self.ends[first - 1] > span[0] and self.text[self.starts[first - 1] : span[0]].isspace():
            first -= 1
        while first < last and self.ends[first] <= span[0]:  # tokens without characters, as a BOS that is not in the text
            first += 1
        while last > first and self.ends[last - 1] > span[1] and not self.text[span[1] : self.ends[last - 1]].isspace():
            last -= 1
        return range(first, last)

    def blank(self, token: int) -> bool:
        return not self.text[self.starts[token] : self.ends[token]].strip()


def check_characters(text: str, location: str) -> None:
    """Raises DataError where no file in UTF-8 and no tokenizer can hold a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(f"{location}: {half!r} is half of a surrogate pair, no character; write the file as UTF-8 again") from None


class Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._cuts = tokenizer, begins_anew_at_lines(tokenizer)
        self._parts: dict[str, Part] = {}
        self._kept_tokens = 0

    def encode(self, text: str, location: str, add_special_tokens: bool = False) -> Tokens:
        check_characters(text, location)
        if add_special_tokens or not self._cuts:
            return Tokens(text, [(0, self._encode(text, add_special_tokens))])
        parts, at = [], 0
        for line in _CUT.split(text):
            parts.append((at, self._part(line)))
            at += len(line)
        return Tokens(text, parts)

    def _part(self, line: str) -> Part:
        part = self._parts.get(line)
        if part is None:
            if self._kept_tokens > KEPT_TOKENS:
                self._parts, self._kept_tokens = {}, 0
            part = self._parts[line] = self._encode(line, False)
            self._kept_tokens += len(part.ids)
        return part

    def _encode(self, text: str, add_special_tokens: bool) -> Part:
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()  # left behind by whoever called it last
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        places = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        if len(places) and add_special_tokens and not places[-1].any():  # an EOS that is added stands at the end, not at 0
            places[-1] = len(text)
        return Part(np.array(encoding.ids, np.int32), places[:, 0], places[:, 1])


def begins_anew_at_lines(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its tokens of two lines are those of one, and those of the other, whatever stands before and after."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, model = backend["normalizer"] or {"type": "NFC"}, backend["model"]
    added = backend["added_tokens"]
    return (
        normalizer == {"type": "NFC"}
        and model["type"] == "BPE"
        and not model.get("dropout")
        and _splits_at_lines(backend["pre_tokenizer"])
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] or "\n" in token["content"] for token in added)
    )


def _splits_at_lines(splitter: dict | None) -> bool:
    steps = splitter.get("pretokenizers", [splitter]) if splitter else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return steps[0]["use_regex"]
    split, last = steps[0], steps[-1]
    return (
        len(steps) == 2
        and not last["use_regex"]
        and split["type"] == "Split"
        and split["pattern"].get("Regex") in PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )
