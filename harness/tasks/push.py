"""A run's export, handed over: verified, described by a card, and sent to a hub or copied into a folder, whole or not at all.

    plan_push(...)      reopens the export and reads everything; nothing is written
    push_to_folder      beside its place, verified, and renamed
    push_to_hub         one commit with exactly the files of the plan; weights of another model that lie there are refused, or go with it

What goes: the files that the export's manifest lists, harness.json without this machine's paths, and README.md. Nothing else, whatever lies
in the folder: no optimizer state, no pickles. Promise. A file that holds a secret of this machine or somebody's home directory stops it.
"""

import contextlib
import json
import netrc
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, ModelError, RecipeError, first_line
from harness.hub.cache import endpoint
from harness.model.export import MANIFEST, check_export, verify_export
from harness.recipe import load
from harness.run import RunDir, replace_folder
from harness.tasks.card import Handed, check_evaluation, is_repo_id, read_figures, redact_all, render_card

CARD = "README.md"
CARRIES_STATE = re.compile(r"optimizer|scheduler|rng_state|scaler|trainer_state|\.(bin|pt|pth|pkl)$")
LOADED = re.compile(r"adapter_config\.json|(adapter_model|model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
"""Words of everybody's text, of which some look like paths."""
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
SECRET_FORM = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bwandb_v1_\w{20,}")
HOMES = re.compile(r"/(?:home|Users)/[\w.-]+")
HUB_TIMEOUT_S = 5
SECRET_CHARACTERS = 16
"""Shorter values of such variables are words."""


@dataclass(frozen=True)
class PlannedFile:
    name: str
    content: bytes | Path

    @property
    def size_bytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


@dataclass(frozen=True)
class Plan:
    source: Path
    files: list[PlannedFile]
    card: str


def plan_push(
    run: RunDir, export: str, name: str, *, base: str | None, license: str | None, evaluations: Sequence[Path], local: bool
) -> Plan:
    """Verify the export and say what would be handed over. name: what loads it there. base: the name under which others find its base.
    local: it goes to a folder, where a base may be one too.

    Raises ModelError for an export that is not whole or holds what must not leave, RecipeError for an adapter whose base nobody else has,
    EvaluationError for numbers of other weights.
    """
    source = run.path / export
    manifest = verify_export(source)
    if export.startswith("gguf"):
        kind = "quantized"
    else:
        # Digests say that nothing has changed since; this, that it is a model.
        check_export(source, None, adapter=manifest["adapter"])
        kind = "adapter" if manifest["adapter"] else "finetune"
    states = [file for file in manifest["files"] if CARRIES_STATE.search(file)]
    if states:
        raise ModelError(f"{source}: holds {states[0]}, which is a training's state and no model; export it again")
    base = find_base(manifest, kind, base, local)
    files = {file: PlannedFile(file, source / file) for file in manifest["files"] if file != CARD}
    if kind == "adapter":
        config = json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        files["adapter_config.json"] = PlannedFile("adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    card = render_card(
        Handed(
            name=name,
            manifest=manifest,
            recipe=load(run.recipe),
            license=license,
            base=base,
            base_license=base_license(base or manifest["base"], local=local),
            kind=kind,
            figures=read_figures(run.metrics, manifest["step"]),
            evaluations=[read_evaluation(folder, source) for folder in evaluations],
        )
    )
    files[MANIFEST] = PlannedFile(MANIFEST, _manifest_of(manifest, files))
    files[CARD] = PlannedFile(CARD, card.encode())
    for file in files.values():
        check_leaves(file, source, allowed=base)
    return Plan(source, [files[file] for file in sorted(files)], card)


def find_base(manifest: dict, kind: str, given: str | None, local: bool) -> str | None:
    """The base's name elsewhere: `given`, or the hub id that the run began from. Raises RecipeError where an adapter would have none."""
    if given is not None:
        if not is_repo_id(given) and not (local and (Path(given).expanduser() / "config.json").is_file()):
            raise RecipeError(f"--base {given}; must be the base's id on the hub{', or a folder that holds it' if local else ''}")
        return given if is_repo_id(given) else str(Path(given).expanduser().resolve())
    # Of a whole model the oldest entry has what it all began with.
    began = manifest["base"] if kind == "adapter" else next(iter(manifest.get("lineage") or [manifest]))["base"]
    if is_repo_id(began):
        return began
    if kind == "adapter":
        raise RecipeError(
            f"the adapter stands on {began}, which others do not have; hand that over first and name it with --base, or hand over the "
            "merged model: harness export RUN --merge, then --export merged"
        )
    return None


def base_license(base: str, *, local: bool) -> str | None:
    """What the base's own card says: beside its weights, among what the hub's cache holds, or where the hub is the target, there.
    None: unknown."""
    from huggingface_hub import HfApi, ModelCard, hf_hub_download

    from harness.embedded import resolve

    folder = Path(resolve(base)).expanduser()
    # No card, no network, a card that cannot be read: each of them means that nobody knows.
    with contextlib.suppress(Exception):
        file = folder / CARD if folder.is_dir() else hf_hub_download(base, CARD, local_files_only=True)
        return ModelCard(Path(file).read_text(encoding="utf-8")).data.license
    with contextlib.suppress(Exception):
        if not local and is_repo_id(base):
            return HfApi().model_info(base, timeout=HUB_TIMEOUT_S).card_data.license
    return None


def read_evaluation(folder: Path, source: Path) -> dict:
    from harness.evaluate.report import load_results
    from harness.teacher.resident import weights_digest

    summary = load_results(folder.expanduser()).summary
    check_evaluation(summary, folder, weights_digest(source))
    return summary


def _manifest_of(manifest: dict, files: dict[str, PlannedFile]) -> bytes:
    """With the digests of what is handed over, and without this machine's paths."""
    from hashlib import sha256

    digests = {
        name: manifest["files"][name] if isinstance(file.content, Path) else sha256(file.content).hexdigest()
        for name, file in files.items()
    }
    return (json.dumps({**redact_all(manifest), "files": digests}, indent=2) + "\n").encode()


def check_leaves(file: PlannedFile, source: Path, *, allowed: str | None) -> None:
    """Raises ModelError where a file holds a secret of this machine, or somebody's home directory. allowed: a path that was asked for."""
    if file.name.endswith((".safetensors", ".gguf", *VOCABULARY)):
        return
    text = (file.content.read_bytes() if isinstance(file.content, Path) else file.content).decode("utf-8", "replace")
    if allowed:
        text = text.replace(json.dumps(allowed), "")
    if SECRET_FORM.search(text) or any(secret in text for secret in secrets_here()):
        raise ModelError(f"{source / file.name}: holds a secret of this machine (its value is not shown); take it out before it leaves")
    homes = [found.group() for found in HOMES.finditer(text)]
    homes += [home for home in (str(Path.home()),) if len(home) > 1 and f"{home}/" in text]
    if homes:
        raise ModelError(f"{source / file.name}: names the home directory {homes[0]}; take it out before it leaves")


def secrets_here() -> set[str]:
    """Values that must not leave: of variables that are called so, the hub's token, the passwords in ~/.netrc (W&B keeps its key there)."""
    from huggingface_hub import get_token

    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)} | {get_token() or ""}
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        found |= {password or "" for _, _, password in netrc.netrc().hosts.values()}
    return {value for value in found if len(value) >= SECRET_CHARACTERS}


