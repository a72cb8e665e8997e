"""How ranks are started, and which backend rules in them.

The parent side is pure: `plan_launch` turns a recipe and counts into the argv that `harness run` prints and executes.
The rank side is `rule_backend`: a launcher's own Accelerate config beats the recipe's `backend`; without one the recipe's is put into the
environment by Accelerate's own functions, so that torchrun and deepspeed start the same job as `accelerate launch`.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from harness.errors import LaunchError, RecipeError
from harness.plugins import check_plugin
from harness.recipe import Recipe
from harness.recipe.backend import Backend, backend_of_json, load_backend
from harness.recipe.rules import check_backend_rules
from harness.resources import shipped
from harness.run import ATTEMPT_VARIABLE


@dataclass(frozen=True)
class Machines:
    """Where ranks run. One machine by default; several are described by the variables that torchrun's users know."""

    processes: int
    """Ranks on each machine."""
    count: int = 1
    index: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    """0: a free one (one machine only)."""

    @classmethod
    def from_environment(cls, processes: int, environment: dict[str, str]) -> "Machines":
        """Read NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. Raises LaunchError when several machines are not fully described."""
        count = _whole_number(environment, "NNODES", 1)
        if count == 0:
            raise LaunchError("NNODES is '0'; it is the number of machines, from 1")
        if count == 1:
            return cls(processes)
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise LaunchError(
                f"NNODES is {count}, but {', '.join(missing)} is not set; set it on every machine (NODE_RANK from 0 to {count - 1})"
            )
        index = _whole_number(environment, "NODE_RANK", 0)
        if index >= count:
            raise LaunchError(f"NODE_RANK is {index}; with NNODES = {count} it goes from 0 to {count - 1}")
        port = _whole_number(environment, "MASTER_PORT", 0)
        if not 0 < port < 2**16:
            raise LaunchError(f"MASTER_PORT is {port}; it must be the same free port on every machine, from 1 to 65535")
        return cls(processes, count, index, environment["MASTER_ADDR"], port)

    @property
    def world_size(self) -> int:
        return self.processes * self.count

    @property
    def environment(self) -> dict[str, str]:
        """What `from_environment` reads."""
        if self.count == 1:
            return {"NNODES": "1"}
        place = {"NODE_RANK": self.index, "MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        return {"NNODES": str(self.count), **{key: str(value) for key, value in place.items()}}


def _whole_number(environment: dict[str, str], name: str, default: int) -> int:
    text = environment.get(name, "") or str(default)
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def plan_launch(recipe: Recipe, machines: Machines, arguments: list[str], python: str = sys.executable) -> list[str]:
    """The argv that starts the ranks on this machine. `arguments` go to launch/train.py. Raises LaunchError for what cannot be started."""
    if recipe.task == "generate":
        raise LaunchError("task = generate; it trains nothing; use `harness generate RECIPE`")
    backend = load_backend(recipe.backend)
    check_named(recipe)
    check_world(recipe, backend, machines.world_size)
    script = [str(shipped("launch", "train.py")), *arguments]
    if backend.kind == "single":
        return [python, *script]
    argv = [python, "-m", "accelerate.commands.launch", "--config_file", str(backend.file), "--num_processes", str(machines.world_size)]
    argv += ["--num_machines", str(machines.count), "--machine_rank", str(machines.index)]
    argv += ["--main_process_ip", machines.address, "--main_process_port", str(machines.port)]
    # Said, so that Accelerate does not print a page of defaults that it chose.
    argv += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return argv + script


def check_named(recipe: Recipe) -> None:
    """Raises RecipeError for Python, and for a file of a reward, that the recipe names and that is not here."""
    named = [(f"rlhf.{key}", getattr(recipe.rlhf, key)) for key in ("tools", "environment")]
    named += [(f"rlhf.rewards.{place}.function", part.function) for place, part in enumerate(recipe.rlhf.rewards)]
    for key, name in named:
        if name:
            check_plugin(key, name)
    for place, part in enumerate(recipe.rlhf.rewards):
        if part.json_schema and not Path(part.json_schema).expanduser().is_file():
            raise RecipeError(f"rlhf.rewards.{place}.json_schema = {part.json_schema}; no such file; give a file that holds a JSON Schema")


def check_world(recipe: Recipe, backend: Backend, world_size: int) -> None:
    """Raises LaunchError when so many ranks cannot run this recipe."""
    if backend.kind == "single" and world_size > 1:
        raise LaunchError(f"backend = {backend.name} is one process, but {world_size} were asked for; use backend=ddp, zero2 or zero3")
    answers = recipe.train.per_device_train_batch_size * accumulation_steps(recipe, world_size) * world_size
    if recipe.task == "rlhf" and answers % recipe.rlhf.num_generations:
        raise LaunchError(
            f"rlhf.num_generations = {recipe.rlhf.num_generations}; a step takes {answers} answers ({world_size} ranks x "
            f"per_device_train_batch_size = {recipe.train.per_device_train_batch_size} x {accumulation_steps(recipe, world_size)}), which "
            "are no whole groups; set train.global_batch_size to a multiple of it"
        )


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per optimiser step. Raises LaunchError when the ranks cannot make the global batch."""
    train = recipe.train
    if train.global_batch_size is None:
        return train.gradient_accumulation_steps or 1
    per_micro_step = train.per_device_train_batch_size * world_size
    if train.global_batch_size % per_micro_step:
        possible = [n for n in range(1, 2 * world_size + 1) if train.global_batch_size % (train.per_device_train_batch_size * n) == 0]
        raise LaunchError(
            f"train.global_batch_size = {train.global_batch_size}; {world_size} ranks with per_device_train_batch_size = "
            f"{train.per_device_train_batch_size} take {per_micro_step} rows at once, which does not divide it; "
            f"use {' or '.join(map(str, possible))} rank{'' if possible == [1] else 's'}, or another per_device_train_batch_size"
        )
    return train.global_batch_size // per_micro_step


# ---- inside a rank


@dataclass(frozen=True)
class RuledBackend:
    backend: Backend
    ruled_by: str
    """`launcher` or `recipe`."""


def rule_backend(recipe: Recipe, environment: dict[str, str], *, has_gpu: bool) -> RuledBackend:
    """Decide which backend this rank runs under, and put it into `environment` (os.environ) when it is the recipe's.

    Raises RecipeError when the launcher's backend cannot run the recipe, LaunchError when these ranks or this machine cannot run it.
    """
    # `accelerate launch` always sets this one; torchrun, deepspeed and plain python never do.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    _check_switches(recipe, environment, by_accelerate)
    if by_accelerate and ATTEMPT_VARIABLE in environment:
        # `harness run` gave it the recipe's own backend, which is in its ranks' environment by now.
        ruled = RuledBackend(load_backend(recipe.backend), "recipe")
    elif by_accelerate:
        ruled = RuledBackend(_launchers_backend(environment), "launcher")
        # The recipe was checked against its own backend; this may be another one.
        problems = check_backend_rules(recipe, ruled.backend)
        if problems:
            raise RecipeError("\n".join(f"under accelerate launch's backend: {problem}" for problem in problems))
    else:
        backend = load_backend(recipe.backend)
        world_size = int(environment.get("WORLD_SIZE", 1))
        check_world(recipe, backend, world_size)
        environment.update(accelerate_environment(backend, world_size))
        ruled = RuledBackend(backend, "recipe")
    check_device(recipe, ruled.backend, has_gpu=has_gpu)
    return ruled


def check_device(recipe: Recipe, backend: Backend, *, has_gpu: bool) -> None:
    """Raises LaunchError for what only a GPU can do, where there is none."""
    train = recipe.train
    wants_gpu = {"fp16": train.fp16, "tf32": train.tf32 is True, "use_liger_kernel": train.use_liger_kernel}
    for key, asked in wants_gpu.items():
        if asked and not has_gpu:
            raise LaunchError(f"train.{key} = true; it needs a CUDA GPU, and this machine has none; leave it out")
    if backend.kind == "fsdp" and not has_gpu:
        raise LaunchError(
            f"backend {backend.name}: this machine has no GPU, and Accelerate 1.15 drops FSDP on a CPU without a word, so nothing would be "
            "sharded; use zero3, which shards on CPU too"
        )


def _check_switches(recipe: Recipe, environment: dict[str, str], by_accelerate: bool) -> None:
    """Raises LaunchError for what a launcher's environment would change behind the recipe's back."""
    for variable in ("ACCELERATE_USE_CPU", "FORCE_CPU"):
        if environment.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise LaunchError(
                f"{variable} = {environment[variable]} (use_cpu in a config, `accelerate launch --cpu`): makes one process out of however "
                "many were asked for, and says nothing; leave it out, the rank program uses the CPU by itself where there is no GPU "
                "(to hide the GPUs: CUDA_VISIBLE_DEVICES=)"
            )
    # Set for several processes, which only some of its launchers then start.
    if by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise LaunchError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and has started one (WORLD_SIZE is not); "
            "give it --config_file configs/backends/ddp.yaml, zero2.yaml or another, or --multi_gpu"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    said = "bf16" if recipe.train.bf16 is True else "fp16" if recipe.train.fp16 else "no"
    if precision not in ("no", said):
        raise LaunchError(
            f"accelerate launch says mixed_precision = {precision}; precision is the recipe's to say; take it out of the launcher's config "
            "(--mixed_precision no), and set train.bf16 or train.fp16 if it is what you want"
        )


def _launchers_backend(environment: dict[str, str]) -> Backend:
    """The backend that `accelerate launch` has put into the environment."""
    nowhere = Path("(accelerate launch)")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        json_file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if json_file not in ("", "none"):
            return backend_of_json(Path(json_file).stem, nowhere, Path(json_file))
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        devices = [environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
        saves = environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false").lower() == "true" or stage != 3
        return Backend(f"zero{stage}", nowhere, "deepspeed", stage, any(device != "none" for device in devices), saves)
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if environment.get("FSDP_VERSION") != "2":
            raise LaunchError(
                "accelerate launch asks for FSDP1, which is deprecated; set fsdp_version: 2 in its config, or take backends/fsdp2.yaml"
            )
        return Backend("fsdp2", nowhere, "fsdp", offloads=environment.get("FSDP_OFFLOAD_PARAMS") == "true")
    world_size = int(environment.get("WORLD_SIZE", 1))
    return Backend("ddp" if world_size > 1 else "single", nowhere, "ddp" if world_size > 1 else "single")


def accelerate_environment(backend: Backend, world_size: int) -> dict[str, str]:
    """The variables that `accelerate launch --config_file <backend>` would give to its ranks, by Accelerate's own functions."""
    if backend.kind in ("single", "ddp"):
        return {}
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # Port 0: the launch that we only imitate must not look whether the real one's port is in use.
    argv = [
        "--config_file",
        str(backend.file),
        "--num_processes",
        str(world_size),
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "-",
    ]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    if backend.kind == "deepspeed":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, planned = prepare_deepspeed_cmd_env(args)
    else:
        planned = prepare_multi_gpu_env(args)
    return {key: value for key, value in planned.items() if key.startswith(("ACCELERATE_", "FSDP_")) and os.environ.get(key) != value}
