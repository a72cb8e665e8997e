"""Lives of a run, a second each, to be killed: ranks are forked from a server that has imported everything once.

    with Rig() as rig:                                              # tests of one session share `shared_rig()`
        life = rig.start(recipe, "output_dir=/…/run", inject=die_in_phase(1, "saving"))
        assert life.wait() == [-9, -9]                              # exit codes by rank, negative for a signal
        life = rig.run(recipe, "output_dir=/…/run", inject=record_steps() + record_samples())
        life.records("steps", rank=0)

A life is one start of the ranks. A supervisor does for it what `harness run` and torch elastic do: it holds the run folder, opens the next
attempt, starts `world` ranks in torchrun's environment (the recipe's backend puts its own variables there, as under torchrun), and when
one rank dies by a signal it ends the others with SIGKILL, `grace_s` seconds later. A life that is not over after `timeout_s` is ended with
every rank's stack in its output, and `wait` raises. Nothing outlives the test: a supervisor ends its ranks when the test's end of its
socket closes, however that came about, and a rank dies with its supervisor.

`open_run` does what `harness run` does before it starts ranks, and must follow it; `jobs.py` has a recipe that is fast enough.

`inject` is Python source that every rank executes before harness.rank.main. It sees RANK, the function `keep(kind, record)` and everything
under "inside a rank" below. The builders at the end return such source; their results are added together.

    die_in_phase(rank, phase, occurrence, before)        SIGKILL where RankReport.enter is told of a phase that starts so
    die_at_call(rank, "module:name", ...)                SIGKILL before or after the n-th call of a function
    record_samples(), record_steps()                     what was trained on and what came of it, to compare lives bit for bit

What a life here shares with all others, and real lives do not: the modules' import-time state, above all the seed of str hashes (the order
of a set of strings never differs between two lives). Python's and numpy's random numbers are seeded anew in each rank.
`test_rig.py` holds a life against `harness run`. A rank that is killed while DeepSpeed loads an operator (joining) leaves a lock that costs
the next life up to a minute (harness.operators).
"""

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

STARTED_WITHIN_S = 300
LIFE_S = 120
FAILURE_GRACE_S = 10
"""How long the others may go on when a rank has failed with an exit code of its own."""
STACKS_S = 2
POLL_S = 0.02
SHARED_BUFFERS = "/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"
"""69 MB for every port and rank, which DeepSpeed leaves there when its process is killed."""


# ---- in the test's process


