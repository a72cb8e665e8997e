"""{full, LoRA, QLoRA} x {single, ddp x2, zero1, zero2, zero3}: real ranks on real xLAM rows and a real pretrained model.

Every cell trains at the same global batch (single: 1 rank x accumulation 4, the others: 2 ranks x 2), so all cells of a variant must have
the same token-weighted losses; what is exported must load with plain transformers and PEFT and have the held-out loss that the run logged.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import MICRO_TEMPLATE, STORIES, XLAM, harness, metrics, needs_shared

pytestmark = needs_shared

BACKENDS = ("single", "ddp", "zero1", "zero2", "zero3")
VARIANTS = {
    "full": (),
    "lora": ("model.lora.r=8", "model.lora.dropout=0.0"),
    "qlora": ("model.lora.r=8", "model.quantization.load_in_4bit=true"),
}
STEPS = 4
# Sums of float32 in another order, over four steps of AdamW whose first ones divide by nearly nothing; measured differences are below 1e-4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """cell(variant, backend) -> run folder; each is trained once."""
    folder = tmp_path_factory.mktemp("grid")

    @cache
    def train(variant: str, backend: str):
        run = folder / f"{variant}-{backend}"
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"""
model: {{name_or_path: "{STORIES}"}}
data: {{train: "{XLAM}", max_length: 512, eval_rows: 21, chat_template: "{MICRO_TEMPLATE}"}}
train: {{learning_rate: 5e-3, max_steps: {STEPS}, logging_steps: 1, eval_steps: {STEPS},
        global_batch_size: 16, per_device_train_batch_size: 4}}
tracking: {{mode: disabled}}
"""
        )
        processes = 1 if backend == "single" else 2
        done = harness("run", recipe, f"output_dir={run}", *VARIANTS[variant], "--backend", backend, "--processes", processes)
        assert done.code == 0, done.output
        return run, done.output

    return train


AT_ONCE = {("full", "zero3"), ("lora", "ddp"), ("lora", "zero2"), ("qlora", "zero3")}
"""Besides those of one rank, with which the others are compared; the rest is slow."""
cells = pytest.mark.parametrize(
    ("variant", "backend"),
    [
        pytest.param(variant, backend, marks=[] if backend == "single" or (variant, backend) in AT_ONCE else pytest.mark.slow)
        for variant in VARIANTS
        for backend in BACKENDS
    ],
)


@cells
def test_every_cell_of_the_grid_trains_to_the_same_losses_and_its_export_loads_with_that_loss(cell, variant, backend):
    run, output = cell(variant, backend)
    reference, _ = cell(variant, "single")
    losses, expected = metrics(run, "train/loss"), metrics(reference, "train/loss")
    assert losses[STEPS] < losses[1] - 1.0
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert metrics(run, "train/grad_norm")[1] == pytest.approx(metrics(reference, "train/grad_norm")[1], rel=1e-3)
    assert metrics(run, "eval/loss") == pytest.approx(metrics(reference, "eval/loss"), abs=TOLERANCE)
    manifest = json.loads((run / "run.json").read_text())
    assert (manifest["backend"], manifest["world_size"]) == (backend, 1 if backend == "single" else 2)
    if (variant, backend) == ("qlora", "zero3"):
        assert "4-bit weights" in output  # the assertion on local bytes ran; a share of them is checked below
        local, whole = (int(word.replace(",", "")) for word in output.split("4-bit weights: ")[1].split(" bytes")[0].split(" of "))
        assert local <= 0.6 * whole
    check_export(run, variant, metrics(run, "eval/loss")[STEPS])


def check_export(run, variant, logged_loss):
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    final = run / "final"
    base = load_file(STORIES / "model.safetensors")
    if variant == "full":
        saved = load_file(final / "model.safetensors")
        assert all(not torch.equal(saved[name], base[name]) for name in base if name in saved)
        model = AutoModelForCausalLM.from_pretrained(final)
    else:
        saved = load_file(final / "adapter_model.safetensors")
        assert len(saved) == 2 * 7 * 5 and all(".lora_A." in name or ".lora_B." in name for name in saved)  # 7 linear layers in 5 blocks
        quantized = {}
        if variant == "qlora":
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
            )
            quantized = {"quantization_config": config}
        model = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32, **quantized)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    assert held_out_loss(model.eval(), run) == pytest.approx(logged_loss, abs=2e-3)


def held_out_loss(model, run):
    """The mean negative log-likelihood per trained token, one row at a time through plain logits: nothing of ours but the stored rows."""
    from datasets import Dataset, concatenate_datasets

    marker = json.loads(next(run.glob("logs/attempt-1/prepared-*.json")).read_text())
    folder = marker["folder"]
    files = json.loads(Path(folder, "manifest.json").read_text())["files"]["eval"]
    rows = concatenate_datasets([Dataset.from_file(f"{folder}/{file['name']}") for file in files])
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        chosen = labels[0, 1:] != -100
        total -= logits.log_softmax(-1)[chosen].gather(1, labels[0, 1:][chosen][:, None]).sum().item()
        tokens += int(chosen.sum())
    return total / tokens
