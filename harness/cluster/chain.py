"""A pipeline on a cluster: its stages are sent at once, each to begin when those that it needs have succeeded.

A stage that is done is left out, one that lives is kept and waited for, so the same command goes on after a failure. Slurm cancels what
needs a stage that has failed, and nothing else (`afterok`, --kill-on-invalid-dep). All stages are sent or none: when one is refused, those
before it are cancelled again.

    PIPELINE/cluster.yaml    the resolved file of `harness submit --cluster`, for those stages that name none
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.cluster import array, slurm
from harness.cluster.array import Array
from harness.cluster.pipeline import Pipeline, Stage, save_pipeline
from harness.cluster.render import render_train
from harness.cluster.schema import Cluster, render_cluster
from harness.cluster.stages import StagePlan, check_order, done_stages, plan_stages
from harness.cluster.submission import (
    CLUSTER,
    Submission,
    check_are_free,
    check_can_begin,
    live_jobs,
    read_job,
    save_submission,
    send_submission,
    unshared_cache,
)
from harness.errors import LaunchError
from harness.life import say
from harness.recipe import load, recipe_digest
from harness.run import RunDir, write_text_atomically


@dataclass(frozen=True)
class Link:
    """A stage as it stands."""

    plan: StagePlan
    work: Submission | Array
    is_done: bool
    live: tuple[str, ...]
    """The jobs of it that live: it is kept."""

    @property
    def is_sent(self) -> bool:
        return not (self.is_done or self.live)


def plan_chain(
    pipeline: Pipeline, cluster_of: Callable[[Stage], Cluster], *, fresh: bool = False, despite_plan: bool = False
) -> list[Link]:
    """Every stage, after everything was checked that can be. Raises a HarnessError that says what is wrong with the first that cannot
    begin."""
    plans = plan_stages(pipeline)
    runs = [run for plan in plans for run in plan.runs]
    if fresh:
        check_are_free(runs)
    living = live_jobs(runs)
    links, finished = [], set() if fresh else done_stages(plans)
    for plan in plans:
        done = plan.name in finished
        live = tuple(job.id for run, job in living if run in plan.runs)
        work = build_work(plan, cluster_of(plan.stage), fresh, despite_plan)
        links.append(Link(plan, work, done, () if done else live))
    for link in links:
        if link.is_sent:
            _check_work(link.work)
        elif link.live:
            _check_kept(link, {run for run, _ in living})
    check_order(plans, {link.plan.name for link in links if link.is_done}, {link.plan.name for link in links if link.live})
    return links


def build_work(plan: StagePlan, cluster: Cluster, fresh: bool, despite_plan: bool) -> Submission | Array:
    """What a stage sends."""
    stage = plan.stage
    like = Submission(
        plan.recipes[0],
        cluster,
        nodes=stage.nodes,
        awaited=plan.awaited,
        fresh=fresh,
        despite_plan=despite_plan,
        source=stage.recipe,
    )
    shares = stage.shares or [None] * len(plan.recipes)
    each = tuple(
        replace(like, recipe=recipe, share=share, merge=index in plan.merged)
        for index, (recipe, share) in enumerate(zip(plan.recipes, shares, strict=True))
    )
    return Array(each, stage.at_once) if stage.elements else each[0]


def _check_work(work: Submission | Array) -> None:
    if isinstance(work, Array):
        array.check_can_begin_array(work)
        first = work.elements[0]
        if first.share and (place := unshared_cache(first.recipe, first.cluster)):
            say(f"warning: the cache goes to {place}, which is in none of the cluster file's `shared` folders; all nodes must see it there")
    else:
        check_can_begin(work)


def _check_kept(link: Link, living: set[RunDir]) -> None:
    """Raises LaunchError for a stage that lives and is not the one that is asked for, or not whole."""
    plan, where = link.plan, f"stage {link.plan.name}: job {link.live[0]} of it lives"
    for index, (run, recipe) in enumerate(zip(plan.runs, plan.recipes, strict=True)):
        if run in living and recipe_digest(load(run.recipe)) != recipe_digest(recipe):
            raise LaunchError(
                f"{where} with another recipe than this; `harness cancel {run.path} --save` ends it, and without --save at once"
            )
        if run in living and index in plan.merged and not read_job(run)["merge"]:
            raise LaunchError(f"{where} and will not merge its adapter, as it must for the stages that are new; wait for its end")
        if run not in living and not plan.is_done(index):
            raise LaunchError(
                f"{where}, and {run.path.name} has failed; wait for the others, or end them with `harness cancel {run.path.parent}`"
            )


def render(links: list[Link]) -> str:
    """The scripts of the stages that would be sent, one after the other."""
    works = [link.work for link in links if link.is_sent]
    return "\n".join(array.render_script(work) if isinstance(work, Array) else render_train(work.batch_job()) for work in works)


def submit(pipeline: Pipeline, links: list[Link], after: tuple[str, ...], cluster: Cluster | None) -> dict[str, str]:
    """Make the folders of the stages that are not done, and send them. `after`: jobs that all of it waits for. Returns stage -> job id."""
    save_pipeline(pipeline)
    if cluster:
        write_text_atomically(pipeline.folder / CLUSTER, render_cluster(cluster))
    to_send = [link for link in links if link.is_sent]
    for link in to_send:
        array.save_array(link.work) if isinstance(link.work, Array) else save_submission(link.work)
    kept = {link.plan.name: link.live for link in links if link.live}
    sent: dict[str, str] = {}
    try:
        for link in to_send:
            needs = link.plan.stage.all_needs
            waits_for = [job_id for need in needs for job_id in ([sent[need]] if need in sent else kept.get(need, ()))]
            sent[link.plan.name] = _send(link.work, tuple(waits_for) or after)
    except BaseException:
        for job_id in sent.values():
            with contextlib.suppress(Exception):
                slurm.cancel_job(job_id)
        if sent:
            say(f"not all stages could be sent, so these are cancelled: {', '.join(f'{name} (job {job})' for name, job in sent.items())}")
        raise
    return sent


def _send(work: Submission | Array, after: tuple[str, ...]) -> str:
    if isinstance(work, Array):
        return array.send_array(replace(work, elements=tuple(replace(element, after=after) for element in work.elements)))
    return send_submission(replace(work, after=after))
