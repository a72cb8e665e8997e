"""Slurm's commands: the only module that starts them. What they know comes back as plain objects, what they refuse as a ClusterError.

What is read comes from squeue and sinfo, whose fields are asked for by name and parted by control characters: names, comments and reasons
hold blanks, `=` and line breaks, which the output of `scontrol show job` cannot be read back through. Both work where compute nodes may not
call scontrol, and neither needs slurmdbd. Times are Unix times.

The promise: every command ends, within a minute, and either did what it was told or raises ClusterError with what Slurm said and what to
do. A variable of the environment (SQUEUE_FORMAT, SBATCH_PARTITION) changes neither what is read nor what is submitted.
"""

import itertools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.doctor.check import Check
from harness.errors import ClusterError

SHORT_S = 10.0
"""Where somebody waits who has little time."""
COMMAND_S = 60.0
"""Slurm's own patience with a controller that does not answer is 10 s, and 100 s on some large sites."""
IGNORED_VARIABLES = ("SQUEUE_", "SINFO_", "SBATCH_", "SCANCEL_", "SLURM_CLUSTERS")
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""The states that a job does not leave again. In COMPLETING its last processes are being ended, and it may yet be requeued."""
USABLE = {"allocated", "completing", "idle", "mixed", "planned"}
"""The states in which a node takes jobs, now or when those that it has are done."""
NO_ANSWER = r"contact slurm controller|timed out|Connection refused|Unexpected message received|Zero Bytes were transmitted"
REMEDIES = (
    (NO_ANSWER, "Slurm's controller does not answer: `scontrol ping` says whether it is up"),
    (r"process configuration|ClusterName", "Slurm's configuration is not found: set SLURM_CONF, or go where Slurm is set up"),
    (r"[Ii]nvalid partition", "`harness nodes` lists the partitions; name one as `partition:` in the cluster file"),
    (r"[Aa]ccount", "set `account:` in the cluster file to one that you may use (`sacctmgr show associations user=$USER` lists them)"),
    (r"(?i)\bqos\b", "set `qos:` in the cluster file to one that you may use"),
    (r"reservation", "`scontrol show reservation` lists those that there are"),
    (r"feature|node configuration|can not be satisfied|\bgres\b", "`harness nodes` shows what the nodes have; ask for no more of one"),
    (r"Invalid node name", "`harness nodes` lists the nodes; mend `exclude:` in the cluster file"),
    (r"[Ii]nvalid job id", "Slurm does not know that job (any more); `harness status RUN` says what became of its run"),
    (r"already finished", "it has ended; `harness status RUN` says what became of its run"),
    (r"[Dd]ependency problem", "write it as KIND:JOB, such as afterok:1234"),
    (r"denied|permission", "the job belongs to somebody else, or users may not do this here"),
)
"""What to do, by the first pattern that is in what a command said."""


class NoAnswer(ClusterError):
    """Slurm's controller does not answer; it may in a minute."""


# ---- jobs


@dataclass(frozen=True)
class SlurmJob:
    """One job, or one element of an array, as Slurm sees it now."""

    id: str
    """As the user writes it: `123`, or `123_4` for an element of an array."""
    name: str
    user: str
    partition: str
    state: str
    """PENDING, RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    """Why it waits, or why it ended; empty when Slurm gives none."""
    hosts: tuple[str, ...]
    """The nodes that it has (had); empty while it waits."""
    nodes: int
    submitted: float | None
    """When it was submitted, or requeued."""
    started: float | None
    """While it waits: when Slurm expects to start it, None if it cannot say."""
    ends: float | None
    """When its time is over; after it was preempted, the end of its grace."""
    preempted: float | None
    restarts: int
    comment: str
    dependency: str


def submit_script(script: Path, *arguments: str) -> str:
    """Hand a batch script to sbatch, with further flags for it; returns the job's id. What sbatch has to say besides goes to stderr."""
    done = _run("sbatch", "--parsable", *arguments, str(script))
    sys.stderr.write(done.stderr)
    # A site's wrapper around sbatch may print lines of its own before.
    last = (done.stdout.split() or [""])[-1].partition(";")[0]
    if not last.isdigit():
        raise ClusterError(f"sbatch: said {done.stdout.strip()!r} and no job id; look into squeue whether the job is there")
    return last


