"""Arrays: which runs there are, what they are called, what is sent the first time and again, and what is refused before anything is made.

On a real Slurm: tests/slurm/test_arrays_and_pipelines.py."""

import json

import pytest
from sent import CountingSlurm, ask, finish

from harness.cli import submit
from harness.cluster.array import Axis, build_elements, element_id, element_names, parse_axis
from harness.cluster.dependency import hand_on_waiting, move_dependency
from harness.cluster.submission import check_inputs, read_job
from harness.errors import ClusterError, LaunchError, RecipeError
from harness.recipe import load
from harness.run import RunDir

RATES = "train.learning_rate=1e-3,1e-2"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return CountingSlurm(tmp_path / "bin", monkeypatch)


def send(*arguments) -> str:
    return ask(submit, "tiny/sft-lora", "--cluster", "cpu", "output_dir=sweep", *arguments)


# ---- which runs


def test_values_are_parted_by_commas_and_one_with_a_comma_is_quoted_or_a_list():
    assert parse_axis("train.learning_rate=1e-3, 1e-2") == Axis("train.learning_rate", ("1e-3", "1e-2"))
    axis = parse_axis('tracking.name="a, b",[q_proj,v_proj],{r: 8, alpha: 16},rows/*.jsonl,embedded:base-train,two words')
    assert axis.values == ('"a, b"', "[q_proj,v_proj]", "{r: 8, alpha: 16}", "rows/*.jsonl", "embedded:base-train", "two words")


def test_a_value_means_what_it_means_as_an_override():
    texts = parse_axis("model.lora.target_modules=[q_proj,v_proj],all-linear").values
    [one, other] = build_elements("tiny/sft-lora", [], [Axis("model.lora.target_modules", texts)])
    assert (one.model.lora.target_modules, other.model.lora.target_modules) == (("q_proj", "v_proj"), "all-linear")
    assert one.model_copy(update={"output_dir": None, "tracking": None}) == load(
        "tiny/sft-lora", ["model.lora.target_modules=[q_proj,v_proj]"]
    ).model_copy(update={"output_dir": None, "tracking": None})


@pytest.mark.parametrize("text", ["seed", "seed=", "=1", "seed= "])
def test_an_array_without_key_or_values_is_refused(text):
    with pytest.raises(RecipeError, match="write key.path=value,value"):
        parse_axis(text)


@pytest.mark.parametrize("text", ["a=1,", "a=1,,2", "a=,1", "a=1], [2", "a=1]  #", "a=[1,2", "a=1 # 2", 'a="x,y', "a=*x"])
def test_values_that_cannot_be_told_apart_are_refused(text):
    with pytest.raises(RecipeError, match="cannot be told apart"):
        parse_axis(text)


def test_each_combination_is_a_run_of_its_own_with_an_index_a_name_and_a_group():
    recipes = build_elements("tiny/sft-lora", ["output_dir=runs/x", "train.max_steps=3"], [parse_axis(RATES), parse_axis("train.seed=1,2")])
    assert [(recipe.train.learning_rate, recipe.train.seed, recipe.train.max_steps) for recipe in recipes] == [
        (1e-3, 1, 3),
        (1e-3, 2, 3),
        (1e-2, 1, 3),
        (1e-2, 2, 3),
    ]
    folders = [RunDir.of(recipe).path for recipe in recipes]
    assert {folder.parent for folder in folders} == {RunDir.of(load("tiny/sft-lora", ["output_dir=runs/x"])).path}
    assert [folder.name for folder in folders] == [
        "00-learning_rate=1e-3_seed=1",
        "01-learning_rate=1e-3_seed=2",
        "02-learning_rate=1e-2_seed=1",
        "03-learning_rate=1e-2_seed=2",
    ]
    assert {recipe.tracking.group for recipe in recipes} == {"x"}


def test_a_group_that_the_recipe_names_stays():
    assert build_elements("tiny/sft-lora", ["tracking.group=mine"], [parse_axis(RATES)])[0].tracking.group == "mine"


def test_names_are_safe_in_a_path_short_and_tell_settings_of_one_name_apart():
    hostile = Axis("data.train.0.path", ("/data/a b'$(x).jsonl", "../../etc", "x" * 300))
    names = element_names([hostile, Axis("data.eval.0.path", ("e",))])
    assert names[0] == "00-data.train.0.path=data-a-b-x-.jsonl_data.eval.0.path=e"
    assert all("/" not in name and len(name) <= 63 for name in names) and len(set(names)) == 3
    assert element_names([Axis("s", tuple(map(str, range(101))))])[7] == "007-s=7"


