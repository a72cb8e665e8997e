"""Backends: ordinary Accelerate config files, read as strictly as a recipe.

A backend file carries sharding policy and nothing else: how many ranks there are is the launcher's to say, and precision is the recipe's
(bf16 in the file under an fp32 recipe raises deep inside). The same files work with `accelerate launch --config_file`.

Accelerate and DeepSpeed accept a misspelt nested key in silence (`zero_stag` trains at stage 2, `zero_optimisation` at stage 0), so the
keys are listed here; a test holds the lists against the installed libraries.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.errors import RecipeError
from harness.recipe.schema import Section
from harness.resources import find_config, shipped_names


class AccelerateDeepSpeed(Section):
    """The `deepspeed_config` of an Accelerate file."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    zero3_init_flag: bool = False
    zero3_save_16bit_model: bool = False
    offload_optimizer_device: Literal["none", "cpu", "nvme"] = "none"
    offload_param_device: Literal["none", "cpu", "nvme"] = "none"
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    deepspeed_moe_layer_cls_names: str | None = None
    deepspeed_multinode_launcher: Literal["standard"] = "standard"
    """`standard` is torchrun on every node; the others want a password-less ssh between nodes."""
    deepspeed_config_file: str | None = None
    """A DeepSpeed JSON, checked below; it then says everything and the keys above must be absent."""


class AccelerateFsdp(Section):
    """The `fsdp_config` of an Accelerate file; FSDP1 is deprecated and not offered."""

    fsdp_version: Literal[2]
    fsdp_reshard_after_forward: bool = True
    fsdp_offload_params: bool = False
    fsdp_auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = "TRANSFORMER_BASED_WRAP"
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    fsdp_min_num_params: int | None = None
    fsdp_state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = "FULL_STATE_DICT"
    fsdp_cpu_ram_efficient_loading: bool = True
    fsdp_activation_checkpointing: Literal[False] = False
    """`train.gradient_checkpointing` says this, for every backend alike."""


class AccelerateFile(Section):
    compute_environment: Literal["LOCAL_MACHINE"] = "LOCAL_MACHINE"
    distributed_type: Literal["NO", "MULTI_GPU", "DEEPSPEED", "FSDP"]
    deepspeed_config: AccelerateDeepSpeed | None = None
    fsdp_config: AccelerateFsdp | None = None
    rdzv_backend: Literal["static", "c10d"] = "static"
    same_network: bool = True
    main_training_function: str = "main"
    debug: bool = False


# What belongs to the launcher or the recipe, and why a backend file may not say it.
_NOT_HERE = {
    "num_processes": "how many ranks there are is the launcher's to say (--processes)",
    "num_machines": "how many machines there are is the launcher's to say",
    "machine_rank": "it differs from machine to machine; the launcher says it",
    "main_process_ip": "the launcher says it (MASTER_ADDR)",
    "main_process_port": "the launcher says it (MASTER_PORT)",
    "gpu_ids": "use CUDA_VISIBLE_DEVICES",
    "mixed_precision": "precision is the recipe's (train.bf16, model.dtype)",
    "downcast_bf16": "precision is the recipe's (train.bf16, model.dtype)",
    "use_cpu": "Accelerate would make one process out of many; the rank program chooses the device",
    "gradient_accumulation_steps": "it is the recipe's (train.gradient_accumulation_steps)",
    "gradient_clipping": "it is the recipe's (train.max_grad_norm)",
}

