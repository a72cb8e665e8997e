"""What is sent to Slurm: the same text for the same job, shell that bash and shellcheck take, and nothing in it that means something else
than the value that was given.

`python tests/cluster/test_render.py` writes the golden files anew; their diff is the review. What sbatch itself makes of the #SBATCH lines
is tried on a real Slurm in tests/slurm/test_rendered_scripts.py.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from harness.cluster import render
from harness.cluster.render import BatchJob, node_command, render_array, render_train, srun_command
from harness.cluster.schema import Cluster, Container, Network
from harness.errors import RecipeError

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("/runs/first")
PLAIN = BatchJob("first", RUN, Cluster(name="site"), 1, "1-00:00:00", "/venv/bin/python", "/src/harness", "sft/qwen2.5-7b-tools-lora")
PYXIS = Container(kind="pyxis", image="nvcr.io#nvidia/pytorch:26.01-py3", mounts=("/data:/data:ro", "/models"))
APPTAINER = Container(kind="apptainer", image="/images/harness.sif", mounts=("/data:/data:ro", "/models"), python="/opt/venv/bin/python")
EVERYTHING = Cluster(
    name="alps",
    partition="normal",
    account="a-01",
    qos="long",
    constraint="gpu&nvlink",
    reservation="week 12",
    exclude=("nid[001-003]", "nid007"),
    time="12:00:00",
    gpus_per_node=4,
    gpu_type="gh200",
    cpus_per_node=288,
    memory_gib=800,
    setup=(
        "module purge",
        "module load cuda/12.8  # the driver's",
        "if [ -d /scratch ]; then\n  export TMPDIR=/scratch\nfi",
        "source '/apps/my env/bin/activate'",
    ),
    network=Network(interface="hsn0", infiniband="off"),
    environment=("HF_HOME", "WANDB_API_KEY", "NOT_SET"),
    secrets="/home/ada/.secrets",
    signal_lead_s=600,
    sbatch={"exclusive": True, "mail-user": "ada@example.org", "nice": 100, "licenses": 'scratch:1,"a b"'},
    srun={"container-writable": True, "cpu-bind": "none"},
)


def job_of(**changes) -> BatchJob:
    return dataclasses.replace(PLAIN, **changes)


def step_of(container: Container) -> str:
    """The argv of a step, a word on each line."""
    cluster = Cluster(name="site", gpus_per_node=8, cpus_per_node=96, container=container, shared=("/runs",), srun={"mem-bind": "local"})
    command = node_command(cluster, "/src/harness", "/venv/bin/python", ["node", str(RUN)], RUN)
    words = srun_command(cluster, 2, command, environment=("HF_HOME", "HARNESS_ATTEMPT"), folders=(RUN, "/src/harness"), workdir="/work")
    return "\n".join(words) + "\n"


CASES = {
    "one-node.sbatch": lambda: render_train(PLAIN),
    "many-nodes.sbatch": lambda: render_train(
        job_of(nodes=16, cluster=Cluster(name="site", partition="gpu", gpus_per_node=8, memory_gib=0))
    ),
    "gpu-type.sbatch": lambda: render_train(job_of(cluster=Cluster(name="site", gpus_per_node=2, gpu_type="h100", cpus_per_node=16))),
    "installed.sbatch": lambda: render_train(job_of(package_root="", python="python")),
    "everything.sbatch": lambda: render_train(
        job_of(name="first try", nodes=2, cluster=EVERYTHING, time="12:00:00", exported=("HF_HOME", "WANDB_API_KEY"))
    ),
    "array.sbatch": lambda: render_array(
        job_of(name="shards", run=Path("/runs/shards")), tuple(Path(f"/runs/shards/{n}") for n in range(4)), 2
    ),
    "pyxis.sbatch": lambda: render_train(job_of(cluster=Cluster(name="site", gpus_per_node=8, container=PYXIS))),
    "pyxis.srun": lambda: step_of(PYXIS),
    "apptainer.srun": lambda: step_of(APPTAINER),
}
SCRIPTS = [name for name in CASES if name.endswith(".sbatch")]


@pytest.mark.parametrize("name", CASES)
def test_what_is_rendered_is_what_was_reviewed(name):
    file = GOLDEN / name
    assert file.is_file(), f"{file} is missing; python {__file__} writes it"
    assert CASES[name]() == file.read_text()


def test_every_golden_file_has_its_case():
    assert {file.name for file in GOLDEN.iterdir()} == set(CASES)


# ---- bash and shellcheck

HOSTILE = [
    "with space",
    "single'quote",
    'double"quote',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a && touch pwned",
    "${HOME}",
    "tab\there",
    "#hash",
    "%j and %%",
    "*",
    "-n",
    "~",
    "ünï☃",
    "(b) {c} [d] <e> |f&",
    "!history",
]
BEYOND_A_DIRECTIVE = ["line\nbreak", "line\n#SBATCH --account=root\ntouch pwned", "back\\slash", "end\\"]
"""Right in the body of a script; refused where Slurm cannot take them."""


def hostile_job(value: str) -> BatchJob:
    cluster = Cluster(
        name=value,
        account=value,
        reservation=value,
        exclude=(value, "r2"),
        network=Network(interface="lo"),
        sbatch={"mail-user": value},
        setup=(f"printf '%s' {render._shell(value)} > /dev/null",),
    )
    return job_of(
        name=value, run=Path("/runs") / value, cluster=cluster, python=f"/venvs/{value}/python", package_root=f"/src/{value}", recipe=value
    )


def every_script() -> dict[str, str]:
    scripts = {name: CASES[name]() for name in SCRIPTS}
    for value in HOSTILE:
        job = hostile_job(value)
        scripts[value] = render_train(job)
        scripts[f"array of {value}"] = render_array(
            job, tuple(Path("/runs") / value / other for other in HOSTILE + BEYOND_A_DIRECTIVE), None
        )
    return scripts


@pytest.mark.parametrize("name, script", every_script().items())
def test_bash_takes_every_script(name, script):
    checked = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck")
def test_shellcheck_finds_nothing_in_any_script(tmp_path):
    # 1091: it cannot read what setup lines source. Below a warning it suspects values that look like shell, which the hostile ones do.
    for number, (name, script) in enumerate(every_script().items()):
        file = tmp_path / f"{number}.sbatch"
        file.write_text(script)
        options = ["--exclude=1091"] if name in SCRIPTS else ["--severity=warning"]
        checked = subprocess.run(["shellcheck", *options, file], capture_output=True, text=True)
        assert (checked.stdout, checked.returncode) == ("", 0)
    (tmp_path / "wrong.sbatch").write_text(render_train(PLAIN) + "cd $HOME\n")
    assert subprocess.run(["shellcheck", tmp_path / "wrong.sbatch"], capture_output=True).returncode == 1


# ---- what a script does


@pytest.fixture
def python(tmp_path) -> Path:
    """Stands for the interpreter on the node: says how it was started, as JSON."""
    file = tmp_path / "it's a venv" / "python"
    file.parent.mkdir()
    file.write_text(
        f"#!{sys.executable}\n"
        "import json, os, signal, sys\n"
        "ignored = [name for name in ('SIGUSR1', 'SIGUSR2', 'SIGTERM') if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN]\n"
        "print(json.dumps({'argv': sys.argv[1:], 'environment': dict(os.environ), 'ignored': ignored}))\n"
    )
    file.chmod(0o755)
    return file


def execute(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    file = folder / "job.sbatch"
    file.write_text(script)
    return subprocess.run(["bash", file], capture_output=True, text=True, cwd=folder, env={"PATH": os.environ["PATH"], **environment})


def started(script: str, folder: Path, **environment: str) -> dict:
    done = execute(script, folder, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("value", HOSTILE)
def test_a_path_reaches_python_as_it_was_whatever_it_holds(tmp_path, python, value):
    job = dataclasses.replace(hostile_job(value), python=str(python))
    start = started(render_train(job), tmp_path)
    assert start["argv"] == ["-m", "harness", "allocation", str(job.run)]
    assert start["environment"]["PYTHONPATH"] == job.package_root
    assert not (tmp_path / "pwned").exists()


def test_an_element_of_an_array_gets_its_own_run_whatever_its_path_holds(tmp_path, python):
    runs = tuple(tmp_path / value for value in HOSTILE + BEYOND_A_DIRECTIVE)
    script = render_array(job_of(run=tmp_path, python=str(python)), runs, 3)
    assert f"#SBATCH --array=0-{len(runs) - 1}%3\n" in script
    for index, run in enumerate(runs):
        assert started(script, tmp_path, SLURM_ARRAY_TASK_ID=str(index))["argv"] == ["-m", "harness", "allocation", str(run)]
    assert not (tmp_path / "pwned").exists()


def test_python_takes_the_place_of_a_shell_that_slurms_warning_does_not_end(tmp_path, python):
    assert started(render_train(job_of(python=str(python))), tmp_path)["ignored"] == ["SIGUSR1", "SIGUSR2"]


def test_what_setup_exports_reaches_python_and_what_export_named_does_not_hinder_srun(tmp_path, python):
    cluster = Cluster(
        name="site",
        setup=("export A='x y'", "if true; then\n  export B=2\nfi", "cat <<END >/dev/null\nC\nEND", "export PYTHONPATH=/site"),
        network=Network(interface="eth0", infiniband="off"),
    )
    found = started(render_train(job_of(cluster=cluster, python=str(python))), tmp_path, SLURM_EXPORT_ENV="NONE")["environment"]
    assert (found["A"], found["B"]) == ("x y", "2")
    assert found["PYTHONPATH"] == "/src/harness:/site"
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"], found["NCCL_IB_DISABLE"]) == ("eth0", "eth0", "1")
    assert "SLURM_EXPORT_ENV" not in found


MODULE = """module() {
  _module_raw() { [ "$1" = load ] && [ "$2" = unknown ] && return 3; false; true; }
  eval "$(false)"
  _module_raw "$@"
}"""
"""Like the real ones: commands inside it fail, and that means nothing."""


@pytest.mark.parametrize(
    "entry, code",
    [
        ("module load unknown", 3),
        ("source /nowhere/bin/activate", 1),
        ("no_such_command", 127),
        ("exit 4", 4),
        ("exit", 1),
        ("set -e\nfalse\ntrue", 1),
        ("true\n(exit 7)  # the last one counts", 7),
    ],
)
def test_a_setup_entry_that_fails_ends_the_job_and_is_named(tmp_path, python, entry, code):
    cluster = Cluster(name="site", setup=(MODULE, "module load cuda", entry, "echo never >never"))
    done = execute(render_train(job_of(cluster=cluster, python=str(python))), tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    assert f"exit code {code if entry != 'exit' else 0}: {entry}\n" in done.stderr
    assert not (tmp_path / "never").exists()


def test_a_python_that_is_not_there_ends_the_job_by_its_name(tmp_path):
    done = execute(render_train(job_of(cluster=Cluster(name="site", setup=("true",)), python="/nowhere/python")), tmp_path)
    assert done.returncode == 127
    assert "/nowhere/python" in done.stderr
    assert "setup" not in done.stderr


def test_setup_lines_stand_as_they_were_written():
    entry = 'eval "$(conda shell.bash hook)" && conda activate "my env"'
    assert f"\n{entry}\n" in render_train(job_of(cluster=Cluster(name="site", setup=(entry,))))


# ---- #SBATCH lines


def words_of(line: str) -> list[str]:
    """What sbatch makes of a #SBATCH line: quotes of both kinds group, a backslash keeps the next character, # begins a comment."""
    words, word, quote, characters = [], None, None, iter(line)
    for character in characters:
        if character == "\\":
            word = (word or "") + next(characters)
        elif quote:
            quote, word = (None, word) if character == quote else (quote, word + character)
        elif character in "\"'":
            quote, word = character, word or ""
        elif character == "#":
            break
        elif character.isspace():
            words, word = words + [word] if word is not None else words, None
        else:
            word = (word or "") + character
    assert quote is None
    return words + [word] if word is not None else words