@pytest.mark.parametrize(
    ("overrides", "axes", "why"),
    [
        ([], ["output_dir=a,b"], "each element has a folder of its own"),
        ([], ["train.seed=1,2", "train.seed=3"], "train.seed: stands twice"),
        (["train.seed=1"], ["train.seed=1,2"], "also set to one value"),
        ([], ["train.seed=1,2,1"], "train.seed=1 and train.seed=1 are the same run"),
        ([], ["train.learning_rate=1e-3,0.001"], "are the same run"),
        ([], ["train.learning_rate=1e-3,-1"], "train.learning_rate = -1"),
        ([], ["train.learning_rat=1e-3"], "did you mean"),
    ],
)
def test_what_is_wrong_with_an_array_is_said_before_anything_is_made(overrides, axes, why):
    with pytest.raises(RecipeError, match=why):
        build_elements("tiny/sft-lora", overrides, map(parse_axis, axes))


# ---- sending


def test_an_array_is_sent_as_one_job_and_each_element_is_a_submitted_run(slurm, tmp_path):
    said = send("--array", RATES, "--at-once", 1, "--after", 7, "--time", "10")
    array = tmp_path / "sweep"
    assert slurm.sent == [f"--dependency=afterok:7 --kill-on-invalid-dep=yes {array}/array.sbatch"]
    script = (array / "array.sbatch").read_text()
    assert "#SBATCH --array=0-1%1\n" in script and "#SBATCH --time=10\n" in script and (array / "logs").is_dir()
    names = ["00-learning_rate=1e-3", "01-learning_rate=1e-2"]
    content = json.loads((array / "array.json").read_text())
    assert content["runs"] == names and [job["id"] for job in content["jobs"]] == ["100"]
    for index, name in enumerate(names):
        run = RunDir(array / name)
        assert [job["id"] for job in read_job(run)["jobs"]] == [f"100_{index}"] and run.recipe.is_file()
        # Sent alone again, it is a run like any other.
        alone = (run.path / "job.sbatch").read_text()
        assert "--array" not in alone and f"allocation {run.path}" in alone
    assert f"job 100: {array}, 2 runs of 1 rank on 1 node" in said and f"harness status {array}" in said


def test_a_dry_run_prints_the_script_that_would_be_sent_and_makes_nothing(slurm, tmp_path):
    printed = send("--array", RATES, "--dry-run")
    assert not (tmp_path / "sweep").exists() and slurm.sent == []
    send("--array", RATES)
    assert (tmp_path / "sweep" / "array.sbatch").read_text() == printed


def test_sent_again_an_array_sends_the_elements_that_are_not_done(slurm, tmp_path):
    send("--array", "train.seed=1,2,3,4", "--at-once", 2)
    for name in ("00-seed=1", "02-seed=3"):
        finish(tmp_path / "sweep" / name)
    assert "job 101" in (said := send("--array", "train.seed=1,2,3,4", "--at-once", 2)) and "2 of 4 runs" in said
    assert slurm.sent[1] == f"--array=1,3%2 {tmp_path}/sweep/array.sbatch"
    jobs = [[job["id"] for job in read_job(RunDir(tmp_path / "sweep" / name))["jobs"]] for name in ("00-seed=1", "01-seed=2")]
    assert jobs == [["100_0"], ["100_1", "101_1"]]


