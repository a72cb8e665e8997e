"""DeepSpeed's part of a checkpoint: saved without a rank left waiting, opened as data, and cut anew for another number of ranks.

What DeepSpeed 0.19 writes into the checkpoint's folder, R counting the ranks (the files of bf16 runs begin with `bf16_`):

    latest                                              the name of the folder below
    global_stepN/
      mp_rank_00_model_states.pt                        stages 1 and 2: weights, and the names and shapes of what is trained    rank 0
      zero_pp_rank_R_mp_rank_00_model_states.pt         stage 3: the same without weights, which are copies of the masters      every rank
      zero_pp_rank_R_mp_rank_00_optim_states.pt         float32 masters and moments, this rank's part of some flat tensors      every rank
    zero_to_fp32.py, zero_to_torch.py                   DeepSpeed's scripts that make plain weights of the above

How parameters lie in the flat tensors:

    stages 1 and 2    a flat tensor holds the parameters of a group one after the other, and is cut into as many equal parts as ranks
    stage 3           each parameter is cut into as many equal parts as ranks, and a rank's flat tensor holds its parts one after the other

The promise: a failed write is an error on its own rank and nothing else there; no shard runs code; and on any number of ranks each
parameter, its master and its moments are bit for bit those that were saved.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import CheckpointError
from harness.guard import replaced

if TYPE_CHECKING:
    import torch


# ---- saving


def save_engine(engine, folder: Path, *, adapter_only: bool) -> list[Exception]:
    """Write the shards of all ranks into `folder`; returns what went wrong with this rank's own, so that the ranks can vote.

    Every rank must call it, and it returns on every rank: DeepSpeed waits for all ranks at the end, so a rank whose disk is full must come
    there too. adapter_only: frozen weights are left out; they are the base's.
    """
    errors: list[Exception] = []

    def remembering(write: Callable) -> Callable:
        def attempt(*args, **kwargs):
            try:
                return write(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - torch reports a full disk as RuntimeError
                errors.append(error)

        return attempt

    # All that writes between DeepSpeed's barriers; none of them waits for another rank.
    writers = {name: remembering(getattr(engine, name)) for name in ("_save_checkpoint", "_save_zero_checkpoint")}
    makedirs = remembering(engine.checkpoint_engine.makedirs)
    with replaced(engine, **writers), replaced(engine.checkpoint_engine, makedirs=makedirs):
        engine.save_checkpoint(str(folder), save_latest=False, exclude_frozen_parameters=adapter_only)
    if engine.global_rank == 0:
        remembering((folder / "latest").write_text)(f"global_step{engine.global_steps}")
    return errors


# ---- loading


def open_as_data(engine) -> None:
    """From now on this engine reads checkpoints without running what a pickle asks for."""
    engine.checkpoint_engine.load = load_as_data


def load_as_data(path: str, map_location=None, *, mmap: bool = False):
    """torch.load of tensors, plain values and the few classes of DeepSpeed's own that are named here.

    Raises CheckpointError for a file that holds anything else, or cannot be read.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [
        LossScaler,  # in every shard but those of fp16 runs: a scale of 1
        DynamicLossScaler,  # fp16: the scale, and when it last changed
        ZeroStageEnum,  # in every shard: the stage that wrote it
        fragment_address,  # stages 1 and 2: for each parameter, where a part of it lies
    ]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds {_foreign_names(path, known)}, which is no data of a checkpoint but could run code; nothing of it was run; "
            "delete this checkpoint, and find out who else can write to its folder"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; continue from another checkpoint") from error


def _foreign_names(path: str, known: list[type]) -> str:
    import torch

    try:
        with torch.serialization.safe_globals(known):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):
        names = []
    return ", ".join(sorted(names)) or "a pickle of another make than torch.save's"


