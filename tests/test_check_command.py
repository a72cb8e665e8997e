"""`harness check`, as a process of its own: what it prints, how it ends, and that it is quick enough to be run before everything."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness.recipe import load

CPU_LIMIT_S = 0.6
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "wandb", "pyarrow", "numpy")


def run(*arguments, python: tuple = ("-m", "harness"), cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *python, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_it_prints_the_recipe_as_it_will_run_and_what_differs_from_the_defaults(tmp_path):
    done = run("check", "tiny/sft-lora", "train.seed=7", "--train.weight_decay", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    resolved, difference = done.stdout.split("\n# Differs from the defaults in:\n")
    (tmp_path / "resolved.yaml").write_text(done.stdout)
    assert load(tmp_path / "resolved.yaml") == load("tiny/sft-lora", ["train.seed=7", "train.weight_decay=0.1"])
    assert {"#   train.seed: 7", "#   train.weight_decay: 0.1", "#   model.lora.r: 8"} <= set(difference.splitlines())
    assert "train.optim" not in difference
    assert "  optim: adamw_torch_fused" in resolved


def test_a_wrong_recipe_leaves_with_2_and_says_file_key_value_rule_and_remedy(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("model: {name_or_path: x}\ndata: {train: rows.jsonl}\ntrain: {learning_rate: '1e-4', learning_rte: 1}\n")
    done = run("check", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert f'{file}: train.learning_rate = "1e-4"; must be a number' in done.stderr
    assert f"{file}: train.learning_rte: unknown key in train; did you mean `learning_rate`?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["check"], ["chekc", "tiny/sft-lora"], ["run", "tiny/sft-lora", "--processes", "0"]])
def test_a_wrong_command_leaves_with_2(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["check", "tiny/sft-lora"], ["check", "sft/llama3-8b-tools-qlora", "backend=zero3"], ["check", "nope"], ["--help"]]
)
def test_it_never_imports_anything_heavy(arguments):
    done = run(*arguments, python=("-X", "importtime", "-m", "harness"))
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "harness.cli" in imported
    assert imported & set(HEAVY) == set()


def cpu_seconds(*argv: str) -> float:
    """User and system time of one child: what it costs, however busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_it_answers_within_its_limit():
    python = min(cpu_seconds(sys.executable, "-c", "pass") for _ in range(3))
    check = min(cpu_seconds(sys.executable, "-m", "harness", "check", "sft/llama3-8b-tools-qlora") for _ in range(5))
    assert check < CPU_LIMIT_S, f"{check:.2f} s of CPU, of which Python itself takes {python:.2f} s"
