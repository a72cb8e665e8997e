"""4-bit weights tried on this machine: bitsandbytes' kernels by what they compute, not by whether they import."""

from dataclasses import dataclass

ROWS, COLUMNS, BATCH = 128, 256, 4
USUAL_ERROR = {"nf4": 0.073, "fp4": 0.097}
"""Mean absolute error of a standard normal weight in blocks of 64: the mean distance to the nearest of the 16 levels."""


@dataclass(frozen=True)
class FourBit:
    version: str
    error: float
    """Mean absolute difference of a standard normal weight, quantised and back."""
    product_error: float
    """Largest difference of x W from 4-bit W to x times W as it came back, as a share of the largest product."""

    @property
    def is_right(self) -> bool:
        return abs(self.error - USUAL_ERROR["nf4"]) < 0.01 and self.product_error < 0.02


def try_four_bit(device: str) -> FourBit:
    """Quantise a matrix to nf4 there, bring it back, and multiply by it. Raises what bitsandbytes raises."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=drawn).to(device)
    batch = torch.randn(BATCH, COLUMNS, generator=drawn).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    back = dequantize_4bit(packed, state)
    product, expected = bitsandbytes.matmul_4bit(batch, packed.t(), state), batch @ back.t()
    return FourBit(
        bitsandbytes.__version__,
        (back - weight).abs().mean().item(),
        ((product - expected).abs().max() / expected.abs().max()).item(),
    )
