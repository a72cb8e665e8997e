"""One Weights & Biases run per run folder, through every requeue. Only this file and sync.py import wandb.

Promises: a run without a key or without a network is recorded offline and loses nothing; trouble with W&B is said in one line and never
ends a training; no secret is written (see `redact`); the run keeps its id (wandb.json) from its first life to its last.

The trainer's step is logged as the metric "step" and is the x axis of every chart. W&B's own counter is the number of the line in
metrics.jsonl instead: it only ever rises, while the trainer's step goes back to the checkpoint on resume, and W&B drops what is logged
to a step that has passed. What a life repeats of an earlier one stands under `replay/` (replay.py).
"""

import json
import logging
import netrc
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from harness.errors import HarnessError, first_line
from harness.run import write_text_atomically

logger = logging.getLogger(__name__)

ID_FILE = "wandb.json"
EXIT_RESUMABLE = 75  # stopped early and can be resumed (design.md, exit codes)
INIT_TIMEOUT_S = 30  # W&B's default is 90; every GPU of the job waits for it
FINISH_TIMEOUT_S = 900  # W&B's default is to wait for ever; what was not sent by then stays on disk for `harness sync`


class TrackingSection(Protocol):
    """The recipe's `tracking` section, as far as W&B needs it."""

    project: str
    entity: str | None
    name: str | None
    group: str | None
    tags: tuple[str, ...]
    mode: str


_SECRET_KEY = re.compile(r"(^|_)(password|passwd|secret|api_key|apikey|access_token|auth_token|hf_token)$|^token$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def redact(value: Any, key: str = "") -> Any:
    """`value` without secrets: what stands under a secret's name, what equals a secret of the environment, the login in a URL."""
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_KEY.search(key):
        return "[redacted]"
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_VARIABLE.search(name):
            value = value.replace(secret, "[redacted]")
    return _URL_LOGIN.sub("[redacted]@", value)


def machine_settings(wandb: ModuleType) -> Any:
    """wandb's settings on this machine. Raises HarnessError for a WANDB_ variable or a settings file that says what cannot be."""
    try:
        return wandb.setup().settings
    except ValueError as error:  # pydantic's
        raise HarnessError(f"W&B: cannot read its settings on this machine: {' '.join(str(error).split())}") from error


def has_credentials(settings: Any) -> bool:
    """Whether W&B can log in without asking: a key or an identity token in the environment, or the host's entry in netrc."""
    if settings.api_key or settings.identity_token_file:
        return True
    paths = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, paths):
        if not os.path.exists(path):
            continue
        try:
            if netrc.netrc(path).hosts.get(urlsplit(settings.base_url).netloc):
                return True
        except (netrc.NetrcParseError, OSError) as error:
            logger.warning("%s: cannot be read (%s); W&B will record offline", path, error)
    return False


def choose_mode(asked: str, credentials: bool) -> str:
    """online, offline or disabled, from tracking.mode. This machine's WANDB_MODE and WANDB_DISABLED beat it, save "disabled"."""
    if asked == "disabled":
        return "disabled"
    variable = os.environ.get("WANDB_MODE", "").lower()
    mode = {"dryrun": "offline", "run": "online"}.get(variable, variable) or asked
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        variable, mode = "disabled", "disabled"
    if mode not in ("auto", "online", "offline", "disabled"):
        logger.warning("W&B: WANDB_MODE=%s is not online, offline or disabled; tracking.mode=%s rules", variable, asked)
        mode = asked
    elif variable and asked not in ("auto", mode):
        logger.warning("W&B: %s, because WANDB_MODE or WANDB_DISABLED of this machine beats tracking.mode=%s", mode, asked)
    if mode == "online" and not credentials:
        logger.warning("W&B: offline, because there is no key (WANDB_API_KEY or `wandb login`), though online was asked for")
    if mode in ("auto", "online"):
        mode = "online" if credentials else "offline"
    return mode


def load_run_id(run_folder: Path) -> str:
    """The id in the folder's wandb.json; in the first life it is made and written, before anything is recorded under it."""
    path = Path(run_folder) / ID_FILE
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))["id"]
        except (ValueError, KeyError, TypeError):
            logger.warning("W&B: %s holds no id; this run gets a new one", path)
    run_id = secrets.token_hex(4)
    write_text_atomically(path, json.dumps({"id": run_id}) + "\n")
    return run_id


def failures(wandb: ModuleType) -> tuple[type[Exception], ...]:
    """What wandb raises when the network, its server or its own helper process fails; the last four do not derive from wandb.Error."""
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox.mailbox import MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

    return (wandb.Error, OSError, WandbServiceConnectionError, MailboxClosedError, HandleAbandonedError, ServerResponseError)


