"""The cluster file: what a site has, what a job there asks for, and how it is set up. As strict as a recipe, and read by the same reader.

    load_cluster("configs/clusters/gpu.yaml", ["partition=a100"]) -> Cluster

A submitted run keeps the resolved one as RUN/cluster.yaml (`render_cluster`). Nothing secret stands in it: secrets are named by their file
(harness.cluster.secrets), variables by their names alone.

The promise: whatever this file lets pass can be rendered, and means to Slurm what it says here. Whether the paths exist is checked where a
job is submitted.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from harness.errors import RecipeError
from harness.planner.gpus import GIB, GPUS, Gpu
from harness.recipe.load import apply_override, read_yaml, render_yaml, validate
from harness.recipe.schema import NonNegativeInt, PositiveInt, Section
from harness.resources import find_config, shipped_names

HomePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with ~."""
TimeLimit = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A whole number is minutes, as sbatch reads it."""
Flags = dict[str, str | int | Literal[True]]
"""Long names of flags without their dashes; `true` for a flag that takes no value."""


class Container(Section):
    """Every process on every node runs in this image; the batch script itself, which only waits, runs outside it."""

    kind: Literal["pyxis", "apptainer"]
    """`pyxis`: srun's own --container-image, by enroot. `apptainer`: `apptainer exec` on each node."""
    image: HomePath
    """An absolute path (.sqsh, .sif), or where a registry has it: nvcr.io#nvidia/pytorch:26.01-py3 (pyxis), docker://... (apptainer)."""
    mounts: tuple[HomePath, ...] = ()
    """SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro. `shared`, the run folder and the code of harness are mounted without being named."""
    python: str = "python3"
    """The interpreter inside the image; harness and its libraries must be there."""


class Network(Section):
    interface: str | None = None
    """The interface that nodes talk over (`ip -brief addr`), for NCCL and gloo. Left out: each chooses, and may choose wrongly."""
    infiniband: Literal["auto", "required", "off"] = "auto"
    """`required`: pre-flight fails where NCCL falls back to sockets. `off`: sockets, even where there is InfiniBand."""


class Restarts(Section):
    in_allocation: NonNegativeInt = 3
    """How often a job starts dead ranks again on nodes that live, without the queue."""
    max_restarts: NonNegativeInt = 30
    """How often a run goes back to the queue, over all of its jobs."""
    exclude_nodes: NonNegativeInt = 2
    """How many nodes that failed pre-flight a run may leave out, each by a successor job."""
    by: Literal["auto", "scontrol", "successor"] = "auto"
    """How a run goes back to the queue. `auto`: `scontrol requeue`, or a successor job where compute nodes may not call it."""


class Cluster(Section):
    name: str
    """What people call it; the file's stem when left out."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Node features, in Slurm's syntax: `a100&nvlink`."""
    reservation: str | None = None
    exclude: tuple[str, ...] = ()
    """Nodes never to be used, in Slurm's syntax: `r[1-3]`."""
    time: TimeLimit = "1-00:00:00"
    """Time limit of one job, in Slurm's syntax: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. A run goes on in the next job."""

    gpus_per_node: NonNegativeInt = 0
    gpu_type: str | None = None
    """As the site's Gres says it: `h100`."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of each GPU, so that what cannot fit is refused before it waits in the queue. Left out: what is known of `gpu_type`."""
    processes_per_node: PositiveInt | None = None
    """Ranks per node: one for each GPU when left out, or one where there are none."""
    cpus_per_node: PositiveInt | None = None
    """Left out: the site's default, which may be one. Ranks, data workers and the tokeniser share them."""
    memory_gib: NonNegativeInt | None = None
    """Host memory per node. 0: all that the node has. Left out: the site's default, which is often little."""

    setup: tuple[str, ...] = ()
    """Bash, run as it is on the first node before anything else: modules, a venv. An entry is one complete command; one that fails ends
    the job, by name. What it exports reaches every node."""
    python: HomePath | None = None
    """The interpreter on the nodes: a path, or a name that is found after `setup`. Left out: the one that submits."""
    container: Container | None = None
    shared: tuple[HomePath, ...] = ()
    """Folders that every node must see and write; pre-flight proves it."""
    network: Network = Network()
    environment: tuple[str, ...] = ()
    """Names of variables that the job takes from the environment in which it is submitted. No other gets through."""
    secrets: HomePath | None = None
    """A file of KEY=VALUE lines that only its owner can read (chmod 600); read on the node, never copied."""

    signal_lead_s: Annotated[int, Field(gt=0, le=65535)] = 300
    """The run is told to save so long before the time limit: the longest step, two saves, and up to 60 s by which Slurm may be off."""
    preflight: bool = True
    """Try every node for up to a minute before the model loads."""
    restarts: Restarts = Restarts()
    sbatch: Flags = {}
    """Any further flag of sbatch by its long name: {mail-type: END, exclusive: true}."""
    srun: Flags = {}
    """The same for the srun that starts the processes."""

    @property
    def ranks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def gpu(self) -> Gpu | None:
        """What a GPU here holds; None where nothing says it."""
        known = GPUS.get((self.gpu_type or "").lower())
        if self.gpu_memory_gib is None:
            return known
        size = round(self.gpu_memory_gib * GIB)
        return replace(known, bytes=size) if known else Gpu(f"{self.gpu_memory_gib:g} GiB", size)

    @property
    def time_s(self) -> int:
        return parse_time_s(self.time)