# ---- doing it


def check_place(target: Path, *, force: bool) -> None:
    """Raises RecipeError for a folder that is there, or that is a run's."""
    for folder in (target, *target.parents):
        if RunDir(folder).manifest.is_file():
            # What is handed over has lost its paths: as the run's own export it would be another, and without its lineage.
            raise RecipeError(f"{target}: lies in the run {folder}, whose exports and checkpoints stay as they are; choose another folder")
    if target.exists() and not (target / MANIFEST).is_file():
        raise RecipeError(f"{target}: is there, and holds no {MANIFEST}, so it is no export that could be replaced; choose another folder")
    if target.exists() and not force:
        raise RecipeError(f"{target}: is there already; --force replaces it")


def push_to_folder(plan: Plan, target: Path, *, force: bool) -> None:
    """Raises RecipeError for a folder that is not to be written, ModelError where what was copied is not what was to be."""
    check_place(target, force=force)
    staging = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for file in plan.files:
        if isinstance(file.content, Path):
            shutil.copyfile(file.content, staging / file.name)
        else:
            (staging / file.name).write_bytes(file.content)
    verify_export(staging)
    replace_folder(staging, target)


def find_others(plan: Plan, there: Sequence[str]) -> list[str]:
    """Of the files that are there, those that transformers or PEFT would load beside the plan's or in their place: an adapter beside a
    whole model, a single file beside its shards."""
    planned = {file.name for file in plan.files}
    if any(name.endswith(".gguf") for name in planned):
        # Each of these is asked for by its own name.
        return []
    return sorted(name for name in there if LOADED.fullmatch(name) and name not in planned)


def push_to_hub(plan: Plan, repo: str, *, private: bool, force: bool) -> str:
    """The address of the commit. force: other weights that lie there, and would be loaded with these, are deleted in it.

    Raises RecipeError for such weights without it and for a name that the hub does not take, HarnessError where the hub cannot be reached
    or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        others = find_others(plan, api.list_repo_files(repo))
        if others and not force:
            raise RecipeError(
                f"--to {repo}: holds {', '.join(others)} of another model, which would be loaded with this one or in its place; --force "
                "deletes them in the same commit"
            )
        added = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content)) for file in plan.files
        ]
        changes = [*added, *map(CommitOperationDelete, others)]
        return api.create_commit(repo, changes, commit_message=f"Hand over {plan.source.parent.name}/{plan.source.name}").commit_url
    except HFValidationError as error:
        raise RecipeError(f"--to {repo}: {error}") from None
    except OfflineModeIsEnabled:
        raise HarnessError(f"{repo}: cannot be pushed: HF_HUB_OFFLINE is set; unset it, on a machine that has a network") from None
    except (OSError, ValueError) as error:
        # Its own errors are OSErrors and ValueErrors: no token, no such organisation.
        raise HarnessError(
            f"{repo}: cannot be pushed: {first_line(error)}; log in with `hf auth login`, or set HF_TOKEN to one that may write"
        ) from None
    except Exception as error:
        # httpx's own, through huggingface_hub, which raises them as they are.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise HarnessError(
            f"{repo}: cannot be pushed: {endpoint()} cannot be reached, or the connection was cut ({error}); nothing or all is there, "
            "and the same command does it again; is there a network here (HTTPS_PROXY, HF_ENDPOINT)? --to ./FOLDER needs none"
        ) from None
