"""A real Slurm on this machine for the tests: munged, slurmctld and one slurmd per node, all private to one Rig.

    with Rig(tracking="cgroup") as rig:
        job = rig.submit("srun hostname", "-N2")
        rig.wait_for(lambda: rig.state(job) == "COMPLETED")
        rig.kill_node("r2")

Its ports are free ones, its munge has a key and a socket of its own, its job ids begin where no other rig's do, and `environment` holds
what makes Slurm's commands talk to it (SLURM_CONF). Two rigs live beside each other, also those of two test sessions.

Nodes r1, r2, ... are all this host; each claims CPUS CPUs, MEMORY_MIB and two "GPUs" of type h100 (/dev/null and /dev/zero). Partitions:
low (the default; preemptible by requeueing, after GRACE_S) and high. What Slurm takes minutes for is set to seconds: a requeued job waits
CRED_EXPIRE_S + 1, a dead slurmd is noticed after 10 to 20 s. Slurm rounds time limits to minutes; `end_in` does not, but even so the limit
comes up to half a minute late.

`tracking` is Slurm's ProctrackType, which decides whom a step's signal reaches: under cgroup, as in production, the tasks that srun has
started; under linuxproc all their descendants. cgroup needs a writable v1 freezer (see `why_not`).

Everything that a rig starts is a descendant of its keeper (keeper.py), which ends it all when the rig is closed or its process dies.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CPUS, MEMORY_MIB, GRACE_S, KILL_WAIT_S, CRED_EXPIRE_S, SLURMD_TIMEOUT_S = 4, 4000, 20, 10, 5, 8
"""Slurm takes no shorter CRED_EXPIRE_S."""
STARTED_WITHIN_S = 30
POLL_S = 0.1
JOBS = 1000
"""So many job ids are one rig's own."""
FREEZER = Path("/sys/fs/cgroup/freezer")
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
PORTS = range(20000, 32000)
"""Below those that the kernel gives to whoever asks for any."""

CONF = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={CRED_EXPIRE_S}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
FirstJobId={first_job}
MaxJobId={last_job}
MinJobAge=36000
JobRequeue=1
OverTimeLimit=0
KillWait={KILL_WAIT_S}
SlurmdTimeout={SLURMD_TIMEOUT_S}
SlurmctldTimeout=10
MessageTimeout=5
InactiveLimit=0
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} "
    "ThreadsPerCore=1 RealMemory={MEMORY_MIB} Gres=gpu:h100:2\n"
)
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""


def why_not(tracking: str) -> str | None:
    """What keeps a rig of this tracking from working here; None when nothing does."""
    missing = [command for command in COMMANDS if not shutil.which(command)]
    if missing:
        return f"needs Slurm, but {', '.join(missing)} is not on PATH: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "needs root, because slurmd does: run these tests as root"
    if tracking == "cgroup" and not os.access(FREEZER / "cgroup.procs", os.W_OK):
        return (
            f"needs a cgroup v1 freezer that can be written, and {FREEZER} is none (this host has cgroup v2 alone, or mounts it read-only)"
        )
    return None


class RigError(AssertionError):
    """Something on the rig that did not come about in time, with what Slurm's own logs say."""