class WandbRun:
    """An open W&B run; rank 0 makes it. After the first failure it goes silent: metrics.jsonl goes on."""

    def __init__(self, wandb: ModuleType, run: Any):
        self._wandb = wandb
        self._run = run

    @property
    def id(self) -> str:
        return self._run.id

    @classmethod
    def start(cls, run_folder: Path, tracking: TrackingSection, config: dict[str, Any]) -> "WandbRun | None":
        """Open the folder's run, or None where W&B is off or cannot even record offline."""
        if tracking.mode == "disabled":
            return None
        import wandb  # here, because only rank 0 of a tracked run needs it

        try:
            mode = choose_mode(tracking.mode, has_credentials(machine_settings(wandb)))
        except HarnessError as error:
            logger.warning("%s; this run goes on without it, metrics.jsonl has everything", error)
            return None
        if mode == "disabled":
            return None
        run_id = load_run_id(run_folder)
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                run = open_run(wandb, run_folder, tracking, config, run_id, attempt)
            except failures(wandb) as error:
                rest = "recording offline instead" if attempt == "online" else "this run goes on without it, metrics.jsonl has everything"
                logger.warning("W&B: cannot start %s (%s); %s", attempt, first_line(error), rest)
                wandb.teardown()  # the failed start holds the run's id until W&B's helper process has ended
                continue
            where = run.url if attempt == "online" else f"offline; send it with `harness sync {run_folder}`"
            logger.info("W&B: run %s, %s", run_id, where)
            return cls(wandb, run)
        return None

    def log(self, row: int, step: int, values: dict[str, Any]) -> None:
        """Line `row` (from 0) of metrics.jsonl: the trainer's step and the same keys; NaN and infinities as such, for W&B has them."""
        self._guarded("log", lambda run: run.log({"step": step, **values}, step=row))

    def log_table(self, row: int, step: int, key: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """A table beside line `row`, which is logged after it. One that fails is left out, and the lines go on: W&B writes tables through
        the disk for temporary files. `harness sync` has none of them, for they are in no metrics.jsonl."""
        if self._run is None:
            return
        try:
            table = self._wandb.Table(columns=list(columns), data=[redact(list(cells)) for cells in rows])
            self._run.log({"step": step, key: table}, step=row)
        except failures(self._wandb) as error:
            logger.warning("W&B: cannot log the table %s (%s); it is left out", key, first_line(error))

    def log_artifact(self, export_folder: Path, lineage: dict[str, Any]) -> None:
        """The export as an artifact of type "model", with its lineage as metadata; offline it is uploaded by `harness sync`."""
        self._guarded("log the export", lambda run: log_export(self._wandb, run, export_folder, lineage))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run. With exit code 75 W&B shows it as preempted, not as failed, until its next life."""
        if exit_code == EXIT_RESUMABLE:
            self._guarded("mark the run as preempted", lambda run: run.mark_preempting())
        self._guarded("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guarded(self, action: str, do: Any) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except failures(self._wandb) as error:
            self._run = None
            logger.warning("W&B: cannot %s (%s); this run goes on without it, metrics.jsonl has everything", action, first_line(error))


def log_evaluation(
    folder: Path, project: str, config: dict[str, Any], values: dict[str, Any], columns: Sequence[str], rows: Sequence
) -> None:
    """An evaluation as a W&B run of its own: one line of numbers, and a table of rows that fail. The folder keeps its id, so that the same
    evaluation told again is the same run."""
    tracking = _Tracking(project, os.environ.get("WANDB_ENTITY"))
    run = WandbRun.start(folder, tracking, config)
    if run is not None:
        run.log_table(0, 0, "failing", columns, rows)
        run.log(0, 0, values)
        run.finish()


@dataclass(frozen=True)
class _Tracking:
    project: str
    entity: str | None
    name: str | None = None
    group: str | None = "evaluate"
    tags: tuple[str, ...] = ()
    mode: str = "auto"


def open_run(
    wandb: ModuleType, folder: Path, tracking: TrackingSection, config: dict[str, Any], run_id: str, mode: str, **settings: Any
) -> Any:
    """wandb.init with what every run of ours has in common; `settings` are wandb.Settings."""
    run = wandb.init(
        id=run_id,
        # W&B ignores `resume` offline, and then records it: `wandb sync` of a file that has it adds its lines to those of the server.
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(Path(folder).resolve()),
        project=tracking.project,
        entity=tracking.entity,
        name=tracking.name or Path(folder).resolve().name,
        group=tracking.group,
        tags=list(tracking.tags) or None,
        config=redact(config),
        allow_val_change=True,  # a later life may run on another commit or with more ranks
        settings=wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            console="off",  # the run folder has a log per rank; W&B's copy of a progress bar helps nobody
            disable_code=True,  # no diff of the checkout, no source, no remote URL: the commit is in the config
            disable_git=True,
            silent=True,  # we say in one line what matters
            **settings,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def log_export(wandb: ModuleType, run: Any, export_folder: Path, lineage: dict[str, Any]) -> None:
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=redact(lineage))
    # immutable: hash the files where they are. The default first copies them all, and an export may have 140 GB.
    artifact.add_dir(str(export_folder), policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["final"])
