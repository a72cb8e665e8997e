"""Shapes from a config alone, held against the modules that transformers builds; two models by hand; and what is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from harness.embedded import resolve
from harness.errors import ModelError, RecipeError
from harness.planner.architecture import MODELS, load_architecture, read_config
from harness.planner.known import KNOWN
from harness.planner.states import count_parameters
from harness.recipe import load

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_linear_layers_are_those_of_the_modules(kind, tied):
    config = CONFIG_MAPPING[kind](**SMALL, **EXPERTS.get(kind, {}), tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_config(json.loads(config.to_json_string()), kind, "config.json")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name]
    assert shape.layers * shape.layer_linears == sum(module.weight.numel() for module in linears)


def test_llama_3_1_8b_by_hand():
    attention = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096  # q; k and v of 8 heads; o
    mlp = 3 * 4096 * 14336
    assert attention + mlp == 218_103_808
    whole = 32 * (218_103_808 + 2 * 4096) + 2 * 128_256 * 4096 + 4096
    assert whole == 8_030_261_248  # what the hub says of it
    assert load_architecture("meta-llama/Llama-3.1-8B-Instruct").parameters == whole


def test_llama_3_3_70b_and_its_adapter_by_hand():
    attention = 8192 * 8192 + 2 * 8192 * 1024 + 8192 * 8192
    layer = attention + 3 * 8192 * 28672 + 2 * 8192
    whole = 80 * layer + 2 * 128_256 * 8192 + 8192
    assert whole == 70_553_706_496  # what the hub says of it
    shape = load_architecture("meta-llama/Llama-3.3-70B-Instruct")
    assert shape.parameters == whole
    # r 16 on all seven: 16 x (in + out).
    by_hand = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    counts = count_parameters(shape, load("sft/llama3.3-70b-tools-qlora"))
    assert counts.adapter == counts.trained == by_hand == 207_093_760
    assert counts.in_4bit == 80 * (layer - 2 * 8192) == 68_451_041_280
    assert counts.whole == whole - counts.in_4bit


@pytest.mark.parametrize("name", ["embedded:tiny-llama", "embedded:tiny-student", "embedded:decide-llama"])
def test_what_is_known_of_the_embedded_models_is_what_they_are(name):
    config = json.loads(Path(resolve(name), "config.json").read_text())
    assert {key: config[key] for key in KNOWN[name]} == KNOWN[name]
    shape = load_architecture(resolve(name))
    assert shape.counted == shape.parameters == load_architecture(name).parameters


def test_an_architecture_that_is_not_known_is_counted_where_its_weights_are_and_else_refused(tmp_path):
    config = CONFIG_MAPPING["olmo2"](**SMALL)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shape = load_architecture(str(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.layers, {matrix.name for matrix in shape.matrices} >= {"q_proj", "down_proj"}) == (3, True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no plan is known for model_type 'olmo2'.*known are llama.*give a folder that holds its weights"):
        load_architecture(str(tmp_path))


def test_a_hub_model_is_found_in_the_hubs_cache_and_else_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"somebody/model: there is no config.json of it.*hf download somebody/model config.json"):
        load_architecture("somebody/model")
    # What can only be a folder is not sent to the hub.
    for name in ("/nowhere", str(tmp_path)):
        with pytest.raises(ModelError, match=f"{name}: holds no config.json, or is not there; give the folder of a model"):
            load_architecture(name)
    folder = tmp_path / "models--somebody--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = KNOWN["Qwen/Qwen3-8B"]
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    shape = load_architecture("somebody/model")
    assert shape.parameters == load_architecture("Qwen/Qwen3-8B").parameters == 8_190_735_360
    assert str(tmp_path) in shape.source


def test_the_shapes_of_an_adapter_are_its_bases(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-1.7B"}))
    assert load_architecture(str(tmp_path)).parameters == load_architecture("Qwen/Qwen3-1.7B").parameters == 1_720_574_976


@pytest.mark.parametrize("wrong", [{"hidden_size": None}, {"num_hidden_layers": 0}, {"vocab_size": "many"}])
def test_a_config_without_a_shape_is_refused_by_the_key(tmp_path, wrong):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Qwen/Qwen3-8B"] | wrong))
    (key,) = wrong
    with pytest.raises(ModelError, match=f"config.json: {key} = .*whole number"):
        load_architecture(str(tmp_path))


def test_a_target_that_the_model_does_not_have_is_refused_with_those_that_it_has():
    recipe = load("tiny/sft-lora", ["model.lora.target_modules=[q_proj, qkv_proj]"])
    with pytest.raises(RecipeError, match=r"target_modules holds qkv_proj; .* are q_proj, k_proj, v_proj, o_proj, gate_proj"):
        count_parameters(load_architecture("embedded:tiny-llama"), recipe)


def save_weights(path: Path, tensors: dict[str, list[int]]) -> None:
    """Their header alone."""
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def save_shards(folder: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": [10, 4]},
        "model-00002-of-00002.safetensors": {"lm_head.weight": [10, 4]},
    }
    for file, tensors in shards.items():
        save_weights(folder / file, tensors)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(KNOWN["Qwen/Qwen3-8B"]))


def test_weights_that_a_repository_holds_twice_are_counted_once(tmp_path):
    save_shards(tmp_path)
    save_weights(tmp_path / "consolidated.safetensors", {"tok_embeddings.weight": [10, 4], "output.weight": [10, 4]})
    assert load_architecture(str(tmp_path)).parameters == 10 * 4 + 10 * 4


def test_a_model_whose_download_is_not_whole_is_planned_by_its_config(tmp_path):
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    shape = load_architecture(str(tmp_path))
    assert (shape.counted, shape.parameters) == (None, 8_190_735_360)


def test_a_head_that_was_saved_although_it_is_tied_is_not_counted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Qwen/Qwen3-1.7B"]))
    save_weights(tmp_path / "model.safetensors", {"model.embed_tokens.weight": [10, 4], "lm_head.weight": [10, 4]})
    assert load_architecture(str(tmp_path)).parameters == 10 * 4
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Qwen/Qwen3-8B"]))
    assert load_architecture(str(tmp_path)).parameters == 2 * 10 * 4


def test_an_architecture_whose_config_says_its_width_in_another_way_is_refused_by_the_key(tmp_path):
    config = {"model_type": "opt", "hidden_size": 4, "num_attention_heads": 2, "ffn_dim": 8, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_weights(tmp_path / "model.safetensors", {"model.decoder.layers.0.fc1.weight": [8, 4]})
    with pytest.raises(ModelError, match="no plan is known for model_type 'opt', whose config has no intermediate_size"):
        load_architecture(str(tmp_path))
