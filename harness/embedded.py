"""What a recipe may name without a file or a hub: `embedded:NAME`, made by our own code and kept in the cache.

    embedded:tiny-llama        a folder: config, tokenizer with a chat template, and weights drawn with seed 0 (they know nothing)
    embedded:tiny-student      the same with less than a third of its parameters
    embedded:base-train        questions over the first world of tools, with gold calls; base-eval: held-out ones
    embedded:adapt-train       the same over tools that the first world does not have; adapt-eval: held-out ones
    embedded:adapt-mining      questions over these that no other file has, for pairs from a model's own failures
    embedded:pairs-train       a right and a slightly wrong answer to questions over the first world; pairs-eval: to held-out ones
    embedded:answers-train     one answer of each pair, labelled good or bad; answers-eval: to held-out questions
    embedded:look-up-train     questions whose answer is what a tool returns, call, result and answer; look-up-eval: held-out ones
    embedded:decide-items      questions with a planted behaviour each; decide-tuning, decide-guards and decide-documents go with them, and
                               decide-train and decide-adapt-train with the model embedded:decide-llama (harness.quickstart.planted)

The tiny recipes and the quickstart use these; they need no network, no GPU and no data of anybody's.
"""

import hashlib
import os
import shutil
from pathlib import Path

from harness.errors import RecipeError
from harness.resources import cache_root

PREFIX = "embedded:"
WORLD_SEED = 0
MODELS = {"tiny-llama": 64, "tiny-student": 32}
"""And how wide they are."""
PLANTED = ("decide-train", "decide-adapt-train", "decide-items", "decide-tuning", "decide-guards", "decide-documents")
PLANTED_MODEL = "decide-llama"


def resolve(name: str) -> str:
    """The path that `embedded:NAME` means, made on first use; any other name as it is. Raises RecipeError for an unknown NAME."""
    if not name.startswith(PREFIX):
        return name
    folder = cache_root() / "embedded" / _version()
    wanted = name.removeprefix(PREFIX)
    makers = dict.fromkeys(("base-train", "base-eval", "adapt-train", "adapt-eval"), ("world", _make_world))
    makers["adapt-mining"] = ("mining", _make_mining)
    makers |= dict.fromkeys(("pairs-train", "pairs-eval", "answers-train", "answers-eval"), ("pairs", _make_pairs))
    makers |= dict.fromkeys(("look-up-train", "look-up-eval"), ("look-ups", _make_look_ups))
    makers |= dict.fromkeys(PLANTED, ("planted", _make_planted))
    if wanted in makers:
        name_of_folder, make = makers[wanted]
        return str(_once(folder / name_of_folder, make) / f"{wanted}.jsonl")
    if wanted in MODELS:
        world = _once(folder / "world", _make_world)
        files = [world / f"{name}.jsonl" for name in ("base-train", "adapt-train")]
        return str(_once(folder / wanted, lambda target: _make_model(target, files, MODELS[wanted])))
    if wanted == PLANTED_MODEL:
        planted = _once(folder / "planted", _make_planted)
        files = [planted / f"{name}.jsonl" for name in PLANTED[:2]]
        return str(_once(folder / wanted, lambda target: _make_model(target, files, MODELS["tiny-llama"])))
    known = ", ".join(PREFIX + one for one in (*MODELS, *makers, PLANTED_MODEL))
    raise RecipeError(f"{name}: nothing of that name is embedded; there are {known}")


def _version() -> str:
    """A digest of the code that makes these things, so that an old cache is not taken for what today's code would make."""
    code = Path(__file__).parent / "quickstart"
    files = ("world.py", "pairs.py", "planted.py", "tokenizer.py", "tools.py")
    return hashlib.sha256(b"".join((code / name).read_bytes() for name in files)).hexdigest()[:12]


def _once(folder: Path, make) -> Path:
    """`folder`, made by `make` beside its place and renamed, so that several processes may ask at once."""
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        make(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            # Another process was first; what it made is the same.
            shutil.rmtree(scratch)
    return folder


def _make_world(folder: Path) -> None:
    from harness.quickstart.world import write_world

    write_world(folder, WORLD_SEED)


def _make_pairs(folder: Path) -> None:
    from harness.quickstart.pairs import write_pairs

    write_pairs(folder, WORLD_SEED)


def _make_mining(folder: Path) -> None:
    import json

    from harness.quickstart.pairs import write_mining

    with open(resolve("embedded:adapt-train"), encoding="utf-8") as rows:
        write_mining(folder, WORLD_SEED, {json.loads(row)["messages"][0]["content"] for row in rows})


def _make_look_ups(folder: Path) -> None:
    from harness.quickstart.tools import write_look_ups

    write_look_ups(folder, WORLD_SEED)


def _make_planted(folder: Path) -> None:
    from harness.quickstart.planted import write_planted

    write_planted(folder, WORLD_SEED)


def _make_model(folder: Path, files: list[Path], width: int) -> None:
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness.quickstart.tokenizer import save_base

    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    save_base(folder, rows, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # Not save_pretrained: among several ranks it writes weights on rank 0 alone, and any rank may be the one that is here.
    weights = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
