"""What a real sbatch makes of the scripts that are rendered: values, log files, environment, signals and setup, as they were meant."""

import json
import sys
from pathlib import Path

import pytest

from harness.cluster.render import BatchJob, render_array, render_train, srun_command
from harness.cluster.schema import Cluster

HOSTILE = [
    "plain",
    "with space",
    "single'quote",
    'double"quote',
    "$(touch pwned)",
    "`id`;id&id|id",
    "tab\there",
    "#hash #",
    "%j %% %5N",
    "*{a}[b]<c>!",
    "-dash",
    "ünï☃",
    ":colon=",
]


@pytest.fixture
def python(tmp_path) -> Path:
    """Stands for the interpreter on the node: says how it was started, as JSON, and then runs the commands of the file beside it."""
    file = tmp_path / "python"
    file.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, subprocess, sys\n"
        "print(json.dumps({'argv': sys.argv[1:], 'environment': dict(os.environ)}), flush=True)\n"
        "commands = pathlib.Path(__file__).with_name('commands.json')\n"
        "for argv in json.loads(commands.read_text()) if commands.exists() else []: subprocess.run(argv, check=True)\n"
    )
    file.chmod(0o755)
    return file


def job_of(run: Path, python: Path, nodes: int = 1, exported: tuple[str, ...] = (), name: str = "tried", **settings) -> BatchJob:
    (run / "logs").mkdir(parents=True)
    return BatchJob(name, run, Cluster(name="rig", **settings), nodes, "5", str(python), "/src", "tiny/sft-full", exported)


def send(rig, folder: Path, script: str) -> str:
    file = folder / "job.sbatch"
    file.write_text(script)
    return rig.run("sbatch", "--parsable", str(file), cwd=folder).strip()


def has_ended(rig, job: str) -> str:
    return rig.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def start_of(log: Path) -> dict:
    return json.loads(log.read_text().splitlines()[0])


def test_names_accounts_and_folders_mean_to_slurm_what_they_say(slurm_cluster, tmp_path, python):
    sent = {}
    for value in HOSTILE:
        job = job_of(tmp_path / value, python, name=value, account=value, sbatch={"mail-user": value, "mail-type": "NONE"})
        sent[value] = send(slurm_cluster, tmp_path, render_train(job))
    for value, job in sent.items():
        assert has_ended(slurm_cluster, job) == "COMPLETED", value
        start = start_of(tmp_path / value / "logs" / f"slurm-{job}.log")
        assert start["argv"] == ["-m", "harness", "allocation", str(tmp_path / value)]
        assert start["environment"]["SLURM_JOB_NAME"] == value
        # Slurm's accounts know no capitals.
        assert start["environment"]["SLURM_JOB_ACCOUNT"] == value.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*HOSTILE, "python", "job.sbatch"])


def test_a_backslash_in_a_name_is_kept(slurm_cluster, tmp_path, python):
    value = "a\\b'\\\\\"end\\"
    number = send(slurm_cluster, tmp_path, render_train(job_of(tmp_path / "run", python, name=value)))
    assert has_ended(slurm_cluster, number) == "COMPLETED"
    assert start_of(tmp_path / "run" / "logs" / f"slurm-{number}.log")["environment"]["SLURM_JOB_NAME"] == value


def test_no_more_than_was_named_leaves_the_submitters_environment_and_all_of_it_reaches_every_node(
    slurm_cluster, tmp_path, python, monkeypatch
):
    monkeypatch.setenv("HF_HOME", "/models with, comma")
    monkeypatch.setenv("NOT_NAMED", "s3cret")
    job = job_of(tmp_path / "run", python, nodes=2, exported=("HF_HOME",), cpus_per_node=2, setup=("export FROM_SETUP=1",))
    step = srun_command(job.cluster, 2, ["sh", "-c", 'echo "$SLURMD_NODENAME $HF_HOME $FROM_SETUP $NOT_NAMED"'])
    (tmp_path / "commands.json").write_text(json.dumps([step]))
    number = send(slurm_cluster, tmp_path, render_train(job))
    assert has_ended(slurm_cluster, number) == "COMPLETED"
    first, *said = (tmp_path / "run" / "logs" / f"slurm-{number}.log").read_text().splitlines()
    environment = json.loads(first)["environment"]
    assert {"PATH", "HOME", "USER"} <= set(environment)
    assert environment["HF_HOME"] == "/models with, comma"
    assert "NOT_NAMED" not in environment
    assert sorted(line.rstrip() for line in said) == ["r1 /models with, comma 1", "r2 /models with, comma 1"]


def test_a_job_asks_for_what_the_cluster_file_says(slurm_cluster, tmp_path, python):
    job = job_of(
        tmp_path / "run",
        python,
        nodes=2,
        gpus_per_node=2,
        gpu_type="h100",
        cpus_per_node=3,
        memory_gib=1,
        exclude=("r2",),
        signal_lead_s=90,
    )
    shown = slurm_cluster.show(send(slurm_cluster, tmp_path, render_train(job)))
    assert (shown["NumNodes"], shown["NumTasks"], shown["CPUs/Task"], shown["MinMemoryNode"]) == ("2-2", "2", "3", "1G")
    assert (shown["TresPerNode"], shown["ExcNodeList"], shown["TimeLimit"], shown["Requeue"]) == ("gres:gpu:h100:2", "r2", "00:05:00", "1")


def test_every_element_of_an_array_has_its_own_run_and_its_own_log(slurm_cluster, tmp_path, python):
    runs = tuple(tmp_path / "shards" / value for value in HOSTILE[:4])
    number = send(slurm_cluster, tmp_path, render_array(job_of(tmp_path / "shards", python), runs, 2))
    slurm_cluster.wait_for(lambda: not slurm_cluster.run("squeue", "-h", "-j", number, check=False).strip(), "the array to end")
    for index, run in enumerate(runs):
        assert start_of(tmp_path / "shards" / "logs" / f"slurm-{number}_{index}.log")["argv"][-1] == str(run)


def test_a_warning_during_setup_does_not_end_the_job(slurm_cluster, tmp_path, python):
    job = job_of(tmp_path / "run", python, setup=(f"touch {tmp_path}/begun; sleep 1",))
    number = send(slurm_cluster, tmp_path, render_train(job))
    slurm_cluster.wait_for((tmp_path / "begun").exists, "the setup to begin")
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", number)
    assert has_ended(slurm_cluster, number) == "COMPLETED"


def test_a_setup_that_fails_ends_the_job_for_good_and_its_log_says_where(slurm_cluster, tmp_path, python):
    number = send(slurm_cluster, tmp_path, render_train(job_of(tmp_path / "run", python, setup=("true", f"cd {tmp_path}/nowhere"))))
    assert has_ended(slurm_cluster, number) == "FAILED"
    assert f"setup ended with exit code 1: cd {tmp_path}/nowhere\n" in (tmp_path / "run" / "logs" / f"slurm-{number}.log").read_text()
