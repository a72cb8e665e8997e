"""A tiny model that has learnt a few rows by heart: it makes real calls, and is right where a test needs it to be."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from harness.data import prepare_recipe
from harness.embedded import resolve
from harness.model import load_tokenizer
from harness.recipe import load


def learn_by_heart(folder: Path, rows: Path, steps: int = 70) -> None:
    """Make `folder` a copy of embedded:tiny-llama that has learnt the rows."""
    shutil.copytree(resolve("embedded:tiny-llama"), folder)
    recipe = load("tiny/sft-full", [f"data.train={rows}", "data.eval=[]", "train.eval_steps=null"])
    tokenizer = load_tokenizer(recipe)
    prepared = prepare_recipe(recipe, tokenizer, packing=False, say=lambda text: None).train
    width = max(prepared["length"])
    ids, labels = (
        torch.tensor([[*row[key], *[filler] * (width - len(row[key]))] for row in prepared])
        for key, filler in (("input_ids", tokenizer.pad_token_id), ("labels", -100))
    )
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