def prepare_loading(engine, checkpoint: Path, manifest: dict, world_size: int) -> None:
    """Make this engine's `load_checkpoint` read as data, and cut the shards anew if another number of ranks has written them.

    Raises CheckpointError when they cannot be.
    """
    open_as_data(engine)
    # As DeepSpeed made it: this engine may have read a checkpoint of other ranks before.
    vars(engine).pop("load_checkpoint", None)
    saved_ranks = manifest["world_size"]
    if saved_ranks == world_size or not engine.zero_optimization():
        return  # DeepSpeed's own way; at stage 0 there is one whole file
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(f"{checkpoint}: the moments lie on the NVMe disks of {saved_ranks} ranks; continue on {saved_ranks} ranks")
    if engine.zero_elastic_checkpoint():
        raise CheckpointError(f"{checkpoint}: elastic_checkpoint is no form that can be cut anew; continue on {saved_ranks} ranks")
    engine.load_checkpoint = partial(_load_resharded, engine, engine.load_checkpoint, saved_ranks)


# ---- another number of ranks


def _load_resharded(engine, load_checkpoint: Callable, saved_ranks: int, folder: str, **options):
    """DeepSpeed's own `load_checkpoint`, which is given the shard that this rank would have if as many ranks as now had saved.

    DeepSpeed's universal checkpoints are no way: at stage 3 they give every parameter group the settings of the first, and one step counter
    to all flat tensors together, which then counts every step several times.
    """
    tag = Path(folder, "latest").read_text()
    # The first rank's: there may be fewer such files than ranks now, and all are alike.
    model_states = engine._get_ckpt_name(folder, tag, pp_placeholder="0")
    shards = [engine._get_rank_zero_ckpt_name(folder, tag, 0, rank, engine.bfloat16_enabled()) for rank in range(saved_ranks)]
    shard = _cut_shard(engine, model_states, shards)

    def load_shard(*_, load_optimizer_states: bool) -> bool:
        from_masters = engine.zero_load_from_fp32_weights()
        engine.optimizer.load_state_dict({engine.global_rank: shard}, load_optimizer_states, load_from_fp32_weights=from_masters)
        return True

    with replaced(engine, _get_all_ckpt_names=lambda *_: [model_states], _load_zero_checkpoint=load_shard):
        return load_checkpoint(folder, **options)


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of a parameter, which `rank` keeps from `offset` on in its part of a flat tensor."""

    start: int
    stop: int
    rank: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Which rank keeps which elements of which parameter, and where."""

    flats: list[dict[str, int]]
    """The parameters of each flat tensor, and their numbers of elements."""
    part_sizes: list[int]
    """Elements of each rank's part of each flat tensor."""
    pieces: dict[str, list[Piece]]

    @classmethod
    def in_line(cls, flats: list[dict[str, int]], part_sizes: list[int], gaps: list[list[int]]) -> "Layout":
        """Stages 1 and 2; gaps: elements that are left free after each parameter, for alignment."""
        pieces = {}
        for flat, (parameters, part_size, after) in enumerate(zip(flats, part_sizes, gaps, strict=True)):
            begin = 0
            for (name, elements), gap in zip(parameters.items(), after, strict=True):
                pieces[name], start = [], 0
                while start < elements:
                    rank, offset = divmod(begin + start, part_size)
                    stop = min(elements, start + part_size - offset)
                    pieces[name].append(Piece(start, stop, rank, flat, offset))
                    start = stop
                begin += elements + gap
        return cls(flats, part_sizes, pieces)

    @classmethod
    def side_by_side(cls, flats: list[dict[str, int]], ranks: int) -> "Layout":
        """Stage 3."""
        pieces, part_sizes = {}, []
        for flat, parameters in enumerate(flats):
            offset = 0
            for name, elements in parameters.items():
                share = -(-elements // ranks)
                starts = range(0, elements, share)
                pieces[name] = [Piece(start, min(start + share, elements), rank, flat, offset) for rank, start in enumerate(starts)]
                offset += share
            part_sizes.append(offset)
        return cls(flats, part_sizes, pieces)


def _cut_shard(engine, model_states: str, paths: list[str]) -> dict:
    """This rank's shard, cut from those that were saved. The files are mapped into memory, and only what this rank needs is read."""
    import torch

    optimizer, stage3 = engine.optimizer, engine.zero_optimization_partition_weights()
    states = load_as_data(model_states, "cpu", mmap=True)
    saved = [load_as_data(path, "cpu", mmap=True)["optimizer_state_dict"] for path in paths]
    shapes, own_shapes = _elements(states["param_shapes"]), _elements(engine._get_zero_param_shapes())
    _check_same_parameters(model_states, shapes, own_shapes)
    if stage3:
        if states["frozen_param_fragments"]:
            raise CheckpointError(f"{model_states}: holds frozen weights in parts for {len(paths)} ranks; continue on {len(paths)} ranks")
        masters, base, group_of = "fp32_flat_groups", "optimizer_state_dict", optimizer.sub_group_to_group_id
        was, now = Layout.side_by_side(shapes, len(paths)), Layout.side_by_side(own_shapes, engine.dp_world_size)
    else:
        masters, base, group_of = "single_partition_of_fp32_groups", "base_optimizer_state", range(len(own_shapes))
        # The last parts are saved without what fills them up to the size of the others.
        sizes = [part.numel() + filling for part, filling in zip(saved[0][masters], saved[0]["group_paddings"], strict=True)]
        was = Layout.in_line(shapes, sizes, saved[0]["param_alignment_paddings"])
        now = Layout.in_line(own_shapes, optimizer.partition_size, optimizer.round_robin_bit16_padding)

    def cut(flat: int, part_of: Callable[[dict, int], "torch.Tensor"]) -> "torch.Tensor":
        """This rank's part of a flat tensor; part_of: that of a rank that saved, from its shard."""
        tensor = torch.zeros(now.part_sizes[flat])
        for name in now.flats[flat]:
            for mine in (piece for piece in now.pieces[name] if piece.rank == engine.global_rank):
                for theirs in was.pieces[name]:
                    start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
                    if start < stop:
                        source = part_of(saved[theirs.rank], theirs.flat)[theirs.offset + start - theirs.start :]
                        tensor[mine.offset + start - mine.start :][: stop - start] = source[: stop - start]
        return tensor

    state = {}
    for flat, parameters in enumerate(now.flats):
        before = was.pieces[next(iter(parameters))][0].flat
        state[flat] = {}
        for key, value in saved[0][base]["state"].get(before, {}).items():
            if key == "step":
                # A copy for each flat tensor: torch counts in place.
                state[flat][key] = value.clone() if isinstance(value, torch.Tensor) else value
            elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == (was.part_sizes[before],):
                state[flat][key] = cut(flat, lambda shard, which, key=key: shard[base]["state"][which][key])
            else:
                raise CheckpointError(
                    f"{paths[0]}: the optimiser's `{key}` belongs to a rank's part as a whole and cannot be cut anew; continue on "
                    f"{len(paths)} ranks"
                )
    groups = [
        {**group, "params": [flat for flat in range(len(now.flats)) if group_of[flat] == index]}
        for index, group in enumerate(saved[0][base]["param_groups"])
    ]
    shard = {**saved[0], base: {"state": state, "param_groups": groups}}
    shard[masters] = [cut(flat, lambda shard, which: shard[masters][which]) for flat in range(len(now.flats))]
    if not stage3:
        shard["param_alignment_paddings"] = optimizer.round_robin_bit16_padding
    return shard


def _elements(shapes: list[dict]) -> list[dict[str, int]]:
    return [{name: shape.numel() for name, shape in flat.items()} for flat in shapes]


def _check_same_parameters(path: str, old: list[dict[str, int]], new: list[dict[str, int]]) -> None:
    """Raises CheckpointError unless the parameters that were trained are trained now, with as many elements."""
    then, now = ({name: elements for flat in flats for name, elements in flat.items()} for flats in (old, new))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise CheckpointError(
                f"{path}: {name} has {then.get(name, 'no')} trained elements there and {now.get(name, 'no')} in this run; "
                "continue with the model and adapter that were saved"
            )
