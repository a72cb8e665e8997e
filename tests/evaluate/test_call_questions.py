"""What a model says to held-out questions is read as a server would return it: markers that are special tokens are part of it."""

import pytest

from harness.evaluate import calls
from harness.evaluate.calls import Question, answer_questions
from harness.tools import ToolCall, normalise_tools

TOOLS = normalise_tools([{"name": "trip", "parameters": {"to": {"type": "str"}}}])


class Spoken:
    """A tokenizer whose tokens are words, of which those that look like it are special."""

    def decode(self, words, skip_special_tokens, clean_up_tokenization_spaces=True):
        return " ".join(word for word in words if not (skip_special_tokens and word.startswith(("<|", "[TOOL"))))


@pytest.mark.parametrize("marker", ["<|python_tag|>", "[TOOL_CALLS]"])
def test_a_call_behind_words_is_read_where_only_a_special_token_tells_that_it_begins(monkeypatch, marker):
    said = ["Let", "me", "see.", marker, '{"name": "trip", "arguments": {"to": "Oslo"}}']
    monkeypatch.setattr(calls, "generate_greedily", lambda *_, **__: [said])
    asked = Question("rows:1", [1], "To Oslo.", [ToolCall("trip", {"to": "Oslo"})], TOOLS)
    (answer,) = answer_questions(None, Spoken(), [asked], max_new_tokens=9, batch_size=1)
    assert answer.score.exact, answer.said
