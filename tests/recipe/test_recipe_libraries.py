"""What a recipe and a backend may say, against the libraries that are installed: no key of ours is unknown to them."""

import dataclasses
import inspect
import re
from typing import get_args

import pytest

from harness.launcher import accumulation_steps
from harness.recipe import load
from harness.recipe.backend import DEEPSPEED_SCALARS, DEEPSPEED_SECTIONS, AccelerateDeepSpeed, AccelerateFile, AccelerateFsdp, load_backend
from harness.recipe.load import read_yaml
from harness.recipe.rules import SCHEDULER_KEYS
from harness.recipe.schema import Optimizer, Scheduler, SchedulerKwargs, Train
from harness.resources import shipped, shipped_names


@pytest.mark.parametrize("name", shipped_names("backends"))
def test_a_shipped_backend_is_taken_by_accelerate_and_says_no_counts(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = shipped("configs", "backends", f"{name}.yaml")
    ours, theirs = load_backend(name), load_config_from_file(str(file))
    assert theirs.distributed_type.value.replace("MULTI_GPU", "ddp").replace("NO", "single").lower() == ours.kind
    assert theirs.deepspeed_config.get("zero_stage", 0) == ours.zero_stage
    assert (theirs.use_cpu, theirs.mixed_precision) in ((False, None), (False, "no"))
    assert ours.name == name
    assert not set(read_yaml(file)) & {"num_processes", "num_machines", "mixed_precision", "use_cpu"}


def test_the_deepspeed_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    def keys(model):
        return set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}

    profiler = {
        name for name in dir(profiling) if re.fullmatch(r"FLOPS_PROFILER_[A-Z_]+", name) and not name.endswith(("_DEFAULT", "_FORMAT"))
    }
    installed = {
        "zero_optimization": keys(DeepSpeedZeroConfig),
        "zero_optimization.offload_optimizer": keys(DeepSpeedZeroOffloadOptimizerConfig),
        "zero_optimization.offload_param": keys(DeepSpeedZeroOffloadParamConfig),
        "bf16": keys(DeepSpeedBF16Config),
        "fp16": keys(DeepSpeedFP16Config),
        "comms_logger": keys(CommsLoggerConfig),
        "aio": set(AIO_DEFAULT_DICT),
        "flops_profiler": {getattr(profiling, name) for name in profiler},
    }
    assert installed == DEEPSPEED_SECTIONS
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert known >= DEEPSPEED_SCALARS


def test_accelerate_knows_every_key_that_a_backend_file_may_hold():
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    assert {name for name in AccelerateFsdp.model_fields if name not in options} == set()
    assert {name for name in AccelerateDeepSpeed.model_fields if name not in options} == set()
    from accelerate.commands.config.config_args import ClusterConfig

    assert set(AccelerateFile.model_fields) <= set(inspect.signature(ClusterConfig).parameters)


def test_names_that_are_passed_on_are_names_of_transformers():
    from transformers import TrainingArguments

    from harness.tasks.arguments import SAME_NAME

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(SAME_NAME) <= theirs
    assert set(SAME_NAME) <= set(Train.model_fields)


def test_every_optimiser_and_scheduler_of_the_schema_is_one_of_transformers():
    import torch
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(get_args(Optimizer)) <= {member.value for member in OptimizerNames}
    values = {
        "num_cycles": 1,
        "min_lr": 1e-6,
        "min_lr_rate": 0.1,
        "num_decay_steps": 5,
        "num_stable_steps": 5,
        "min_lr_ratio": 0.1,
        "power": 2.0,
        "lr_end": 1e-6,
    }
    assert set(values) == set(SchedulerKwargs.model_fields)
    for name in get_args(Scheduler):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        kwargs = {key: values[key] for key in SCHEDULER_KEYS.get(name, ())}
        if "min_lr" in kwargs:
            del kwargs["min_lr_rate"]
        get_scheduler(SchedulerType(name), optimizer, 2, 20, scheduler_specific_kwargs=kwargs)


REPRESENTATIVE = [
    ("tiny/sft-full", []),
    ("tiny/sft-qlora", ["train.optim=adamw_8bit", "train.gradient_checkpointing=true"]),
    ("sft/llama3-8b-tools-qlora", ["train.bf16=auto"]),
    (
        "sft/qwen2.5-7b-tools-lora",
        ["train.bf16=auto", "backend=ddp", "train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs.min_lr_rate=0.1"],
    ),
    ("tiny/sft-lora", ["train.metric_for_best_model=eval/loss", "train.early_stopping_patience=2"]),
]


@pytest.mark.parametrize("name, overrides", REPRESENTATIVE)
def test_a_recipe_becomes_arguments_that_trl_takes(name, overrides, tmp_path):
    from harness.tasks.arguments import training_arguments
    from harness.tasks.sft import build_arguments

    recipe = load(name, overrides)
    arguments = training_arguments(recipe, load_backend(recipe.backend), tmp_path, world_size=1, has_gpu=False, bf16_hardware=False)
    args = build_arguments(recipe, arguments, flattens=False)
    train = recipe.train
    assert (args.learning_rate, args.per_device_train_batch_size, args.seed) == (
        train.learning_rate,
        train.per_device_train_batch_size,
        train.seed,
    )
    assert args.gradient_accumulation_steps == accumulation_steps(recipe, 1)
    assert args.optim.value == train.optim
    assert args.get_warmup_steps(1000) == (train.warmup_steps if train.warmup_steps is not None else 1000 * (train.warmup_ratio or 0))
    assert (args.use_cpu, args.bf16, args.max_length, args.report_to) == (True, False, None, [])
    assert args.load_best_model_at_end == (train.metric_for_best_model is not None)
