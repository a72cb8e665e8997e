"""What `harness doctor` says of torch, GPUs, kernels and 4-bit weights; GPUs, which this machine has not, are told by facts."""

import os

import pytest
import torch

from harness.doctor import accelerator, examine
from harness.doctor.accelerator import check_attention, check_operators, check_torch, judge_count, judge_gpu
from harness.model import four_bit
from harness.recipe import load


def levels(checks) -> list[tuple[str, str, str]]:
    return [(check.name, check.level, check.what) for check in checks]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (dvs-builder@U16)\n", "550.54.14"),
    ],
)
def test_the_driver_is_the_kernels_module(tmp_path, text, version):
    (tmp_path / "version").write_text(text)
    assert accelerator.cuda_driver(tmp_path / "version") == version
    assert accelerator.cuda_driver(tmp_path / "none") == "none"


def test_a_device_that_multiplies_wrongly_once_in_four_million_is_found(monkeypatch):
    assert accelerator.multiplies_rightly("cpu")
    rightly = torch.Tensor.__matmul__

    def wrongly(left, right):
        product = rightly(left, right)
        if product.dtype == torch.float32:
            product[1234, 567] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrongly)
    assert not accelerator.multiplies_rightly("cpu")


def test_what_a_gpu_says_of_itself_is_told(monkeypatch):
    monkeypatch.setattr(accelerator, "multiplies_rightly", lambda device: device == "cuda:1")
    for name, answer in {"device_count": 2, "set_device": None, "mem_get_info": (70, 80), "get_device_name": "H100"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    found = accelerator.try_gpu(1)
    assert (found["visible"], found["gpu"], found["gpu_free_bytes"], found["gpu_total_bytes"], found["multiplies"]) == (
        2,
        "H100",
        70,
        80,
        True,
    )
    assert accelerator.try_gpu(2) == {"visible": 2, "built_for": found["built_for"]}


def test_a_gpu_in_use_and_one_that_multiplies_wrongly_fail_and_a_free_one_is_ok():
    facts = {"gpu": "H100", "gpu_free_bytes": 79 * 2**30, "gpu_total_bytes": 80 * 2**30, "multiplies": True}
    assert levels(judge_gpu(0, facts)) == [("GPU 0", "ok", "H100, 79.0 GiB of 80.0 GiB free, multiplies rightly")]
    wrong = judge_gpu(1, facts | {"gpu_free_bytes": 60 * 2**30, "multiplies": False})
    assert levels(wrong) == [
        ("GPU 1", "fail", "H100: 20.0 GiB of 80.0 GiB are in use by others"),
        ("GPU 1", "fail", "H100: multiplies wrongly"),
    ]


def test_a_torch_for_cpus_on_a_machine_with_gpus_is_a_failure_and_so_is_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(accelerator, "count_gpus", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert levels(check_torch(None)) == [("torch", "fail", "built for CPUs alone")]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    ((name, level, what),) = levels(check_torch(None))
    assert (name, level, what) == ("GPU", "fail", "0 of 8 GPUs are visible")
    assert "nvidia-smi" in judge_count(0, 8, "13.0", "torch 2.13").remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert [check.level for check in check_torch(None)] == ["ok", "ok"]


def test_a_recipe_that_needs_a_gpu_fails_on_a_machine_without_one():
    found = check_torch(load("tiny/sft-full", ["train.use_liger_kernel=true"]))
    assert ("device", "fail", "train.use_liger_kernel = true; it needs a CUDA GPU, and this machine has none") in levels(found)


def test_the_attention_is_the_one_that_a_run_would_choose_or_the_reason_why_it_cannot_be():
    assert levels(check_attention(None)) == [("attention", "ok", "sdpa in float32, which `auto` chooses here")]
    (asked,) = check_attention(load("tiny/sft-full", ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"]))
    assert asked.level == "fail" and "flash-attn is not installed" in asked.what and "use auto" in asked.remedy


def test_operators_that_are_not_compiled_are_a_warning_and_without_a_compiler_a_failure(monkeypatch):
    from harness import operators

    monkeypatch.setattr(operators, "is_compiled", lambda name: False)
    (check,) = check_operators(None)
    assert (check.level, check.what) == ("warn", "operators not compiled yet: ShareMemComm, CPUAdam")
    assert "python -m harness.operators" in check.remedy
    (check,) = check_operators(load("tiny/sft-full", ["backend=zero2"]))
    assert check.what == "operators not compiled yet: ShareMemComm"
    monkeypatch.setattr(accelerator, "find_compiler", lambda: None)
    assert check_operators(None)[0].level == "fail"


def test_four_bit_weights_are_tried_and_kernels_that_compute_wrongly_are_found(monkeypatch):
    found = four_bit.try_four_bit("cpu")
    # The mean distance of a standard normal weight, in blocks of 64, to the nearest of nf4's 16 levels: 0.0727, counted with numpy.
    assert found.error == pytest.approx(0.0727, abs=0.003) and found.is_right
    import bitsandbytes

    rightly = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *arguments: rightly(*arguments) * 1.1)
    (check,) = accelerator.check_four_bit(None)
    assert check.level == "fail" and "computes wrongly on cpu" in check.what
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *arguments: 1 / 0)
    (check,) = accelerator.check_four_bit(None)
    assert check.level == "fail" and "ZeroDivisionError" in check.what


def test_a_library_that_crashes_is_a_failure_of_the_check_in_which_it_did():
    told = ['{"checking": "torch"}', '{"name": "torch", "checks": []}', '{"checking": "four_bit"}']
    (check,) = examine.read_told(told, "accelerator", -11, "Segmentation fault")
    assert (check.name, check.level, check.what) == ("four_bit", "fail", "was killed by SIGSEGV: Segmentation fault")
    (check,) = examine.read_told(told, "accelerator", None, "")
    assert check.what == "does not answer within 60 s"


def test_a_torch_that_does_not_load_is_said_with_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    (check,) = examine.run_apart(examine.Task("accelerator", "torch", names=("torch",)), None)
    assert (check.name, check.level) == ("torch", "fail") and "libcudart.so.12: cannot open" in check.what


def test_without_a_gpu_a_large_model_is_warned_of_and_a_tiny_one_is_not():
    hub_like = load("sft/llama3-8b-tools-qlora")
    counted = accelerator.count_parameters(hub_like)
    assert counted == pytest.approx(8.03e9, rel=0.01)  # Meta's own figure
    found = accelerator.judge_no_gpu(counted, hides_some=False)
    assert found.level == "warn" and "8.0 billion parameters" in found.what and "harness submit" in found.remedy
    assert accelerator.judge_no_gpu(accelerator.count_parameters(load("tiny/sft-lora")), hides_some=True).level == "ok"
