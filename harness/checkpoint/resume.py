"""What must be the same for a run to be continued, and what is adjusted.

A checkpoint's manifest says what it was made with. What differs now is refused by its dotted name, unless the person names it
(`--allow-change train.learning_rate`); what was allowed stands in every manifest from there on. The number of ranks may differ: the
accumulation is fitted to keep the global batch.
"""

import contextlib
from typing import Any

from harness.checkpoint.ledger import read_ledger
from harness.checkpoint.manifest import read_manifest
from harness.checkpoint.selection import checkpoints, run_name
from harness.errors import CheckpointError, LaunchError, RecipeError
from harness.launcher import accumulation_steps
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.load import validate
from harness.run import RunDir

FREE = (
    "output_dir backend tracking checkpoint guard watchdog data train.per_device_train_batch_size train.per_device_eval_batch_size "
    "train.gradient_accumulation_steps train.global_batch_size train.gradient_checkpointing train.gradient_checkpointing_kwargs "
    "train.logging_steps train.eval_strategy train.eval_steps train.eval_on_start train.eval_tool_calls train.dataloader_num_workers "
    "train.ddp_timeout train.use_liger_kernel train.torch_compile model.attn_implementation model.trust_remote_code "
    "teacher.cache teacher.unit_tokens teacher.device_map teacher.attn_implementation teacher.trust_remote_code teacher.server"
).split()
"""Fields that may change freely: they do not decide what the weights become (but for rounding), or something else is compared in their
place: the prepared data, the engine, the global batch."""
DATA, GLOBAL_BATCH, BASE, ADAPTER, TEACHER, REFERENCE = OTHERS = "data", "global_batch", "base", "adapter", "teacher", "reference"
"""What `--allow-change` takes beside the names of recipe fields."""


def engine_of(backend: Backend) -> str:
    """How a checkpoint under this backend is laid out: `plain` is transformers' own, the others hold shards."""
    return {"deepspeed": f"zero{backend.zero_stage}", "fsdp": "fsdp2"}.get(backend.kind, "plain")


def check_continuation(run: RunDir, recipe: Recipe, backend: Backend, allowed: tuple[str, ...], *, must_exist: bool = False) -> None:
    """Raises LaunchError when the run in the folder was begun with another recipe, or with `must_exist` when nothing was ever saved there.

    Before anything is changed or loaded; once the ranks know the data and the base they check again, and whether the checkpoint is whole.
    """
    saved = checkpoints(run.path)
    if must_exist and not saved and not any(event["event"] == "committed" for event in read_ledger(run.ledger)):
        raise LaunchError(f"--resume: {run.path} holds no checkpoint, so there is nothing to continue from; leave --resume out to begin")
    for _, folder in saved:
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(folder)
            if manifest.get("run") != run_name(run):
                continue
            check_recipe(manifest, recipe, allowed)
            check_engine(manifest, backend)
            return


def check_recipe(manifest: dict, recipe: Recipe, allowed: tuple[str, ...]) -> None:
    """Raises LaunchError that lists every field in which `recipe` is not the one that the checkpoint was made with."""
    now, then = flatten(recipe.model_dump(mode="json")), flatten(_recipe_of(manifest))
    known = now.keys() | then.keys()
    for name in allowed:
        # It would allow nothing, in silence.
        if name not in OTHERS and not any(_is_under(key, name) for key in known):
            raise LaunchError(
                f"--allow-change {name}: no such setting; give the dotted name of a recipe's field (train.learning_rate), "
                f"or {', '.join(OTHERS)}"
            )
    problems = [
        f"{key} = {now.get(key)}; the checkpoint was made with {then.get(key)}"
        for key in changed_fields(manifest, recipe)
        if not any(_is_under(key, name) for name in (*FREE, *allowed))
    ]
    _refuse(problems, manifest, _PUT_BACK)


def changed_fields(manifest: dict, recipe: Recipe) -> list[str]:
    """The dotted names of what is otherwise in `recipe` than in the one that the checkpoint was made with."""
    now, then = flatten(recipe.model_dump(mode="json")), flatten(_recipe_of(manifest))
    return sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))


def _recipe_of(manifest: dict) -> dict:
    """As this version reads it: a field that is newer than the checkpoint has its default, with which the run was made."""
    try:
        return validate(Recipe, manifest["recipe"], "the checkpoint").model_dump(mode="json")
    except RecipeError:
        # It has a field that is gone, which is a change, and named as one.
        return manifest["recipe"]


