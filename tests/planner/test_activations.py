"""What a layer keeps for its backward, in closed form, and counted by autograd itself: to the byte."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from harness import model as models
from harness.planner.activations import Types, layer_activations
from harness.planner.architecture import read_config
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.schema import Lora

ROWS, LENGTH = 2, 48
HALF, FULL = torch.bfloat16, torch.float32


def build(kind: str, layers: int, dtype=FULL, attention: str = "sdpa"):
    config = CONFIG_MAPPING[kind](
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype), read_config(config.to_dict(), kind, "config.json")


def saved_bytes(model, *, autocast: bool) -> int:
    """Bytes of all storages that autograd keeps between forward and backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(0, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    decoder = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=HALF) if autocast else contextlib.nullcontext():
            decoder(input_ids=ids, use_cache=False).last_hidden_state.float().sum()
    return sum(size for size, _ in kept.values())


def adapt(model, lora: Lora, dtype):
    model.requires_grad_(False)
    targets = lora.target_modules if lora.target_modules == "all-linear" else list(lora.target_modules)
    config = LoraConfig(r=lora.r, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def of_one_layer(make, **how) -> int:
    return saved_bytes(make(4).train(), **how) - saved_bytes(make(3).train(), **how)


CASES = {
    "full, all in bfloat16 (DeepSpeed)": (HALF, False, None, None),
    "full, float32 under autocast": (FULL, True, None, None),
    "full, float32": (FULL, False, None, None),
    "adapter and base in bfloat16 (DeepSpeed)": (HALF, False, Lora(r=4), HALF),
    "float32 adapter under autocast": (HALF, True, Lora(r=4), FULL),
    "with dropout": (HALF, True, Lora(r=4, dropout=0.1), FULL),
    "in bfloat16 with dropout": (HALF, False, Lora(r=4, dropout=0.1), HALF),
    "on two layers": (HALF, True, Lora(r=4, target_modules=("q_proj", "v_proj")), FULL),
    "on some": (HALF, False, Lora(r=4, target_modules=("o_proj", "up_proj", "down_proj")), HALF),
}


KINDS = ["llama", "qwen2", "qwen3", "phi3", "gemma"]
# Phi's layers are fused, and have no such names.
GRID = [(kind, case) for kind in KINDS for case in CASES if kind != "phi3" or not case.startswith("on ")]


@pytest.mark.parametrize(("kind", "case"), GRID)
def test_what_a_layer_keeps_is_what_autograd_keeps(kind, case):
    dtype, autocast, lora, adapter = CASES[case]
    shape = build(kind, 1)[1]

    def make(layers):
        model = build(kind, layers, dtype)[0]
        return model if lora is None else adapt(model, lora, adapter)

    base = dtype.itemsize
    compute = 2 if autocast else base
    types = Types(base, base, compute, compute, adapter.itemsize if adapter else base, autocast)
    # A CPU's dropout mask is of its input's type; CUDA's is a byte.
    kept = layer_activations(shape, types, lora, mask_bytes=types.adapter)
    counted = of_one_layer(make, autocast=autocast)
    # Gemma also keeps its norms' weights, plus one.
    assert kept.per_token * ROWS * LENGTH + kept.copies == pytest.approx(counted, rel=0.005 if kind == "gemma" else 0, abs=0)


def test_with_a_4bit_base_and_nothing_sharded_the_mlp_keeps_float32(tmp_path):
    recipe = load("tiny/sft-qlora", ["model.lora.r=4", "model.dtype=bfloat16", f"model.name_or_path={tmp_path}"])
    shape = build("llama", 1)[1]

    def make(layers):
        folder = tmp_path / str(layers)
        build("llama", layers)[0].save_pretrained(folder)
        model = models.load_base(recipe, str(folder), "bfloat16", "sdpa", load_backend("single"), torch.device("cpu"))
        return models.attach_adapter(model, recipe, load_backend("single"), "bfloat16")

    kept = layer_activations(shape, Types(4, 4, 4, 2, 4, autocast=True), recipe.model.lora)
    assert kept.per_token * ROWS * LENGTH + kept.copies == of_one_layer(make, autocast=True)
    in_halves = layer_activations(shape, Types(2, 2, 2, 2, 4, autocast=True), recipe.model.lora)
    assert kept.per_token - in_halves.per_token == 3 * 2 * shape.intermediate


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_with_checkpointing_a_layer_keeps_its_input_alone(dtype):
    def make(layers):
        model = build("llama", layers, dtype)[0]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    assert of_one_layer(make, autocast=False) == ROWS * LENGTH * 96 * dtype.itemsize


def test_eager_attention_keeps_a_matrix_of_all_pairs_and_flash_like_attention_does_not():
    shape = build("llama", 1)[1]
    types = Types(4, 4, 4, 4, 4, autocast=False)
    counted = of_one_layer(lambda layers: build("llama", layers, FULL, "eager")[0], autocast=False)
    kept = layer_activations(shape, types, None, eager_length=LENGTH)
    assert kept.per_token * ROWS * LENGTH == pytest.approx(counted, rel=0.15)
    assert kept.per_token - layer_activations(shape, types, None).per_token > 6 * LENGTH * 4
