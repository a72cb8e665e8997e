"""Generation, greedy or sampled: batched, in the order of prompt length, on whatever device the model is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Continuation:
    ids: list[int]
    """Up to and without the token that stopped it."""
    ended: bool
    """A stop token came; else it was cut off at max_new_tokens."""


def generate_greedily(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[list[int]], **options
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, without the token that stopped it. options: as of `generate`."""
    return [continuation.ids for continuation in generate(model, tokenizer, prompts, **options)]


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    after_batch: Callable[[], None] = lambda: None,
    streamer=None,
) -> list[Continuation]:
    """The model's continuation of each prompt, in the prompts' order. Prompts of like length share a batch, padded on the left.

    temperature: 0 is greedy; above it, tokens are drawn by torch's own generator from the smallest set that holds top_p of the mass.
    after_batch: called after each batch, for whoever watches for signs of life. streamer: transformers' own, told each token as it is
    drawn, of a single prompt.
    """
    import torch

    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    # A model's own generation config may ask for a top_k, and for penalties (Qwen2.5's does), which would make names of tools improbable.
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    draws |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    continuations: dict[int, Continuation] = {}
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                # Each rank has prompts of its own; waiting for each other is for shards, of which none are left here.
                synced_gpus=False,
                streamer=streamer,
                **draws,
            )
        for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
            stop = next((at for at, token in enumerate(row) if token in stops), None)
            continuations[index] = Continuation(row[:stop], stop is not None)
        after_batch()
    model.train(was_training)
    return [continuations[index] for index in range(len(prompts))]
