"""An earlier adapter is taken whole or refused, the reference is what it should be and leaves no trace, and two adapters make one."""

import json
import os
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import REPOSITORY, run_command
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file

from harness.embedded import resolve
from harness.errors import ModelError
from harness.model import attach_adapter, load_base
from harness.model.adapters import (
    add_reference_adapter,
    check_is_no_adapter,
    check_revision,
    concatenate_adapters,
    find_adapter,
    load_earlier,
    reference_of,
    trained_as_they_are,
)
from harness.model.export import MANIFEST, adapter_shapes, digest_base, digest_file
from harness.recipe import load
from harness.recipe.backend import load_backend

CPU = torch.device("cpu")
SINGLE = load_backend("single")
IDS = torch.arange(5, 45).reshape(2, 20)
NEW = "model.lora={r: 3, alpha: 9}"


@pytest.fixture(scope="module")
def base() -> str:
    return resolve("embedded:tiny-llama")


def open_base(base: str, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def write_adapter(base: str, folder: Path, seed: int = 1, **settings) -> Path:
    """A LoRA folder as PEFT alone writes it, with weights that do something."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(open_base(base), peft.LoraConfig(**config))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "final")


@pytest.fixture
def spoilt(adapter, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "final"))


@pytest.fixture
def recipe_of(base, tmp_path):
    def recipe_of(adapter, *overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps({"model": {"name_or_path": base, "adapter": str(adapter)}, "data": {"train": "rows.jsonl"}}))
        return load(str(file), overrides)

    return recipe_of


@pytest.fixture
def policy_of(base, recipe_of):
    """policy_of(adapter, *overrides) -> the model as a run begins with it"""

    def policy_of(adapter, *overrides, dtype="float32"):
        recipe = recipe_of(adapter, *overrides)
        model = load_base(recipe, base, dtype, "sdpa", SINGLE, CPU)
        return attach_adapter(model, recipe, SINGLE, dtype).eval()

    return policy_of


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def plain(base: str, adapter: Path) -> torch.Tensor:
    """What PEFT alone makes of base and adapter."""
    return logits(peft.PeftModel.from_pretrained(open_base(base), str(adapter)).eval())


def move(model) -> None:
    """As a few steps would."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def flags(model) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


# ---- continued


def test_a_policy_that_continues_begins_as_the_earlier_adapter_and_trains_it(base, adapter, policy_of):
    model = policy_of(adapter)
    assert torch.equal(logits(model), plain(base, adapter))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    assert adapter_shapes(model) == {name: tuple(tensor.shape) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}


def test_float32_weights_of_an_adapter_are_not_rounded_on_a_bfloat16_base(adapter, policy_of):
    model = policy_of(adapter, dtype="bfloat16")
    held = peft.get_peft_model_state_dict(model)
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        assert held[name].dtype == torch.float32 and torch.equal(held[name], tensor), name


def test_an_adapter_on_4_bits_may_be_continued(base, adapter, recipe_of):
    recipe = recipe_of(adapter, "model.quantization.load_in_4bit=true")
    model = attach_adapter(load_base(recipe, base, "float32", "sdpa", SINGLE, CPU), recipe, SINGLE, "float32")
    assert add_reference_adapter(model) == "reference"
    move(model)
    outside = logits(model)
    with reference_of(model):
        assert not torch.allclose(logits(model), outside)


def test_a_trainer_that_casts_what_is_trained_does_not_round_what_an_adapter_has_learnt(adapter, policy_of):
    model = policy_of(adapter)
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    with trained_as_they_are(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does for a 4-bit base
    after = dict(model.named_parameters())
    assert before and all(after[name].dtype == torch.float32 and torch.equal(after[name], data) for name, data in before.items())


# ---- stacked, and two as one


def test_a_stacked_policy_is_the_base_with_both_and_trains_the_new_one_alone(base, adapter, policy_of):
    model = policy_of(adapter, "model.adapter_mode=stack", NEW)
    torch.testing.assert_close(logits(model), plain(base, adapter))  # a new adapter does nothing yet
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(".default." in name for name in names)
    move(model)
    assert not torch.allclose(logits(model), plain(base, adapter))


def test_what_switches_adapters_off_and_on_does_not_thaw_the_one_beneath(adapter, policy_of):
    model = policy_of(adapter, "model.adapter_mode=stack", NEW)
    before, output = flags(model), logits(model)
    with model.disable_adapter():
        pass
    assert flags(model) == before and torch.equal(logits(model), output)


def test_only_the_trained_adapter_is_saved(adapter, policy_of, tmp_path):
    model = policy_of(adapter, "model.adapter_mode=stack", NEW)
    model.save_pretrained(tmp_path / "saved")
    assert not [entry for entry in (tmp_path / "saved").iterdir() if entry.is_dir()]
    assert {
        tensor.shape[0] for name, tensor in load_file(tmp_path / "saved" / "adapter_model.safetensors").items() if "lora_A" in name
    } == {3}


PAIRS = [
    ({}, {"r": 2, "lora_alpha": 4}),
    ({"r": 3, "lora_alpha": 7, "use_rslora": True}, {"r": 5, "lora_alpha": 9}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "down_proj", "embed_tokens"], "r": 6}),
    (
        {"target_modules": r".*layers\.0\..*proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
]


@pytest.mark.parametrize("later, earlier", PAIRS)
def test_two_adapters_make_one_that_does_what_both_do(base, tmp_path, later, earlier):
    above, beneath = write_adapter(base, tmp_path / "above", **later), write_adapter(base, tmp_path / "beneath", seed=2, **earlier)
    both = peft.PeftModel.from_pretrained(open_base(base), str(above))
    both.load_adapter(str(beneath), "second")
    both.base_model.set_adapter(["default", "second"])
    expected = logits(both.eval())
    shapes = concatenate_adapters(beneath, above)
    torch.testing.assert_close(plain(base, above), expected, rtol=1e-5, atol=1e-4)
    assert (expected - plain(base, beneath)).abs().max() > 0.1
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load_file(above / "adapter_model.safetensors").items()}


def test_two_of_one_scale_are_put_together_bit_for_bit(base, tmp_path):
    above = write_adapter(base, tmp_path / "above", r=2, lora_alpha=4)
    beneath = write_adapter(base, tmp_path / "beneath", seed=2, r=4, lora_alpha=8)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (above, beneath))
    concatenate_adapters(beneath, above)
    for name, tensor in load_file(above / "adapter_model.safetensors").items():
        assert torch.equal(tensor, torch.cat([first[name], second[name]], dim=0 if "lora_A" in name else 1))


