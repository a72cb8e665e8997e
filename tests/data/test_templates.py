"""Masks: only what the assistant says is trained, up to the token that ends its turn."""

import json
import pickle
from itertools import groupby

import pytest
from chat_tokenizer import chat_tokenizer, trl_template

from harness.data.templates import Renderer, check_tokenizer, has_markers, render
from harness.errors import DataError, ModelError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def call(city, name="get_weather"):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def talk(*turns, **more):
    """Messages from strings: user and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)], **more}


PLAIN = talk("hi", "hello you", "more, please", "The temperature is 21 degrees")
TOOL_ROW = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [call("Paris")]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "21 degrees, SECRETRESULT"},
        {"role": "assistant", "content": "The temperature is 21 degrees."},
    ],
    "tools": TOOLS,
}


def said(tokenizer, rendered):
    """The trained stretches as text."""
    parts, start = [], 0
    for trained, group in groupby(rendered.mask):
        end = start + len(list(group))
        if trained:
            parts.append(tokenizer.decode(rendered.ids[start:end]))
        start = end
    return parts


TAKES_TOOLS = [f"{n}_training" for n in ("qwen2_5", "qwen3", "gptoss", "glm4moe", "lfm2_v2", "nemotron_3_nano", "qwen3_instruct_2507")]
MARKED = TAKES_TOOLS + [f"{n}_training" for n in ("llama3", "gemma", "cohere", "phi3", "deepseekv3")]


@pytest.mark.parametrize("name", MARKED)
def test_mask_is_that_of_transformers_where_the_template_has_markers(name):
    tokenizer = chat_tokenizer(name)
    for row in [PLAIN] + [TOOL_ROW] * (name in TAKES_TOOLS):
        messages = [m if "content" in m else {**m, "content": ""} for m in row["messages"]]
        theirs = tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True)
        ours = render(tokenizer, row)
        assert ours.ids == theirs["input_ids"]
        assert ours.mask == [bool(bit) for bit in theirs["assistant_masks"]]
        assert ours.turn_ends[-1] <= len(ours.ids) and sorted(ours.turn_ends) == ours.turn_ends


@pytest.mark.parametrize("name, end", [("llama3", "<|eot_id|>"), ("cohere", "<|END_OF_TURN_TOKEN|>"), ("cohere2", "<|END_OF_TURN_TOKEN|>")])
def test_prefix_differences_give_the_mask_of_the_markers(name, end):
    row = talk("hi", "naïve café 🙂", "and in Köln?", "東京 is not Köln")
    tokenizer = chat_tokenizer(name, eos=end)
    bare, marked = render(tokenizer, row), render(tokenizer, row, training_template=trl_template(f"{name}_training"))
    assert not has_markers(tokenizer.chat_template)
    assert bare == marked
    assert said(tokenizer, bare)[-1].startswith("東京 is not Köln") and said(tokenizer, bare)[-1].endswith(end)


@pytest.mark.parametrize(
    "name", [*TAKES_TOOLS, "qwen2_5", "llama3_1", "llama3_2", "gemma4_v5", "qwen3_instruct_2507", "lfm2_v2", "muse_glimmer"]
)
def test_a_tools_result_is_never_trained_and_the_call_and_its_end_are(name):
    tokenizer = chat_tokenizer(name)
    rendered = render(tokenizer, TOOL_ROW)
    parts = said(tokenizer, rendered)
    assert "SECRETRESULT" in tokenizer.decode(rendered.ids) and "SECRETRESULT" not in "".join(parts)
    assert len(parts) == 2
    assert "get_weather" in parts[0] and "Paris" in parts[0]
    assert "The temperature is 21 degrees." in parts[1]
    for part in parts:  # the last thing trained, white space aside, is a control token
        ids = tokenizer(part.rstrip(), add_special_tokens=False)["input_ids"]
        assert ids[-1] in tokenizer.get_added_vocab().values()


def test_the_end_of_a_turn_is_trained_when_pad_is_eos():
    tokenizer = chat_tokenizer("qwen2_5", eos="<|im_end|>", pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert said(tokenizer, render(tokenizer, PLAIN)) == ["hello you<|im_end|>", "The temperature is 21 degrees<|im_end|>"]
    text = render(tokenizer, {"prompt": "2 + 2 =", "completion": " 4"})
    assert text.ids[-1] == tokenizer.pad_token_id and text.mask[-1]


def test_markers_that_leave_out_the_end_of_the_turn_are_extended_to_it():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    assert said(tokenizer, render(tokenizer, PLAIN)) == ["hello you<|im_end|>", "The temperature is 21 degrees<|im_end|>"]


def test_an_end_that_is_written_with_the_next_message_is_trained_with_the_turn_before_it():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}{{ '<|user|>' if not add_generation_prompt else '<|assistant|>' }}"
    )
    tokenizer = chat_tokenizer(template, eos="<|user|>")
    assert said(tokenizer, render(tokenizer, PLAIN)) == ["hello you<|user|>", "The temperature is 21 degrees<|user|>"]


def test_a_template_that_never_ends_a_turn_is_refused():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ModelError, match="never learn to stop"):
        render(chat_tokenizer(template), PLAIN)
    with pytest.raises(ModelError, match="never learn to stop"):
        check_tokenizer(chat_tokenizer(template))


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_something_marks_them():
    tokenizer = chat_tokenizer("qwen3")
    with pytest.raises(ModelError, match=r"rows.jsonl:7: .*data\.chat_template"):
        render(tokenizer, PLAIN, location="rows.jsonl:7")
    seen = []
    rendered = render(tokenizer, PLAIN, training_template=lambda t: seen.append(t) or trl_template("qwen3_training"))
    assert seen == [tokenizer] and len(said(tokenizer, rendered)) == 2


def test_training_begins_with_the_message_that_the_row_names():
    for name in ("qwen2_5", "qwen2_5_training", "phi3_training"):  # phi3 marks three spans for two turns
        tokenizer = chat_tokenizer(name)
        parts = said(tokenizer, render(tokenizer, {**PLAIN, "train_from": 2}))
        assert len(parts) == 1 and "The temperature" in parts[0]


def test_several_marked_blocks_in_one_turn_belong_to_it():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|channel|>' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    rendered = render(tokenizer, {**PLAIN, "train_from": 2})
    assert said(tokenizer, rendered) == ["The temperature is 21 degrees", "<|im_end|>"]
    assert [tokenizer.decode(rendered.ids[:end]).count("<|im_end|>") for end in rendered.turn_ends] == [2, 4]


def test_a_token_that_holds_part_of_the_prompt_is_not_trained():
    tokenizer = chat_tokenizer()
    glued = next(t for t in ("he", "in", "er", "an", "at") if len(tokenizer(t)["input_ids"]) == 1)
    rendered = render(tokenizer, {"prompt": glued[0], "completion": glued[1] + " weather"})
    assert tokenizer.decode(rendered.ids[:1]) == glued  # one token over the boundary
    assert said(tokenizer, rendered) == [" weather<|im_end|>"]


def test_white_space_at_the_end_of_a_prompt_does_not_cost_the_first_word():
    tokenizer = chat_tokenizer()
    rendered = render(tokenizer, {"prompt": "weather in ", "completion": "Paris"})
    assert said(tokenizer, rendered) == [" Paris<|im_end|>"]


def test_text_rows_are_trained_whole_and_end_with_one_eos():
    tokenizer = chat_tokenizer()
    rendered = render(tokenizer, {"text": "naïve café 🙂"})
    assert all(rendered.mask) and tokenizer.decode(rendered.ids) == "naïve café 🙂<|im_end|>"
    already = render(tokenizer, {"text": "naïve café 🙂<|im_end|>"})
    assert already.ids == rendered.ids


def test_a_completion_is_trained_to_the_byte_and_the_prompt_is_not():
    tokenizer = chat_tokenizer()
    assert said(tokenizer, render(tokenizer, {"prompt": "grüße ", "completion": "🙂東京"}))[0].strip() == "🙂東京<|im_end|>"
    everything = Renderer(tokenizer, train_on="all").render({"prompt": "a", "completion": "b"})
    assert all(everything.mask)


def test_all_tokens_are_trained_when_the_recipe_says_so_even_where_turns_cannot_be_told():
    tokenizer = chat_tokenizer("qwen3")
    assert all(Renderer(tokenizer, train_on="all").render(PLAIN).mask)


def test_a_template_that_does_not_show_tools_is_refused():
    with pytest.raises(DataError, match="x.jsonl:3: .* does not show tools to the model"):
        render(chat_tokenizer("llama3", eos="<|eot_id|>"), TOOL_ROW, location="x.jsonl:3")


def test_a_template_that_drops_a_call_is_refused_although_the_tools_name_stands_in_the_prompt():
    template = (
        "{{ tools | tojson if tools else '' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match='drops a call of "get_weather"'):
        render(chat_tokenizer(template), TOOL_ROW)


def test_one_lost_call_of_two_is_noticed():
    tokenizer = chat_tokenizer("gptoss_training", eos="<|return|>")  # writes the first of several calls only
    row = {"messages": [TOOL_ROW["messages"][1], {"role": "assistant", "tool_calls": [call("Paris"), call("Köln")]}], "tools": TOOLS}
    with pytest.raises(DataError, match="drops a call"):
        render(tokenizer, row)


def test_a_template_that_drops_the_words_beside_a_call_is_refused():
    row = {
        "messages": [TOOL_ROW["messages"][1], {"role": "assistant", "content": "Let me look.", "tool_calls": [call("Paris")]}],
        "tools": TOOLS,
    }
    with pytest.raises(DataError, match="beside its tool call"):
        render(chat_tokenizer("llama3_1", eos="<|eot_id|>"), row)
    assert "Let me look." in said(tokenizer := chat_tokenizer("qwen2_5"), render(tokenizer, row))[0]


def test_reasoning_that_the_template_does_not_write_is_refused():
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "reasoning_content": "because"}]}
    with pytest.raises(DataError, match="does not write reasoning_content"):
        render(chat_tokenizer("qwen2_5"), row)
    assert "because" in said(tokenizer := chat_tokenizer("qwen3_training"), render(tokenizer, row))[0]


def test_what_a_template_objects_to_is_told_with_the_rows_place():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
    with pytest.raises(DataError, match="d.jsonl:9: .*Conversation roles must alternate"):
        render(chat_tokenizer("gemma_training", eos="<end_of_turn>"), row, location="d.jsonl:9")


def test_an_empty_list_of_tools_writes_nothing():
    tokenizer = chat_tokenizer("llama3_1", eos="<|eot_id|>")
    assert render(tokenizer, {**PLAIN, "tools": []}) == render(tokenizer, PLAIN)


def test_arguments_reach_the_text_as_json_objects_in_their_own_order():
    tokenizer = chat_tokenizer("qwen2_5")
    arguments = {"unit": "celsius", "city": "Köln", "days": 3, "nothing": None, "deep": {"a": [1, 2.5, True]}}
    message = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}]}
    part = said(tokenizer, render(tokenizer, {"messages": [{"role": "user", "content": "q"}, message], "tools": TOOLS}))[0]
    written = json.loads(part.split("<tool_call>")[1].split("</tool_call>")[0])
    assert written["arguments"] == arguments and list(written["arguments"]) == list(arguments)


def test_a_tokenizer_without_pad_or_eos_or_template_is_refused():
    tokenizer = chat_tokenizer("qwen2_5")
    check_tokenizer(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no pad_token"):
        check_tokenizer(tokenizer)
    bare = chat_tokenizer()
    check_tokenizer(bare, conversations=False)
    with pytest.raises(ModelError, match="no chat template"):
        check_tokenizer(bare)
    with pytest.raises(ModelError, match="no chat template"):
        render(bare, PLAIN)


def test_an_end_of_turn_at_which_generation_does_not_stop_is_found():
    tokenizer = chat_tokenizer("qwen2_5", eos="<|endoftext|>")
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert Renderer(tokenizer).end_of_turn_ids() == {im_end}
    with pytest.raises(ModelError, match=r"<\|im_end\|>.*stops at .*<\|endoftext\|>"):
        check_tokenizer(tokenizer, stop_ids=[tokenizer.eos_token_id])
    check_tokenizer(tokenizer, stop_ids=[tokenizer.eos_token_id, im_end])


@pytest.mark.parametrize(
    "name, ends",
    [
        ("llama3_1", ["<|eot_id|>"]),
        ("gptoss_training", ["<|end|>", "<|return|>"]),
        ("glm4moe_training", ["<|user|>"]),
        ("gemma3", ["<end_of_turn>"]),
        ("cohere2", ["<|END_OF_TURN_TOKEN|>"]),
        ("deepseekv3_training", ["<｜end▁of▁sentence｜>"]),
    ],
)
def test_the_end_of_turn_of_known_families_is_found(name, ends):
    tokenizer = chat_tokenizer(name)
    assert sorted(tokenizer.convert_ids_to_tokens(sorted(Renderer(tokenizer).end_of_turn_ids()))) == sorted(ends)


def test_half_a_character_is_named_and_not_a_crash():
    with pytest.raises(DataError, match="d.jsonl:4: .*half of a surrogate pair"):
        render(chat_tokenizer("qwen2_5"), talk("hi", "a \ud83d b"), location="d.jsonl:4")


def test_what_renders_rows_can_be_sent_to_another_process():
    renderer = Renderer(chat_tokenizer("qwen3"), training_template=lambda t: trl_template("qwen3_training"))
    assert pickle.loads(pickle.dumps(renderer)).render(PLAIN) == renderer.render(PLAIN)


def test_a_training_template_is_looked_up_only_where_it_is_needed():
    def refuse(tokenizer):
        raise AssertionError("looked up")

    assert Renderer(chat_tokenizer(), training_template=refuse).training_template is None
    marked = Renderer(chat_tokenizer("qwen3_training"), training_template=refuse)
    assert marked.mask_source() == "the markers of the chat template"
    assert (
        "training template" in Renderer(chat_tokenizer("qwen3"), training_template=lambda t: trl_template("qwen3_training")).mask_source()
    )
    assert "prefixes" in Renderer(chat_tokenizer("qwen2_5"), training_template=lambda t: None).mask_source()


def test_trls_own_lookup_fits():
    from harness.tasks.templates import training_template

    rendered = render(chat_tokenizer("qwen3"), PLAIN, training_template=training_template)
    assert rendered == render(chat_tokenizer("qwen3_training"), PLAIN)
    assert render(chat_tokenizer(), {"text": "a"}, training_template=training_template).ids
    assert render(chat_tokenizer("llama3_1", eos="<|eot_id|>"), PLAIN, training_template=training_template).turn_ends  # TRL has none