def load_cluster(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Cluster:
    """Read, override, validate. `name_or_path` is a file or the name of a shipped cluster file; `overrides` are `key.path=value`.

    Raises RecipeError (exit code 2) that names file, dotted key, value, rule and remedy for everything that is wrong.
    """
    file = find_config(name_or_path, "clusters")
    if file is None:
        known = ", ".join(shipped_names("clusters"))
        raise RecipeError(f"{name_or_path}: no such cluster file; give the path of a YAML file or one of: {known}")
    settings = read_yaml(file)
    for override in overrides:
        apply_override(settings, override)
    settings.setdefault("name", file.stem)
    cluster = validate(Cluster, settings, str(file), ELSEWHERE)
    problems = [f"{file}: {problem}" for rule in _RULES for problem in rule(cluster)]
    if problems:
        raise RecipeError("\n".join(problems))
    return cluster


def render_cluster(cluster: Cluster) -> str:
    """The cluster as YAML; loading it again gives the same cluster."""
    return render_yaml(cluster.model_dump(mode="json"))


def parse_time_s(text: str) -> int:
    """Seconds of a time limit in Slurm's syntax. Raises ValueError for anything else."""
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<numbers>\d+(?::\d+){0,2})", text, re.ASCII)
    if not match:
        raise ValueError(f"{text!r} is no time limit")
    numbers = [int(number) for number in match["numbers"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 3:
        return numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    minutes, seconds = [*numbers, 0][:2]
    return minutes * 60 + seconds


# ---- what no single field can say; each rule yields `dotted.key = value; reason or remedy`

CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
"""Cannot stand in a #SBATCH line: a line break would end it, and the rest would be a line of the script."""
_IN_DIRECTIVES = {"partition", "account", "qos", "constraint", "reservation", "exclude", "time", "gpu_type", "sbatch"}

_SAID_BY = {
    "partition": "`partition`",
    "account": "`account`",
    "qos": "`qos`",
    "constraint": "`constraint`",
    "reservation": "`reservation`",
    "exclude": "`exclude`",
    "time": "`time`",
    "gres": "`gpus_per_node` and `gpu_type`",
    "gpus": "`gpus_per_node`",
    "gpus-per-node": "`gpus_per_node`",
    "gpus-per-task": "`gpus_per_node`",
    "cpus-per-task": "`cpus_per_node`",
    "mem": "`memory_gib`",
    "export": "`environment`",
    "export-file": "`environment` and `secrets`",
    "nodes": "`harness submit --nodes`",
    "ntasks": "`harness submit --nodes`",
    "ntasks-per-node": "`processes_per_node`",
}
_SBATCH_SAID_BY = _SAID_BY | {
    "signal": "`signal_lead_s`",
    "requeue": "`restarts`",
    "no-requeue": "`restarts`",
    "dependency": "`harness submit --after`",
    "array": "`harness submit --array`",
    "output": "the run folder (logs/slurm-JOB.log)",
    "error": "the run folder (logs/slurm-JOB.log)",
    "open-mode": "the run folder (a log is continued, never emptied)",
    "chdir": "the folder in which `harness submit` runs",
    "job-name": "the run's name",
    "comment": "the run itself (its step and loss)",
    "wrap": "the run's script",
    "wait": "`harness status`",
    "parsable": "`harness submit` (the job id is what it prints)",
    "test-only": "`harness submit --dry-run`",
    "clusters": "the Slurm of the machine that submits",
}
_SRUN_SAID_BY = _SAID_BY | {
    "output": "the run folder (logs/attempt-K)",
    "error": "the run folder (logs/attempt-K)",
    "kill-on-bad-exit": "`restarts`",
    "wait": "`restarts`",
    "mpi": "the recipe's backend (Accelerate starts the ranks, not MPI)",
    "container-image": "`container.image`",
    "container-mounts": "`container.mounts` and `shared`",
    "container-env": "`environment`",
    "container-workdir": "the folder in which `harness submit` runs",
}


def _time_rules(cluster: Cluster) -> Iterator[str]:
    try:
        limit_s = cluster.time_s
    except ValueError:
        yield f"time = {cluster.time!r}; must be MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as 1-12:00:00"
        return
    if limit_s == 0:
        yield f"time = {cluster.time}; to Slurm that is no limit at all; say how long one job may take, such as 1-00:00:00"
    elif cluster.signal_lead_s >= limit_s:
        yield (
            f"signal_lead_s = {cluster.signal_lead_s}; the whole job is {limit_s} s (time = {cluster.time}), so it would be told to stop "
            "at once; make time longer, or the lead shorter"
        )


def _gpu_rules(cluster: Cluster) -> Iterator[str]:
    gpus, processes = cluster.gpus_per_node, cluster.processes_per_node
    if cluster.gpu_type and not gpus:
        yield f"gpu_type = {cluster.gpu_type}; gpus_per_node is 0, so none would be asked for; say how many"
    if cluster.gpu_memory_gib and not gpus:
        yield f"gpu_memory_gib = {cluster.gpu_memory_gib:g}; gpus_per_node is 0; say how many there are, or remove this"
    if cluster.gpu_type and not re.fullmatch(r"[\w.-]+", cluster.gpu_type):
        yield f"gpu_type = {cluster.gpu_type!r}; is not the type alone, such as h100; how many there are is gpus_per_node"
    if gpus and processes and processes != gpus:
        yield f"processes_per_node = {processes}; there are {gpus} GPUs per node, and a rank takes one; leave it out"


def _path_rules(cluster: Cluster) -> Iterator[str]:
    container = cluster.container
    paths = [("secrets", cluster.secrets), *((f"shared.{number}", path) for number, path in enumerate(cluster.shared))]
    for key, path in paths:
        if path and not os.path.isabs(path):
            yield f"{key} = {path}; every node must find it from wherever it runs; write it from / or ~"
    if cluster.python and "/" in cluster.python and not os.path.isabs(cluster.python):
        yield f"python = {cluster.python}; write its path from / or ~, or a bare name that is found after `setup`"
    if container is None:
        return
    if not (os.path.isabs(container.image) or _is_remote_image(container)):
        remote = "nvcr.io#nvidia/pytorch:26.01-py3" if container.kind == "pyxis" else "docker://nvcr.io/nvidia/pytorch:26.01-py3"
        yield f"container.image = {container.image}; must be an absolute path, or a registry's image such as {remote}"
    mounts = [(f"container.mounts.{number}", mount) for number, mount in enumerate(container.mounts)]
    for key, mount in mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:[\w+-]+)?)?", mount):
            yield f"{key} = {mount!r}; must be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, both from /, without a comma"
    for number, path in enumerate(cluster.shared):
        if re.search("[:,]", path):
            yield f"shared.{number} = {path!r}; a container cannot mount a path with a colon or a comma; choose another folder"