# What DeepSpeed 0.19 knows, section by section (a test compares each with the installed one). Values it checks
# itself; an unknown key at the top level it would drop in silence.
ZERO_KEYS = set(
    """
    allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters
    leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
    param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter
    round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """.split()
)
DEEPSPEED_SECTIONS = {
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_optimizer": set(
        """
        buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio super_offload
        """.split()
    ),
    "zero_optimization.offload_param": {"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"},
    "bf16": {"enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"},
    "fp16": set(
        """
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale
        fp16_master_weights_and_grads
        """.split()
    ),
    "comms_logger": {"enabled", "verbose", "prof_all", "debug", "prof_ops"},
    "flops_profiler": {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
}
DEEPSPEED_SCALARS = set(
    """
    communication_data_type dump_state gradient_accumulation_steps gradient_clipping gradient_predivide_factor memory_breakdown
    prescale_gradients seq_parallel_communication_data_type steps_per_print train_batch_size train_micro_batch_size_per_gpu
    wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)
# Sizes and precision come from the recipe; DeepSpeed may only be told to take them from there.
_ONLY_AUTO = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
)


@dataclass(frozen=True)
class Backend:
    """What the rest of harness asks about a backend."""

    name: str
    file: Path
    kind: Literal["single", "ddp", "deepspeed", "fsdp"]
    zero_stage: int = 0
    offloads: bool = False
    """Optimiser state or parameters live on the host."""
    saves_16bit: bool = True
    """ZeRO-3 gathers weights when it saves; without it an export would be empty."""
    offloads_parameters: bool = False
    """ZeRO-3's or FSDP2's shares of the weights live on the host, besides the optimiser state."""
    zero: dict = field(default_factory=dict, compare=False)
    """The `zero_optimization` of a DeepSpeed JSON, for whoever asks for its sizes; without one DeepSpeed's own defaults rule."""

    @property
    def shards_parameters(self) -> bool:
        return self.kind == "fsdp" or self.zero_stage == 3


def load_backend(name: str, base_dir: Path | None = None) -> Backend:
    """The backend that a name or a path means. Raises RecipeError for an unknown name, an unknown key at any depth, or a wrong value."""
    # load.py imports the rules, which import this module: the functions that both share live there.
    from harness.recipe.load import read_yaml, validate

    file = find_config(name, "backends", base_dir)
    if file is None:
        raise RecipeError(
            f"{name}: no such backend; give one of {', '.join(shipped_names('backends'))} or the path of an Accelerate config file"
        )
    settings = read_yaml(file)
    nested = settings.get("deepspeed_config")
    for prefix, section in (("", settings), ("deepspeed_config.", nested if isinstance(nested, dict) else {})):
        for key in section:
            if key in _NOT_HERE:
                raise RecipeError(f"{file}: {prefix}{key}: does not belong in a backend file: {_NOT_HERE[key]}; remove it")
    config = validate(AccelerateFile, settings, str(file))
    kind = config.distributed_type
    for section, belongs_to in (("deepspeed_config", "DEEPSPEED"), ("fsdp_config", "FSDP")):
        if kind == belongs_to and getattr(config, section) is None:
            raise RecipeError(f"{file}: {section}: is required with distributed_type {kind}; see the files in configs/backends/")
        if kind != belongs_to and getattr(config, section) is not None:
            raise RecipeError(f"{file}: {section}: has no effect with distributed_type {kind}; change one of the two")
    if kind == "DEEPSPEED":
        return _deepspeed_backend(file, config.deepspeed_config)
    if kind == "FSDP":
        offloads = config.fsdp_config.fsdp_offload_params
        return Backend(file.stem, file, "fsdp", offloads=offloads, offloads_parameters=offloads)
    return Backend(file.stem, file, "single" if kind == "NO" else "ddp")


def _deepspeed_backend(file: Path, config: AccelerateDeepSpeed) -> Backend:
    if config.deepspeed_config_file is not None:
        beside = ("deepspeed_config_file", "deepspeed_multinode_launcher", "zero3_init_flag")
        for key in AccelerateDeepSpeed.model_fields:
            if key in config.model_fields_set and key not in beside:
                raise RecipeError(f"{file}: deepspeed_config.{key}: deepspeed_config_file already says everything; remove it here")
        return backend_of_json(file.stem, file, Path(config.deepspeed_config_file))
    if config.zero_stage is None:
        raise RecipeError(f"{file}: deepspeed_config.zero_stage: is required; one of 0, 1, 2, 3")
    for key in ("offload_param_device", "zero3_init_flag", "zero3_save_16bit_model"):
        if getattr(config, key) not in ("none", False) and config.zero_stage != 3:
            raise RecipeError(
                f"{file}: deepspeed_config.{key} = {getattr(config, key)}; has no effect at zero_stage {config.zero_stage}, which does not "
                "shard parameters; remove it, or set zero_stage to 3"
            )
    if config.offload_optimizer_device != "none" and config.zero_stage == 0:
        raise RecipeError(
            f"{file}: deepspeed_config.offload_optimizer_device: zero_stage 0 shards no optimiser; set zero_stage to 1, 2 or 3"
        )
    for what in ("optimizer", "param"):
        if getattr(config, f"offload_{what}_device") == "nvme" and getattr(config, f"offload_{what}_nvme_path") is None:
            raise RecipeError(f"{file}: deepspeed_config.offload_{what}_nvme_path: is required with nvme; a folder on a local disk")
    moves_parameters = config.offload_param_device != "none"
    offloads = config.offload_optimizer_device != "none" or moves_parameters
    saves = config.zero3_save_16bit_model or config.zero_stage != 3
    return Backend(file.stem, file, "deepspeed", config.zero_stage, offloads, saves, moves_parameters)


def backend_of_json(name: str, file: Path, path: Path) -> Backend:
    """The backend that a DeepSpeed JSON describes. `path` is relative to where the command is run, as for Accelerate itself."""
    zero = check_deepspeed_json(path).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    offloads, moves_parameters = (
        (zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")
    )
    gathers = any(zero.get(key) for key in zero if key.endswith("gather_16bit_weights_on_model_save"))
    return Backend(name, file, "deepspeed", stage, offloads or moves_parameters, stage != 3 or gathers, moves_parameters, zero)


def check_deepspeed_json(path: Path) -> dict:
    """The settings of a DeepSpeed JSON whose keys are all known, at every depth."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _without_doubles(pairs, path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: holds {type(settings).__name__}, not an object")
    for key, instead in (("optimizer", "train.optim"), ("scheduler", "train.lr_scheduler_type")):
        if key in settings:
            raise RecipeError(f"{path}: {key}: is the recipe's ({instead}); remove it")
    _check_keys(settings, DEEPSPEED_SCALARS | {name for name in DEEPSPEED_SECTIONS if "." not in name}, "", path)
    for section, keys in DEEPSPEED_SECTIONS.items():
        here = _follow(settings, section)
        if here is not None:
            _check_keys(here, keys, section, path)
    for key in _ONLY_AUTO:
        if _follow(settings, key) not in (None, "auto"):
            raise RecipeError(f'{path}: {key} = {json.dumps(_follow(settings, key))}; is the recipe\'s to say; write "auto"')
    stage = _follow(settings, "zero_optimization.stage")
    if stage is not None and (not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(4)):
        raise RecipeError(f"{path}: zero_optimization.stage = {json.dumps(stage)}; must be 0, 1, 2 or 3")
    return settings


def _without_doubles(pairs: list[tuple], path: Path) -> dict:
    seen = dict(pairs)
    for key in seen:
        if sum(other == key for other, _ in pairs) > 1:
            raise RecipeError(f"{path}: `{key}` stands twice in one object; keep one of them")
    return seen


def _follow(settings: dict, dotted: str):
    """The value at a dotted key, None where there is none."""
    here = settings
    for part in dotted.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _check_keys(settings, known: set[str], prefix: str, path: Path) -> None:
    from harness.recipe.names import advise_key

    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: {prefix} = {json.dumps(settings)}; must be an object")
    for key in settings:
        if key not in known:
            dotted = f"{prefix}.{key}" if prefix else key
            raise RecipeError(f"{path}: {dotted}: unknown key; {advise_key(key, sorted(known), {})}")
