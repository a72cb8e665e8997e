"""Run folders that look as if a training had ended in them, without the training: small models, exported and manifested as ours are."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from harness.embedded import resolve
from harness.model import load_tokenizer
from harness.model.export import MANIFEST, check_export, digest_base
from harness.recipe import load, recipe_digest
from harness.run import RunDir


def export_run(folder: Path, shipped: str, *overrides: str, base: str | None = None) -> RunDir:
    """The run of a shipped recipe, at step 20. An adapter where the recipe has `lora`, a classifier where it trains a reward model."""
    from peft import LoraConfig, get_peft_model

    recipe = load(shipped, [f"output_dir={folder}", *([f"model.name_or_path={base}"] if base else []), *overrides])
    named = recipe.model.name_or_path or recipe.model.init
    run, source, scores = RunDir.create(recipe), resolve(named), recipe.task == "reward"
    torch.manual_seed(0)
    loader = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = loader.from_pretrained(source, **({"num_labels": 1} if scores else {}))
    if scores:
        model.config.pad_token_id = 0
    if adapter := recipe.model.lora is not None:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS" if scores else "CAUSAL_LM"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(run.final)
    load_tokenizer(recipe).save_pretrained(run.final)
    about = {"base": named, "base_revision": None, "base_digest": digest_base(source)}
    about |= {"data": "d" * 32, "recipe_digest": recipe_digest(recipe), "step": 20}
    manifest = {"task": recipe.task, **about, "adapter": adapter, "quantization": None, "dtype": "float32", "best_metric": None}
    manifest |= {
        "lineage": [{"task": recipe.task, **about, "git_commit": "c" * 40}],
        "files": check_export(run.final, None, adapter=adapter),
    }
    (run.final / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    run.write_manifest(recipe)
    run.metrics.write_text(json.dumps({"step": 20, "eval/loss": 1.25, "eval/runtime_s": 3.0}) + "\n")
    return run


def amend(run: RunDir, **changes) -> None:
    """Change keys of an export's manifest."""
    file = run.final / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