def find_job(job_id: str, patience_s: float | None = None) -> SlurmJob | None:
    """None when Slurm no longer knows it (it forgets a job some minutes after its end: MinJobAge). Also by the id of its own that an
    element of an array has; the elements of a whole array are `list_jobs([id])`."""
    return next(iter(list_jobs([job_id], patience_s).values()), None)


def list_jobs(job_ids: Iterable[str] | None = None, patience_s: float | None = None) -> dict[str, SlurmJob]:
    """The jobs with these ids, by id, ended ones included as long as Slurm knows them; without ids all of this user. One call of squeue,
    however many they are. The id of an array stands for all its elements."""
    asked = None if job_ids is None else list(job_ids)
    if asked == []:
        return {}
    whose = ["--user", str(os.getuid())] if asked is None else ["--jobs", ",".join(asked)]
    try:
        # --array: without it pending elements come as one line, `123_[4-9%2]`.
        said = _run(
            "squeue", "--noheader", "--array", "--states=all", *whose, "--Format", _format(_JOB_COLUMNS), patience_s=patience_s
        ).stdout
    except ClusterError as error:
        # Of several it leaves out those that it does not know, of one it complains.
        if asked and "Invalid job id specified" in str(error):
            return {}
        raise
    jobs = [_parse_job(line) for line in _split(said)]
    return {job.id: job for job in jobs}


END_OF_FIELD, END_OF_LINE = "\x1f", "\x1e"
CONTROL = r"[\x00-\x1f]+"
_JOB_COLUMNS = (
    ("JobArrayID", 64),
    ("Name", 1024),
    ("UserName", 128),
    ("Partition", 1024),
    ("State", 64),
    ("Reason", 512),
    ("NodeList", 8192),
    ("NumNodes", 32),
    ("SubmitTime", 32),
    ("StartTime", 32),
    ("EndTime", 32),
    ("PreemptTime", 32),
    ("RestartCnt", 16),
    ("Comment", 1024),
    ("Dependency", 2048),
)
"""(field of squeue --Format, so many characters of it). In SlurmJob's order."""
_NOTHING = ("", "(null)", "N/A", "n/a", "None", "none", "Unknown", "NONE")


def _format(columns: tuple[tuple[str, int], ...]) -> str:
    return f"{END_OF_FIELD},".join(f"{name}:{width}" for name, width in columns) + END_OF_LINE


def _split(said: str) -> list[list[str]]:
    """The lines of squeue or sinfo, as lists of fields."""
    return [[field.strip() for field in line.split(END_OF_FIELD)] for line in said.split(END_OF_LINE)[:-1]]


def _parse_job(fields: list[str]) -> SlurmJob:
    if len(fields) != len(_JOB_COLUMNS):
        raise ClusterError(
            f"job {fields[0]}: its name or comment holds control characters, and cannot be read; give it another by "
            f"scontrol update JobId={fields[0]}"
        )
    job_id, name, user, partition, state, reason, hosts, nodes, submitted, started, ends, preempted, restarts, comment, dependency = fields
    return SlurmJob(
        job_id,
        name,
        user,
        partition,
        state,
        _text(reason),
        hostnames(_text(hosts)),
        int(nodes),
        _time(submitted),
        _time(started),
        _time(ends),
        _time(preempted),
        int(restarts),
        _text(comment),
        _text(dependency),
    )


def _text(value: str) -> str:
    return "" if value in _NOTHING else value


def _time(value: str) -> float | None:
    return None if value in _NOTHING else float(value)


def is_alive(job: SlurmJob | None) -> bool:
    """Whether it waits, runs, is ending, or is held to be started again."""
    return job is not None and job.state not in ENDED