def _is_remote_image(container: Container) -> bool:
    if container.kind == "apptainer":
        return re.match(r"[a-z]+://[^/]", container.image) is not None
    enroot = r"(docker://)?([^/@#\s]+@)?([\w.:-]+#)?\w[\w./-]*(:[\w.-]+)?(@sha256:\w+)?"
    return re.fullmatch(enroot, container.image) is not None and not container.image.endswith(".sqsh")


def _setup_rules(cluster: Cluster) -> Iterator[str]:
    for number, entry in enumerate(cluster.setup):
        if "\0" in entry:
            continue
        # Bash itself says nothing about a backslash at the end, and of an unfinished here-document it only warns.
        said = subprocess.run(["bash", "-n"], input=entry, capture_output=True, text=True).stderr.strip()
        if said or entry.endswith("\\"):
            reason = said.splitlines()[0] if said else "it ends in a backslash"
            yield f"setup.{number} = {json.dumps(entry)}; is not complete by itself ({reason}); write several lines as one entry, after |"


def _environment_rules(cluster: Cluster) -> Iterator[str]:
    for number, name in enumerate(cluster.environment):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # What stands behind an = may be a secret.
            found = json.dumps(re.sub("=.*", "=...", name, flags=re.DOTALL))
            yield f"environment.{number} = {found}; is not the name of a variable; its value comes from where you submit"
        elif name.upper() in ("ALL", "NONE", "NIL"):
            yield f"environment.{number} = {name}; to sbatch that is a word of its own (--export={name}); name each variable that is wanted"
    interface = cluster.network.interface
    if interface and not re.fullmatch(r"[\w.@-]+", interface):
        yield f"network.interface = {interface!r}; must be the name of one interface, as `ip -brief addr` shows it; gloo knows no patterns"


