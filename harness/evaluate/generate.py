"""Greedy generation for evaluation: batched, in the order of prompt length, on whatever device the model is."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_greedily(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """The model's continuation of each prompt, in the prompts' order: token ids up to and without the token that stopped it.

    Prompts of like length share a batch, padded on the left.
    """
    import torch

    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    continuations: list[list[int]] = [[] for _ in prompts]
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
                do_sample=False,
                use_cache=True,
            )
        for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
            stop = next((at for at, token in enumerate(row) if token in stops), len(row))
            continuations[index] = row[:stop]
    model.train(was_training)
    return continuations
