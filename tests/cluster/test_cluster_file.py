"""A cluster file says what a site has, or is refused by key with the remedy. Secrets come from a file of one's own, and stay there."""

import os
import stat
from pathlib import Path

import pytest

from harness.cluster import schema
from harness.cluster.schema import Cluster, Container, Network, load_cluster, parse_time_s, render_cluster
from harness.cluster.secrets import check_secrets, read_secrets
from harness.errors import RecipeError
from harness.resources import shipped_names


@pytest.fixture
def site(tmp_path) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text("partition: low\n")
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as refused:
        load_cluster(str(file), list(overrides))
    assert refused.value.exit_code == 2
    return str(refused.value)


# ---- what is taken


@pytest.mark.parametrize("name", shipped_names("clusters"))
def test_a_shipped_cluster_file_loads_by_its_name_and_keeps_it(name):
    assert load_cluster(name).name == name
    assert load_cluster(f"configs/clusters/{name}.yaml") == load_cluster(name)


def test_the_example_of_a_container_says_what_it_shows():
    cluster = load_cluster("container")
    assert cluster.container.kind == "pyxis"
    assert cluster.container.image == os.path.expanduser("~/images/harness.sqsh")
    assert cluster.network == Network(interface="eth0", infiniband="required")
    assert (cluster.sbatch, cluster.srun) == ({"exclusive": True, "mail-type": "FAIL"}, {"container-writable": True})


def test_a_file_without_a_name_has_that_of_its_stem(site):
    assert load_cluster(str(site)).name == "site"
    site.write_text("name: alps\n")
    assert load_cluster(str(site)).name == "alps"


def test_overrides_reach_every_depth(site):
    cluster = load_cluster(
        str(site), ["network.infiniband=off", "restarts.by=successor", "sbatch.exclusive=true", "exclude=[r1,r2]", "time=90"]
    )
    assert (cluster.network.infiniband, cluster.restarts.by, cluster.sbatch, cluster.exclude) == (
        "off",
        "successor",
        {"exclusive": True},
        ("r1", "r2"),
    )
    assert cluster.time_s == 90 * 60


