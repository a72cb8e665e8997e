"""A small real tokenizer for the tests: byte-level BPE, with the control tokens of the model families whose templates TRL ships."""

from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|observation|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>",
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
    "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>", "<|turn>", "<turn|>", "<|channel>",
    "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|think|>", "<|eot|>",
]  # fmt: skip
# Added, but not special, as Qwen has them.
PLAIN_ADDED = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
]  # fmt: skip

CORPUS = [
    'What is the weather in Paris? {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": 3}}',
    "You are a helpful assistant. The temperature is 21 degrees. Answer in one short sentence, and call a tool where it helps.",
    "grüße aus Köln 東京 🙂 naïve café\n\n\tdef f(x):\n    return x\n",
] * 3


@cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def chat_tokenizer(
    template: str | None = None, *, eos: str = "<|im_end|>", pad: str = "<pad>", bos: str = "<s>"
) -> PreTrainedTokenizerFast:
    """template: a Jinja text, or the name of a file among TRL's chat_templates."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(_trained()))
    tokenizer.add_tokens(PLAIN_ADDED)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = eos, pad, bos
    tokenizer.chat_template = trl_template(template) if template and "{" not in template else template
    return tokenizer


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