def cancel_job(*job_ids: str) -> None:
    """End jobs wherever they stand. Slurm says nothing of one that has ended, or never was."""
    _run("scancel", *job_ids)


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue; where it runs it is ended at once. It starts again no sooner than two minutes from now or so
    (AuthInfo's cred_expire)."""
    _run("scontrol", "requeue", job_id)


def comment_job(job_id: str, text: str) -> None:
    """Set the comment that squeue shows, in one line. Slurm refuses it for a job that has ended. Worth no wait."""
    _run("scontrol", "update", f"JobId={job_id}", f"Comment={re.sub(CONTROL, ' ', text)}", patience_s=SHORT_S)


def depend_on(job_id: str, dependency: str) -> None:
    """Let a job that waits wait for this (`afterany:123`) instead of what it waited for."""
    _run("scontrol", "update", f"JobId={job_id}", f"Dependency={dependency}")


# ---- nodes


@dataclass(frozen=True)
class Node:
    name: str
    partitions: tuple[str, ...]
    state: str
    """idle, mixed, allocated, down, drained, ..., without the sign that Slurm adds."""
    is_usable: bool
    """Whether jobs start on it, now or when those that it has are done."""
    cpus: int
    cpus_free: int
    memory_mib: int
    memory_free_mib: int
    """Not promised to any job. Where Slurm does not share out memory, that is all of it."""
    gpus: dict[str, int] = field(default_factory=dict)
    """Type -> count; the type is `gpu` where none was given."""
    gpus_free: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    """Why it is down or drained, as an administrator or Slurm wrote it."""


def list_nodes() -> list[Node]:
    """All nodes, in Slurm's order; those of several partitions once."""
    said = _run("sinfo", "--noheader", "--all", "--Node", "--Format", _format(_NODE_COLUMNS)).stdout
    lines: dict[str, list[list[str]]] = {}
    for fields in _split(said):
        lines.setdefault(fields[0], []).append(fields)
    return [_parse_node(name, of_node) for name, of_node in lines.items()]


_NODE_COLUMNS = (
    ("NodeList", 256),
    ("PartitionName", 256),
    ("StateLong", 64),
    ("CPUsState", 64),
    ("Memory", 32),
    ("AllocMem", 32),
    ("Gres", 1024),
    ("GresUsed", 1024),
    ("Reason", 512),
)


def _parse_node(name: str, lines: list[list[str]]) -> Node:
    _, _, state, cpus, memory, allocated, gres, gres_used, reason = lines[0]
    partitions = tuple(dict.fromkeys(line[1] for line in lines))
    # idle* does not answer, idle~ sleeps and is woken for a job, mixed- is kept for one: the signs, of which only the first matters here.
    plain = state.rstrip("*~#!%$@^+-")
    usable = plain in USABLE and "*" not in state
    _, idle, _, total = map(int, cpus.split("/"))
    gpus, used = parse_gpus(gres), parse_gpus(gres_used)
    free = {kind: count - used.get(kind, 0) for kind, count in gpus.items()}
    return Node(name, partitions, plain, usable, total, idle, int(memory), int(memory) - int(allocated), gpus, free, _text(reason))


def parse_gpus(gres: str) -> dict[str, int]:
    """`gpu:h100:8(S:0-1),shard:16` as {"h100": 8}; `gpu:2` as {"gpu": 2}."""
    counts: dict[str, int] = {}
    for match in re.finditer(r"(?:^|,)gpu:(?:([^:,()]+|\(null\)):)?(\d+)", gres):
        kind = match[1] if match[1] and match[1] != "(null)" else "gpu"
        counts[kind] = counts.get(kind, 0) + int(match[2])
    return counts


def default_partition() -> str | None:
    """The one that a job gets which names none; None when there is no such partition."""
    names = _run("sinfo", "--noheader", "--all", "--format", "%P").stdout.split()
    return next((name.removesuffix("*") for name in names if name.endswith("*")), None)


def hostnames(nodelist: str) -> tuple[str, ...]:
    """`r[1-2,08],gpu1` as ("r1", "r2", "r08", "gpu1"), as `scontrol show hostnames` does, which not every compute node may call. Raises
    ClusterError for what is no list of nodes."""
    hosts: list[str] = []
    for part in re.findall(rf"(?:{_RANGES}|[^,])+", nodelist):
        pieces = [_numbers(piece[1:-1]) if piece.startswith("[") else [piece] for piece in re.split(f"({_RANGES})", part)]
        if any(set("[]") & set(name) for names in pieces for name in names):
            raise ClusterError(f"node list {nodelist!r}: cannot be read; write it as r[1-3,5],gpu1")
        hosts += map("".join, itertools.product(*pieces))
    return tuple(hosts)


_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"


def _numbers(ranges: str) -> list[str]:
    """`1-3,08` as 1, 2, 3, 08."""
    numbers: list[str] = []
    for text in ranges.split(","):
        first, _, last = text.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def node_address(host: str) -> str:
    """What other nodes reach a node by: its name if that resolves here, else the address that Slurm has for it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        said = _run("sinfo", "--noheader", "--all", "--Node", "--nodes", host, "--format", "%o").stdout.split()
    if not said:
        raise ClusterError(f"node {host}: its name does not resolve, and Slurm knows no such node; `harness nodes` lists them")
    return said[0]


# ---- settings of this Slurm


def grace_s(partition: str) -> int | None:
    """The seconds between a preemption's signal and its end in this partition; None when Slurm does not say."""
    match = re.search(r"\bGraceTime=(\d+)", _run("scontrol", "show", "partition", partition, "--oneliner").stdout)
    return int(match[1]) if match else None


def kill_wait_s() -> int:
    """The seconds between SIGTERM and SIGKILL when a job is ended."""
    said = _run("scontrol", "show", "config").stdout
    match = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
    if not match:
        raise ClusterError("scontrol show config: names no KillWait; this Slurm's version is not one that harness knows")
    return int(match[1])


# ---- running a command


def _run(*argv: str, patience_s: float | None = None) -> subprocess.CompletedProcess[str]:
    patience_s = patience_s or COMMAND_S
    environment = {name: value for name, value in os.environ.items() if not name.startswith(IGNORED_VARIABLES)}
    environment |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=patience_s
        )
    except FileNotFoundError:
        raise ClusterError(f"{argv[0]} is not on PATH; run this where Slurm's commands are, such as the login node") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"{argv[0]}: no answer within {patience_s:.0f} s, and it may have been obeyed nonetheless: look into squeue before you ask "
            "again; `scontrol ping` says whether Slurm's controller is up"
        ) from None
    except OSError as error:
        raise ClusterError(f"{argv[0]}: cannot be started: {error.strerror}; see to the command that PATH finds") from error
    if done.returncode:
        lines = [line.removeprefix(f"{argv[0]}: error: ").strip() for line in (done.stderr or done.stdout).splitlines()]
        said = "; ".join(filter(None, lines)) or f"left with {done.returncode} and said nothing"
        remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, said)), f"the command was: {shlex.join(argv)}")
        kind = NoAnswer if re.search(NO_ANSWER, said) else ClusterError
        raise kind(f"{argv[0]}: {said}; {remedy}")
    return done