class Rig:
    """The server's owner. `close` (or leaving the `with`) ends it and every life."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="rig-")
        self.folder, self._lives = Path(self._folder.name), []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")])
        self._log = open(self.folder / "server.log", "wb")  # noqa: SIM115 - open for the life of the rig
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.folder / "socket")],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )

    def start(
        self, recipe, *overrides: str, world=2, backend="ddp", inject="", fresh=False, allowed=(), grace_s=0.0, timeout_s=LIFE_S
    ) -> "Life":
        """Start the ranks of `recipe` (a path or the name of a shipped one), which continue the run that lies there, as with `harness run`;
        `allowed` is its --allow-change. Raises Refused for what it would refuse, and for a run that is complete."""
        folder = Path(tempfile.mkdtemp(prefix="life-", dir=self.folder))
        request = {
            "recipe": str(recipe),
            "overrides": [*map(str, overrides), f"backend={backend}"],
            "world": world,
            "inject": inject,
            "fresh": fresh,
            "allowed": list(allowed),
            "time": time.time(),
            "grace_s": grace_s,
            "timeout_s": timeout_s,
            "folder": str(folder),
            # The cache among them, which the session's fixture sets after this file was imported.
            "environment": {key: value for key, value in os.environ.items() if key.startswith("HARNESS_")},
        }
        life = Life(folder, self._connect(), request)
        self._lives.append(life)
        return life

    def run(self, recipe, *overrides: str, **options) -> "Life":
        """`start`, and wait for its end."""
        life = self.start(recipe, *overrides, **options)
        life.wait()
        return life

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + STARTED_WITHIN_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.folder / "socket"))
                return connection
            except OSError:
                connection.close()
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RigError("the rig's server did not start:\n" + (self.folder / "server.log").read_text()) from None
                time.sleep(POLL_S)

    def close(self) -> None:
        for life in self._lives:
            life.close()
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@functools.cache
def shared_rig() -> Rig:
    """One for the whole session: it takes five seconds to start."""
    rig = Rig()
    atexit.register(rig.close)
    return rig


class RigError(AssertionError):
    """A life that did not end in time, or a rig that does not work."""


class Refused(Exception):
    """The run could not be opened: the error that `harness run` would have printed."""


class Life:
    """One start of the ranks, seen from the test."""

    def __init__(self, folder: Path, connection: socket.socket, request: dict):
        self.folder, self.world = folder, request["world"]
        self.codes: dict[int, int] = {}
        self.seconds: float | None = None
        """From the request to the last rank's end."""
        self.attempt: Path | None = None
        self.pids: list[int] = []
        self._connection, self._messages, self._timed_out = connection, Messages(connection), False
        self._over = False
        self._deadline = time.monotonic() + request["timeout_s"] + request["grace_s"] + FAILURE_GRACE_S + STACKS_S + 5
        send(connection, request)
        while not self.pids:
            self._receive(self._deadline)

    def _receive(self, deadline: float) -> None:
        """Take in the supervisor's next messages. Raises RigError when there is none by then, Refused when it says so."""
        self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            messages = self._messages.receive()
        except TimeoutError:
            raise RigError(f"nothing was heard of the life in {self.folder} any more; {self._outputs()}") from None
        if messages is None:
            raise RigError(f"the supervisor of {self.folder} is gone; {self._outputs()}")
        for message in messages:
            if "refused" in message:
                raise Refused(message["refused"])
            if "pids" in message:
                self.pids, self.attempt = message["pids"], Path(message["attempt"])
            if "rank" in message:
                self.codes[message["rank"]], self.seconds = message["code"], message["seconds"]
            self._timed_out |= "timed_out" in message
            if "over" in message:
                self._over = True
                self._connection.close()

    def wait(self, timeout_s: float | None = None) -> list[int]:
        """Exit codes by rank, negative for a signal. Raises RigError, with the outputs, when the life took too long."""
        deadline = self._deadline if timeout_s is None else min(self._deadline, time.monotonic() + timeout_s)
        while not self._over:
            self._receive(deadline)
        if self._timed_out:
            raise RigError(f"the life in {self.folder} took too long and was ended; {self._outputs()}")
        return [self.codes[rank] for rank in range(self.world)]

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        with contextlib.suppress(RigError):
            while not self._over:
                self._receive(time.monotonic())
        return [rank for rank in range(self.world) if rank not in self.codes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send this rank a signal; by the supervisor, which knows whether it is still there."""
        if rank in self.alive():
            with contextlib.suppress(BrokenPipeError):
                send(self._connection, {"kill": rank, "signal": int(number)})

    def wait_for_phase(self, rank: int, phase: str, timeout_s: float = 60) -> None:
        """Until this rank says that it is in a phase that starts so."""
        path, deadline = self.attempt / "alive" / f"rank-{rank}.json", time.monotonic() + timeout_s
        while not (path.is_file() and json.loads(path.read_text())["phase"].startswith(phase)):
            if rank not in self.alive() or time.monotonic() > deadline:
                raise RigError(f"rank {rank} never came to {phase!r}; {self._outputs()}")
            time.sleep(POLL_S)

    def output(self, rank: int) -> str:
        """All that this rank has written, in its own log too: other ranks than 0 write there alone, and every rank its last traceback."""
        files = [self.folder / f"rank-{rank}.out", *([self.attempt / f"rank-{rank}.log"] if self.attempt else [])]
        return "".join(file.read_text(errors="replace") for file in files if file.is_file())

    def records(self, kind: str, rank: int) -> list[dict]:
        """What `keep(kind, …)` was given in this rank; without a last line that a kill has cut."""
        file = self.folder / f"{kind}-{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []

    def close(self) -> None:
        """End what still runs, and wait until it has ended."""
        with contextlib.suppress(RigError, OSError):
            self._connection.shutdown(socket.SHUT_WR)
            while not self._over:
                self._receive(time.monotonic() + STACKS_S)
        self._connection.close()

    def _outputs(self) -> str:
        said = (self.folder.parent / "server.log").read_text()[-2000:]
        return f"server said:\n{said}\n" + "\n".join(f"rank {rank} said:\n{self.output(rank)[-4000:]}" for rank in range(self.world))


class Messages:
    """What comes over a connection, one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self._connection, self._unread = connection, b""

    def receive(self) -> list[dict] | None:
        """The next ones, none if a line is not whole yet; None when the other end is closed."""
        received = self._connection.recv(1 << 16)
        *lines, self._unread = (self._unread + received).split(b"\n")
        return [json.loads(line) for line in lines] if received else None


def send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


# ---- in the server


def serve(address: str) -> None:
    """Import, then fork a supervisor for each connection, until stdin closes."""
    import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                selector.close()
                listener.close()
                run_and_exit(lambda connection=connection: supervise(connection))
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def import_everything() -> None:
    """What a rank would import, and nothing that a rank would do."""
    import gc
    import importlib

    from harness.logs import quieten

    quieten()
    for name in IMPORTS:
        importlib.import_module(name)
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    threads = {(task / "comm").read_text().strip() for task in others}
    # pyarrow's allocator has a thread, and is made for forks; any other may hold a lock that a fork would never see released.
    assert threads <= {"jemalloc_bg_thd"}, f"a module that the rig's server imports starts threads: {threads}"
    import accelerate.state
    import torch.distributed

    import harness.run

    shared = accelerate.state.PartialState._shared_state, accelerate.state.AcceleratorState._shared_state, harness.run._HELD
    assert not any(shared) and not torch.distributed.is_initialized(), "a module that the rig's server imports begins a run"
    # Collecting garbage would touch, and so copy, every page that the forks share.
    gc.collect()
    gc.freeze()


IMPORTS = """
    accelerate.commands.launch deepspeed harness.cli.run harness.data harness.data.prepare harness.rank harness.tasks.arguments
    harness.tasks.export harness.tasks.job harness.tasks.rlhf harness.tasks.sft harness.tasks.templates harness.tools harness.tools.match
    harness.tools.checks harness.tools.schema harness.tracking.callback harness.tracking.progress harness.tracking.throughput jsonschema
    numpy.ctypeslib peft.tuners.lora.bnb peft.utils.transformers_weight_conversion torch.distributed.algorithms.ddp_comm_hooks
    torch.profiler torch.utils.cpp_extension torch.utils.serialization.config transformers.models.llama.modeling_llama
""".split()


def run_and_exit(act) -> None:
    """End this fork with what `act` returns, whatever happens in it."""
    code = 1
    try:
        code = act() or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# ---- in a supervisor: one life


def supervise(connection: socket.socket) -> int:
    begun, messages = time.monotonic(), Messages(connection)
    while not (requests := messages.receive()):
        if requests is None:
            return 0
    request = requests[0]
    os.environ.update(request["environment"])
    try:
        recipe_file, attempt = open_run(request)
    except Exception as error:
        send(connection, {"refused": f"{type(error).__name__}: {error}"})
        return 0
    port, ranks = free_port(), {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            connection.close()
            run_and_exit(lambda rank=rank: be_rank(rank, request, recipe_file, attempt, port))
        # Here and in the rank: whoever is first. From now on `end_group` finds it.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        ranks[rank] = pid
    send(connection, {"pids": list(ranks.values()), "attempt": str(attempt)})
    try:
        watch(connection, messages, ranks, request, begun)
    except BrokenPipeError:
        pass  # nobody waits for this life any more
    finally:
        for pid in ranks.values():
            end_group(pid)
        for left in Path("/").glob(SHARED_BUFFERS.format(port=port).removeprefix("/")):
            left.unlink(missing_ok=True)
    # Only now may the next life begin.
    release_run()
    with contextlib.suppress(BrokenPipeError):
        send(connection, {"over": True})
    return 0


def open_run(request: dict) -> tuple[Path, Path]:
    """(the recipe's file, the attempt's folder): what harness.cli.run does before it starts the ranks."""
    import harness.run
    from harness.checkpoint.resume import check_continuation
    from harness.cli.run import prepare
    from harness.errors import LaunchError
    from harness.launcher import check_world
    from harness.recipe import load
    from harness.recipe.backend import load_backend
    from harness.run import RunDir, is_complete

    recipe = load(request["recipe"], request["overrides"])
    check_world(recipe, load_backend(recipe.backend), request["world"])
    if not request["fresh"]:
        if is_complete(RunDir.of(recipe), recipe):
            raise LaunchError(f"{recipe.output_dir}: this run is complete")
        check_continuation(RunDir.of(recipe), recipe, load_backend(recipe.backend), tuple(request["allowed"]))
    in_a_fork(lambda: prepare(recipe, packing=recipe.data.packing is True), Path(request["folder"]) / "prepare.out")
    run = RunDir.create(recipe, fresh=request["fresh"])
    # When `harness run` would have been started: a STOP from before is none of this life's.
    harness.run._LOADED = request["time"]
    return run.recipe, run.open_attempt()


def in_a_fork(act, output: Path) -> None:
    """So that what it starts and loads is not in the ranks."""
    pid = os.fork()
    if pid == 0:
        write_to(output)
        run_and_exit(act)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(output.read_text())


def write_to(output: Path) -> int:
    """Let this process read nothing and write to this file. Returns a descriptor of it."""
    descriptor, nothing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (descriptor, 1), (descriptor, 2)):
        os.dup2(source, target)
    return descriptor


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def watch(connection: socket.socket, messages: Messages, ranks: dict[int, int], request: dict, begun: float) -> None:
    """Until every rank has ended, or the test has gone. `ranks` loses those that have ended."""
    never = begun + 10 * request["timeout_s"]
    kill_at, stacks_at = never, begun + request["timeout_s"]
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        for rank, pid in ranks.items():
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, rank)
        while ranks:
            ready = selector.select(max(0, min(kill_at, stacks_at) - time.monotonic()))
            for key, _ in ready:
                if key.data is None:
                    kills = messages.receive()
                    if kills is None:
                        return
                    for message in kills:
                        if message["kill"] in ranks:
                            os.kill(ranks[message["kill"]], message["signal"])
                    continue
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                pid = ranks.pop(key.data)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                end_group(pid)
                send(connection, {"rank": key.data, "code": code, "seconds": time.monotonic() - begun})
                if code:
                    kill_at = min(kill_at, time.monotonic() + (request["grace_s"] if code < 0 else FAILURE_GRACE_S))
            now = time.monotonic()
            if now >= stacks_at:
                send(connection, {"timed_out": True})
                stacks_at, kill_at = never, min(kill_at, now + STACKS_S)
                for pid in ranks.values():
                    os.kill(pid, signal.SIGABRT)
            if now >= kill_at:
                kill_at = never
                for pid in ranks.values():
                    os.kill(pid, signal.SIGKILL)