def test_a_rendered_cluster_loads_again_to_the_same(tmp_path):
    cluster = Cluster(
        name="7e12",
        account="12345",
        exclude=("r[1-3]",),
        time="1:30",
        signal_lead_s=60,
        setup=("module load cuda\n# a comment: and more\n", "export A='x y'"),
        container=Container(kind="apptainer", image="docker://a/b:c", mounts=("/a:/b:ro",)),
        environment=("no", "ON"),
        sbatch={"nice": 100, "exclusive": True, "mail-user": "no"},
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(render_cluster(cluster))
    assert load_cluster(str(file)) == cluster


def test_a_home_is_written_out_so_that_the_node_needs_no_shell(site, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    cluster = load_cluster(
        str(site),
        [
            "shared=['~/runs']",
            "secrets=~/.secrets",
            "python=~/v/bin/python",
            "container={kind: apptainer, image: ~/i.sif, mounts: ['~/d:/d']}",
        ],
    )
    assert (cluster.shared, cluster.secrets, cluster.python) == (("/home/ada/runs",), "/home/ada/.secrets", "/home/ada/v/bin/python")
    assert (cluster.container.image, cluster.container.mounts) == ("/home/ada/i.sif", ("/home/ada/d:/d",))


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("90:00", 5400),
        ("02:00:05", 7205),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:05", 131405),
        ("0-00:00:01", 1),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert parse_time_s(text) == seconds


@pytest.mark.parametrize(
    "settings, ranks",
    [({}, 1), ({"gpus_per_node": 8}, 8), ({"processes_per_node": 4}, 4), ({"gpus_per_node": 8, "processes_per_node": 8}, 8)],
)
def test_there_is_a_rank_for_each_gpu_or_as_many_as_are_asked_for(settings, ranks):
    assert Cluster(name="x", **settings).ranks_per_node == ranks


@pytest.mark.parametrize(
    "kind, image",
    [
        ("pyxis", "/images/a.sqsh"),
        ("pyxis", "nvcr.io#nvidia/pytorch:26.01-py3"),
        ("pyxis", "docker://user@registry.example:5000#team/harness:1.2"),
        ("pyxis", "ubuntu"),
        ("apptainer", "/images/a.sif"),
        ("apptainer", "docker://nvcr.io/nvidia/pytorch:26.01-py3"),
        ("apptainer", "oras://registry.example/a:b"),
    ],
)
def test_an_image_is_a_file_or_in_a_registry(site, kind, image):
    assert load_cluster(str(site), [f"container={{kind: {kind}, image: '{image}'}}"]).container.image == image


# ---- what is refused


WRONG = [
    # overrides, the key that must be named, words that the message must hold
    (["partion=x"], "partion", "did you mean `partition`?"),
    (["interface=ib0"], "interface", "`interface` stands at `network.interface`"),
    (["restarts.max_restart=3"], "restarts.max_restart", "did you mean `max_restarts`?"),
    (["container={kind: pyxis}"], "container.image", "is required"),
    (["container={kind: docker, image: /a}"], "container.kind", '"docker"; must be pyxis or apptainer'),
    (["gpus_per_node=-1"], "gpus_per_node", "must be >= 0"),
    (["processes_per_node=0"], "processes_per_node", "must be > 0"),
    (["account=12345"], "account", "12345; must be text"),
    (["time=1:2:3:4"], "time", "must be MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS"),
    (["time=1-"], "time", "must be MM"),
    (["time=1h"], "time", "must be MM"),
    (["time=UNLIMITED"], "time", "must be MM"),
    (["time=1-2:3:4:5"], "time", "must be MM"),
    (["time=0"], "time", "no limit at all"),
    (["time=5:00"], "signal_lead_s", "the whole job is 300 s (time = 5:00)"),
    (["signal_lead_s=86400"], "signal_lead_s", "must be <= 65535"),
    (["gpu_type=h100"], "gpu_type", "gpus_per_node is 0"),
    (["gpu_memory_gib=80"], "gpu_memory_gib", "gpus_per_node is 0"),
    (["gpus_per_node=8", "gpu_type=h100:8"], "gpu_type", "is not the type alone"),
    (["gpus_per_node=8", "processes_per_node=4"], "processes_per_node", "there are 8 GPUs per node"),
    (["secrets=keys.env"], "secrets", "write it from / or ~"),
    (["shared=[runs]"], "shared.0", "write it from / or ~"),
    (["python=venv/bin/python"], "python", "write its path from / or ~, or a bare name"),
    (["container={kind: pyxis, image: a.sqsh}"], "container.image", "an absolute path, or a registry's image such as nvcr.io#"),
    (["container={kind: apptainer, image: a.sif}"], "container.image", "an absolute path, or a registry's image such as docker://"),
    (["container={kind: pyxis, image: /i, mounts: [data]}"], "container.mounts.0", "must be SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro"),
    (["container={kind: pyxis, image: /i, mounts: ['/a:b']}"], "container.mounts.0", "both from /"),
    (["container={kind: pyxis, image: /i, mounts: ['/a,/b']}"], "container.mounts.0", "without a comma"),
    (["container={kind: pyxis, image: /i}", "shared=['/a:b']"], "shared.0", "a container cannot mount"),
    (["setup=['if true']"], "setup.0", "is not complete by itself"),
    (["setup=['true', 'module load a &&']"], "setup.1", "is not complete by itself"),
    (["setup=['cat <<END']"], "setup.0", "here-document"),
    ([r'setup=["module load \\"]'], "setup.0", "it ends in a backslash"),
    ([r'setup=["a\0b"]'], "setup.0", "can hold a NUL"),
    (["environment=['MY-NAME']"], "environment.0", "is not the name of a variable"),
    (["environment=[A, all]"], "environment.1", "a word of its own (--export=all)"),
    (["network.interface=^docker0"], "network.interface", "must be the name of one interface"),
    (["sbatch.Mail=x"], "sbatch.Mail", "is not a flag's long name"),
    (["sbatch.mail_type=END"], "sbatch.mail_type", "is not a flag's long name"),
    (["sbatch.--nice=1"], "sbatch.--nice", "is not a flag's long name"),
    (["sbatch.p=x"], "sbatch.p", "is not a flag's long name"),
    (["sbatch.hold=false"], "sbatch.hold", "false; must be text or a whole number or true"),
    (["sbatch.out=x"], "sbatch.out", "the run folder"),
    ([r'sbatch.mail-user="a\n#SBATCH --account=b"'], "sbatch.mail-user", "cannot hold a line break"),
    ([r'exclude=["r1\nr2"]'], "exclude.0", "cannot hold a line break"),
    ([r'account="a\0b"'], "account", "cannot hold a line break or another control character"),
    *(([rf'{key}="a\nb"'], key, "cannot hold a line break") for key in ("partition", "account", "qos", "constraint", "reservation")),
]


@pytest.mark.parametrize("overrides, key, words", WRONG)
def test_a_wrong_setting_is_refused_with_file_key_and_remedy(site, overrides, key, words):
    lines = [line for line in refusal(site, *overrides).splitlines() if line.startswith(f"{site}: {key}")]
    assert lines and lines[0].removeprefix(f"{site}: {key}")[0] in " :"
    assert words in lines[0]


def test_everything_that_is_wrong_is_said_at_once(site):
    lines = refusal(site, "time=x", "gpu_type=h100", "environment=[a b]", "sbatch.gres=gpu:4").splitlines()
    assert [line.removeprefix(f"{site}: ").split()[0].strip(":") for line in lines] == ["time", "gpu_type", "environment.0", "sbatch.gres"]


@pytest.mark.parametrize("section, said_by", [("sbatch", schema._SBATCH_SAID_BY), ("srun", schema._SRUN_SAID_BY)])
def test_a_flag_that_is_said_elsewhere_is_refused_with_that_place(site, section, said_by):
    assert {"output", "time", "nodes", "gres", "mem", "export"} <= set(said_by)
    for flag, place in said_by.items():
        assert f"{section}.{flag}: {place} says this" in refusal(site, f"{section}.{flag}=1")


def test_every_field_that_a_flag_is_sent_to_is_there():
    for place in [*schema._SBATCH_SAID_BY.values(), *schema._SRUN_SAID_BY.values(), *schema.ELSEWHERE.values()]:
        for name in (
            word.strip("`").split(".")[0] for word in place.split(" ") if word.startswith("`") and not word.startswith("`harness")
        ):
            assert name in Cluster.model_fields, place


@pytest.mark.parametrize("key", schema.ELSEWHERE)
def test_a_name_from_elsewhere_is_answered_with_ours(site, key):
    line = refusal(site, f"{key}=1")
    advised = schema.ELSEWHERE[key].split(" ")[0].strip(",:").split(".")[0]
    assert f"{site}: {key}: unknown key in the top level; " in line
    assert advised in line


def test_an_unknown_cluster_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(RecipeError, match="no such cluster file; give the path of a YAML file or one of: .*cpu"):
        load_cluster(str(tmp_path / "nowhere.yaml"))


def test_what_stands_behind_a_name_in_the_allow_list_is_not_repeated(site):
    message = refusal(site, r'environment=["WANDB_API_KEY=\ns3cret"]')
    assert 'environment.0 = "WANDB_API_KEY=..."; is not the name of a variable' in message
    assert "s3cret" not in message


# ---- secrets


@pytest.fixture
def secrets(tmp_path) -> Path:
    file = tmp_path / "secrets"
    file.write_text("# of the site\n\nWANDB_API_KEY=s3cret=with=signs\n  HF_TOKEN = hf_s3cret #1 \r\n")
    file.chmod(0o600)
    return file


def test_secrets_are_read_as_they_stand(secrets):
    assert check_secrets(secrets) is None
    assert read_secrets(str(secrets)) == {"WANDB_API_KEY": "s3cret=with=signs", "HF_TOKEN": "hf_s3cret #1"}


@pytest.mark.parametrize(
    "line, words",
    [
        (b"s3cret", "is not KEY=VALUE"),
        (b"export A=s3cret", "without `export`"),
        (b"A-B=s3cret", "is not KEY=VALUE"),
        (b"=s3cret", "is not KEY=VALUE"),
        (b"A_NAME=", "is not KEY=VALUE"),
        (b"A=s3cret\0", "is not KEY=VALUE"),
        (b"A='s3cret'", "the quotes would become part of the value"),
        (b'A="s3cret"', "the quotes would become part of the value"),
        (b"A=s3cret\xff", "is not UTF-8"),
        (b"FIRST=s3cret", "an earlier line"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_not_by_what_it_holds(tmp_path, line, words):
    file = tmp_path / "secrets"
    file.write_bytes(b"FIRST=1\n" + line + b"\n")
    file.chmod(0o600)
    with pytest.raises(RecipeError) as refused:
        read_secrets(file)
    assert str(refused.value).startswith(f"{file}:2: ")
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_secrets_that_others_can_reach_are_refused(secrets, mode):
    secrets.chmod(mode)
    with pytest.raises(RecipeError, match=f"mode {mode:04o} lets others at the secrets; run: chmod 600 {secrets}"):
        check_secrets(secrets)
    assert stat.S_IMODE(secrets.stat().st_mode) == mode


def test_secrets_of_somebody_else_are_refused(secrets, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: secrets.stat().st_uid + 1)
    with pytest.raises(RecipeError, match=f"belongs to user {secrets.stat().st_uid}, who could change it"):
        check_secrets(secrets)


def test_secrets_that_are_no_file_are_refused_and_a_pipe_is_not_waited_for(tmp_path):
    with pytest.raises(RecipeError, match="No such file or directory; make a file of KEY=VALUE lines and chmod 600 it"):
        check_secrets(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(RecipeError, match="must be in a regular file"):
        check_secrets(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        check_secrets(tmp_path)
