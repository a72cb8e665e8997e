"""Several processes on this machine that share units of work (harness.units), as `harness capture` and `harness generate` start them."""

import signal
import subprocess
import time

from harness.cli.run import ONE_CAUSE_S
from harness.distributed import free_port
from harness.errors import Stopped
from harness.launcher import Machines
from harness.life import has_nvidia_gpu, noted_signals, own_environment, say, start_launcher

LOOK_EVERY_S = 0.2


def supervise(argv: list[str], machines: Machines, environment: dict[str, str], *, together: bool) -> int:
    """Run `argv` in so many processes, and hand signals on to them. Returns the exit code.

    environment: beside this process's own, in which they find this very harness, and what says which of them each is.
    together: they do each unit together, so that all end when one fails. Otherwise the others do the work of one that failed.
    """
    address, port = (machines.address, machines.port) if machines.count > 1 else ("127.0.0.1", free_port())
    processes, asked_at = [], None
    # harness.life.rank_environment says why threads are not to spin.
    shared = ({} if has_nvidia_gpu() else {"OMP_WAIT_POLICY": "PASSIVE"}) | own_environment() | environment
    with noted_signals() as signals:
        for local in range(machines.processes):
            place = {
                "RANK": machines.index * machines.processes + local,
                "LOCAL_RANK": local,
                "WORLD_SIZE": machines.world_size,
                "LOCAL_WORLD_SIZE": machines.processes,
                "MASTER_ADDR": address,
                "MASTER_PORT": port,
            }
            processes.append(start_launcher(argv, shared | {key: str(value) for key, value in place.items()}, []))
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if signals:
                signals.clear()
                if asked_at is None:
                    asked_at = now
                    say("stopping: each worker ends its unit and leaves; press Ctrl-C again to leave at once")
                    _signal(processes, signal.SIGTERM)
                elif now - asked_at > ONE_CAUSE_S:
                    _signal(processes, signal.SIGKILL)
            if together and any(process.returncode not in (None, 0, Stopped.exit_code) for process in processes):
                _signal(processes, signal.SIGKILL)
            time.sleep(LOOK_EVERY_S)
    return exit_code_of([process.returncode for process in processes], together=together)


def exit_code_of(codes: list[int], *, together: bool) -> int:
    """0 when all units are there: one that ends with it has found every unit there. Else what went wrong, and 75 if nothing did."""
    if 0 in codes and not together:
        return 0
    wrong = [code for code in codes if code not in (0, Stopped.exit_code)]
    # Those that were killed for another's failure come after it.
    return next((code for code in wrong if code > 0), 128 - wrong[0] if wrong else max(codes))


def _signal(processes: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