def end_group(pid: int) -> None:
    """A rank leads a group of its own, in which its data workers are."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# ---- inside a rank

RANK = -1
FOLDER = Path()


def release_run() -> None:
    from harness.run import _HELD

    while _HELD:
        _HELD.popitem()[1].close()


def be_rank(rank: int, request: dict, recipe_file: Path, attempt: Path, port: int) -> int:
    global RANK, FOLDER
    import ctypes
    import faulthandler
    import resource

    import numpy

    import harness.rank
    import harness.tasks.job
    from harness.launcher import Machines
    from harness.life import rank_environment

    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The supervisor holds the run folder, as the parent does; its ranks have no part in it.
    release_run()
    RANK, FOLDER = rank, Path(request["folder"])
    # The stacks on SIGABRT, which the supervisor sends when the time is up; by a descriptor that the rank's own log does not move.
    faulthandler.enable(write_to(FOLDER / f"rank-{rank}.out"))
    numpy.random.seed()
    # Half of a short life would go in waiting for the next look.
    harness.tasks.job.PREPARED_POLL_S = POLL_S
    os.environ.update(rank_environment(Machines(request["world"]), attempt, FOLDER.name), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(request["world"]), LOCAL_WORLD_SIZE=str(request["world"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    exec(compile(request["inject"], "<inject>", "exec"), {**globals(), "__name__": "inject"})
    changes = [part for key in request["allowed"] for part in ("--allow-change", key)]
    code = harness.rank.main(["--recipe", str(recipe_file), *changes])
    atexit._run_exitfuncs()
    return code


def keep(kind: str, record: dict) -> None:
    """Append to what `Life.records(kind, rank)` reads. Survives SIGKILL."""
    with open(FOLDER / f"{kind}-{RANK}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def wrap(target: str, around) -> None:
    """Put `around(original)` in the place of "module:name" or "module:Class.name", also where others have imported it by name."""
    import importlib

    module, _, dotted = target.partition(":")
    *path, name = dotted.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    wrapped = around(original)
    setattr(owner, name, wrapped)
    for other in list(sys.modules.values()) if not path else []:
        if getattr(other, "__dict__", {}).get(name) is original:
            other.__dict__[name] = wrapped


def kill_in_phase(phase: str, occurrence: int, before: bool) -> None:
    def around(enter):
        seen = 0

        def entering(report, name, *arguments):
            nonlocal seen
            seen += name.startswith(phase)
            dies = name.startswith(phase) and seen == occurrence
            if dies and before:
                die()
            enter(report, name, *arguments)
            if dies:
                die()

        return entering

    wrap("harness.run:RankReport.enter", around)


def kill_at_call(target: str, occurrence: int, before: bool, matching: str) -> None:
    def around(function):
        seen = 0

        def called(*args, **kwargs):
            nonlocal seen
            counts = matching in repr((args, kwargs)) if matching else True
            seen += counts
            dies = counts and seen == occurrence
            if dies and before:
                die()
            result = function(*args, **kwargs)
            if dies:
                die()
            return result

        return called

    wrap(target, around)


def keep_samples() -> None:
    """Per micro-batch: the optimiser step that it goes into, and the `sample` digests of its rows in their order."""
    import hashlib

    def name_of(tokens) -> str:
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def names_of(trainer) -> dict[str, str]:
        names = {}
        # Of pairs a step takes two answers, laid out as it suits: they are known by their tokens alone.
        for row in trainer.train_dataset if "input_ids" in trainer.train_dataset.column_names else ():
            tokens, samples = row["input_ids"], row.get("samples") or [row["sample"]]
            for length, sample in zip(row.get("seq_lengths") or [len(tokens)], samples, strict=True):
                names[name_of(tokens[:length])], tokens = sample, tokens[length:]
        return names

    def samples_in(inputs) -> list[list[int]]:
        if "attention_mask" in inputs:
            return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        tokens, positions = inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()
        starts = [index for index, position in enumerate(positions) if position == 0]
        return [tokens[start:end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]

    def around(training_step):
        names = {}

        def stepping(trainer, model, inputs, *args, **kwargs):
            if isinstance(inputs, list):
                # Prompts, to which the answers are not yet written; what comes of them is in the steps' digests.
                keep("samples", {"step": trainer.state.global_step + 1, "samples": [each["location"] for each in inputs]})
                return training_step(trainer, model, inputs, *args, **kwargs)
            names.update({} if names else names_of(trainer))
            found = [name_of(tokens) for tokens in samples_in(inputs)]
            # A student's own words are in no data set.
            keep("samples", {"step": trainer.state.global_step + 1, "samples": [names.get(name, f"written {name}") for name in found]})
            return training_step(trainer, model, inputs, *args, **kwargs)

        return stepping

    wrap("harness.tasks.trainer:HarnessTrainer.training_step", around)


def keep_steps() -> None:
    """After each optimiser step: digests of this rank's weights, optimiser and random numbers, and the learning rate to the last bit."""
    import transformers

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
            rates = [rate.hex() for rate in lr_scheduler.get_last_lr()]
            keep("steps", {"step": state.global_step, **digests_of(model, optimizer), "lr": rates})

    def around(build):
        def building(trainer, *args, **kwargs):
            build(trainer, *args, **kwargs)
            # First, before a callback that saves: a checkpoint holds what is digested here.
            trainer.callback_handler.callbacks.insert(0, Steps())

        return building

    wrap("transformers:Trainer.__init__", around)