class Rig:
    def __init__(self, tracking: str = "cgroup", nodes: int = 3):
        self.tracking, self.nodes = tracking, tuple(f"r{number}" for number in range(1, nodes + 1))
        # A socket's path may have 107 bytes, which pytest's own folders can exceed.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-rig-"))
        self._keeper: subprocess.Popen | None = None
        self._first_job = random.randrange(1000, 60_000_000, JOBS)
        self._ports: list[int] = []

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with nothing of another Slurm."""
        return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SQUEUE"))} | {
            "SLURM_CONF": str(self.folder / "slurm.conf")
        }

    # ---- up and down

    def up(self) -> "Rig":
        """Start everything and wait until all nodes are idle. Raises RigError with the logs when they do not become so."""
        self.folder.chmod(0o755)
        for name in ("state", "log", "jobs", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self._ports = free_ports(1 + len(self.nodes))
        self._write_configuration()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keeper.py")), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )
        files = {option: self.folder / name for option, name in MUNGE_FILES.items()}
        self._start("munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in files.items()))
        self.wait_for((self.folder / "munge.sock").exists, "munged's socket")
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        self.wait_for(self._all_idle, "all nodes to be idle", STARTED_WITHIN_S)
        return self

    def down(self) -> None:
        """End every process of the rig and remove what it left on this host."""
        if self._keeper:
            self._keeper.stdin.close()
            self._keeper.wait(60)
            self._keeper.stdout.close()
            self._keeper = None
            self._remove_cgroups()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Rig":
        try:
            return self.up()
        except BaseException:
            self.down()
            raise

    def __exit__(self, *_) -> None:
        self.down()

    def reset(self) -> None:
        """Back to an empty cluster: no jobs, all nodes up and idle, the user signal on."""
        self.set_user_signal(True)
        deadline = time.monotonic() + 60
        while not self._all_idle() or self._queue():
            if time.monotonic() > deadline:
                raise RigError(f"the cluster does not come to rest: jobs {self._queue()}\n{self._logs()}")
            for job in self._queue():
                self.run("scancel", "--signal=KILL", "--full", job, check=False)
                self.run("scancel", job, check=False)
                for pid in self.processes_of(job):
                    kill(pid)
            for node in self.nodes:
                if not self._slurmd_lives(node):
                    self._start("slurmd", "-D", "-N", node)
                elif re.search("DOWN|DRAIN|FAIL", self._node_state(node)):
                    self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            time.sleep(POLL_S)

    def set_user_signal(self, is_sent: bool) -> None:
        """Whether a preempted job gets the signal of its --signal (preempt_send_user_signal)."""
        configuration, file = self._render_configuration(user_signal=is_sent), self.folder / "slurm.conf"
        if file.read_text() != configuration:
            # Renamed, because every slurmd reads it some time after the command has returned.
            Path(f"{file}.new").write_text(configuration)
            os.rename(f"{file}.new", file)
            self.run("scontrol", "reconfigure")

    # ---- jobs

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60, **options) -> str:
        """One command under `environment`; returns its output. Raises RigError when it fails and `check` is not False."""
        done = subprocess.run(
            argv, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, **options
        )
        if check and done.returncode:
            raise RigError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def submit(self, script: str, *flags: str) -> str:
        """sbatch of a bash script, given as text. Returns the job's id; its output goes where `log` reads."""
        output = f"--output={self.folder}/jobs/%j.log"
        return self.run("sbatch", "--parsable", output, "--open-mode=append", *flags, input=f"#!/bin/bash\n{script}\n").strip()

    def log(self, job: str) -> str:
        """What a job of `submit` has written so far."""
        file = self.folder / "jobs" / f"{job}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`; Comment and other free text are cut at a blank."""
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", "-o", job).split() if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def hosts(self, job: str) -> list[str]:
        """The nodes that a running job has, in Slurm's order."""
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).split()

    def wait_for(self, predicate: Callable[[], object], what: str = "that", timeout_s: float = 60):
        """The first true value of `predicate`. Raises RigError, with Slurm's logs, when there is none in time."""
        deadline = time.monotonic() + timeout_s
        while not (value := predicate()):
            if time.monotonic() > deadline:
                raise RigError(f"waited {timeout_s:.0f} s in vain for {what}\n{self._logs()}")
            time.sleep(POLL_S)
        return value

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 60) -> str:
        """Until the job is in one of these states; returns which."""
        return self.wait_for(lambda: (state := self.state(job)) in states and state, f"job {job} to be {' or '.join(states)}", timeout_s)

    def processes_of(self, job: str) -> list[int]:
        """Every living process of a job on any node, whatever its parent: Slurm's variable is in its environment."""
        return processes_with(f"SLURM_CONF={self.folder}/slurm.conf", f"SLURM_JOB_ID={job}")

    def end_in(self, job: str, seconds: float) -> None:
        """Move a running job's end: its time limit comes then, and not at a whole minute."""
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.run("scontrol", "update", f"JobId={job}", f"EndTime={end}")

    # ---- nodes

    def kill_node(self, name: str, *, with_jobs: bool = False) -> None:
        """SIGKILL of a node's slurmd, as if the network had lost the node: its tasks run on. `with_jobs`: as if it had lost its power."""
        kill(self._slurmd_pid(name))
        while with_jobs and (left := self._processes_on(name)):
            for pid in left:
                kill(pid)
            time.sleep(POLL_S)

    def revive_node(self, name: str) -> None:
        """Start a killed node's slurmd again, and wait until Slurm counts on it."""
        self._start("slurmd", "-D", "-N", name)
        self.wait_for(lambda: re.match("IDLE|MIX|ALLOC|COMPLETING", self._node_state(name)), f"{name} to come back")

    def _slurmd_pid(self, name: str) -> int:
        return int((self.folder / f"slurmd-{name}.pid").read_text())

    def _slurmd_lives(self, name: str) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return f"slurmd\0-D\0-N\0{name}\0" == Path(f"/proc/{self._slurmd_pid(name)}/cmdline").read_text()
        return False

    def _processes_on(self, name: str) -> list[int]:
        """The tasks of all jobs on a node, and the slurmstepd above them, which are known by the log that they hold open."""
        tasks = processes_with(f"SLURM_CONF={self.folder}/slurm.conf", f"SLURMD_NODENAME={name}")
        log = str(self.folder / "log" / f"slurmd-{name}.log")
        return tasks + [pid for pid in processes_with(f"SLURM_CONF={self.folder}/slurm.conf") if log in open_files(pid)]

    def _node_state(self, name: str) -> str:
        return re.search(r"State=(\S+)", self.run("scontrol", "show", "node", "-o", name))[1]

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def _queue(self) -> list[str]:
        """The jobs that have not ended."""
        return self.run("squeue", "-h", "-r", "-o", "%A", check=False).split()

    # ---- inside

    def _start(self, *argv: str) -> None:
        self._keeper.stdin.write(json.dumps(argv).encode() + b"\n")
        self._keeper.stdin.flush()
        self._keeper.stdout.readline()

    def _write_configuration(self) -> None:
        (self.folder / "slurm.conf").write_text(self._render_configuration(user_signal=True))
        gpus = [f"NodeName={node} Name=gpu Type=h100 File=/dev/null,/dev/zero\n" for node in self.nodes]
        (self.folder / "gres.conf").write_text("".join(gpus))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)

    def _render_configuration(self, *, user_signal: bool) -> str:
        values = {**globals(), "host": socket.gethostname(), "folder": self.folder, "tracking": self.tracking, "port": self._ports[0]}
        values |= {"first_job": self._first_job, "last_job": self._first_job + JOBS - 1, "user_signal": "" if user_signal else "#"}
        nodes = [NODE.format(**{**values, "name": name, "port": port}) for name, port in zip(self.nodes, self._ports[1:], strict=True)]
        return CONF.format(**values) + "".join(nodes)

    def _remove_cgroups(self) -> None:
        """The folders of this rig's jobs, which a killed slurmstepd leaves, and those of the nodes unless another rig uses them."""
        for node in self.nodes:
            top = FREEZER / f"slurm_{node}"
            ours = [path for path in top.glob("uid_*/job_*") if int(path.name[4:]) in range(self._first_job, self._first_job + JOBS)]
            for path in [inner for job in ours for inner in (*job.iterdir(), job) if inner.is_dir()] + [*top.glob("uid_*"), top]:
                with contextlib.suppress(OSError):
                    path.rmdir()

    def _logs(self) -> str:
        """The last lines of what Slurm says of itself."""
        files = sorted((self.folder / "log").glob("*.log"))
        lines = {file.name: [line for line in file.read_text(errors="replace").splitlines() if "pmi" not in line] for file in files}
        return "\n".join(f"---- {name}\n" + "\n".join(said[-15:]) for name, said in lines.items())


MUNGE_FILES = {
    "socket": "munge.sock",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "log-file": "log/munged.log",
    "seed-file": "munge.seed",
}


def free_ports(count: int) -> list[int]:
    """So many different ports that nobody listens on now."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RigError(f"{PORTS}: fewer than {count} ports are free")


def processes_with(*entries: str) -> list[int]:
    """The living processes that have all these in their environment."""
    wanted, found = {entry.encode() for entry in entries}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # slurmstepd writes its title over the first bytes of its environment.
            if wanted <= set((folder / "environ").read_bytes().replace(b" ", b"\0").split(b"\0")):
                found.append(int(folder.name))
    return found


def open_files(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(link))
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