def flags_of(script: str) -> dict[str, str | None]:
    lines = [words_of(line.removeprefix("#SBATCH")) for line in script.split("\n") if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in lines), lines
    pairs = [words[0].removeprefix("--").partition("=") for words in lines]
    assert len({flag for flag, _, _ in pairs}) == len(pairs)
    return {flag: value if equals else None for flag, equals, value in pairs}


@pytest.mark.parametrize("value", HOSTILE)
def test_a_flag_means_the_value_that_was_given_whatever_it_holds(value):
    flags = flags_of(render_train(hostile_job(value)))
    assert [flags[flag] for flag in ("job-name", "account", "reservation", "mail-user")] == [value] * 4
    assert flags["exclude"] == f"{value},r2"
    assert flags["output"].replace("%%", "%") == f"/runs/{value}/logs/slurm-%j.log"


@pytest.mark.parametrize("value", ["back\\slash", "end\\", '\\"', "\\\\'"])
def test_a_backslash_that_is_no_part_of_a_path_is_kept(value):
    flags = flags_of(render_train(job_of(name=value, cluster=Cluster(name="site", account=value))))
    assert (flags["job-name"], flags["account"]) == (value, value)


def test_a_per_cent_sign_of_a_folder_is_not_replaced_and_that_of_the_log_is():
    assert flags_of(render_train(job_of(run=Path("/r/%j%%"))))["output"] == "/r/%%j%%%%/logs/slurm-%j.log"
    array = render_array(job_of(run=Path("/r/%a")), (Path("/r/%a/0"),), None)
    assert (flags_of(array)["output"], flags_of(array)["array"]) == ("/r/%%a/logs/slurm-%A_%a.log", "0-0")


