"""Micro-batches of answers that are compared: the two of each pair, or single ones with a label.

An answer is a sequence (prompt and answer, labels -100 where the policy does not speak). A batch tells of each trained token which answer
it belongs to (`owner`), so that log-probabilities of tokens become those of answers whatever the layout is:

    apart       a row for each answer, padded at the right
    flattened   one row of all answers without padding, for kernels that keep them apart (varlen, flash)
    shared      a row for each pair, in which the prompt is read once:  prompt | chosen | last token of the prompt again | rejected.
                The rejected answer takes up the prompt's positions where they end, and does not see the chosen one: a mask says so
                (`segments`). The repeated token is there to predict the first token of the rejected answer.

All three give the same log-probabilities; `shared` costs half of `apart` where prompts are long and answers short, as with tools.

Answers stand in the order chosen 0, rejected 0, chosen 1, …; trained tokens too, in every layout, from left to right and top to bottom.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.teacher.targets import UNTRAINED

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3
"""Segments of a shared row."""
LAYOUT_KEYS = ("answers", "owner", "segments", "reference", "good", "others", "divergence")
"""Of a batch, what is not the model's."""


class Answer(NamedTuple):
    ids: list[int]
    labels: list[int]
    reference: list[float] | None = None
    """The reference's log-probability of each trained token, where it was computed before."""

    @property
    def first_trained(self) -> int:
        """Its place; the length where nothing is trained."""
        return next((place for place, label in enumerate(self.labels) if label != UNTRAINED), len(self.labels))


def answers_of_pair(row: dict) -> tuple[Answer, Answer]:
    return tuple(Answer(row[f"{side}_input_ids"], row[f"{side}_labels"], row.get(f"{side}_reference")) for side in ("chosen", "rejected"))


def answers_of_pairs(rows: list[dict]) -> list[Answer]:
    return [answer for row in rows for answer in answers_of_pair(row)]


def answer_of_row(row: dict) -> Answer:
    return Answer(row["input_ids"], row["labels"], row.get("reference"))


# ---- layouts


@dataclass(frozen=True)
class Apart:
    """A collator of answers. collate: a trainer's own for supervised rows, which pads them or flattens them."""

    collate: Callable[[list[dict]], dict]

    def __call__(self, answers: Sequence[Answer]) -> dict:
        batch = self.collate([{"input_ids": answer.ids, "labels": answer.labels} for answer in answers])
        lengths = torch.tensor([len(answer.ids) for answer in answers])
        numbers = torch.arange(len(answers))
        flattened = batch["input_ids"].shape[0] == 1 and len(answers) > 1
        owner = numbers.repeat_interleave(lengths)[None] if flattened else numbers[:, None].expand(batch["input_ids"].shape)
        return {**batch, "answers": len(answers), "owner": owner.contiguous(), **_reference(answers)}


@dataclass(frozen=True)
class Shared:
    """A collator of pairs of answers that reads each prompt once."""

    pad_token_id: int

    def __call__(self, answers: Sequence[Answer]) -> dict:
        rows = [self._row(*answers[at : at + 2]) for at in range(0, len(answers), 2)]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": UNTRAINED, "position_ids": 0, "segments": PADDING}
        batch = {name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows]) for name, value in fill.items()}
        pair = torch.arange(len(rows))[:, None]
        batch["owner"] = 2 * pair + (batch["segments"] == REJECTED).long()
        batch["attention_mask"] = (batch["segments"] != PADDING).long()
        return {**batch, "answers": len(answers), **_reference(answers)}

    def _row(self, chosen: Answer, rejected: Answer) -> dict[str, list[int]]:
        prompt = shared_prompt(chosen, rejected)
        again = max(prompt - 1, 0)
        return {
            "input_ids": chosen.ids + rejected.ids[again:],
            "labels": chosen.labels + [UNTRAINED] + rejected.labels[again + 1 :],
            "position_ids": [*range(len(chosen.ids)), *range(again, len(rejected.ids))],
            "segments": [PROMPT] * prompt + [CHOSEN] * (len(chosen.ids) - prompt) + [REJECTED] * (len(rejected.ids) - again),
        }


def shared_prompt(chosen: Answer, rejected: Answer) -> int:
    """How many leading tokens both have and neither trains."""
    most = min(chosen.first_trained, rejected.first_trained)
    return next((at for at in range(most) if chosen.ids[at] != rejected.ids[at]), most)


def shared_mask(segments: Tensor) -> Tensor:
    """Who sees whom in shared rows: bool [B, 1, T, T] of segments [B, T]. A token sees what stands before it of its own segment and of the
    prompt; a rejected one sees the repeated last token of the prompt in place of the first."""
    length = segments.shape[1]
    is_prompt = segments == PROMPT
    last_of_prompt = is_prompt & ~is_prompt.roll(-1, 1)
    last_of_prompt[:, -1] = False
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    prompt_for = is_prompt[:, None, :] & ~((segments == REJECTED)[:, :, None] & last_of_prompt[:, None, :])
    return (causal & (same | prompt_for))[:, None]


def _reference(answers: Sequence[Answer]) -> dict[str, Tensor]:
    if any(answer.reference is None for answer in answers):
        return {}
    return {"reference": torch.tensor([value for answer in answers for value in answer.reference], dtype=torch.float32)}


def model_inputs(batch: dict) -> dict:
    """What of a batch the model's forward takes, with the mask of shared rows in place of the one of padding."""
    inputs = {name: value for name, value in batch.items() if name not in LAYOUT_KEYS}
    if "segments" in batch:
        inputs["attention_mask"] = shared_mask(batch["segments"])
    return inputs


def trained_owners(batch: dict) -> Tensor:
    """[N], which answer each trained token belongs to, as a lesson has the tokens."""
    return batch["owner"][:, 1:][batch["labels"][:, 1:] != UNTRAINED]


def sum_by_answer(values: Tensor, owners: Tensor, answers: int) -> Tensor:
    """[answers], sums of the values [N] of their trained tokens."""
    return values.new_zeros(answers).index_add(0, owners, values)


OF_ITS_OWN = (
    "alibi attention_chunk_size attention_layers attn_config block_types conv_kernel hybrid_override_pattern layers_block_type "
    "sliding_window_pattern state_size window_size"
).split()
"""What configs have whose layers know of distance or of the past by more than the mask and the positions: windows and chunks, biases by
distance, convolutions and states."""


def shares_prompts(model) -> bool:
    """Whether the mask of shared rows, and their positions, say all that this model's attention is: SDPA, and no layer with a window or a
    memory of its own. Where it cannot be told, rows of their own cost time and nothing else."""
    config, base = model.config.get_text_config(), getattr(model, "base_model", model)
    base = getattr(base, "model", base) if hasattr(model, "peft_config") else base
    try:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        # Where layer_types says nothing, a window is of all layers.
        has_window = getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)
        others = [name for name in OF_ITS_OWN if getattr(config, name, None)]
    except Exception:
        # transformers raises where layers differ in what is asked of all.
        return False
    reads_positions = "position_ids" in inspect.signature(base.forward).parameters
    return config._attn_implementation == "sdpa" and kinds == {"full_attention"} and not has_window and not others and reads_positions
