"""The clock of benchmarks/checkpoint.py: Python imports it at the start of every process that has this folder on PYTHONPATH.

It changes nothing that either side does. To whatever Trainer is built it adds a callback, and puts a clock around `_save_checkpoint`; and
it listens to `RankReport.enter`, by which our ranks say what they do, and to transformers' `rotate_checkpoints`. Rank 0 keeps everything in
memory and writes it to BENCH_EVENTS when no clock runs:

    {"events": [[seconds of the machine's monotonic clock, "what"], ...], "saves": [...]}

Turns are those of probe/sitecustomize.py; ranks other than 0 wait for them at a barrier. Before a save the disk is made idle (`sync`), and
after it the files of the checkpoint are flushed on both sides, which is timed by itself; with BENCH_PLAIN the same bytes are then written
once more, plainly. BENCH_LEAVE_AFTER ends the process after so many steps. Without BENCH_EVENTS nothing happens.
"""

import importlib.abc
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", 0))
PIECE_BYTES = 8 * 2**20
EVENTS: list[tuple[float, str]] = [(time.monotonic(), "python")]
SAVES: list[dict] = []


class After(importlib.abc.MetaPathFinder):
    """Lets one module load as ever, then calls `act` with it."""

    def __init__(self, module: str, act):
        self.module, self.act = module, act

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_act(module):
            load(module)
            self.act(module)

        spec.loader.exec_module = load_and_act
        return spec


def listen_to_phases(module) -> None:
    enter = module.RankReport.enter

    def enter_and_note(self, phase, attempt=None):
        EVENTS.append((time.monotonic(), phase))
        enter(self, phase, attempt)

    module.RankReport.enter = enter_and_note


def add_clock(module) -> None:
    construct = module.Trainer.__init__

    def construct_and_add(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.add_callback(steps_of_this_life())
        save = self._save_checkpoint
        self._save_checkpoint = lambda *args, **kwargs: time_save(self, lambda: save(*args, **kwargs))

    module.Trainer.__init__ = construct_and_add
    rotate = module.rotate_checkpoints

    def note_and_rotate(*args, save_total_limit=None, **kwargs):
        # Ours keeps no limit there: it retires by itself, and says so.
        if save_total_limit:
            EVENTS.append((time.monotonic(), "saving: retention"))
        rotate(*args, save_total_limit=save_total_limit, **kwargs)

    module.rotate_checkpoints = note_and_rotate


def steps_of_this_life():
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        done = 0

        def on_step_end(self, args, state, control, **kwargs):
            wait_for_device()
            if self.done == 0:
                EVENTS.append((time.monotonic(), "first step done"))
            self.done += 1
            wait_for_ranks()
            if self.done == int(os.environ.get("BENCH_LEAVE_AFTER", 0)):
                write_events()
                os._exit(0)

    return Steps()


def time_save(trainer, save) -> None:
    wait_for_device()
    os.sync()
    wait_for_ranks()
    EVENTS.append((time.monotonic(), "save begins"))
    save()
    wait_for_device()
    EVENTS.append((time.monotonic(), "save ends"))
    wait_for_ranks()
    if RANK == 0:
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        SAVES.append({"step": trainer.state.global_step, **flush_and_write_plainly(folder)})
        write_events()
    wait_for_ranks()


def flush_and_write_plainly(folder: Path) -> dict:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    begun = time.monotonic()
    for path in (*files, folder):
        flush(path)
    measured = {"flush_s": time.monotonic() - begun, "files": {str(path.relative_to(folder)): path.stat().st_size for path in files}}
    if plain := os.environ.get("BENCH_PLAIN"):
        contents = [path.read_bytes() for path in files]
        os.sync()
        write_s, flush_s = write_plainly(contents, Path(plain))
        measured |= {"plain_write_s": write_s, "plain_flush_s": flush_s}
    return measured


def write_plainly(contents: list[bytes], folder: Path) -> tuple[float, float]:
    """(seconds of the writes, seconds of the flushes), file by file, as a program would that does nothing else."""
    folder.mkdir()
    write_s = flush_s = 0.0
    for number, content in enumerate(contents):
        begun = time.monotonic()
        view, file = memoryview(content), os.open(folder / str(number), os.O_WRONLY | os.O_CREAT, 0o644)
        while view:
            view = view[os.write(file, view[:PIECE_BYTES]) :]
        written = time.monotonic()
        os.fsync(file)
        os.close(file)
        write_s, flush_s = write_s + written - begun, flush_s + time.monotonic() - written
    begun = time.monotonic()
    flush(folder)
    flush_s += time.monotonic() - begun
    shutil.rmtree(folder)
    return write_s, flush_s


def flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wait_for_ranks() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def write_events() -> None:
    if RANK == 0:
        Path(os.environ["BENCH_EVENTS"]).write_text(json.dumps({"events": EVENTS, "saves": SAVES}))


def add_stopwatch() -> None:
    """Of benchmarks/sft.py: on rank 0, where BENCH_SOCKET says that turns are taken."""
    if RANK:
        os.environ.pop("BENCH_SOCKET", None)
    spec = importlib.util.spec_from_file_location("stopwatch", Path(__file__).parents[1] / "probe" / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("BENCH_EVENTS"):
    add_stopwatch()
    sys.meta_path[:0] = [
        After("transformers.trainer", add_clock),
        After("harness.run", listen_to_phases),
    ]