# ---- the reference


def test_the_reference_of_a_continued_policy_is_the_adapter_as_it_began(base, adapter, policy_of):
    model = policy_of(adapter)
    trained = flags(model)
    assert add_reference_adapter(model) == "reference"
    move(model)
    before, moved = flags(model), logits(model)
    with reference_of(model):
        assert torch.equal(logits(model), plain(base, adapter))
        assert flags(model) == before
    assert torch.equal(logits(model), moved) and not torch.allclose(moved, plain(base, adapter))
    assert sum(before) == sum(trained) and flags(model) == before


def test_the_reference_of_a_stacked_policy_is_the_earlier_adapter_alone(base, adapter, policy_of):
    model = policy_of(adapter, "model.adapter_mode=stack", NEW)
    assert add_reference_adapter(model) == "earlier"
    move(model)
    before, moved = flags(model), logits(model)
    with reference_of(model):
        assert torch.equal(logits(model), plain(base, adapter))
        assert flags(model) == before
    assert torch.equal(logits(model), moved) and flags(model) == before


def test_the_reference_of_a_new_adapter_is_the_base(base, policy_of, recipe_of, adapter):
    recipe = recipe_of(adapter, "model.adapter=null", NEW)
    model = attach_adapter(open_base(base), recipe, SINGLE, "float32").eval()
    move(model)
    with reference_of(model):
        assert torch.equal(logits(model), logits(open_base(base)))
    assert not torch.allclose(logits(model), logits(open_base(base)))


