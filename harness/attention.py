"""Which attention runs, and whether it keeps packed samples apart.

`varlen` is torch's own variable-length attention (torch.nn.attention.varlen: FlashAttention kernels inside torch, CUDA, half precision),
registered as an attention function of transformers, so that packing needs no flash-attn package.
"""

from typing import TYPE_CHECKING

from harness.errors import ModelError
from harness.recipe import Recipe

if TYPE_CHECKING:
    import torch

PACKING_KERNELS = ("varlen", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention")
"""Attention that skips the products between samples of a pack. SDPA isolates samples too, by a mask, but computes all products."""


def asked_attention(recipe: Recipe) -> str:
    """What a run asks `choose_attention` for. Whoever writes reads prompts that are padded at the left, which kernels for packs do not; a
    score is read at a row's end."""
    asked = recipe.model.attn_implementation
    return "sdpa" if asked == "auto" and pads_rows(recipe) else asked


def pads_rows(recipe: Recipe) -> bool:
    return bool(recipe.distill.on_policy) or recipe.task in ("reward", "rlhf")


def choose_attention(asked: str, dtype: str, has_gpu: bool) -> str:
    """The attention that will run: what was asked for, or for `auto` the fastest that this machine has and that isolates samples.

    dtype: in which the products are computed, the autocast's where there is one. Raises ModelError when the one asked for cannot run here.
    """
    half = dtype in ("bfloat16", "float16")
    if asked == "auto":
        if not has_gpu:
            return "sdpa"
        if half and _has_varlen():
            return register_varlen()
        if half and _has_flash(2):
            return "flash_attention_2"
        # Flex compiles its kernels for Ampere and newer; in float32, or on an older card, nothing packs well.
        return "flex_attention" if half and _is_ampere() else "sdpa"
    if asked == "varlen":
        if not has_gpu or not _has_varlen():
            raise ModelError(
                "model.attn_implementation = varlen; torch's variable-length attention needs a CUDA GPU (Ampere or newer); use auto or sdpa"
            )
        if not half:
            raise ModelError(
                f"model.attn_implementation = varlen; its kernels are half precision and this run is in {dtype}; set train.bf16, or sdpa"
            )
        return register_varlen()
    if asked == "flex_attention" and not has_gpu:
        raise ModelError("model.attn_implementation = flex_attention; it has no backward pass on a CPU; use auto or sdpa")
    if asked.startswith("kernels-community/") and not (has_gpu and _has_hub_kernels()):
        raise ModelError(
            f"model.attn_implementation = {asked}; the package `kernels` is not installed or there is no GPU; pip install kernels, "
            "or use auto (varlen needs no package)"
        )
    if asked.startswith("flash_attention_") and not (has_gpu and _has_flash(int(asked[-1]))):
        raise ModelError(
            f"model.attn_implementation = {asked}; the package flash-attn is not installed or there is no GPU; "
            "use auto (varlen needs no package)"
        )
    return asked


def _is_ampere() -> bool:
    import torch

    return torch.cuda.get_device_capability()[0] >= 8


def _has_varlen() -> bool:
    import torch

    if not torch.cuda.is_available() or not _is_ampere():
        return False
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return False
    return True


def _has_hub_kernels() -> bool:
    from importlib.util import find_spec

    return find_spec("kernels") is not None


def _has_flash(version: int) -> bool:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    return is_flash_attn_2_available() if version == 2 else is_flash_attn_3_available()


def register_varlen() -> str:
    """Make `varlen` known to transformers; returns its name. Registering twice is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("varlen", varlen_attention_forward)
    AttentionMaskInterface.register("varlen", flash_attention_mask)
    return "varlen"


def varlen_attention_forward(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: "torch.Tensor | None" = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple["torch.Tensor", None]:
    """Attention within each sample of a flattened batch, for transformers' attention interface.

    query [B, Hq, T, D], key and value [B, Hkv, T, D]; cu_seq_lens_q [samples + 1] int32, boundaries in the flattened batch (B = 1). Without
    boundaries each of the B rows is one sample. Returns [B, T, Hq, D]. Raises ModelError for what these kernels cannot do.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn

    if attention_mask is not None:
        raise ModelError(
            "varlen attention got a padded batch; it takes flattened batches only (packing or padding-free); use sdpa for padded ones"
        )
    if softcap is not None or dropout or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelError(
            "varlen attention has no soft-capping, dropout, sinks or position bias, and this model wants one of them; "
            "set model.attn_implementation to flex_attention, sdpa or eager"
        )
    batch, heads, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    flat = [tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value)]
    if flat[0].dtype == torch.float32:
        # A float32 norm or adapter upstream; the kernels are half precision.
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.bfloat16
        flat = [tensor.to(half) for tensor in flat]
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    mixed = varlen_attn(
        *flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window, enable_gqa=heads != key.shape[1]
    )
    return mixed.to(query.dtype).view(batch, length, heads, -1), None


def check_isolation(model, vocab_size: int, device: "torch.device") -> float:
    """Run two packs that differ only in a sample's neighbour; returns the largest change of its logits, as a share of their largest value.

    Every rank must call it (under ZeRO-3 a forward is a collective). Raises ModelError when the change is more than rounding.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocab_size, (length,), generator=generator) for length in (7, 7, 5))
    lengths = torch.tensor([0, 7, 12], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None].to(device)
    was_training = model.training
    model.eval()
    logits = []
    with torch.no_grad():
        for neighbour in (first, other):
            ids = torch.cat([neighbour, second])[None].to(device)
            packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
            output = model(input_ids=ids, position_ids=positions, use_cache=False, **packed)
            logits.append(output.logits[0, 7:].float())
    model.train(was_training)
    effect = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1e-6)).item()
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    if not effect <= tolerance:
        raise ModelError(
            f"packing: a sample's logits change by {effect:.1%} with its neighbour in the pack, so samples see each other under this "
            "attention or architecture; set data.packing: false, or another model.attn_implementation"
        )
    return effect
