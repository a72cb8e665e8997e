"""Who waits for whom: when a successor takes a run over, the jobs that wait for the old one must wait for the new one.

squeue prints `afterok:1(unfulfilled),afterok:2_*(unfulfilled)`, parted by `,` where all must hold and by `?` where one is enough; scontrol
takes a job's whole list anew, without what stands in parentheses.
"""

import re
from collections.abc import Iterable

from harness.cluster import slurm
from harness.errors import ClusterError
from harness.life import say


def hand_on_waiting(old: str, new: str) -> None:
    """Let every job of this user that waits for job `old` wait for `new`. Where scontrol may not be called that is said: Slurm cancels what
    waits for `old` to succeed, and it must be sent again."""
    try:
        elements = [job_id for job_id in slurm.list_jobs([old.partition("_")[0]]) if "_" in job_id]
        for job in slurm.list_jobs().values():
            moved = move_dependency(job.dependency, old, new, elements)
            if moved and job.id != new and job.state == "PENDING":
                slurm.depend_on(job.id, moved)
    except ClusterError as error:
        say(f"warning: jobs that wait for {old} cannot be made to wait for {new}, so Slurm cancels them; submit them again: {error}")


def move_dependency(dependency: str, old: str, new: str, elements: Iterable[str] = ()) -> str | None:
    """A list of squeue's with `new` in the place of `old`, as scontrol takes it; None when `old` is not in it. `elements`: of the array
    that `old` is one of. A job that waited for the whole array waits for each of them from then on."""
    found = False
    terms: list[str] = []
    for term in re.split(r"([,?])", dependency):
        kind, _, rest = re.sub(r"\(.*\)$", "", term).partition(":")
        job_id, plus, minutes = rest.partition("+")
        if job_id == old:
            found, job_id = True, new
        elif job_id == f"{old.partition('_')[0]}_*" and "_" in old:
            found, job_id = True, ":".join([*(element for element in elements if element != old), new])
        terms.append(f"{kind}:{job_id.removesuffix('_*')}{plus}{minutes}" if rest else kind)
    return "".join(terms) if found else None