@pytest.mark.parametrize("value", ["line\nbreak", "return\r", "nul\0", "bell\a"])
def test_what_would_end_a_directive_early_is_refused(value):
    with pytest.raises(RecipeError, match="--job-name = .*; a #SBATCH line cannot hold a line break or another control character"):
        render_train(job_of(name=value))
    with pytest.raises(RecipeError, match="--output = .*; a #SBATCH line cannot hold"):
        render_train(job_of(run=Path("/runs") / value))


def test_a_heading_stays_one_comment_whatever_the_recipe_is_called():
    script = render_train(job_of(recipe="a\ntouch pwned\r\x1b[2J", cluster=Cluster(name="b\nexit")))
    assert "# Recipe:   a\\ntouch pwned\\r\\x1b[2J\n# Cluster:  b\\nexit: 1 x 1 ranks\n" in script


def test_a_run_folder_whose_logs_slurm_would_lose_is_refused():
    with pytest.raises(RecipeError, match="output_dir = .*Slurm replaces no %j in a path with a backslash"):
        render_train(job_of(run=Path("/runs/a\\b")))


def test_a_checkout_that_pythonpath_cannot_name_is_refused():
    with pytest.raises(RecipeError, match="/a:b: PYTHONPATH cannot hold a path with a colon"):
        render_train(job_of(package_root="/a:b"))


