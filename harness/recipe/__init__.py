"""The recipe: one strict YAML file that says everything about a run.

    load("configs/tiny/sft-lora.yaml", ["train.learning_rate=1e-4"]) -> Recipe

`schema` holds the sections, `load` reads files and overrides and writes the errors, `rules` holds what no single field can say,
`backend` reads Accelerate's config files as strictly as the recipe itself. Nothing here imports torch.
"""

from harness.recipe.load import load, recipe_digest, render_recipe
from harness.recipe.schema import Recipe

__all__ = ["Recipe", "load", "recipe_digest", "render_recipe"]
