"""Reward models: where they read their score, and how they are loaded to give one.

transformers' classifiers read a row at its last token that is not the pad token, found by its id alone. Where the pad token also ends
answers (pad = eos, as with every tokenizer that came without one), that is the token before: another place than the one that a reader of
attention masks would look at, and the end of an answer would be invisible to its judge. So `settle_pad` gives such a tokenizer a pad token
that no answer ends with; the export carries it, and plain transformers reads where training did.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.embedded import resolve
from harness.errors import ModelError, first_line
from harness.model import SCORE, four_bit_config, keep_4bit_weights_as_they_are
from harness.model.export import MANIFEST, digest_base, verify_export
from harness.recipe.schema import Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def settle_pad(tokenizer: "PreTrainedTokenizerBase", endings: set[int]) -> str | None:
    """Give the tokenizer a pad token that is none of `endings`, the ids with which answers end. Returns what is to be said of a change.

    Raises ModelError when it has no special token for that.
    """
    was = tokenizer.pad_token
    if tokenizer.pad_token_id not in endings:
        return None
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [token for token in special if "pad" in token.lower()]
    for token in (*named, tokenizer.unk_token, tokenizer.bos_token, *special):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in endings:
            tokenizer.pad_token = token
            return f"pads with {token!r}: answers end with {was!r}, and a classifier reads its score at the last token that is no pad"
    raise ModelError(
        f"model: the tokenizer pads with {was!r}, with which answers end as well, and a classifier reads its score at the last token that "
        "is no pad; none of its special tokens is free; add one, and set it as pad_token in tokenizer_config.json"
    )


@dataclass(frozen=True)
class RewardModel:
    """A frozen classifier of one score."""

    model: object
    tokenizer: "PreTrainedTokenizerBase"
    """Its own: another model's token ids mean other words."""
    digest: str | None
    """Of its weights; None for a hub id, whose revision says which they are."""

    def score(self, rows: Sequence[Sequence[int]], batch_size: int = 16) -> list[float]:
        """One score for each row of token ids, in their order: of whole conversations, rendered with the tokenizer's chat template.

        Batches are of like length and padded at the right; a row has the same score in any. Raises ModelError for a row without tokens.
        """
        import torch

        if not all(len(row) for row in rows):
            raise ModelError(f"reward model: row {[len(row) for row in rows].index(0)} has no token to score")
        pad, scores = self.model.config.get_text_config().pad_token_id, [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        # Without a pad token transformers reads the last token, of a single row alone.
        size = batch_size if pad is not None else 1
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            longest = len(rows[batch[-1]])
            ids = torch.tensor([[*rows[index], *[pad] * (longest - len(rows[index]))] for index in batch], device=self.model.device)
            lengths = torch.tensor([len(rows[index]) for index in batch], device=self.model.device)
            mask = (torch.arange(longest, device=self.model.device) < lengths[:, None]).long()
            with torch.no_grad():
                found = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1).float().tolist()
            for index, value in zip(batch, found, strict=True):
                scores[index] = value
        return scores


def load_reward_model(source: str | Path, *, dtype: str | None = None, device: "torch.device | None" = None) -> RewardModel:
    """The reward model of a run (its folder), of an export of harness (whose files are verified against their digests), or any other
    sequence classifier of one score: a folder, or a hub id.

    dtype: of its weights; left out: as it was trained. device: left out, this rank's GPU, or the CPU. A QLoRA's base is loaded in 4 bits,
    as in training. Under ZeRO-3 call it before the trainer's arguments are made, or its weights are sharded like a trained model's.
    Raises ModelError when files are not what was exported, the base is another, or it gives not one score.
    """
    import torch
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    folder = folder / "final" if (folder / "final" / MANIFEST).is_file() else folder
    manifest = verify_export(folder) if (folder / MANIFEST).is_file() else {"task": "reward", "adapter": False}
    if manifest["task"] != "reward":
        raise ModelError(f"{folder}: was trained by task = {manifest['task']}, which gives no scores; name an export of task = reward")
    if (folder / "adapter_config.json").is_file() and not manifest["adapter"]:
        raise ModelError(f"{folder}: is an adapter without harness's manifest, which says what its base is; merge it, and name the result")
    where, dtype = str(folder) if folder.is_dir() else str(source), dtype or manifest.get("dtype", "auto")
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(where)
    if manifest["adapter"]:
        model = _load_with_adapter(where, manifest, dtype, device)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    else:
        model = _load_classifier(where, dtype).to(device)
    return RewardModel(model.requires_grad_(False).eval(), tokenizer, digest_base(where))


def _load_with_adapter(folder: str, manifest: dict, dtype: str, device: "torch.device"):
    from peft import PeftModel

    # Where an earlier adapter was merged into it, the base is a folder of the run, which PEFT names.
    said = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
    places = [resolve(place) for place in (manifest["base"], said)]
    base = next((place for place in places if not manifest["base_digest"] or digest_base(place) == manifest["base_digest"]), None)
    if base is None:
        raise ModelError(f"{places[0]}: is not the base that {folder} was trained on (its digest differs); restore that one")
    options: dict = {"revision": manifest["base_revision"], "num_labels": 1}
    if manifest["quantization"]:
        asked = Quantization(**manifest["quantization"])
        # Stored as bytes whatever held them in training: the values are the same.
        asked = asked.model_copy(update={"bnb_4bit_quant_storage": None})
        options |= {"quantization_config": four_bit_config(asked, dtype, whole=[SCORE]), "device_map": {"": device}}
    model = _load_classifier(base, dtype, **options)
    model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return model if manifest["quantization"] else model.to(device)


def _load_classifier(source: str, dtype: str, **options):
    """Raises ModelError unless it is one of a single score, all of whose weights are there (but for an adapter's: num_labels is given)."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"reward model: {source} cannot be loaded: {first_line(error)}") from error
    # An adapter has the score of its base's place.
    missing = set() if "num_labels" in options else loading["missing_keys"]
    if model.config.num_labels != 1 or missing:
        found = f"lacks {sorted(missing)[0]}" if missing else f"num_labels = {model.config.num_labels}"
        raise ModelError(f"reward model: {source} is no classifier of one score ({found}); name an export of task = reward, or its like")
    keep_4bit_weights_as_they_are(model)
    return model