# ---- whether it is there


COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sinfo", "sacct")


def check_commands() -> list[Check]:
    """Of `harness doctor`: the commands that `harness submit` and `harness status` call, and whether the controller answers."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if len(missing) == len(COMMANDS):
        return [Check("cluster", "Slurm", "ok", "not here; `harness run` is for one machine, `harness submit` for a login node")]
    if missing:
        what = f"{', '.join(missing)} not on PATH, though {', '.join(name for name in COMMANDS if name not in missing)} are"
        return [Check("cluster", "Slurm", "fail", what, "module load slurm, or install the client package whole")]
    try:
        done = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=5)
        answer = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return [Check("cluster", "Slurm", "warn", "its controller does not answer within 5 s", _NO_CONTROLLER)]
    version = done.stdout.strip() or "installed"
    said = ((answer.stdout + answer.stderr).strip().splitlines() or [""])[-1].strip()
    if answer.returncode == 0 and " UP" in answer.stdout:
        return [Check("cluster", "Slurm", "ok", f"{version}; {said}")]
    return [Check("cluster", "Slurm", "warn", f"{version}, but no controller answers ({said})", _NO_CONTROLLER)]


_NO_CONTROLLER = "`harness submit` needs it: is this a login node of the cluster, and SLURM_CONF right?"
