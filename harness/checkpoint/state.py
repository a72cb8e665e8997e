"""What transformers does not carry from one life to the next, and what must be true after it has loaded.

harness_rank_R.json in a checkpoint, one per rank: the losses and metrics since the last log line, so that the next line after a resume is
the one that an uninterrupted run would have written:

    {"tr_loss": sum of this rank's step losses since the last line, "last_logged": step of the last line,
     "left_out": how many steps since then are not in that sum, "metrics": TRL's lists since then,
     "trained_tokens": tokens seen by all ranks in the whole run, "guard": the guard's window,
     "cuda_random": state of this rank's GPU, in hex}
"""

import json
import random
from pathlib import Path

from harness import distributed
from harness.errors import CheckpointError
from harness.run import write_text_atomically


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"harness_rank_{rank}.json"


def save_rank_state(folder: Path, trainer, guard_state: dict) -> None:
    import torch

    content = {
        "tr_loss": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        "left_out": trainer._left_out_of_log,
        "metrics": {key: list(values) for key, values in trainer._metrics["train"].items()},
        "trained_tokens": trainer._total_train_tokens,
        "guard": guard_state,
        "cuda_random": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }
    write_text_atomically(rank_file(folder, distributed.rank()), json.dumps(content))


def load_rank_state(folder: Path, saved_ranks: int) -> dict:
    """This rank's state; on another number of ranks rank 0's, with the mean of all ranks' losses, of which the next log line is made."""
    if saved_ranks == distributed.world_size():
        return json.loads(rank_file(folder, distributed.rank()).read_text())
    states = [json.loads(rank_file(folder, rank).read_text()) for rank in range(saved_ranks)]
    return {**states[0], "tr_loss": sum(state["tr_loss"] for state in states) / saved_ranks}


def restore_rank_state(state: dict, trainer) -> None:
    """Call it when the training loop has set up its own counters and not yet begun."""
    trainer._tr_loss.fill_(state["tr_loss"])
    # The mean loss that is reported at the end is this life's: what came from the last one is taken off it again.
    trainer._total_loss_scalar = -state["tr_loss"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._left_out_of_log = state["left_out"]
    trainer._metrics["train"].update({key: list(values) for key, values in state["metrics"].items()})
    trainer._total_train_tokens = state["trained_tokens"]


def restore_cuda_random_numbers(folder: Path) -> None:
    """Of this rank's own device: transformers keeps them by the devices' places on the machine, which may be another now."""
    import torch

    if torch.cuda.is_available():
        state = json.loads(rank_file(folder, distributed.rank()).read_text())["cuda_random"]
        if state is None:
            raise CheckpointError(f"{folder}: was written without a GPU, whose random numbers cannot go on here; continue on a CPU")
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))


def seed_for_other_ranks(seed: int, step: int) -> None:
    """Random numbers for a rank that did not exist at the checkpoint: a function of seed, step and rank."""
    import numpy
    import torch
    import xxhash

    value = xxhash.xxh32_intdigest(f"{seed} {step} {distributed.rank()}".encode())
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def check_loaded(trainer, manifest: dict, folder: Path) -> None:
    """Raises CheckpointError, on every rank, unless optimiser, schedule and step are the checkpoint's. transformers says nothing when they
    are not: without an optimizer.pt it begins the warm-up again."""
    step, problems = manifest["step"], []
    if trainer.state.global_step != step:
        problems.append(f"the trainer stands at step {trainer.state.global_step}")
    if trainer.lr_scheduler.last_epoch != manifest["scheduler_step"]:
        problems.append(f"the learning rate's schedule stands at {trainer.lr_scheduler.last_epoch}, not {manifest['scheduler_step']}")
    # There are none where every step so far was left out.
    if manifest["has_moments"] and not optimizer_state(trainer):
        problems.append("the optimiser is empty")
    if distributed.agree(bool(problems)):
        raise CheckpointError(f"{folder}: was loaded, but {'; '.join(problems) or 'another rank does not stand where it should'}")


def optimizer_state(trainer) -> dict:
    """The moments as the innermost optimiser holds them: under DeepSpeed it is wrapped, under Accelerate once more."""
    optimizer = trainer.optimizer
    while not optimizer.state and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.state