def check_facts(manifest: dict, facts: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Raises LaunchError when the data, the base, the earlier adapter, the teacher or the reference of `facts` is not the checkpoint's."""
    problems = []
    if facts["data"]["digest"] != manifest["data"]["digest"] and DATA not in allowed:
        problems.append(
            f"{DATA}: the prepared rows are {facts['data']['digest']}; the checkpoint was made with {manifest['data']['digest']}"
        )
    if _identity(facts["base"]) != _identity(manifest["base"]) and BASE not in allowed:
        problems.append(f"{BASE}: the weights of {facts['base']['name']} are not those that the checkpoint was made with")
    now, then = (about.get("adapter") for about in (facts, manifest))
    if (now and now["digest"]) != (then and then["digest"]) and ADAPTER not in allowed:
        problems.append(f"{ADAPTER}: the one in {(now or then)['folder']} is not that which the checkpoint's run began from")
    if facts["teacher"] != manifest.get("teacher") and TEACHER not in allowed:
        problems.append(f"{TEACHER}: its weights are not those that the checkpoint's run has learnt from")
    now, then = (about.get("reference") for about in (facts, manifest))
    # None is the policy itself without its adapter, whose base is compared above.
    if now and then and now != then and REFERENCE not in allowed:
        problems.append(f"{REFERENCE}: the weights that the policy is compared with are not those that the checkpoint was made with")
    _refuse(problems, manifest, _PUT_BACK)


def check_engine(manifest: dict, backend: Backend) -> None:
    """Raises LaunchError when the optimiser's state is laid out in a way that this backend does not read."""
    if engine_of(backend) != manifest["engine"]:
        raise LaunchError(
            f"checkpoint-{manifest['step']} holds the state of {_ENGINES[manifest['engine']]}, and backend = {backend.name} is "
            f"{_ENGINES[engine_of(backend)]}: one cannot be read as the other; continue with backend={manifest['backend']}, "
            "on any number of ranks, or begin again with --fresh"
        )


_PUT_BACK = "put them back, or name each with --allow-change KEY, or begin again with --fresh"
_ENGINES = {
    "plain": "one rank or DDP",
    "zero0": "DeepSpeed without ZeRO",
    "zero1": "DeepSpeed's ZeRO stage 1",
    "zero2": "DeepSpeed's ZeRO stage 2",
    "zero3": "DeepSpeed's ZeRO stage 3",
    "fsdp2": "FSDP2",
}


def keep_global_batch(manifest: dict, recipe: Recipe, world_size: int, allowed: tuple[str, ...]) -> tuple[Recipe, str | None]:
    """(`recipe` with the accumulation that keeps the checkpoint's global batch on so many ranks, what to say about it if it changed).

    Raises LaunchError when the recipe asks for another global batch, or the ranks cannot make this one.
    """
    train, kept = recipe.train, manifest["global_batch"]
    before = manifest["recipe"]["train"]
    asked = train.per_device_train_batch_size * accumulation_steps(recipe, world_size) * world_size
    if asked == kept:
        return recipe, _new_accumulation(manifest, recipe, world_size)
    if GLOBAL_BATCH in allowed:
        rows = asked // recipe.rlhf.num_generations if recipe.task == "rlhf" else asked
        if manifest["data"]["cursor"] % rows:
            raise LaunchError(
                f"checkpoint-{manifest['step']} stands {manifest['data']['cursor']} rows into its epoch, where no step of {rows} "
                "rows begins; choose a global batch that divides it"
            )
        return recipe, None
    rewritten = [
        key
        for key in ("global_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size")
        if getattr(train, key) != before[key]
    ]
    if train.global_batch_size or "gradient_accumulation_steps" in rewritten:
        _refuse(
            [f"train.{rewritten[0] if rewritten else 'global_batch_size'}: a step would take {asked} rows; the run takes {kept}"],
            manifest,
            f"put it back, or give --allow-change {GLOBAL_BATCH}",
        )
    train = train.model_copy(update={"global_batch_size": kept, "gradient_accumulation_steps": None})
    fitted = recipe.model_copy(update={"train": train})
    return fitted, _new_accumulation(manifest, fitted, world_size)


def _new_accumulation(manifest: dict, recipe: Recipe, world_size: int) -> str | None:
    now, ranks = accumulation_steps(recipe, world_size), manifest["world_size"]
    if now == manifest["accumulation"]:
        return None
    return (
        f"{ranks} rank{'s' * (ranks > 1)} before, {world_size} now: gradient_accumulation_steps is {now} in place of "
        f"{manifest['accumulation']}, so that a step still takes {manifest['global_batch']} rows"
    )


def _identity(base: dict):
    """A base from the hub has no digest but its commit."""
    return base["digest"] or (base["name"], base["revision"])


def flatten(settings: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}."""
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_under(field: str, name: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _refuse(problems: list[str], manifest: dict, remedy: str) -> None:
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise LaunchError(f"checkpoint-{manifest['step']} cannot be continued with other settings:\n{lines}\n{remedy}")