def test_the_folder_of_an_array_goes_on_as_it_was_sent_from_wherever_that_is_asked(slurm, tmp_path, monkeypatch):
    send("--array", "train.seed=1,2,3", "--at-once", 2, "--nodes", 2, "backend=ddp", "cluster.partition=low")
    finish(tmp_path / "sweep" / "01-seed=2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "2 of 3 runs of 2 ranks on 2 nodes" in ask(submit, "../sweep")
    assert slurm.sent[1] == f"--array=0,2%2 {tmp_path}/sweep/array.sbatch" and f"--chdir={tmp_path}" in slurm.asked("sbatch")[1]
    assert "#SBATCH --partition=low" in (tmp_path / "sweep" / "array.sbatch").read_text()
    with pytest.raises(RecipeError, match="sweep is an array already; leave --array out"):
        ask(submit, tmp_path / "sweep", "--array", RATES)


def test_an_array_that_is_done_or_lives_or_is_another_one_is_refused(slurm, tmp_path):
    send("--array", "train.seed=1,2")
    slurm.lives("100_1")
    with pytest.raises(LaunchError, match=r"01-seed=2: job 100_1 of this run lives \(RUNNING\)"):
        send("--array", "train.seed=1,2")
    slurm.lives()
    with pytest.raises(LaunchError, match="holds an array of other values"):
        send("--array", "train.seed=1,3")
    for name in ("00-seed=1", "01-seed=2"):
        finish(tmp_path / "sweep" / name)
    with pytest.raises(LaunchError, match="all 2 runs of this array are complete; --fresh"):
        send("--array", "train.seed=1,2")
    send("--array", "train.seed=1,2", "--fresh")
    assert slurm.sent[-1] == f"{tmp_path}/sweep/array.sbatch" and not (tmp_path / "sweep" / "00-seed=1" / "final").exists()


def test_a_folder_that_holds_something_else_is_refused(slurm, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").touch()
    with pytest.raises(LaunchError, match="holds what is not an array's"):
        send("--array", RATES)


def test_one_element_that_cannot_begin_keeps_all_from_being_made(slurm, tmp_path):
    with pytest.raises(LaunchError, match=r"data.train.0.path = ./gone.jsonl: there is no such file"):
        send("--array", "data.train.0.path=embedded:base-train,./gone.jsonl")
    assert not (tmp_path / "sweep").exists() and slurm.sent == []


def test_at_once_without_an_array_is_refused(slurm):
    with pytest.raises(RecipeError, match="--at-once 2: there is one run alone"):
        send("--at-once", 2)


def test_a_path_that_other_jobs_make_may_be_absent(tmp_path):
    recipe = load("tiny/sft-lora", [f"model.name_or_path={tmp_path}/base/final"])
    check_inputs(recipe, awaited=(f"{tmp_path}/base/final",))
    with pytest.raises(LaunchError, match="base/final: there is no such file"):
        check_inputs(recipe, awaited=(f"{tmp_path}/other/final",))


# ---- jobs that wait for a job that another takes over


def test_an_element_has_an_id_of_its_own_though_slurm_gives_the_last_one_that_of_the_array():
    assert element_id({"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}) == "8_3"
    assert element_id({"SLURM_JOB_ID": "8"}) == "8"


@pytest.mark.parametrize(
    ("waits_for", "old", "moved"),
    [
        ("afterok:1(unfulfilled)", "1", "afterok:9"),
        ("afterok:1(unfulfilled),afterok:2(unfulfilled),afterany:3(unfulfilled)", "2", "afterok:1,afterok:9,afterany:3"),
        ("after:1+5(unfulfilled)?afterok:2(unfulfilled)", "2", "after:1+5?afterok:9"),
        ("afterok:2(unfulfilled),singleton(unfulfilled)", "2", "afterok:9,singleton"),
        ("afterok:1(unfulfilled),afterok:5_*(unfulfilled)", "1", "afterok:9,afterok:5"),
        ("afterok:5_*(unfulfilled),afterok:1(unfulfilled)", "5_1", "afterok:5_0:5_2:9,afterok:1"),
        ("afterok:5_0(unfulfilled),afterok:5_1(unfulfilled)", "5_1", "afterok:5_0,afterok:9"),
        # 12 is not 123, an element not its array, and who waits for nobody stays.
        ("afterok:123(unfulfilled)", "12", None),
        ("afterok:5_1(unfulfilled)", "5", None),
        ("", "12", None),
    ],
)
def test_a_list_of_what_a_job_waits_for_is_rewritten_whole(waits_for, old, moved):
    assert move_dependency(waits_for, old, "9", ["5_0", "5_1", "5_2"]) == moved


def test_where_scontrol_may_not_be_called_it_is_said_that_those_who_wait_are_lost(slurm, monkeypatch, capsys):
    def refuse(*_):
        raise ClusterError("scontrol: Access/permission denied")

    monkeypatch.setattr("harness.cluster.slurm.list_jobs", refuse)
    hand_on_waiting("1", "2")
    assert "jobs that wait for 1 cannot be made to wait for 2, so Slurm cancels them; submit them again" in capsys.readouterr().err
