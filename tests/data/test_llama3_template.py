"""configs/templates/llama3-tools.jinja, which the reference recipes name, through the code that masks and on real rows."""

from pathlib import Path

import pytest
from chat_tokenizer import chat_tokenizer

from harness.data.sources import load_rows
from harness.data.templates import Renderer, check_tokenizer
from harness.recipe.schema import Source
from harness.resources import shipped

XLAM = Path(__file__).resolve().parents[3] / "shared" / "data" / "xlam" / "sealtool.json"


@pytest.fixture(scope="module")
def tokenizer():
    template = shipped("configs", "templates", "llama3-tools.jinja").read_text(encoding="utf-8")
    return chat_tokenizer(template, eos="<|eot_id|>", bos="<|begin_of_text|>")


def test_its_turns_end_where_llama_3_stops(tokenizer):
    check_tokenizer(tokenizer, stop_ids=[tokenizer.convert_tokens_to_ids("<|eot_id|>")])


@pytest.mark.skipif(not XLAM.is_file(), reason=f"needs real xLAM rows in {XLAM}, which are not part of the repository")
def test_every_real_xlam_row_is_shown_whole_and_only_its_calls_are_trained(tokenizer):
    renderer = Renderer(tokenizer)
    rows = load_rows(Source(path=str(XLAM))).rows
    for source in rows:
        rendered = renderer.render(source.row, source.location)
        calls = [call["function"]["name"] for message in source.row["messages"] for call in message.get("tool_calls", ())]
        trained = tokenizer.decode([token for token, kept in zip(rendered.ids, rendered.mask, strict=True) if kept])
        assert [trained.count(f'<tool_call>{{"name": "{name}"') for name in calls] == [calls.count(name) for name in calls]
        assert trained.count("<tool_call>") == len(calls)
        assert trained.endswith("<|eot_id|>")
    assert len(rows) > 200
