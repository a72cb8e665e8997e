"""In which types a run computes, where the recipe leaves that to the machine. Asked by who loads the model, and by the planner before."""

from harness.recipe.backend import Backend
from harness.recipe.schema import Recipe


def choose_dtype(recipe: Recipe, backend: Backend, *, bf16_hardware: bool) -> str:
    """The type in which weights are loaded, for `dtype: auto` and otherwise as the recipe says.

    float32 for full fine-tuning without DeepSpeed: AdamW on bfloat16 weights loses updates below 1/256 of a weight. DeepSpeed keeps float32
    masters itself, and frozen bases are never updated.
    """
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if recipe.train.fp16 and recipe.model.trains_adapter:
        return "float16"
    if not bf16_hardware or recipe.train.fp16:
        return "float32"
    return "bfloat16" if recipe.model.trains_adapter or backend.kind == "deepspeed" else "float32"


def autocasts_bf16(recipe: Recipe, bf16_hardware: bool) -> bool:
    if recipe.train.bf16 != "auto":
        return recipe.train.bf16
    return bf16_hardware and not recipe.train.fp16 and recipe.model.dtype != "float32"
