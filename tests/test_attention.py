"""Which attention is chosen, what our adapter of torch's variable-length kernel hands to it, and the check that samples stay apart."""

import sys
import types

import pytest
import torch

from harness import attention
from harness.attention import check_isolation, choose_attention, varlen_attention_forward
from harness.embedded import resolve
from harness.errors import ModelError

gpu = pytest.mark.gpu


# ---- choice

# (asked, dtype, GPU, varlen there, flash-attn there) -> chosen, or what the refusal says
CHOICES = [
    (("auto", "bfloat16", True, True, True), "varlen"),
    (("auto", "bfloat16", True, False, True), "flash_attention_2"),
    (("auto", "bfloat16", True, False, False), "flex_attention"),
    (("auto", "float32", True, True, True), "sdpa"),
    (("auto", "float32", False, False, False), "sdpa"),
    (("auto", "bfloat16", False, True, True), "sdpa"),
    (("sdpa", "float32", True, True, True), "sdpa"),
    (("eager", "float32", False, False, False), "eager"),
    (("varlen", "float16", True, True, False), "varlen"),
    (("varlen", "bfloat16", False, True, False), "needs a CUDA GPU"),
    (("varlen", "bfloat16", True, False, True), "needs a CUDA GPU"),
    (("varlen", "float32", True, True, True), "half precision"),
    (("flex_attention", "float32", False, False, False), "no backward pass on a CPU"),
    (("flash_attention_2", "bfloat16", True, True, False), "not installed"),
    (("flash_attention_2", "bfloat16", False, True, True), "no GPU"),
    (("kernels-community/flash-attn2", "bfloat16", False, True, True), "pip install kernels"),
]


@pytest.mark.parametrize(("here", "expected"), CHOICES)
def test_attention_is_the_fastest_that_isolates_or_the_one_asked_for_or_refused(here, expected, monkeypatch):
    asked, dtype, has_gpu, varlen, flash = here
    monkeypatch.setattr(attention, "_is_ampere", lambda: True)
    monkeypatch.setattr(attention, "_has_varlen", lambda: varlen)
    monkeypatch.setattr(attention, "_has_flash", lambda version: flash)
    if " " in expected:
        with pytest.raises(ModelError, match=expected):
            choose_attention(asked, dtype, has_gpu)
    else:
        assert choose_attention(asked, dtype, has_gpu) == expected


# ---- varlen: the layout, against attention written out sample by sample


def varlen_double(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn promises: query [N, Hq, D], key, value [N, Hkv, D], boundaries [S + 1] -> [N, Hq, D]."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k) and query.dtype in (torch.bfloat16, torch.float64)
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths) and sum(lengths) == len(query)
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1) and window_size[1] == 0
    mixed = torch.empty_like(query)
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        for head in range(query.shape[1]):
            for at in range(start, end):
                first = start if window_size[0] < 0 else max(start, at - window_size[0])
                keys, values = key[first : at + 1, head // group], value[first : at + 1, head // group]
                weights = (keys @ query[at, head] * scale).softmax(0)
                mixed[at, head] = weights @ values
    return mixed


@pytest.fixture
def kernel(monkeypatch):
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_double
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


def masked_sdpa(query, key, value, samples, scale, window):
    """The same by PyTorch's SDPA and one explicit mask: same sample, not later, not further back than the window."""
    at = torch.arange(query.shape[2])
    allowed = (samples[:, None] == samples[None]) & (at[:, None] >= at[None])
    if window:
        allowed &= at[:, None] - at[None] < window
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=True).transpose(
        1, 2
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_flattened_batch_attends_within_its_samples(kernel, kv_heads, window):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 6]
    query = torch.randn(1, 4, 12, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(1, kv_heads, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    boundaries = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    mixed, weights = varlen_attention_forward(
        None, query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=boundaries, max_length_q=6
    )
    samples = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    assert mixed.shape == (1, 12, 4, 8) and weights is None
    torch.testing.assert_close(mixed, masked_sdpa(query, key, value, samples, 0.3, window))


def test_without_boundaries_every_row_is_one_sample_and_float32_comes_back_as_float32(kernel):
    query, key, value = (torch.randn(3, heads, 7, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    mixed, _ = varlen_attention_forward(None, query, key, value, None, scaling=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, atol=3e-2, rtol=3e-2)  # through bfloat16


def test_what_the_kernel_cannot_do_is_refused(kernel):
    tensor = torch.zeros(1, 2, 4, 8)
    for more, says in (({"softcap": 30.0}, "soft-capping"), ({"dropout": 0.1}, "dropout"), ({"s_aux": torch.zeros(2)}, "sinks")):
        with pytest.raises(ModelError, match=says):
            varlen_attention_forward(None, tensor, tensor, tensor, None, **more)
    with pytest.raises(ModelError, match="padded batch"):
        varlen_attention_forward(None, tensor, tensor, tensor, torch.ones(1, 4))


# ---- isolation


@pytest.fixture
def tiny_llama():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), attn_implementation="sdpa")


def test_sdpa_with_position_ids_keeps_samples_apart(tiny_llama):
    assert check_isolation(tiny_llama, tiny_llama.config.vocab_size, torch.device("cpu")) < 1e-5
    assert not tiny_llama.training  # as it was


def test_a_model_that_ignores_the_boundaries_is_refused(tiny_llama):
    forward = tiny_llama.forward

    def blind(input_ids, position_ids, **kwargs):
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], use_cache=False)

    tiny_llama.forward = blind
    with pytest.raises(ModelError, match="logits change by .* with its neighbour"):
        check_isolation(tiny_llama, tiny_llama.config.vocab_size, torch.device("cpu"))


def test_logits_that_are_not_numbers_are_no_isolation(tiny_llama):
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="neighbour"):
        check_isolation(tiny_llama, tiny_llama.config.vocab_size, torch.device("cpu"))


# ---- on a GPU


@gpu
def test_varlen_on_a_gpu_has_the_logits_and_gradients_of_sdpa():
    from transformers import AutoModelForCausalLM

    choose_attention("varlen", "bfloat16", True)
    generator = torch.Generator().manual_seed(0)
    results = {}
    lengths = [33, 1, 66]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    boundaries = torch.tensor([0, 33, 34, 100], dtype=torch.int32).cuda()
    ids = torch.randint(0, 200, (1, 100), generator=generator).cuda()
    for name in ("varlen", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.bfloat16, attn_implementation=name).cuda()
        packed = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 66, "max_length_k": 66}
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **packed).logits.float()
        logits.log_softmax(-1)[0, :, 0].sum().backward()
        results[name] = logits.detach(), {key: parameter.grad.float() for key, parameter in model.named_parameters()}
        assert check_isolation(model, 200, torch.device("cuda")) <= 2e-2
    torch.testing.assert_close(results["varlen"][0], results["sdpa"][0], atol=5e-2, rtol=5e-2)
    for key, gradient in results["varlen"][1].items():
        reference = results["sdpa"][1][key]
        assert (gradient - reference).norm() <= 0.03 * reference.norm() + 1e-6, key
