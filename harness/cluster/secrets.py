"""The secrets of a job: a file of KEY=VALUE lines that its owner alone can read.

    # comments and empty lines are skipped
    WANDB_API_KEY=0123456789

It is read where it is needed, by the Python process on the node, and goes on as environment alone: it never stands in a script, an argv, a
log or a recipe. Messages name a line's number and nothing of what stands in it.
"""

import os
import re
import stat
from pathlib import Path

from harness.errors import RecipeError


def check_secrets(path: str | Path) -> None:
    """Raises RecipeError unless the file can be used, for a submission that has no need of its content."""
    read_secrets(path)


def read_secrets(path: str | Path) -> dict[str, str]:
    """Name -> value. Raises RecipeError when there is no such file, when others can read it, or when a line is not KEY=VALUE."""
    try:
        # Without waiting for whoever writes to a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
            _check_owner(path, os.fstat(stream.fileno()))
            content = stream.read()
    except OSError as error:
        advice = "make a file of KEY=VALUE lines and chmod 600 it"
        raise RecipeError(f"{path}: the secrets cannot be read: {error.strerror}; {advice}") from None
    secrets: dict[str, str] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            name, value = _parse_line(line, f"{path}:{number}")
            if name in secrets:
                raise RecipeError(f"{path}:{number}: gives a name that an earlier line gives too; keep one of them")
            secrets[name] = value
    return secrets


def _check_owner(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RecipeError(f"{path}: the secrets must be in a regular file; this is something else")
    if status.st_uid != os.getuid():
        raise RecipeError(
            f"{path}: belongs to user {status.st_uid}, who could change it; the secrets must be in a file of your own (you: {os.getuid()})"
        )
    if status.st_mode & 0o077:
        raise RecipeError(f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets others at the secrets; run: chmod 600 {path}")


def _parse_line(line: bytes, where: str) -> tuple[str, str]:
    try:
        name, equals, value = line.decode("utf-8").partition("=")
    except UnicodeDecodeError:
        raise RecipeError(f"{where}: is not UTF-8 text; write KEY=VALUE") from None
    name, value = name.strip(), value.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not value or "\0" in value:
        raise RecipeError(f"{where}: is not KEY=VALUE; write the name of a variable, = and its value, without `export`")
    if value[0] == value[-1] and value[0] in "\"'":
        raise RecipeError(f"{where}: the quotes would become part of the value; leave them out")
    return name, value
