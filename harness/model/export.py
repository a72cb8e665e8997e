"""Exports: written once, reopened and compared, verified by digest whenever asked, merged into their base with the difference measured."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ModelError
from harness.model import auto_class, keep_4bit_weights_as_they_are, quantization_config
from harness.recipe import Recipe

if TYPE_CHECKING:
    import torch

MANIFEST = "harness.json"
"""Stands in every export: what it was made from, and the digest of each of its files."""


def adapter_shapes(model) -> dict[str, tuple[int, ...]]:
    """Tensor name -> whole shape of what the export of an adapter must hold, by PEFT's own naming."""
    import torch
    from peft import get_peft_model_state_dict

    trained = {
        name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    named = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def check_export(
    folder: Path, expected: dict[str, tuple[int, ...]] | None, *, tied: frozenset[str] = frozenset(), adapter: bool, moved: bool = True
) -> dict[str, str]:
    """Reopen an export and compare: number of tensors, no empty shape, finite values, an adapter that is not zero. Returns file digests.

    expected: tensor name -> shape as the model in memory has it, or None to check the folder alone. tied: names that may stand in the file
    as a copy of another (gathers copy tied weights). moved: training took at least one step.
    Raises ModelError; the 40-byte adapter (no tensors at all) is the case that gave this function its reason.
    """
    import torch
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no safetensors file; the export failed, and the run's last checkpoint is what is left")
    shapes: dict[str, tuple[int, ...]] = {}
    lora_b = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                value = tensors.get_tensor(name)
                shapes[name] = tuple(value.shape)
                if value.numel() == 0:
                    raise ModelError(
                        f"{file}: tensor {name} is empty, shape {tuple(value.shape)}; weights were not gathered before they were saved"
                    )
                if value.is_floating_point() and not torch.isfinite(value).all():
                    raise ModelError(f"{file}: tensor {name} holds values that are not finite; training diverged")
                if ".lora_B." in name or name.endswith("lora_B"):
                    lora_b.append(bool(value.any()))
    if not shapes:
        raise ModelError(f"{folder}: {files[0].name} holds no tensor ({files[0].stat().st_size} bytes): an empty adapter is the base model")
    if adapter and not lora_b:
        raise ModelError(f"{folder}: holds no lora_B tensor among {len(shapes)}; it is not a LoRA adapter")
    if adapter and moved and not any(lora_b):
        raise ModelError(
            f"{folder}: every lora_B is zero, so the adapter does nothing; it was saved before it was trained or was never trained"
        )
    kept = {name: shape for name, shape in shapes.items() if name not in tied}
    if expected is not None and kept != expected:
        lacking, foreign = sorted(expected.keys() - kept.keys()), sorted(kept.keys() - expected.keys())
        other = [name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]]
        raise ModelError(
            f"{folder}: is not the model that was trained: {len(lacking)} tensors lacking {lacking[:2]}, "
            f"{len(foreign)} foreign {foreign[:2]}, {len(other)} of another shape {other[:2]}"
        )
    return {file.name: digest_file(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name != MANIFEST}


def digest_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_base(source: str) -> str | None:
    """A digest of the base's weights: of its safetensors files when it is a folder, None for a hub id (its revision says which it is)."""
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        return None
    return hashlib.sha256("".join(f"{file.name} {digest_file(file)}\n" for file in files).encode()).hexdigest()


def verify_export(folder: Path) -> dict:
    """The manifest of an export whose every file still has the digest that was recorded. Raises ModelError that names another."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ModelError(f"{folder}: holds no {MANIFEST}, so it is not an export of harness or it is not finished")
    content = json.loads(manifest.read_text())
    for name, digest in content["files"].items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is gone; it was there when the export was made")
        if digest_file(folder / name) != digest:
            raise ModelError(f"{folder / name}: is not what was exported (its digest differs); copy the export again")
    return content


# ---- merge


COMPARED_ROWS = 8
COMPARED_TOKENS = 256
KL_LIMIT = 0.05
"""Nats per token (of a reward model: per pair) between base + adapter and the merged model, both in one type. Rounding stays far below; a
wrong base is far above."""


def ends_in_score(adapter: Path) -> bool:
    return json.loads((adapter / "adapter_config.json").read_text()).get("task_type") == "SEQ_CLS"


def rows_to_compare(prepared, *, pairs: bool = False) -> list:
    """Token ids of a few rows of prepared data that are held out, or of its first training rows. pairs: of both answers of each."""
    rows = prepared.eval if prepared.eval is not None else prepared.train
    column = "input_ids" if "input_ids" in rows.column_names else "chosen_input_ids"
    first = rows[:COMPARED_ROWS]
    if pairs:
        return [[chosen, rejected] for chosen, rejected in zip(first["chosen_input_ids"], first["rejected_input_ids"], strict=True)]
    return [ids[:COMPARED_TOKENS] for ids in first[column]]


def check_merge(difference: dict[str, float]) -> None:
    """Raises ModelError when a merge has changed what the model says (one of `merge_adapter`'s findings) by more than rounding."""
    if not difference["kl"] <= KL_LIMIT:
        raise ModelError(
            f"the merge changed the model: KL {difference['kl']:.3g} nats per token, above {KL_LIMIT}; is the base what it was in training?"
        )


def merge_adapter(
    adapter: Path,
    base: str,
    recipe: Recipe,
    dtype: str,
    target: Path,
    token_rows: list,
    into: str = "bfloat16",
    pad_token_id: int | None = None,
) -> dict[str, dict]:
    """Merge an adapter into its base in the type `into`, save it to `target`, reopen it, and measure what the merge changed.

    dtype: in which the run loaded its base. token_rows: token ids to compare on; of a reward model's adapter pairs of them, and
    pad_token_id, which a classifier carries in its config. Returns name -> {"max_abs", "mean_abs", "kl"} of the reopened merged model's
    logits (a pair's two scores) against `adapter` (base + adapter in that type: what merging alone changes) and, for a 4-bit run, against
    `trained_4bit` (what training saw: the 4-bit base's own error, which the adapter has learnt to live with and the merged model lacks).
    """
    import torch
    from peft import PeftModel

    loader, options = auto_class(scores=ends_in_score(adapter))

    def load(source, dtype, quantized=None):
        model = loader.from_pretrained(
            str(source),
            revision=recipe.model.revision if source == base else None,
            dtype=dtype,
            quantization_config=quantized,
            use_safetensors=True,
            trust_remote_code=recipe.model.trust_remote_code,
            **options,
        )
        if pad_token_id is not None:
            model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
        keep_4bit_weights_as_they_are(model)
        return model.eval()

    into = getattr(torch, into)
    model = PeftModel.from_pretrained(load(base, into), str(adapter)).eval()
    before = {"adapter": _logits(model, token_rows)}
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    # One model in memory at a time.
    del model
    quantized = quantization_config(recipe, dtype)
    if quantized is not None:
        trained = PeftModel.from_pretrained(load(base, getattr(torch, dtype), quantized), str(adapter)).eval()
        before["trained_4bit"] = _logits(trained, token_rows)
        del trained
    after = _logits(load(target, into), token_rows)
    return {name: compare_logits(logits, after) for name, logits in before.items()}


def _logits(model, token_rows: list):
    """[T, V] of each row; of a pair of rows its two scores, [1, 2], whose softmax is the probability that either is the better answer."""
    import torch

    def read(ids: list[int]):
        return model(torch.tensor([ids], device=model.device)).logits[0].float().cpu()

    with torch.no_grad():
        return [read(row) if isinstance(row[0], int) else torch.cat([read(ids) for ids in row])[None] for row in token_rows]


def compare_logits(before: list["torch.Tensor"], after: list["torch.Tensor"]) -> dict[str, float]:
    """Differences of logits [T, V], float32, over rows: largest and mean absolute, and mean KL(before || after) in nats per token
    (of a reward model: per pair)."""
    import torch

    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(before, after, strict=True)])
    divergences = [
        torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for a, b in zip(before, after, strict=True)
    ]
    return {"max_abs": gaps.max().item(), "mean_abs": gaps.mean().item(), "kl": torch.cat(divergences).mean().item()}


# ---- inference


def load_for_inference(folder: Path, dtype: str = "auto"):
    """(model, tokenizer) of an exported model or adapter, as plain transformers and PEFT load them, on the GPU if there is one."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    model = loader.from_pretrained(str(folder), dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(str(folder))