def test_only_variables_that_are_named_and_set_are_exported():
    assert flags_of(render_train(PLAIN))["export"] == "NONE"
    assert flags_of(render_train(job_of(exported=("HF_HOME", "A"))))["export"] == "HF_HOME,A"


def test_no_secret_stands_in_anything_that_is_rendered(tmp_path, monkeypatch):
    secrets = tmp_path / "secrets"
    secrets.write_text("WANDB_API_KEY=s3cret\n")
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    cluster = Cluster(name="site", environment=("HF_TOKEN",), secrets=str(secrets), container=PYXIS)
    job = job_of(cluster=cluster, exported=("HF_TOKEN",))
    texts = [
        render_train(job),
        render_array(job, (RUN,), None),
        *srun_command(cluster, 1, ["x"], environment=("HF_TOKEN", "WANDB_API_KEY")),
    ]
    assert "s3cret" not in "".join(texts)


# ---- templates


@pytest.fixture
def template(tmp_path, monkeypatch):
    """Write a template and render it."""

    def render_text(text: str) -> str:
        (tmp_path / "train.sbatch.j2").write_text(text)
        return render_train(PLAIN)

    monkeypatch.setattr(render, "shipped", lambda folder: tmp_path)
    render._templates.cache_clear()
    yield render_text
    render._templates.cache_clear()


