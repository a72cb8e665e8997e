"""Slurm's commands as executables on PATH that print what the real ones (22.05.8) printed, and keep what they were asked."""

from pathlib import Path

COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue")
SCRIPT = """\
#!/bin/bash
printf '%s\\0' "$@" >>{folder}/{command}.asked
printf '\\n' >>{folder}/{command}.asked
/usr/bin/env >{folder}/{command}.environment
/bin/cat {folder}/{command}.stdout
/bin/cat {folder}/{command}.stderr >&2
{last}
"""


class FakeSlurm:
    """Commands that say nothing, until `says` tells them what to. Nothing else is on PATH."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        for command in COMMANDS:
            self.says(command)

    def says(self, command: str, stdout: str = "", stderr: str = "", last: str = "exit 0") -> None:
        """`last` is the script's last line: how it ends."""
        (self.folder / f"{command}.stdout").write_text(stdout)
        (self.folder / f"{command}.stderr").write_text(stderr)
        script = self.folder / command
        script.write_text(SCRIPT.format(folder=self.folder, command=command, last=last))
        script.chmod(0o755)

    def refuses(self, command: str, stderr: str) -> None:
        self.says(command, stderr=f"{stderr}\n", last="exit 1")

    def asked(self, command: str) -> list[list[str]]:
        """The arguments of each call."""
        file = self.folder / f"{command}.asked"
        calls = file.read_text().split("\0\n")[:-1] if file.is_file() else []
        return [call.split("\0") for call in calls]

    def environment(self, command: str) -> dict[str, str]:
        """That of the last call."""
        return dict(line.partition("=")[::2] for line in (self.folder / f"{command}.environment").read_text().splitlines())


def as_lines(*rows: tuple[str, ...]) -> str:
    """Rows of fields as squeue and sinfo print them under our format."""
    return "".join("\x1f".join(f"{field}   " for field in row) + "\x1e\n" for row in rows)


def job_row(job_id: str, state: str = "RUNNING", reason: str = "None", **fields: str) -> tuple[str, ...]:
    """A line of squeue as a real one printed it, with these fields put otherwise."""
    row = {
        "name": "first",
        "user": "root",
        "partition": "low",
        "hosts": "q[1-2]" if state == "RUNNING" else "",
        "nodes": "2",
        "submitted": "1795379653",
        "started": "1795379653",
        "ends": "1795380253",
        "preempted": "N/A",
        "restarts": "0",
        "comment": "(null)",
        "dependency": "(null)",
    } | fields
    name, user, partition, *rest = row.values()
    return (job_id, name, user, partition, state, reason, *rest)
