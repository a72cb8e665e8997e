"""The tokenizer loses nothing, learns whole words, and its template trains exactly what the assistant says."""

import json
import random

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.quickstart.tokenizer import build_tokenizer, save_base
from harness.quickstart.world import ADAPT_TOOLS, Sizes, write_world


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    sizes = Sizes(base_train=2000, base_eval=10, adapt_train=1000, adapt_eval=10)
    files = write_world(tmp_path_factory.mktemp("world"), seed=0, sizes=sizes)
    return [json.loads(line) for path in (files.base_train, files.adapt_train) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), rows)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def encoded(tokenizer, row):
    return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True)


def trained_text(tokenizer, row):
    out = encoded(tokenizer, row)
    return tokenizer.decode([i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m])


def test_any_text_comes_back_unchanged(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "Zebra  crossing\n\tat 07:30!", 'x = {"a": [1, 2.50, null]}', "don't -- stop", "naïve café ☕ 東京"]
    texts += ["".join(chr(rng.randrange(128)) for _ in range(rng.randrange(60))) for _ in range(300)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_of_the_world_are_one_token_and_others_are_bytes(tokenizer):
    assert len(tokenizer.encode("Paris")) == len(tokenizer.encode("95")) == len(tokenizer.encode('": "')) == 1
    assert len(tokenizer.encode("Zanzibar")) == len("Zanzibar")


def test_the_vocabulary_does_not_depend_on_the_order_of_the_rows(rows, tokenizer):
    assert build_tokenizer(rows[::-1]).get_vocab() == tokenizer.get_vocab()


def test_every_word_of_the_unseen_tools_is_said_by_the_assistant_in_the_base_stage(rows, tokenizer):
    """An adapter with frozen embeddings cannot learn to say a word that the base was never trained to say."""
    unseen = {tool.name for tool in ADAPT_TOOLS}
    base_rows = [row for row in rows if unseen.isdisjoint(tool["function"]["name"] for tool in row["tools"])]
    said = {token for row in base_rows for token in tokenizer.tokenize(trained_text(tokenizer, row))}
    names = [name for tool in ADAPT_TOOLS for name in (tool.name, *(p.name for p in tool.parameters))]
    values = [str(v) for tool in ADAPT_TOOLS for p in tool.parameters for v in p.values if not isinstance(v, bool)]
    assert not {token for text in names + values for token in tokenizer.tokenize(text)} - said


def test_pad_is_not_end_and_both_are_known(tokenizer, folder):
    config = AutoConfig.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config.pad_token_id, config.eos_token_id, config.vocab_size) == (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer))


def test_a_row_is_rendered_compactly_and_only_the_answer_with_its_end_is_trained(tokenizer):
    weather = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
    functions = {"name": "get_weather", "parameters": weather}, {"name": "stop"}
    tools = [{"type": "function", "function": function} for function in functions]
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": c}}} for c in ("Paris", "Rome")]
    row = {
        "tools": tools,
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "look", "tool_calls": calls},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "it will rain"},
        ],
    }
    first = (
        'look<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call><|end|>'
    )
    assert tokenizer.decode(encoded(tokenizer, row)["input_ids"]) == (
        "<|system|>be kind\nget_weather(city,days?) stop()<|end|><|user|>and now?<|end|><|assistant|>"
        + first
        + "<|tool|>rain<|end|><|assistant|>it will rain<|end|>"
    )
    assert trained_text(tokenizer, row) == first + "it will rain<|end|>"


def test_the_mask_covers_exactly_the_assistants_turn_in_every_row(tokenizer, rows):
    for row in rows[::50]:
        text = tokenizer.decode(encoded(tokenizer, row)["input_ids"])
        assert trained_text(tokenizer, row) == text.split("<|assistant|>")[1]
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tools=row["tools"], add_generation_prompt=True, tokenize=False)
        assert text.startswith(prompt) and prompt.endswith("<|assistant|>")


def test_call_marks_survive_decoding_without_special_tokens(tokenizer):
    ids = tokenizer.encode('<|assistant|><tool_call>{"name": "x"}</tool_call><|end|>')
    assert tokenizer.decode(ids, skip_special_tokens=True) == '<tool_call>{"name": "x"}</tool_call>'


def test_rows_stay_short_enough_for_a_cpu(tokenizer, rows):
    assert max(len(encoded(tokenizer, row)["input_ids"]) for row in rows[::10]) <= 128


def test_the_configuration_makes_a_tiny_tied_llama(folder):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 140_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
