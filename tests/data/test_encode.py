"""Texts that are cut at lines have the tokens of the whole, and only tokenizers for which that is certain are given cut texts."""

import random

import pytest
import tokenizers
from chat_tokenizer import chat_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.data.encode import PATTERNS, Encoder, begins_anew_at_lines

BITS = [
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "  ",
    "\t",
    "\u00a0",
    "\u2028",
    "\x1c",
    "a",
    "don",
    "'s",
    "'LL",
    "Ünï",
    "東京",
    "٣",
    "12345",
    "e\u0301",
    "\u0301",
]
BITS += ["🙂", '"', "{", "}", "},", "_", ".", "<", "<|im_end|>", "<|im_start|>", "<tool_call>", "</s>", " x", "\nx", "}\n{", ".\n", "\n."]


def tokenizer_with(pattern=None, **options):
    made = chat_tokenizer("qwen2_5")
    if pattern:
        pieces = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
        made.backend_tokenizer.normalizer = normalizers.NFC()
    for name, value in options.items():
        setattr(made.backend_tokenizer, name, value)
    return made


@pytest.mark.parametrize("pattern", [None, *sorted(PATTERNS)])
def test_what_is_cut_at_lines_has_the_tokens_of_the_whole_and_their_places(pattern):
    tokenizer, rng, cuts = tokenizer_with(pattern), random.Random(5), 0
    assert begins_anew_at_lines(tokenizer)
    encoder = Encoder(tokenizer)
    for _ in range(1500):
        text = "".join(rng.choices(BITS, k=rng.randrange(30)))
        whole, got = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True), encoder.encode(text, "row")
        assert got.ids == whole["input_ids"], repr(text)
        assert list(zip(got.starts, got.ends, strict=True)) == whole["offset_mapping"], repr(text)
    cuts = len(encoder._parts)
    assert cuts > 1000


def test_a_line_that_comes_again_is_tokenised_once_and_what_is_kept_is_bounded(monkeypatch):
    encoder = Encoder(tokenizer_with())
    asked = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda text, special: asked.append(text) or encode(text, special))
    for question in ("one", "two"):
        encoder.encode(f"tool a\ntool b\n{question}", "row")
    assert asked == ["tool a\n", "tool b\n", "one", "two"]
    monkeypatch.setattr("harness.data.encode.KEPT_TOKENS", 50)
    for n in range(100):
        encoder.encode(f"some words of line {n}\nand of another", "row")
        assert encoder._kept_tokens == sum(len(part.ids) for part in encoder._parts.values()) < 100


def other_pattern():
    return tokenizer_with(r"[^\n]+\n?[^\n]*|\n")  # takes two lines for a word


def metaspace():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def unigram():
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def token_that_eats_white_space():
    made = tokenizer_with()
    made.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return made


def token_over_two_lines():
    made = tokenizer_with()
    made.add_tokens(["a\nb"])
    return made


OTHERS = [
    other_pattern, metaspace, unigram, token_that_eats_white_space, token_over_two_lines,
    lambda: tokenizer_with(normalizer=normalizers.Strip()),
    lambda: tokenizer_with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS)
def test_texts_for_any_other_tokenizer_are_not_cut(make):
    assert not begins_anew_at_lines(make())


def test_where_a_token_goes_over_two_lines_a_cut_would_change_the_tokens():
    tokenizer = token_over_two_lines()
    assert Encoder(tokenizer).encode("a\nb", "row").ids == tokenizer("a\nb", add_special_tokens=False)["input_ids"]
    encoder = Encoder(tokenizer)
    encoder._cuts = True
    assert encoder.encode("a\nb", "row").ids != tokenizer("a\nb", add_special_tokens=False)["input_ids"]
