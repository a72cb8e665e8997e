"""job.sbatch and the commands inside it: a pure function of recipe, cluster and run folder, for a person who must read it at night.

The text lies in slurm/*.sbatch.j2. The promise: every value in it is quoted for the place where it stands, or refused with the reason. A
template that lets a value through unquoted does not render.

What sbatch makes of a #SBATCH line is not what a shell would (tried on Slurm 22.05, held by tests/slurm/test_rendered_scripts.py): both
kinds of quotes group, a backslash escapes everywhere, also inside '...'; # begins a comment, $ means nothing. In the path of --output, %j
and its like are replaced and %% is a per cent sign, unless the path holds a backslash: then nothing is replaced and backslashes vanish.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from harness.cluster.schema import CONTROL, Cluster
from harness.errors import RecipeError
from harness.resources import shipped


@dataclass(frozen=True)
class BatchJob:
    """Everything that a script says."""

    name: str
    run: Path
    """The run folder; of an array the folder that holds its runs. Its logs/ must be there when the job begins, or Slurm fails it."""
    cluster: Cluster
    nodes: int
    time: str
    """Time limit in Slurm's syntax."""
    python: str
    """The interpreter on the nodes, outside of any container."""
    package_root: str
    """The folder that holds harness/, put before everything else that Python searches; empty where `python` has it installed."""
    recipe: str
    """For the heading alone."""
    exported: tuple[str, ...] = ()
    """Those of the cluster's `environment` that are set where the job is submitted."""


def render_train(job: BatchJob) -> str:
    """The script of one run. Raises RecipeError for a value that Slurm cannot be given."""
    directives = _directives(job, output=job.run / "logs" / "slurm-%j.log")
    return _render("train.sbatch.j2", job, directives)


def render_array(job: BatchJob, runs: tuple[Path, ...], at_once: int | None) -> str:
    """One script for many runs, each an element of a job array; no more than `at_once` of them run at a time."""
    elements = f"0-{len(runs) - 1}" + (f"%{at_once}" if at_once else "")
    directives = _directives(job, output=job.run / "logs" / "slurm-%A_%a.log", array=elements)
    return _render("array.sbatch.j2", job, directives, runs=[str(run) for run in runs])


# ---- the commands inside


def node_command(cluster: Cluster, package_root: str, python: str, arguments: list[str], run: Path) -> list[str]:
    """The argv that starts `harness ARGUMENTS` on a node, inside apptainer's image where there is one. (pyxis is a flag of srun's.)"""
    container = cluster.container
    if container is None:
        return [python, "-m", "harness", *arguments]
    inside = [container.python, "-m", "harness", *arguments]
    if container.kind == "pyxis":
        return inside
    gpus = ["--nv"] if cluster.gpus_per_node else []
    mounts = [f"--bind={mount}" for mount in _mounts(cluster, (package_root, run))]
    return ["apptainer", "exec", *gpus, *mounts, container.image, *inside]


def srun_command(
    cluster: Cluster,
    nodes: int,
    command: list[str],
    *,
    environment: Iterable[str] = (),
    folders: Iterable[str | Path] = (),
    workdir: str | Path | None = None,
) -> list[str]:
    """The argv that starts `command` once on each of `nodes` nodes of this job.

    For pyxis alone: `environment` names what wins over the image's own variables, `folders` what is mounted beside `shared` and
    `container.mounts` (the run folder, the code), and `workdir` where the command begins.
    """
    # --wait: a node whose ranks have ended waits for one that still exports; the site's default may end that one after seconds.
    # --mpi: under pmi2, which may be a site's default, Accelerate takes PMI_SIZE, the number of nodes, for the number of ranks.
    argv = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0", "--mpi=none"]
    argv.append("--export=ALL")
    if cluster.cpus_per_node:
        # Since 22.05 srun does not take it over from the job.
        argv.append(f"--cpus-per-task={cluster.cpus_per_node}")
    if cluster.container and cluster.container.kind == "pyxis":
        names = list(environment)
        argv.append(f"--container-image={cluster.container.image}")
        mounts = _mounts(cluster, [*folders, *([workdir] if workdir else [])])
        argv += [f"--container-mounts={','.join(mounts)}"] if mounts else []
        argv += [f"--container-workdir={workdir}"] if workdir else []
        argv += [f"--container-env={','.join(names)}"] if names else []
    argv += [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in cluster.srun.items()]
    return argv + command


