"""The stopwatch of benchmarks/sft.py: Python imports it at the start of every process that has this folder on PYTHONPATH.

Both sides train with transformers.Trainer, and neither command takes a callback from outside. So the same callback is added to whatever
Trainer is built, on both sides, by the public `add_callback`. After each optimiser step it reports to the benchmark and waits until it is
this side's turn again: the sides take turns step by step, and whatever else the machine does hits them alike. Waiting is not timed.

A step is timed from one end of a step to the next (device synchronised): fetching the batch, forward, backward, clipping, optimiser,
logging, and every callback of either side. Without BENCH_SOCKET in the environment nothing happens.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import socket
import sys
import time


class TrainerFinder(importlib.abc.MetaPathFinder):
    """Lets `transformers.trainer` load as ever, then adds the callback to its Trainer."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_add(module):
            load(module)
            add_stopwatch(module.Trainer)

        spec.loader.exec_module = load_and_add
        return spec


def add_stopwatch(trainer_class) -> None:
    construct = trainer_class.__init__

    def construct_and_add(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        if os.environ.get("BENCH_ORDER") == "file":
            from torch.utils.data import SequentialSampler

            self._get_train_sampler = lambda dataset=None: SequentialSampler(self.train_dataset)
        self.add_callback(stopwatch(self))

    trainer_class.__init__ = construct_and_add


def stopwatch(trainer):
    import torch
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.loss = None
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(os.environ["BENCH_SOCKET"])
            self.resume()

        def resume(self):
            self.resumed, self.cpu = time.perf_counter(), time.process_time()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, cpu_seconds = time.perf_counter() - self.resumed, time.process_time() - self.cpu
            report = {
                "step": state.global_step,
                "last": state.global_step >= state.max_steps,
                "seconds": seconds,
                # Of all threads of this process: what a busy neighbour does not change.
                "cpu_seconds": cpu_seconds,
                # TRL's own count of tokens without padding, since the start; both sides train with its SFTTrainer.
                "tokens": trainer._total_train_tokens,
                # Of the step before: a step is logged after it has ended.
                "loss": self.loss,
                "peak_bytes": torch.cuda.max_memory_allocated()
                if torch.cuda.is_available()
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "threads": torch.get_num_threads(),
            }
            self.socket.sendall(json.dumps(report).encode() + b"\n")
            self.socket.recv(1)
            self.resume()

    return Stopwatch()


if os.environ.get("BENCH_SOCKET"):
    sys.meta_path.insert(0, TrainerFinder())