def test_the_reference_has_its_own_copy_of_a_module_that_is_trained_whole(base, policy_of, tmp_path):
    model = policy_of(write_adapter(base, tmp_path / "whole", modules_to_save=["embed_tokens"], target_modules=["q_proj"]))
    add_reference_adapter(model)
    move(model)
    assert any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    with reference_of(model):
        assert torch.equal(logits(model), plain(base, tmp_path / "whole"))
    assert not torch.allclose(logits(model), plain(base, tmp_path / "whole"))


def test_an_error_inside_leaves_the_policy_active(adapter, policy_of):
    model = policy_of(adapter)
    add_reference_adapter(model)
    move(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference_of(model):
        raise RuntimeError("out of memory")
    assert torch.equal(logits(model), before)


def test_the_copy_is_neither_saved_nor_among_what_an_export_must_hold(adapter, policy_of, tmp_path):
    model = policy_of(adapter)
    shapes = adapter_shapes(model)
    add_reference_adapter(model)
    assert adapter_shapes(model) == shapes
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").rglob("*.safetensors")) == ["adapter_model.safetensors"]
    assert load_file(tmp_path / "saved" / "adapter_model.safetensors").keys() == shapes.keys()


def test_a_policy_without_an_adapter_is_not_its_own_reference(base):
    with pytest.raises(ModelError, match="load the reference as a model of its own"), reference_of(open_base(base)):
        pass


@pytest.mark.slow
def test_under_every_backend_gradients_reach_the_policy_alone_and_the_reference_stays(adapter, base, tmp_path):
    """Two ranks on gloo: DDP, ZeRO-2 and ZeRO-3, each with a copied reference and with an adapter beneath (adapter_ranks.py)."""
    script = Path(__file__).with_name("adapter_ranks.py")
    expected = tmp_path / "expected.pt"
    torch.save({"ids": IDS, "reference": plain(base, adapter)}, expected)
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests" / "checkpoint")))
    done = run_command(sys.executable, str(script), base, str(adapter), str(expected), str(tmp_path), PYTHONPATH=paths, OMP_NUM_THREADS="1")
    assert done.code == 0, done.output[-6000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert seen.keys() == {f"{backend} {mode}" for backend in ("ddp", "zero2", "zero3") for mode in ("continue", "stack")}
        for case, found in seen.items():
            assert found["reference_before"] < 1e-4 and found["reference_after"] < 1e-4, case
            assert found["policy_moved"] > 1e-2, case
            assert found["without_gradient"] == [] and found["changed"] and all(".default." in name for name in found["changed"]), case
            assert found["flags_kept"], case


# ---- refused


def refusal(recipe_of, base, folder, *overrides) -> str:
    with pytest.raises(ModelError) as raised:
        load_earlier(recipe_of(folder, *overrides), base)
    return str(raised.value)


def test_what_is_no_adapter_is_refused_with_what_it_is(base, tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        find_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="holds no adapter_config.json.*a whole model is given as model.name_or_path"):
        find_adapter(base)


def test_a_run_folder_means_its_final_and_a_checkpoint_is_refused(spoilt):
    assert find_adapter(str(spoilt.parent)) == spoilt
    (spoilt / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="is a checkpoint"):
        find_adapter(str(spoilt))


def test_an_adapter_as_the_base_of_a_run_is_refused(adapter, base):
    check_is_no_adapter("some/model", base)
    with pytest.raises(ModelError, match="holds an adapter; give it as model.adapter, and the base that it was trained on"):
        check_is_no_adapter("x", str(adapter))


def test_another_base_is_refused_by_name_and_by_digest(adapter, base, spoilt, recipe_of, tmp_path):
    other = resolve("embedded:tiny-student")
    assert f"was trained on {base}" in refusal(recipe_of, other, adapter, f"model.name_or_path={other}")
    as_ours = {"base": "org/base", "base_digest": digest_base(base), "base_revision": None, "files": {}}
    (spoilt / MANIFEST).write_text(json.dumps(as_ours))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert load_earlier(recipe_of(spoilt, f"model.name_or_path={moved}"), str(moved)).base == "org/base"  # the same weights elsewhere
    assert "their digest differs" in refusal(recipe_of, other, spoilt, f"model.name_or_path={other}")


def test_another_commit_of_a_hub_model_is_refused(adapter, spoilt, recipe_of, base):
    (spoilt / MANIFEST).write_text(json.dumps({"base": base, "base_digest": None, "base_revision": "abc", "files": {}}))
    earlier = load_earlier(recipe_of(spoilt), base)
    check_revision(earlier, "abc")
    with pytest.raises(ModelError, match="commit abc.*set model.revision: abc"):
        check_revision(earlier, "def")


def test_an_altered_export_is_refused(spoilt, recipe_of, base):
    files = {"adapter_model.safetensors": digest_file(spoilt / "adapter_model.safetensors")}
    (spoilt / MANIFEST).write_text(json.dumps({"base": base, "base_digest": digest_base(base), "base_revision": None, "files": files}))
    digest = load_earlier(recipe_of(spoilt), base).digest
    tensors = load_file(spoilt / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, spoilt / "adapter_model.safetensors")
    assert "is not what was exported" in refusal(recipe_of, base, spoilt)
    (spoilt / MANIFEST).unlink()
    assert load_earlier(recipe_of(spoilt), base).digest != digest


SETTINGS = [
    ({"peft_type": "IA3"}, (), "only LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, (), "changes the base too"),
    ({"bias": "all"}, (), "the base's own biases"),
    ({"use_dora": True}, ("model.adapter_mode=stack", NEW), "use_dora = True, and such a one cannot be made one LoRA"),
    ({"use_dora": True}, ("model.quantization.load_in_4bit=true",), "norms need whole weights"),
]


@pytest.mark.parametrize("settings, overrides, words", SETTINGS)
def test_a_kind_that_cannot_be_gone_on_from_is_refused(spoilt, recipe_of, base, settings, overrides, words):
    edit(spoilt / "adapter_config.json", **settings)
    assert words in refusal(recipe_of, base, spoilt, *overrides)


def test_an_adapter_on_the_head_can_only_be_merged(recipe_of, base, tmp_path):
    folder = write_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    assert "reads the frozen head; set model.adapter_mode: merge" in refusal(recipe_of, base, folder)
    load_earlier(recipe_of(folder, "model.adapter_mode=merge"), base)


def test_an_adapter_that_brings_a_weight_of_the_base_can_only_be_merged(recipe_of, base, tmp_path):
    folder = write_adapter(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    load_earlier(recipe_of(folder), base)
    model = peft.PeftModel.from_pretrained(open_base(base), str(folder))
    model.save_pretrained(folder, save_embedding_layers=True)
    assert "embed_tokens.base_layer.weight, a weight of its base" in refusal(recipe_of, base, folder)


def test_settings_that_are_cut_off_are_refused(spoilt, recipe_of, base):
    (spoilt / "adapter_config.json").write_text('{"peft_type": "LO')
    assert "adapter_config.json: is no JSON" in refusal(recipe_of, base, spoilt)


def test_weights_that_are_not_safetensors_are_refused(spoilt, recipe_of, base):
    (spoilt / "adapter_model.safetensors").rename(spoilt / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refusal(recipe_of, base, spoilt)


@pytest.mark.parametrize(
    "fault, words", [("lacks", "1 places no tensor"), ("foreign", "1 tensors have no place"), ("shape", "does not fit")]
)
def test_tensors_that_do_not_fit_the_base_are_refused(spoilt, policy_of, fault, words):
    file = spoilt / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if fault == "lacks":
        del tensors[name]
    elif fault == "foreign":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, file)
    with pytest.raises(ModelError, match=words):
        policy_of(spoilt)
