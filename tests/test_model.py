"""What is loaded is checked, what is trained has gradients, what is exported is what was trained: on tiny models, each fault by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.attention import register_varlen
from harness.embedded import resolve
from harness.errors import ModelError
from harness.model import (
    attach_adapter,
    check_4bit_is_sharded,
    check_4bit_survives_the_engine,
    check_gradients,
    check_vocabulary,
    draw_weights,
    follow_tokenizer,
    load_base,
    load_tokenizer,
    settle_adapter_dtype,
)
from harness.model.export import MANIFEST, adapter_shapes, check_export, compare_logits, digest_file, verify_export
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.precision import choose_dtype

CPU = torch.device("cpu")
SINGLE, ZERO3 = load_backend("single"), load_backend("zero3")


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(resolve("embedded:tiny-llama"), tmp_path / "base"))


@pytest.fixture
def recipe_of(tmp_path):
    """recipe_of(base, *overrides) -> Recipe"""

    def recipe_of(base, *overrides):
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps({"model": {"name_or_path": str(base)}, "data": {"train": "rows.jsonl"}}))
        return load(str(file), overrides)

    return recipe_of


def open_base(recipe, base, backend=SINGLE):
    return load_base(recipe, str(base), "float32", "sdpa", backend, CPU)


def edit(file: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


LORA = ("model.lora.r=4", "model.lora.alpha=8")


# ---- tokenizer and base


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(base, recipe_of):
    edit(base / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(recipe_of(base))


def test_a_folder_without_a_tokenizer_says_what_to_set(base, recipe_of):
    for file in base.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer at .*model.tokenizer"):
        load_tokenizer(recipe_of(base))


def test_the_end_of_sequence_token_pads_where_there_is_no_other(base, recipe_of):
    edit(base / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(recipe_of(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(base, recipe_of):
    recipe = recipe_of(base)
    model, tokenizer = open_base(recipe, base), load_tokenizer(recipe)
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens([f"<tool-{number}>" for number in range(model.config.vocab_size)])
    with pytest.raises(ModelError, match=f"embedding has {model.config.vocab_size} rows"):
        check_vocabulary(model, tokenizer)


def test_embeddings_that_are_tied_on_paper_only_are_refused(base, recipe_of):
    recipe = recipe_of(base)
    model, tokenizer = open_base(recipe, base), load_tokenizer(recipe)
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ModelError, match="two tensors"):
        check_vocabulary(model, tokenizer)


def test_the_model_stops_where_the_tokenizers_turns_end(base, recipe_of):
    recipe = recipe_of(base)
    model, tokenizer = open_base(recipe, base), load_tokenizer(recipe)
    for before, after in ((None, 7), (5, [7, 5]), ([5, 7], [5, 7])):
        model.generation_config.eos_token_id = before
        tokenizer.eos_token_id = 7
        follow_tokenizer(model, tokenizer)
        assert model.generation_config.eos_token_id == after
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_varlen_is_refused_for_a_model_that_takes_no_flash_kernels(base, recipe_of, monkeypatch):
    from transformers import LlamaForCausalLM

    register_varlen()
    load_base(recipe_of(base), str(base), "float32", "varlen", SINGLE, CPU)
    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    with pytest.raises(ModelError, match="LlamaForCausalLM takes no flash kernels.*flex_attention or sdpa"):
        load_base(recipe_of(base), str(base), "float32", "varlen", SINGLE, CPU)


def test_a_base_that_lacks_weights_is_refused_and_not_filled_with_random_ones(base, recipe_of):
    weights = load_file(base / "model.safetensors")
    lost = next(name for name in weights if "q_proj" in name)
    del weights[lost]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 of its weights .*{lost}"):
        open_base(recipe_of(base), base)


def test_a_checkpoint_of_pickles_is_refused(base, recipe_of):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded: .*safetensors"):
        open_base(recipe_of(base), base)


def test_code_from_a_models_folder_does_not_run_unless_the_recipe_says_so(base, recipe_of, tmp_path):
    witness = tmp_path / "it-ran"
    (base / "modeling_evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass EvilConfig: pass\nclass EvilModel: pass\n")
    automatic = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    edit(base / "config.json", model_type="evil", auto_map=automatic)
    with pytest.raises(ModelError, match="trust_remote_code"):
        open_base(recipe_of(base), base)
    assert not witness.exists()


def test_weights_are_drawn_once_by_the_seed(base, recipe_of, tmp_path):
    (base / "model.safetensors").unlink()
    digests = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe = recipe_of(base, f"model.init={base}", "model.name_or_path=null", f"train.seed={seed}")
        draw_weights(recipe, tmp_path / folder)
        digests.append(digest_file(tmp_path / folder / "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]
    draw_weights(recipe, tmp_path / "a")  # another seed, and weights that are there already stay
    assert digest_file(tmp_path / "a" / "model.safetensors") == digests[0]


@pytest.mark.parametrize(
    ("overrides", "backend", "bf16", "expected"),
    [
        ((), SINGLE, True, "float32"),  # AdamW on bfloat16 weights would round updates away
        ((), ZERO3, True, "bfloat16"),  # DeepSpeed keeps float32 masters
        (LORA, SINGLE, True, "bfloat16"),  # a frozen base
        (LORA, SINGLE, False, "float32"),
        (("train.fp16=true",), ZERO3, True, "float32"),
        (("model.dtype=bfloat16",), SINGLE, False, "bfloat16"),
    ],
)
def test_the_type_of_weights_never_loses_updates(recipe_of, overrides, backend, bf16, expected):
    assert choose_dtype(recipe_of("some/model", *overrides), backend, bf16_hardware=bf16) == expected


# ---- adapter


def test_an_unknown_target_is_answered_with_the_names_that_exist(base, recipe_of):
    recipe = recipe_of(base, *LORA, 'model.lora.target_modules=["query_proj"]')
    with pytest.raises(ModelError, match="query_proj.*modules with weights are: .*down_proj.*q_proj"):
        attach_adapter(open_base(recipe, base), recipe, SINGLE, "float32")


def test_all_linear_adapts_every_linear_layer_and_not_the_head(base, recipe_of):
    recipe = recipe_of(base, *LORA)
    model = attach_adapter(open_base(recipe, base), recipe, SINGLE, "float32")
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name in adapter_shapes(model) if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_is_float32_again_after_a_library_has_cast_it_except_where_one_type_must_serve_all(base, recipe_of):
    recipe = recipe_of(base, *LORA)
    model = attach_adapter(open_base(recipe, base), recipe, SINGLE, "float32")
    frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    # FSDP2 has no float32 masters of its own, and wants one type of what trains alone.
    for backend, expected in ((SINGLE, torch.float32), (load_backend("fsdp2"), torch.float32), (ZERO3, torch.bfloat16)):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does over a 4-bit base
        settle_adapter_dtype(model, backend, "bfloat16")
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {expected}
    assert frozen.dtype == torch.float32


def test_the_shapes_that_an_export_must_have_are_those_that_peft_writes(base, recipe_of, tmp_path):
    for number, more in enumerate(((), ("model.lora.use_dora=true",), ('model.lora.modules_to_save=["embed_tokens"]',))):
        recipe = recipe_of(base, *LORA, *more)
        model = attach_adapter(open_base(recipe, base), recipe, SINGLE, "float32")
        model.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        assert adapter_shapes(model) == {name: tuple(tensor.shape) for name, tensor in saved.items()}


# ---- 4 bits, sharded


class Params4bit(torch.nn.Parameter):
    """By its name, as the check finds bitsandbytes' own; with DeepSpeed's marks of a share."""


def sharded(local: int, whole: int) -> torch.nn.Module:
    model = torch.nn.Module()
    weight = Params4bit(torch.zeros(0, dtype=torch.bfloat16), requires_grad=False)
    weight.ds_tensor, weight.ds_numel = torch.zeros(local, dtype=torch.bfloat16), whole
    model.weight = weight
    return model


def test_packed_weights_that_deepspeed_would_cast_are_refused_and_bytes_are_not_cast(base, recipe_of):
    qlora = ("model.quantization={}", *LORA)
    packed_in_float32 = open_base(recipe_of(base, *qlora), base, ZERO3)
    check_4bit_survives_the_engine(packed_in_float32, None)
    check_4bit_survives_the_engine(packed_in_float32, "float32")
    with pytest.raises(ModelError, match="packed into float32.*set model.dtype: bfloat16"):
        check_4bit_survives_the_engine(packed_in_float32, "bfloat16")
    model = open_base(recipe_of(base, *qlora), base, load_backend("zero2"))
    check_4bit_survives_the_engine(model, "bfloat16")
    assert {parameter.dtype for name, parameter in model.named_parameters() if "q_proj" in name} == {torch.uint8}


def test_a_share_of_4bit_weights_is_told_in_bytes_and_a_whole_copy_is_refused():
    assert check_4bit_is_sharded(sharded(50_000, 100_000), 2) == "4-bit weights: 100,000 of 200,000 bytes on this rank"
    # What uint8 storage does: DeepSpeed leaves it whole on every rank.
    with pytest.raises(ModelError, match="holds 200,000 of 200,000 bytes .*not a share of 1/2.*bnb_4bit_quant_storage"):
        check_4bit_is_sharded(sharded(100_000, 100_000), 2)
    with pytest.raises(ModelError, match="no weight is in 4 bits"):
        check_4bit_is_sharded(torch.nn.Linear(2, 2), 2)


# ---- gradients


@pytest.fixture
def trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    check_gradients(model)
    return model


def test_a_trainable_tensor_without_a_gradient_is_named(trained):
    trained.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ModelError, match="1 tensors have no gradient, so they would never be trained: idle"):
        check_gradients(trained)


def test_a_frozen_tensor_with_a_gradient_is_named(trained):
    trained[0].bias.grad = torch.zeros(3)
    with pytest.raises(ModelError, match="1 tensors are frozen but have a gradient: 0.bias"):
        check_gradients(trained)


def test_a_gradient_that_is_not_finite_is_named_except_under_a_loss_scaler(trained):
    trained[1].weight.grad[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite: 1.weight"):
        check_gradients(trained)
    check_gradients(trained, finite=False)


def test_a_tensor_that_backward_never_came_to_is_named_though_its_gradient_reads_as_zeros(trained):
    zeros = {"gradient_of": lambda parameter: torch.zeros_like(parameter)}
    check_gradients(trained, **zeros, reached={"1.weight", "1.bias"})
    with pytest.raises(ModelError, match="no gradient.*: 1.bias"):
        check_gradients(trained, **zeros, reached={"1.weight"})


# ---- export


@pytest.fixture
def exported(base, recipe_of, tmp_path):
    """(folder of a good adapter, its model)"""
    recipe = recipe_of(base, *LORA)
    model = attach_adapter(open_base(recipe, base), recipe, SINGLE, "float32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "final")
    return tmp_path / "final", model


def spoil(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_good_adapter_passes_and_its_files_are_digested(exported):
    folder, model = exported
    digests = check_export(folder, adapter_shapes(model), adapter=True)
    assert digests["adapter_model.safetensors"] == digest_file(folder / "adapter_model.safetensors")
    assert "adapter_config.json" in digests


def test_the_40_byte_adapter_is_refused(exported, tmp_path):
    _, model = exported
    model.save_pretrained(tmp_path / "empty", state_dict={})
    assert (tmp_path / "empty" / "adapter_model.safetensors").stat().st_size <= 40
    with pytest.raises(ModelError, match="holds no tensor"):
        check_export(tmp_path / "empty", None, adapter=True)


def _empty(tensors):
    tensors[min(tensors)] = torch.zeros(0, 4)


def _untrained(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def _diverged(tensors):
    tensors[min(tensors)][0, 0] = float("nan")


def _no_lora(tensors):
    for name in [name for name in tensors if "lora_B" in name]:
        del tensors[name]


def _one_lost(tensors):
    del tensors[min(tensors)]


def _other_shape(tensors):
    name = min(tensors)
    tensors[name] = tensors[name][:, :3].contiguous()


FAULTS = {
    _empty: "is empty, shape",
    _untrained: "every lora_B is zero",
    _diverged: "not finite",
    _no_lora: "no lora_B tensor",
    _one_lost: "1 tensors lacking",
    _other_shape: "1 of another shape",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_spoilt_export_is_refused_by_name(exported, fault):
    folder, model = exported
    spoil(folder, fault)
    with pytest.raises(ModelError, match=FAULTS[fault]):
        check_export(folder, adapter_shapes(model), adapter=True)


def test_an_adapter_that_took_no_step_may_be_zero(exported):
    folder, model = exported
    spoil(folder, _untrained)
    check_export(folder, adapter_shapes(model), adapter=True, moved=False)


def test_a_flipped_bit_and_a_lost_file_are_named_when_an_export_is_verified(exported):
    folder, _ = exported
    with pytest.raises(ModelError, match=f"holds no {MANIFEST}"):
        verify_export(folder)
    (folder / MANIFEST).write_text(json.dumps({"files": check_export(folder, None, adapter=True)}))
    verify_export(folder)
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="adapter_model.safetensors: is not what was exported"):
        verify_export(folder)
    file.unlink()
    with pytest.raises(ModelError, match="adapter_model.safetensors is gone"):
        verify_export(folder)


# ---- merge


def test_the_difference_of_logits_is_what_it_is_by_hand():
    before, after = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.5, 2.0], [3.0, 0.0, -1.0]])
    found = compare_logits([before[:1], before[1:]], [after[:1], after[1:]])
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert (found["max_abs"], found["mean_abs"]) == (1.0, pytest.approx(1.5 / 6))


def test_a_merged_model_is_the_base_plus_the_scaled_product_of_the_adapters_halves(base, recipe_of, exported, tmp_path):
    from transformers import AutoModelForCausalLM

    from harness.model.export import merge_adapter

    folder, _ = exported
    rows = [[5, 9, 2, 40, 7, 33], [8, 8, 1]]
    differences = merge_adapter(folder, str(base), recipe_of(base, *LORA), "float32", tmp_path / "merged", rows)
    assert set(differences) == {"adapter"} and 0 < differences["adapter"]["kl"] < 1e-2
    # W + (alpha / r) B A in float32, by hand, then one rounding to bfloat16.
    weights, adapter, merged = load_file(base / "model.safetensors"), load_file(folder / "adapter_model.safetensors"), None
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in [name for name in adapter if ".lora_A." in name]:
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        whole = weights[target].float() + 8 / 4 * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
        torch.testing.assert_close(merged[target].float(), whole, atol=2**-7, rtol=2**-7)
        assert not torch.equal(merged[target], weights[target].to(torch.bfloat16))
        weights[target] = whole
    # And its logits are those of that model, far nearer than the base's.
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, state_dict=None)
    logits_of_base = expected(torch.tensor(rows[:1])).logits.detach()
    expected.load_state_dict(weights, strict=False)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    gap = (reopened(torch.tensor(rows[:1])).logits - expected(torch.tensor(rows[:1])).logits).abs().max()
    assert gap < 0.1 * (logits_of_base - expected(torch.tensor(rows[:1])).logits).abs().max()


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False])
def test_a_base_in_4_bits_on_a_gpu_answers_like_the_base_and_trains_its_adapter(base, recipe_of, double):
    overrides = (*LORA, "model.quantization.load_in_4bit=true", f"model.quantization.bnb_4bit_use_double_quant={str(double).lower()}")
    recipe, cuda = recipe_of(base, *overrides), torch.device("cuda", 0)
    quantized = load_base(recipe, str(base), "bfloat16", "sdpa", SINGLE, cuda)
    whole = load_base(recipe_of(base), str(base), "bfloat16", "sdpa", SINGLE, cuda).to(cuda)
    ids = torch.arange(4, 60, device=cuda)[None]
    a, b = (model(ids).logits.float().log_softmax(-1) for model in (whole, quantized))
    assert (a.exp() * (a - b)).sum(-1).mean() < 0.1
    model = attach_adapter(quantized, recipe, SINGLE, "bfloat16").train()
    model(ids, labels=ids).loss.backward()
    check_gradients(model)


def test_a_model_learns_where_turns_end_and_what_it_would_have_missed_is_named():
    from types import SimpleNamespace

    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=None), generation_config=SimpleNamespace(pad_token_id=None, eos_token_id=2))
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    assert follow_tokenizer(model, tokenizer, {2, 7}) == [7]
    assert model.generation_config.eos_token_id == [7, 2]
    assert follow_tokenizer(model, tokenizer, {2, 7}) == []
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


def test_a_row_beyond_the_models_positions_is_refused():
    from types import SimpleNamespace

    from harness.model import check_positions

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=512))
    check_positions(SimpleNamespace(config=config), 512)
    with pytest.raises(ModelError, match="513 tokens .* positions for 512.*set data.max_length: 512"):
        check_positions(SimpleNamespace(config=config), 513)