def _flag_rules(cluster: Cluster) -> Iterator[str]:
    for section, flags, said_by in (("sbatch", cluster.sbatch, _SBATCH_SAID_BY), ("srun", cluster.srun, _SRUN_SAID_BY)):
        for flag in flags:
            # sbatch takes the beginning of a flag for the flag.
            meant = flag if flag in said_by else next((known for known in said_by if flag and known.startswith(flag)), None)
            if not re.fullmatch(r"[a-z][a-z0-9]+(-[a-z0-9]+)*", flag):
                yield f"{section}.{flag}: is not a flag's long name without its dashes, such as mail-type"
            elif meant:
                yield f"{section}.{flag}: {said_by[meant]} says this; remove it here"


def _text_rules(cluster: Cluster) -> Iterator[str]:
    for key, text in _texts(cluster.model_dump(mode="json"), ""):
        if key.split(".")[0] in _IN_DIRECTIVES and CONTROL.search(text):
            yield f"{key} = {json.dumps(text)}; a #SBATCH line cannot hold a line break or another control character; remove it"
        elif "\0" in text:
            yield f"{key} = {json.dumps(text)}; nothing that is given to a program can hold a NUL; remove it"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from _texts(item, f"{key}.{name}" if key else str(name))


_RULES = (_time_rules, _gpu_rules, _path_rules, _setup_rules, _environment_rules, _flag_rules, _text_rules)

# submitit's, NeMo-Run's, prime-rl's and sbatch's own names -> where the same thing stands here.
ELSEWHERE = {
    "gres": "gpus_per_node and gpu_type",
    "gpus": "gpus_per_node",
    "num_gpus": "gpus_per_node",
    "ntasks_per_node": "processes_per_node",
    "tasks_per_node": "processes_per_node",
    "nproc_per_node": "processes_per_node",
    "cpus_per_task": "cpus_per_node",
    "cpus": "cpus_per_node",
    "mem": "memory_gib",
    "mem_gb": "memory_gib",
    "mem_per_node": "memory_gib",
    "memory": "memory_gib",
    "time_limit": "time",
    "timeout_min": "time",
    "walltime": "time",
    "queue": "partition",
    "project": "account",
    "feature": "constraint",
    "env": "environment",
    "env_vars": "environment",
    "export": "environment",
    "modules": "setup (module load ...)",
    "module": "setup (module load ...)",
    "conda": "setup, or python",
    "conda_env": "setup, or python",
    "venv": "python (VENV/bin/python)",
    "setup_lines": "setup",
    "slurm_setup": "setup",
    "pre_run_command": "setup",
    "mounts": "container.mounts",
    "container_image": "container.image",
    "container_mounts": "container.mounts",
    "signal": "signal_lead_s",
    "signal_delay_s": "signal_lead_s",
    "max_requeues": "restarts.max_restarts",
    "max_num_timeout": "restarts.max_restarts",
    "requeue": "restarts",
    "additional_parameters": "sbatch",
    "slurm_additional_parameters": "sbatch",
    "srun_args": "srun",
    "slurm_srun_args": "srun",
    "exclusive": "sbatch: {exclusive: true}",
    "mail_type": "sbatch: {mail-type: ...}",
    "mail_user": "sbatch: {mail-user: ...}",
    "nodelist": "sbatch: {nodelist: ...}",
    "nodes": "harness submit --nodes",
    "num_nodes": "harness submit --nodes",
    "array_parallelism": "harness submit --array",
    "dependency": "harness submit --after",
}