def digests_of(model, optimizer) -> dict[str, str]:
    import random

    import numpy
    import torch

    # Accelerate's and DeepSpeed's wrappers hold the next one; the innermost has this rank's share, in fp32.
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = [(group["params"], [optimizer.state.get(parameter, {}) for parameter in group["params"]]) for group in optimizer.param_groups]
    return {
        # Under ZeRO-3 a parameter is empty, and its share is beside it.
        "weights": digest_of([getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]),
        "optimizer": digest_of(held),
        "random": digest_of([torch.get_rng_state(), numpy.random.get_state(), random.getstate()]),
    }


def digest_of(value) -> str:
    """Of tensors, arrays and plain values, to any depth, by their bytes."""
    import hashlib

    import numpy
    import torch

    digest = hashlib.sha256()

    def add(part) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        elif isinstance(part, numpy.ndarray):
            digest.update(part.tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                digest.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            digest.update(f"{len(part)}".encode())
            for each in part:
                add(each)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


# ---- builders of `inject`


def die_in_phase(rank: int, phase: str, occurrence: int = 1, *, before: bool = True) -> str:
    """This rank is killed when it enters, for the n-th time, a phase that starts so; before or after its report says so."""
    return f"if RANK == {rank}: kill_in_phase({phase!r}, {occurrence}, {before})\n"


def die_at_call(rank: int, target: str, occurrence: int = 1, *, before: bool = True, matching: str = "") -> str:
    """This rank is killed at the n-th call of "module:name" or "module:Class.name", before it runs or after. `matching`: only calls count
    in whose arguments' repr this text stands (a path, say)."""
    return f"if RANK == {rank}: kill_at_call({target!r}, {occurrence}, {before}, {matching!r})\n"


def record_samples() -> str:
    return "keep_samples()\n"


def record_steps() -> str:
    return "keep_steps()\n"


if __name__ == "__main__":
    serve(sys.argv[1])
