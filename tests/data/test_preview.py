"""The preview shows what is trained, and nothing in the data can act on the terminal."""

import re

from chat_tokenizer import chat_tokenizer

from harness.data.prepare import prepare
from harness.data.preview import render_preview
from harness.data.rows import SourceRow

ROWS = [
    SourceRow("d.jsonl:1", {"messages": [{"role": "user", "content": "say\nnaïve"}, {"role": "assistant", "content": "café 🙂\nTokyo"}]}),
    SourceRow("d.jsonl:2", {"messages": [{"role": "user", "content": "\x1b[2J evil"}, {"role": "assistant", "content": "no"}]}),
]


def prepared(tmp_path, **more):
    tokenizer = chat_tokenizer("qwen2_5")
    return tokenizer, prepare(ROWS, tokenizer, cache_dir=tmp_path, max_length=256, **more)


def test_trained_text_stands_in_brackets_with_special_tokens_and_line_ends(tmp_path):
    tokenizer, data = prepared(tmp_path)
    text = render_preview(tokenizer, data.train, rows=1, color=False)
    assert "⟦café 🙂↵\nTokyo<|im_end|>⟧" in text and "<|im_start|>user↵\nsay↵\nnaïve<|im_end|>" in text
    assert text.count("⟦") == text.count("⟧") == 1 and "d.jsonl:1" in text and "\x1b" not in text


def test_colours_say_the_same_as_brackets(tmp_path):
    tokenizer, data = prepared(tmp_path)
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", render_preview(tokenizer, data.train), flags=re.DOTALL)
    brackets = re.findall(r"⟦(.*?)⟧", render_preview(tokenizer, data.train, color=False), flags=re.DOTALL)
    assert green == brackets == ["café 🙂↵\nTokyo<|im_end|>", "no<|im_end|>"]


def test_control_characters_of_the_data_are_shown_not_sent(tmp_path):
    tokenizer, data = prepared(tmp_path)
    assert "\\x1b[2J evil" in render_preview(tokenizer, data.train, color=False)


def test_a_pack_is_shown_sample_by_sample_and_the_counts_follow(tmp_path):
    tokenizer, data = prepared(tmp_path, packing=True)
    text = render_preview(tokenizer, data.train, color=False, report=data.report)
    assert "pack 1, sample 1 of 2" in text and "pack 1, sample 2 of 2" in text
    assert "⟦no<|im_end|>⟧" in text and "train: 2 of 2 rows" in text
