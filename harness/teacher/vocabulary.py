"""Which token ids a teacher and a student share.

What must agree is the map from tokens to ids, and nothing else of a tokenizer: neither its template nor its special tokens' names. A model
may have more rows than its tokenizer has ids (151,936 and 152,064 rows for the 151,665 ids of one family); they are padding, and are cut
off.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from harness.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVICE = "let the teacher write answers and train on them (sequence-level), or use TRL's GOLD, which aligns two tokenizers"


def true_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that a token has."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the map from tokens to ids; 32 hex digits."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Raises TeacherError that names the first id which is another token's. name: the teacher's, for the message."""
    ours, theirs = _tokens_by_id(student), _tokens_by_id(teacher)
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise TeacherError(
                f"teacher.name_or_path = {name}: token {token_id} is {_show(theirs.get(token_id))}, and {_show(ours.get(token_id))} of the "
                f"student; distributions over other tokens cannot be compared: take a teacher with the student's tokenizer, or {ADVICE}"
            )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, list[str]]:
    tokens: dict[int, list[str]] = {}
    for token, token_id in sorted(tokenizer.get_vocab().items()):
        tokens.setdefault(token_id, []).append(token)
    return tokens


def _show(tokens: list[str] | None) -> str:
    return " or ".join(map(repr, tokens)) if tokens else "nobody's"