def _mounts(cluster: Cluster, folders: Iterable[str | Path]) -> list[str]:
    """SOURCE:TARGET of all that a container must see, each once. Raises RecipeError for a path that cannot be written so."""
    paths = [str(folder) for folder in (*cluster.shared, *folders) if str(folder)]
    for path in paths:
        if re.search("[:,]", path):
            raise RecipeError(f"{path}: a container cannot mount a path with a colon or a comma; choose another folder")
    named = [mount if ":" in mount else f"{mount}:{mount}" for mount in cluster.container.mounts]
    return list(dict.fromkeys([*(f"{path}:{path}" for path in paths), *named]))


# ---- text


class Quoted(str):
    """Text that is right for the place where it stands."""


def _directives(job: BatchJob, output: Path, array: str | None = None) -> list[Quoted]:
    """What follows each #SBATCH, in the order in which a person looks for it."""
    cluster = job.cluster
    flags = {
        "job-name": job.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": ",".join(cluster.exclude) or None,
        "array": array,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": cluster.cpus_per_node,
        "gres": _gres(cluster),
        "mem": f"{cluster.memory_gib}G" if cluster.memory_gib else cluster.memory_gib,
        "time": job.time,
        "signal": f"B:USR1@{cluster.signal_lead_s}",
        "requeue": True,
        "open-mode": "append",
        "output": f"{str(output.parent).replace('%', '%%')}/{output.name}",
        "export": ",".join(job.exported) or "NONE",
        **cluster.sbatch,
    }
    return [_directive(flag, value) for flag, value in flags.items() if value is not None]


def _gres(cluster: Cluster) -> str | None:
    if not cluster.gpus_per_node:
        return None
    return f"gpu:{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else f"gpu:{cluster.gpus_per_node}"


def _directive(flag: str, value: str | int | bool) -> Quoted:
    if value is True:
        return Quoted(f"--{flag}")
    text = str(value)
    if CONTROL.search(text):
        raise RecipeError(f"--{flag} = {text!r}; a #SBATCH line cannot hold a line break or another control character; remove it")
    if re.fullmatch(r"[\w@%+=:,./&|*\[\]-]+", text, re.ASCII):
        return Quoted(f"--{flag}={text}")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return Quoted(f'--{flag}="{escaped}"')


def _shell(value: str | Path) -> Quoted:
    return Quoted(shlex.quote(str(value)))


def _comment(value: str | Path | int) -> Quoted:
    """For a line that begins with #: nothing ends it early."""
    return Quoted("".join(character if character.isprintable() else repr(character)[1:-1] for character in str(value)))


def _code(value: str) -> Quoted:
    """Shell that a person wrote as shell."""
    return Quoted(value)


def _demand_quoted(value: Any) -> Quoted:
    if not isinstance(value, Quoted):
        raise TypeError(f"the template lets {value!r} through unquoted; give it | shell, | comment or | code")
    return value


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(shipped("slurm")),
        undefined=jinja2.StrictUndefined,
        finalize=_demand_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shell": _shell, "comment": _comment, "code": _code}
    return environment


def _render(template: str, job: BatchJob, directives: list[Quoted], **values: Any) -> str:
    if "\\" in str(job.run):
        raise RecipeError(
            f"output_dir = {job.run}; Slurm replaces no %j in a path with a backslash, so no log could be found; choose another"
        )
    if ":" in job.package_root:
        raise RecipeError(f"{job.package_root}: PYTHONPATH cannot hold a path with a colon; move the checkout to another folder")
    return _templates().get_template(template).render(job=job, cluster=job.cluster, directives=directives, **values)
