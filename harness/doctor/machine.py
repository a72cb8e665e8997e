"""Python, the libraries against what harness needs and what its tests were run with, and the compiler."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import harness
from harness.doctor.check import Check
from harness.resources import shipped

AREA = "environment"


def check_python() -> list[Check]:
    return [
        Check(AREA, "Python", "ok", f"{platform.python_version()}, {sys.executable}"),
        Check(AREA, "harness", "ok", f"{harness.__version__}, {Path(harness.__file__).parent}"),
    ]


def check_libraries() -> list[Check]:
    """One line for each library that is missing or outside of the range that harness asks for, else one for all of them."""
    needed, tested = needed_libraries(), tested_versions()
    found = {name: installed_version(name) for name in {*needed, *tested}}
    checks, differing = [], []
    for name, requirement in needed.items():
        version, asked = found[name], str(requirement.specifier)
        remedy = f"pip install '{requirement.name}{asked}'"
        newer = version is not None and name in tested and Version(version) > Version(tested[name])
        if version is None:
            checks.append(Check(AREA, name, "fail", f"is not installed; harness needs {asked}", remedy))
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{version}; harness was tested with {tested.get(name, asked)} and asks for {asked}"
            checks.append(Check(AREA, name, "warn" if newer else "fail", f"{what}{', what is newer may work' if newer else ''}", remedy))
        elif name in tested and not _is_same(version, tested[name]):
            differing.append(f"{name} {version} ({tested[name]})")
    if checks:
        return checks
    others = sum(found[name] is not None and not _is_same(found[name], version) for name, version in tested.items() if name not in needed)
    beneath = f"; {others} of the libraries beneath them differ" if others else ""
    if differing:
        what = f"usable; not what the tests were run with (in brackets): {', '.join(sorted(differing))}{beneath}"
        return [Check(AREA, "libraries", "warn", what, f"pip install -c {constraints_file()} harness, to have the tested set")]
    return [Check(AREA, "libraries", "ok", f"all {len(needed)} that harness needs, in the tested versions{beneath}")]


def needed_libraries() -> dict[str, Requirement]:
    """What the installed harness declares, without its extras."""
    declared = map(Requirement, importlib.metadata.requires("harness") or ())
    return {normalised(one.name): one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})}


def constraints_file() -> Path:
    return shipped("constraints.txt")


def tested_versions() -> dict[str, str]:
    """Of constraints.txt, which a checkout has at its top and a wheel inside."""
    pinned = re.findall(r"(?m)^([\w.-]+)==(\S+)$", constraints_file().read_text(encoding="utf-8"))
    return {normalised(name): version for name, version in pinned}


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_same(version: str, tested: str) -> bool:
    # torch 2.13.0+cu130 is a build of 2.13.0.
    return Version(version).public == Version(tested).public


@cache
def find_compiler() -> str | None:
    """The C++ compiler that torch's extensions, and so DeepSpeed's operators, would be built with."""
    return shutil.which(os.environ.get("CXX", "c++"))


NO_COMPILER = "DeepSpeed compiles its operators on first use; apt-get install g++, or module load gcc (CXX names another)"


def check_compiler() -> list[Check]:
    path = find_compiler()
    if path is None:
        return [Check(AREA, "compiler", "warn", f"no C++ compiler ({os.environ.get('CXX', 'c++')}) on PATH", NO_COMPILER)]
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5)
    version = (done.stdout.splitlines() or ["it does not say its version"])[0]
    return [Check(AREA, "compiler", "ok", version)]
