"""Every wrong recipe is refused by name, in the library and through the real command; no rule is left without a recipe that breaks it."""

import ast
import inspect
from pathlib import Path

import pytest
import wrong_recipes as wrong

from harness.cli import main
from harness.errors import HarnessError, LaunchError, RecipeError
from harness.launcher import Machines, accumulation_steps, plan_launch, rule_backend
from harness.overrides import dashed_overrides
from harness.recipe import backend, rlhf_rules, rules, task_rules
from harness.recipe import load as load_recipe


def _named(table):
    return [pytest.param(*rest, id=name.replace(" ", "-")) for name, *rest in table]


OVERRIDDEN = _named(wrong.TYPOS + wrong.FROM_ELSEWHERE + wrong.VALUES + wrong.COMBINATIONS)


@pytest.fixture
def base(tmp_path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(wrong.BASE)
    return file


def refused_by_command(arguments: list, capsys) -> str:
    """What `harness check` says on stderr; it must leave with 2 and print nothing on stdout."""
    with pytest.raises(SystemExit) as left:
        main(["check", *map(str, arguments)])
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("RecipeError: ")
    return printed.err


def backend_file(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def json_backend(folder: Path, text: str) -> Path:
    (folder / "ds.json").write_text(text)
    return backend_file(folder, f"{wrong.DEEPSPEED}{{deepspeed_config_file: {folder / 'ds.json'}}}\n")


def test_there_are_enough_of_them():
    assert len(OVERRIDDEN) + len(wrong.FILES) + len(wrong.OVERRIDES) + len(wrong.BACKENDS) + len(wrong.DEEPSPEED_JSONS) >= 150


def test_the_base_that_they_spoil_is_right(base):
    assert load_recipe(base).model.name_or_path == "some/model"


@pytest.mark.parametrize("overrides, key, words", OVERRIDDEN)
def test_a_wrong_setting_is_refused_with_file_key_and_remedy(base, capsys, overrides, key, words):
    message = refused_by_command([base, *overrides.split()], capsys)
    line = next(line for line in message.removeprefix("RecipeError: ").splitlines() if line.startswith(f"{base}: {key}"))
    assert line.removeprefix(f"{base}: {key}")[0] in " :;"
    assert words in line
    with pytest.raises(RecipeError):
        load_recipe(base, overrides.split())


@pytest.mark.parametrize("text, where, words", _named(wrong.FILES))
def test_a_file_that_is_no_recipe_is_refused_with_its_line(tmp_path, capsys, text, where, words):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused_by_command([file], capsys)
    assert f"{file}{where}" in message
    assert words in message


@pytest.mark.parametrize("overrides, words", _named(wrong.OVERRIDES))
def test_an_override_that_cannot_be_applied_is_refused(base, capsys, overrides, words):
    assert words in refused_by_command([base, *overrides], capsys)


@pytest.mark.parametrize("text, key, words", _named(wrong.BACKENDS))
def test_a_wrong_backend_file_is_refused_with_its_name_and_key(base, tmp_path, capsys, text, key, words):
    file = backend_file(tmp_path, text)
    message = refused_by_command([base, f"backend={file}"], capsys)
    assert f"{base}: backend = {file}" in message
    assert key in message
    assert words in message


@pytest.mark.parametrize("text, key, words", _named(wrong.DEEPSPEED_JSONS))
def test_a_wrong_deepspeed_json_is_refused_with_its_key(base, tmp_path, capsys, text, key, words):
    message = refused_by_command([base, f"backend={json_backend(tmp_path, text)}"], capsys)
    assert key in message
    assert words in message


def test_a_deepspeed_json_that_says_only_what_is_its_own_is_taken(base, tmp_path):
    text = (
        "{" + wrong.ZERO3 + ', "offload_param": {"device": "cpu", "pin_memory": true}}, "bf16": {"enabled": "auto"}, "steps_per_print": 1}'
    )
    taken = backend.load_backend(str(json_backend(tmp_path, text)))
    assert (taken.kind, taken.zero_stage, taken.offloads, taken.saves_16bit, taken.shards_parameters) == ("deepspeed", 3, True, True, True)


def test_a_missing_deepspeed_json_is_refused_by_name(base, tmp_path, capsys):
    file = backend_file(tmp_path, f"{wrong.DEEPSPEED}{{deepspeed_config_file: nowhere.json}}\n")
    assert "nowhere.json: cannot be read" in refused_by_command([base, f"backend={file}"], capsys)


def test_everything_that_is_wrong_is_said_at_once(base, capsys):
    fields = refused_by_command([base, "train.seed=x", "modle=1", "data.max_length=1"], capsys)
    assert sorted(line.removeprefix("RecipeError: ").split()[1].strip(":") for line in fields.splitlines()) == [
        "data.max_length",
        "modle",
        "train.seed",
    ]
    combined = refused_by_command(
        [base, "checkpoint.auto=false", "checkpoint.keep=5", "train.fp16=true", "train.bf16=true", "backend=nope"], capsys
    )
    assert [line.removeprefix("RecipeError: ").split()[1] for line in combined.splitlines()] == ["train.fp16", "checkpoint.keep", "backend"]


def test_an_unknown_recipe_is_answered_with_the_known_ones(capsys):
    message = refused_by_command(["sft/nope"], capsys)
    assert "no such recipe" in message
    assert "tiny/sft-lora" in message


def test_a_file_that_is_no_recipe_but_nearly_one_is_answered_with_what_was_meant(tmp_path, monkeypatch, capsys):
    assert refused_by_command(["sft/qwen2.5-7b-tools-lor"], capsys).strip().endswith("did you mean sft/qwen2.5-7b-tools-lora?")
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for file in ("run/recipe.yaml", "tools.yaml"):
        Path(file).write_text("task: sft\n")
    assert "is a run's folder, and no recipe; its recipe is run/recipe.yaml" in refused_by_command(["run"], capsys)
    assert "did you mean tools.yaml?" in refused_by_command(["tools.yml"], capsys)
    pipeline = refused_by_command(["pipelines/tiny"], capsys)
    assert "is a pipeline" in pipeline and "one of its stages" in pipeline and "unknown key" not in pipeline


# ---- ranks


@pytest.mark.parametrize(
    "overrides, world_size, words",
    [
        ("backend=ddp train.global_batch_size=16", 3, "train.global_batch_size = 16; 3 ranks"),
        ("backend=ddp train.global_batch_size=8", 2, "use 1 rank, or another per_device_train_batch_size"),
        ("backend=ddp train.global_batch_size=24 train.per_device_train_batch_size=4", 4, "use 1 or 2 or 3 or 6 ranks"),
        ("", 2, "backend = single is one process, but 2 were asked for; use backend=ddp"),
    ],
)
def test_ranks_that_cannot_run_a_recipe_are_refused(base, overrides, world_size, words):
    with pytest.raises(LaunchError) as refused:
        plan_launch(load_recipe(base, overrides.split()), Machines(world_size), [])
    assert words in str(refused.value)
    assert refused.value.exit_code == 2


def test_the_accumulation_makes_the_global_batch_on_any_number_of_ranks_that_can(base):
    recipe = load_recipe(base, ["train.global_batch_size=48", "train.per_device_train_batch_size=4"])
    assert {world: accumulation_steps(recipe, world) for world in (1, 2, 3, 4, 6, 12)} == {1: 12, 2: 6, 3: 4, 4: 3, 6: 2, 12: 1}


@pytest.mark.parametrize("arguments", [["--processes", "2"], ["--processes", "3", "--backend", "ddp", "train.global_batch_size=16"]])
def test_harness_run_leaves_with_2_when_the_ranks_cannot_run_the_recipe(base, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(["run", str(base), f"output_dir={tmp_path / 'run'}", *arguments])
    assert left.value.code == 2
    assert "LaunchError" in capsys.readouterr().err


MACHINES = [
    ({"NNODES": "two"}, "NNODES is 'two'; it must be a whole number"),
    ({"NNODES": "0"}, "it is the number of machines, from 1"),
    ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "NODE_RANK is 2; with NNODES = 2 it goes from 0 to 1"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "from 1 to 65535"),
]


@pytest.mark.parametrize("environment, words", MACHINES)
def test_machines_that_are_not_fully_described_are_refused(environment, words):
    with pytest.raises(LaunchError, match=words):
        Machines.from_environment(1, environment)


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
LAUNCHED = [
    ("", {**ACCELERATE, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, LaunchError, "asks for FSDP1"),
    ("", {**ACCELERATE, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, LaunchError, "this machine has no GPU"),
    (
        "backend=single train.torch_compile=true",
        {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        RecipeError,
        "under accelerate launch's backend: train.torch_compile = true",
    ),
    (
        "backend=zero3",
        {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        RecipeError,
        "set zero3_save_16bit_model: true",
    ),
]


@pytest.mark.parametrize("overrides, environment, error, words", LAUNCHED)
def test_a_launchers_own_backend_is_held_to_the_same_rules(base, overrides, environment, error, words):
    with pytest.raises(error) as refused:
        rule_backend(load_recipe(base, overrides.split()), dict(environment), has_gpu=False)
    assert words in str(refused.value)


def test_a_launchers_deepspeed_json_says_the_stage(base, tmp_path):
    (tmp_path / "ds.json").write_text("{" + wrong.ZERO3 + "}}")
    environment = {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    assert rule_backend(load_recipe(base), environment, has_gpu=False).backend.zero_stage == 3


# ---- none is left out


def _sentences(module) -> list[tuple[int, list[str]]]:
    """(line, fixed parts) of every message that a module can give: what it yields, and what it raises as one of our errors."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        message = node.value if isinstance(node, ast.Yield) else None
        if (
            isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and getattr(node.exc.func, "id", "") in ("RecipeError", "LaunchError")
        ):
            message = node.exc.args[0]
        pieces = message.values if isinstance(message, ast.JoinedStr) else [message]
        fixed = [piece.value for piece in pieces if isinstance(piece, ast.Constant) and isinstance(piece.value, str)]
        if fixed:
            found.append((node.lineno, fixed))
    return found


def _messages(tmp_path: Path, base: Path) -> str:
    """Everything that the tables above are told."""
    told = []

    def tell(function, *arguments, **keywords):
        try:
            function(*arguments, **keywords)
        except HarnessError as error:
            told.append(str(error))

    for _, overrides, *_ in wrong.TYPOS + wrong.FROM_ELSEWHERE + wrong.VALUES + wrong.COMBINATIONS:
        tell(load_recipe, base, overrides.split())
    for _, text, *_ in wrong.FILES:
        (tmp_path / "wrong.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        tell(load_recipe, tmp_path / "wrong.yaml")
    for _, overrides, _ in wrong.OVERRIDES:
        tell(lambda overrides=overrides: load_recipe(base, dashed_overrides(overrides)))
    for make, table in ((backend_file, wrong.BACKENDS), (json_backend, wrong.DEEPSPEED_JSONS)):
        for _, text, *_ in table:
            tell(load_recipe, base, [f"backend={make(tmp_path, text)}"])
    (tmp_path / "recipe.yaml").write_text("task: sft\n")
    for name in ("nope", "tiny/sft-lorra", "pipelines/tiny", tmp_path):
        tell(load_recipe, name)
    tell(load_recipe, base, ["backend=" + str(backend_file(tmp_path, f"{wrong.DEEPSPEED}{{deepspeed_config_file: nowhere.json}}\n"))])
    for environment, _ in MACHINES:
        tell(Machines.from_environment, 1, environment)
    tell(plan_launch, load_recipe(base), Machines(2), [])
    tell(accumulation_steps, load_recipe(base, ["train.global_batch_size=16"]), 3)
    for overrides, environment, _, _ in LAUNCHED:
        tell(rule_backend, load_recipe(base, overrides.split()), dict(environment), has_gpu=False)
    return "\n".join(told)


@pytest.mark.parametrize(
    "module", [rules, task_rules, rlhf_rules, inspect.getmodule(load_recipe), backend], ids=lambda module: module.__name__
)
def test_no_rule_is_left_without_a_recipe_that_breaks_it(module, tmp_path, base):
    told = _messages(tmp_path, base)
    untold = [
        f"{module.__name__}:{line}: {''.join(fixed)}" for line, fixed in _sentences(module) if not all(part in told for part in fixed)
    ]
    assert _sentences(module)
    assert untold == []
