"""Arrays and pipelines on a real Slurm, with real training: who waits for whom, what is cancelled with what, and what then goes on."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import harness

from harness.checkpoint.ledger import read_ledger
from harness.cluster import slurm
from harness.cluster.array import element_id
from harness.cluster.dependency import hand_on_waiting
from harness.cluster.submission import read_job
from harness.model.export import digest_base
from harness.recipe import load
from harness.run import RunDir, is_complete, rank_reports
from slurm.rig import Rig

CLUSTER = {
    "partition": "low",
    "time": "20",
    "signal_lead_s": 60,
    "preflight": False,
    "environment": ["HARNESS_CACHE", "WANDB_MODE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"],
}
SHORT = {"train.max_steps": 2, "train.warmup_steps": 1}
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture
def send(slurm_cluster, tmp_path):
    """`harness submit`, from a folder with a cluster file."""
    (tmp_path / "cluster.yaml").write_text(json.dumps(CLUSTER))

    def submit(*arguments, code: int = 0) -> str:
        done = harness("submit", *arguments, "--cluster", "cluster.yaml", cwd=tmp_path, OMP_NUM_THREADS="1")
        assert done.code == code, done.output
        return done.output

    return submit


def written(folder: Path, **stages) -> str:
    (folder / "chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return "chain.yaml"


def job_of(folder: Path) -> str:
    return read_job(RunDir(folder))["jobs"][-1]["id"]


def wait_for_end(rig: Rig, folder: Path, timeout_s: float = 150) -> str:
    return rig.wait_for_state(job_of(folder), *ENDED, timeout_s=timeout_s)


def said(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in sorted(folder.rglob("slurm-*.log")))


def done(folder: Path) -> bool:
    run = RunDir(folder)
    return is_complete(run, load(run.recipe))


# ---- arrays


@pytest.mark.slow
def test_an_array_of_four_trains_and_sent_again_sends_what_has_failed(slurm_cluster, send, tmp_path):
    rows, array = tmp_path / "rows.jsonl", tmp_path / "sweep"
    rows.write_text("no row\n")
    what = ["tiny/sft-lora", "output_dir=sweep", "data.train.0.max_rows=64", *(f"{key}={value}" for key, value in SHORT.items())]
    what += ["--array", "train.seed=1,2", "--array", "data.train.0.path=embedded:base-train,rows.jsonl", "--at-once", 2]
    send(*what)
    names = [folder.name for folder in sorted(array.glob("0*"))]
    assert names[1] == "01-seed=1_path=rows.jsonl" and len(names) == 4
    states = [wait_for_end(slurm_cluster, array / name) for name in names]
    assert states == ["COMPLETED", "FAILED", "COMPLETED", "FAILED"], said(array)
    # One job, four elements; each has spoken to Slurm of itself alone.
    job = job_of(array / names[0]).removesuffix("_0")
    comments = [slurm.find_job(f"{job}_{index}").comment for index in range(4)]
    assert [comment.split(":")[0] for comment in comments] == ["done", "stop", "done", "stop"]
    assert "rows.jsonl:1" in (array / "logs" / f"slurm-{job}_1.log").read_text()
    assert done(array / names[0]) and not done(array / names[1])
    settings = [load(array / name / "recipe.yaml") for name in names]
    assert {recipe.tracking.group for recipe in settings} == {"sweep"} and [recipe.train.seed for recipe in settings] == [1, 1, 2, 2]

    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 8)
    send("sweep")
    assert [len(read_job(RunDir(array / name))["jobs"]) for name in names] == [1, 2, 1, 2]
    assert [wait_for_end(slurm_cluster, array / name) for name in names] == ["COMPLETED"] * 4, said(array)
    assert all(done(array / name) for name in names)


def test_the_last_element_of_an_array_is_taken_for_itself_alone(slurm_cluster):
    """Slurm gives it the plain id of the whole array."""
    rig = slurm_cluster
    array = rig.submit("env -0; exec sleep 300", "--array=0-1")
    rig.wait_for(lambda: [job.state for job in slurm.list_jobs([array]).values()] == ["RUNNING"] * 2, "both to run")
    written = rig.wait_for(lambda: rig.log(array).endswith("\0") and rig.log(array), "the environment of the last")
    environment = dict(entry.partition("=")[::2] for entry in written.split("\0"))
    assert environment["SLURM_JOB_ID"] == array and (last := element_id(environment)) == f"{array}_1"
    assert slurm.find_job(last).id == last
    slurm.comment_job(last, "mine")
    slurm.requeue_job(last)
    other = rig.wait_for(lambda: (jobs := slurm.list_jobs([array]))[last].state != "RUNNING" and jobs[f"{array}_0"], "it to be requeued")
    assert (other.state, other.comment) == ("RUNNING", "")


def test_whoever_waits_for_a_job_waits_for_its_successor_and_still_for_all_else(slurm_cluster):
    rig = slurm_cluster
    first, second = rig.submit("exec sleep 300"), rig.submit("exec sleep 300")
    array = rig.submit("exec sleep 300", "--array=0-2")
    ends_badly = ["--dependency=afterok:" + ":".join((first, second, array)), "--kill-on-invalid-dep=yes"]
    waiting, other = rig.submit("true", *ends_badly), rig.submit("true", f"--dependency=afterok:{second}")
    rig.wait_for(lambda: slurm.find_job(f"{array}_2").state == "RUNNING", "the array to run")
    successors = [rig.submit("exec sleep 300", f"--dependency=afterany:{old}") for old in (first, f"{array}_1")]
    for old, new in zip((first, f"{array}_1"), successors, strict=True):
        hand_on_waiting(old, new)
    kinds = {term.partition("(")[0] for term in slurm.find_job(waiting).dependency.split(",")}
    assert kinds == {f"afterok:{job}" for job in (*successors, second, f"{array}_0", f"{array}_2")}
    assert slurm.find_job(other).dependency == f"afterok:{second}(unfulfilled)"
    # The ones that were taken over may end as they like.
    for old in (first, f"{array}_1"):
        rig.run("scancel", old)
    rig.wait_for(lambda: all(slurm.find_job(new).state == "RUNNING" for new in successors), "the successors to run")
    assert slurm.find_job(waiting).state == "PENDING"
    rig.run("scancel", successors[0])
    rig.wait_for(lambda: slurm.find_job(waiting).state == "CANCELLED", "what waits for it to be cancelled")


# ---- pipelines


@pytest.mark.slow
def test_a_pipeline_of_five_stages_goes_through_a_preemption_in_the_middle(slurm_cluster, send, tmp_path):
    rig, folder = slurm_cluster, tmp_path / "runs" / "chain"
    # Long enough to be met, in steps of one short row.
    long = {"train.max_steps": 200, "train.warmup_steps": 1, "train.per_device_train_batch_size": 1, "train.global_batch_size": 1}
    lora = {"recipe": "tiny/sft-lora", "set": SHORT}
    chain = written(
        tmp_path,
        base={"recipe": "tiny/sft-full", "set": SHORT},
        adapt=lora | {"model": {"from": "base"}, "set": long | {"train.logging_steps": 100, "train.eval_steps": 200}},
        rates=lora | {"model": {"from": "base"}, "array": {"train.learning_rate": [1e-3, 1e-2]}, "at_once": 1},
        again=lora | {"model": {"from": "adapt"}},
        last=lora | {"model": {"from": "rates", "element": 1}, "needs": ["again"]},
    )
    send(chain)
    adapt = RunDir(folder / "adapt")
    assert [slurm.find_job(job_of(folder / name)).state for name in ("again", "last")] == ["PENDING"] * 2

    def is_training() -> bool:
        reports = rank_reports(adapt.last_attempt(), "alive", [0]) if adapt.attempts() else []
        return bool(reports) and (reports[0]["step"] or 0) >= 5

    rig.wait_for(is_training, "adapt to train", 120)
    tracked = json.loads((adapt.path / "wandb.json").read_text())["id"]
    [host] = rig.hosts(job_of(adapt.path))
    urgent = rig.submit("exec sleep 3", "--partition=high", "--exclusive", f"--nodelist={host}")
    rig.wait_for_state(urgent, "COMPLETED")
    assert wait_for_end(rig, folder / "last", 240) == "COMPLETED", said(folder)

    names = ["base", "adapt", "rates/00-learning_rate=0.001", "rates/01-learning_rate=0.01", "again", "last"]
    assert all(done(folder / name) for name in names) and rig.show(job_of(adapt.path))["Restarts"] == "1"
    begun = [event["resumed_from"] for event in read_ledger(adapt.ledger) if event["event"] == "life_began"]
    stopped = [event["step"] for event in read_ledger(adapt.ledger) if event["event"] == "stopped"]
    assert begun == [None, *stopped] and len(stopped) == 1
    assert json.loads((adapt.path / "wandb.json").read_text())["id"] == tracked
    recorded = {file.name.rsplit("-", 1)[1] for file in adapt.path.glob("wandb/*offline-run-*")}
    assert recorded == {tracked}
    # Each has the weights of the one before.
    for name, model in (("adapt", "base/final"), ("again", "adapt/merged"), ("last", "rates/01-learning_rate=0.01/merged")):
        made = json.loads((folder / name / "final" / "harness.json").read_text())
        assert made["base_digest"] == digest_base(str(folder / model))
    drawn = harness("status", folder).output
    assert drawn.count("done") == 5 and "<- rates, again" in drawn
    assert send(chain).count(": complete\n") == 5


@pytest.mark.slow
def test_a_stage_that_fails_stops_what_needs_it_and_nothing_else_and_again_only_that_is_sent(slurm_cluster, send, tmp_path):
    rig, folder, rows = slurm_cluster, tmp_path / "runs" / "chain", tmp_path / "rows.jsonl"
    rows.write_text("no row\n")
    base = {"recipe": "tiny/sft-full", "set": SHORT}
    chain = written(
        tmp_path,
        bad=base | {"set": SHORT | {"data.train.0.path": "rows.jsonl"}},
        good=base,
        needs_bad={"recipe": "tiny/sft-lora", "set": SHORT, "model": {"from": "bad"}},
        needs_both=base | {"needs": ["good", "needs_bad"]},
        needs_good=base | {"needs": ["good"]},
    )
    send(chain)
    states = {name: wait_for_end(rig, folder / name) for name in ("bad", "needs_bad", "needs_both", "good", "needs_good")}
    stopped = {"bad": "FAILED", "needs_bad": "CANCELLED", "needs_both": "CANCELLED"}
    assert states == stopped | {"good": "COMPLETED", "needs_good": "COMPLETED"}, said(folder)
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 32)
    output = send(chain)
    assert [line for line in output.splitlines() if ": complete" in line] == ["good: complete", "needs_good: complete"]
    assert all(slurm.is_alive(slurm.find_job(job_of(folder / name))) for name in stopped)
    assert "lives and is kept" in (again := send(chain)) and again.count("kept") == 3


def test_when_slurm_refuses_a_stage_none_is_left(slurm_cluster, send, tmp_path):
    (tmp_path / "nowhere.yaml").write_text(json.dumps(CLUSTER | {"partition": "nowhere"}))
    base = {"recipe": "tiny/sft-full", "set": SHORT}
    chain = written(tmp_path, first=base, second=base | {"needs": ["first"]}, third=base | {"cluster": "nowhere.yaml"})
    output = send(chain, code=1)
    first, second = (job_of(tmp_path / "runs" / "chain" / name) for name in ("first", "second"))
    assert f"these are cancelled: first (job {first}), second (job {second})" in output and "partition" in output
    slurm_cluster.wait_for(lambda: not any(map(slurm.is_alive, slurm.list_jobs().values())), "both to be cancelled")