def test_a_template_that_lets_a_value_through_unquoted_does_not_render(template):
    with pytest.raises(TypeError, match="the template lets 'first' through unquoted; give it | shell"):
        template("exec {{ job.name }}\n")
    assert template("exec {{ job.name | shell }}\n") == "exec first\n"


def test_a_template_that_asks_for_what_there_is_not_does_not_render(template):
    with pytest.raises(jinja2.UndefinedError, match="nodess"):
        template("{{ job.nodess | shell }}\n")


# ---- the commands inside


def test_without_a_container_a_step_is_python_on_every_node():
    cluster = Cluster(name="site")
    command = node_command(cluster, "/src", "/venv/bin/python", ["node", "/runs/a b"], Path("/runs/a b"))
    assert command == ["/venv/bin/python", "-m", "harness", "node", "/runs/a b"]
    argv = srun_command(cluster, 3, command, environment=("A",), folders=("/src",), workdir="/work")
    assert argv[-5:] == command
    assert argv[:-5] == "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 --mpi=none --export=ALL".split()


def test_srun_gets_the_sites_own_flags_and_the_cpus_that_it_would_not_take_over():
    argv = srun_command(Cluster(name="site", cpus_per_node=12, srun={"label": True, "cpu-bind": "none"}), 1, ["x"])
    assert argv[-4:] == ["--cpus-per-task=12", "--label", "--cpu-bind=none", "x"]


def test_pyxis_that_is_given_nothing_to_mount_mounts_nothing():
    cluster = Cluster(name="site", container=Container(kind="pyxis", image="/i.sqsh"))
    assert [word for word in srun_command(cluster, 1, ["x"]) if word.startswith("--container")] == ["--container-image=/i.sqsh"]


def test_a_folder_that_is_named_twice_is_mounted_once():
    cluster = Cluster(name="site", container=Container(kind="pyxis", image="/i.sqsh", mounts=("/data",)), shared=("/runs",))
    argv = srun_command(cluster, 1, ["x"], folders=["/runs", "/data"], workdir="/runs")
    assert "--container-mounts=/runs:/runs,/data:/data" in argv


def test_apptainer_sees_gpus_only_where_there_are_some():
    container = Container(kind="apptainer", image="/i.sif")
    commands = [node_command(Cluster(name="s", container=container, gpus_per_node=gpus), "", "p", ["node"], RUN) for gpus in (0, 8)]
    assert [command[:3] for command in commands] == [["apptainer", "exec", "--bind=/runs/first:/runs/first"], ["apptainer", "exec", "--nv"]]


@pytest.mark.parametrize("container", [PYXIS, APPTAINER])
def test_a_folder_that_a_container_cannot_mount_is_refused(container):
    cluster = Cluster(name="site", container=container)
    with pytest.raises(RecipeError, match="/runs/a,b: a container cannot mount a path with a colon or a comma"):
        command = node_command(cluster, "/src", "python", ["node"], Path("/runs/a,b"))
        srun_command(cluster, 1, command, folders=["/runs/a,b"])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.iterdir():
        old.unlink()
    for case, text_of in CASES.items():
        (GOLDEN / case).write_text(text_of())
