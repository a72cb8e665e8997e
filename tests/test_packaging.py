"""The package as a person installs it: a wheel that is built from a copy, unpacked elsewhere, and run from an empty folder."""

import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = ("configs", "launch", "slurm")
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def files_below(folder: str) -> set[str]:
    return {
        file.relative_to(REPOSITORY).as_posix()
        for file in (REPOSITORY / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy, so that no build/ is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("harness", *SHIPPED):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("harness-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def run_installed(installed, tmp_path):
    """Run Python in an empty folder, with the unpacked wheel in front of everything else."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_the_list_of_packages_is_what_lies_on_the_disk():
    folders = {file.parent.relative_to(REPOSITORY).as_posix().replace("/", ".") for file in (REPOSITORY / "harness").rglob("__init__.py")}
    shipped = {"harness.shipped", *(f"harness.shipped.{name}" for name in SHIPPED)}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == folders | shipped


def test_the_wheel_carries_every_shipped_file_and_all_of_the_code(wheel):
    carried = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"harness/shipped/{name}" for folder in SHIPPED for name in files_below(folder)} | {"harness/shipped/constraints.txt"}
    assert len(shipped) > 10
    assert {name for name in carried if name.startswith("harness/shipped/")} == shipped
    assert files_below("harness") <= carried
    assert any(name.endswith("licenses/LICENSE") for name in carried)


def test_the_installed_command_knows_the_shipped_recipes_by_name_from_any_folder(run_installed, installed):
    done = run_installed("-c", "import harness; print(harness.__file__)")
    assert done.stdout.strip() == str(installed / "harness" / "__init__.py")
    done = run_installed("-m", "harness", "check", "sft/llama3-8b-tools-qlora")
    assert (done.returncode, done.stderr) == (0, "")
    assert "output_dir: runs/sft-llama3-8b-tools-qlora" in done.stdout
    assert run_installed("-m", "harness", "check", "configs/tiny/sft-full.yaml", "backend=zero3").returncode == 0


def test_what_the_installed_command_would_launch_exists_in_the_wheel(run_installed, installed):
    program = (
        "from harness.launcher import Machines, plan_launch\nfrom harness.recipe import load\n"
        "print('\\n'.join(plan_launch(load('tiny/sft-full', ['backend=zero2']), Machines(2), [])))"
    )
    argv = run_installed("-c", program).stdout.splitlines()
    paths = [Path(word) for word in argv if word.endswith((".py", ".yaml"))]
    assert [path.name for path in paths] == ["zero2.yaml", "train.py"]
    assert all(path.is_file() and path.is_relative_to(installed) for path in paths)


def test_the_command_in_the_wheel_is_the_one_that_is_documented(wheel):
    entry_points = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    assert "harness = harness.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_version_is_written_once_in_two_places_that_agree():
    import harness

    assert SETTINGS["project"]["version"] == harness.__version__


def test_shell_scripts_can_be_executed_and_say_how():
    for script in (REPOSITORY / "launch").glob("*.sh"):
        assert script.stat().st_mode & stat.S_IXUSR, script
        assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_installed_command_knows_the_tested_versions(run_installed, installed):
    program = "from harness.doctor import machine; print(machine.constraints_file()); print(machine.tested_versions()['torch'])"
    file, torch = run_installed("-c", program).stdout.split()
    assert Path(file) == installed / "harness" / "shipped" / "constraints.txt"
    assert f"torch=={torch}" in (REPOSITORY / "constraints.txt").read_text().splitlines()


def test_what_a_build_of_torch_brings_for_itself_is_not_pinned():
    """torch for CUDA asks for exactly one triton and NVIDIA's libraries: with another pin of them nobody with a GPU can install."""
    pinned = [line.split("==")[0] for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line]
    assert "torch" in pinned
    assert not [name for name in pinned if name.startswith(("triton", "nvidia-", "cuda-", "pytorch-"))]
