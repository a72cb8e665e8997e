"""`harness fetch` against a hub of this machine: what comes, what stays out, cuts and kills, refusals, and a run without a network."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MICRO_TEMPLATE, STORIES, harness, metrics, needs_shared

from harness.errors import HarnessError, LaunchError, RecipeError
from harness.hub import cache, fetch, needs
from harness.hub.needs import Need
from harness.hub.record import verify_record
from harness.recipe import load
from hub.server import Hub, oid

pytestmark = needs_shared
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]}) + "\n" for n in range(12)
)
CHUNK = 10 * 2**20
"""huggingface_hub writes a file in pieces of this size."""


class Place:
    """A machine: its recipe, its caches, and a hub that it may reach."""

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub
        folder.mkdir(exist_ok=True)
        self.environment = {
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "",
            "HARNESS_CACHE": str(folder / "cache"),
        }
        (folder / "mine.yaml").write_text(
            f"model: {{name_or_path: org/tiny}}\ndata: {{train: org/rows, max_length: 128, chat_template: {MICRO_TEMPLATE}}}\n"
            "train: {max_steps: 1, per_device_train_batch_size: 2}\n"
        )

    def fetch(self, *arguments: str, **environment: str):
        return harness("fetch", "mine.yaml", *arguments, cwd=self.folder, **(self.environment | environment))

    def snapshot(self) -> Path:
        (found,) = (self.folder / "hf" / "hub" / "models--org--tiny" / "snapshots").iterdir()
        return found


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        model = {file.name: file.read_bytes() for file in STORIES.iterdir()}
        hub.add("org/tiny", model | {"pytorch_model.bin": b"x" * 3_000_000, "onnx/model.onnx": b"y" * 9000, "README.md": b"# tiny"})
        hub.add("org/rows", {"train.jsonl": ROWS.encode(), "README.md": b"# rows"}, repo_type="dataset")
        yield hub


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("fetched"), hub)
    return place, place.fetch("--dry-run"), place.fetch()


def test_a_dry_run_says_what_would_come_and_how_large_it_is_and_brings_none_of_it(fetched):
    _, said, _ = fetched
    assert said.code == 0, said.output
    assert re.search(r"model +org/tiny +\w{8} +6 files +1\.0 MiB +to come\n.*2\.9 MiB of other formats", said.output)
    assert re.search(r"dataset +org/rows +\w{8} +2 files", said.output)


def test_what_comes_is_what_a_run_loads_with_the_digests_of_the_hub(fetched):
    place, _, done = fetched
    assert done.code == 0, done.output
    assert {file.name for file in place.snapshot().iterdir()} == {file.name for file in STORIES.iterdir()} | {"README.md"}
    assert (place.snapshot() / "model.safetensors").read_bytes() == (STORIES / "model.safetensors").read_bytes()
    record = json.loads((place.folder / "hf" / "harness-fetched" / "models--org--tiny.json").read_text())
    files = record["commits"][record["revisions"]["main"]]
    # As git counts them, and as `sha256sum` does.
    assert files["config.json"]["digest"] == oid((STORIES / "config.json").read_bytes())
    sums = subprocess.run(["sha256sum", STORIES / "model.safetensors"], capture_output=True, text=True).stdout
    assert files["model.safetensors"]["digest"] == sums.split()[0]
    assert f"digests are written to {place.folder / 'hf' / 'harness-fetched'}" in done.output


def test_the_second_time_nothing_comes(fetched):
    place, *_ = fetched
    before = len(place.hub.requests)
    done = place.fetch()
    assert done.code == 0 and "all here" in done.output
    assert not [path for method, path, _ in place.hub.requests[before:] if method == "GET" and "/resolve/" in path]


ALONE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
"""No network."""


def test_digests_can_be_checked_and_data_be_prepared_without_a_network(fetched):
    place, *_ = fetched
    checked = place.fetch(**ALONE)
    assert checked.code == 0 and checked.output.count("all as they were fetched") == 2, checked.output
    done = harness("prepare", "mine.yaml", cwd=place.folder, **place.environment | ALONE)
    assert done.code == 0 and "12 of 12 rows" in done.output, done.output


@pytest.mark.slow
def test_a_run_without_a_network_has_all_that_was_fetched(fetched):
    place, *_ = fetched
    done = harness("run", "mine.yaml", cwd=place.folder, **place.environment | ALONE)
    assert done.code == 0, done.output
    assert list(metrics(place.folder / "runs" / "mine", "train/loss")) == [1]


def test_a_file_that_was_changed_since_is_found(fetched, tmp_path):
    place, *_ = fetched
    copy = Place(tmp_path / "copy", place.hub)
    shutil.copytree(place.folder / "hf", copy.folder / "hf", symlinks=True)
    weights = copy.snapshot() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (copy.snapshot() / "config.json").unlink()
    done = copy.fetch("--verify")
    assert done.code == 1 and "model.safetensors is not what the hub has" in done.output
    assert "config.json is not there any more" in done.output
    # As the message says.
    weights.resolve().unlink()
    assert copy.fetch().code == 0
    assert copy.fetch("--verify").code == 0


def test_what_was_never_fetched_cannot_be_verified(hub, tmp_path):
    done = Place(tmp_path, hub).fetch("--verify")
    assert done.code == 1 and "was not fetched" in done.output


# ---- cuts


@pytest.fixture(scope="module")
def large(hub):
    """A second file of weights, in pieces enough that it can be cut between two."""
    files = hub.repositories["models", "org/tiny"]
    hub.add("org/large", files | {"model-2.safetensors": os.urandom(2 * CHUNK + 1000)})
    return hub


def ranges(hub: Hub, name: str) -> list[str | None]:
    return [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(name)]


def test_a_fetch_that_is_killed_goes_on_where_it_was(large, tmp_path):
    place = Place(tmp_path, large)
    large.requests.clear()
    large.go.clear()
    large.stall = ("model-2.safetensors", 2 * CHUNK)
    argv = [sys.executable, "-m", "harness", "fetch", "mine.yaml", "model.name_or_path=org/large"]
    fetching = subprocess.Popen(
        argv, cwd=place.folder, env=os.environ | place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    blobs, deadline = place.folder / "hf" / "hub" / "models--org--large" / "blobs", time.monotonic() + 60
    while not any(fetch.size_of(file) == CHUNK * 2 for file in blobs.glob("*.harness")):
        assert time.monotonic() < deadline and fetching.poll() is None
        time.sleep(0.05)
    fetching.send_signal(signal.SIGKILL)
    fetching.wait()
    large.go.set()
    done = place.fetch("model.name_or_path=org/large")
    assert done.code == 0, done.output
    assert ranges(large, "model-2.safetensors") == [None, f"bytes={2 * CHUNK}-"]
    assert list(blobs.glob("*.harness")) == []


def test_a_connection_that_is_cut_goes_on_by_itself(large, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    here(monkeypatch, large, tmp_path)
    large.requests.clear()
    large.cut = ("model.safetensors", 500_000)
    came = []
    planned = fetch.plan_fetch(need("org/tiny"))
    fetch.download(planned, came.append)
    fetch.record_fetch(planned)
    first, second = ranges(large, "model.safetensors")
    assert first is None and re.fullmatch(r"bytes=(\d+)-", second)
    assert sum(came) == planned.size_bytes
    assert not any(planned.missing)


# ---- what the hub refuses


def need(name: str, **facts) -> Need:
    return Need(**{"kind": "model", "id": name, "revision": None, "key": "model.name_or_path"} | facts)


def here(monkeypatch, hub: Hub, folder: Path) -> None:
    """This process on a machine with an empty cache."""
    import huggingface_hub.hf_api

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (need("org/secret"), HarnessError, "is gated; accept its terms at {url}/org/secret.*`hf auth login`.*HF_TOKEN"),
        (need("org/tiny", revision="v9"), RecipeError, "has no branch, tag or commit v9; it has main"),
        (need("org/none"), RecipeError, "{url} has no such model, or it is private"),
        (need("org/bin"), RecipeError, "holds no model.safetensors.*refs/pr/N"),
    ],
    ids=["gated", "revision", "name", "format"],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(hub, tmp_path, monkeypatch, asked, error, said):
    here(monkeypatch, hub, tmp_path)
    hub.add("org/secret", {"config.json": b"{}"})
    hub.gated.add("org/secret")
    hub.add("org/bin", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(error, match=said.format(url=re.escape(hub.url))) as caught:
        fetch.plan_fetch(asked)
    assert type(caught.value) is error


def test_a_hub_that_is_not_there_and_a_disk_that_is_full_are_told_apart(hub, tmp_path, monkeypatch):
    here(monkeypatch, hub, tmp_path)
    planned = fetch.plan_fetch(need("org/tiny"))
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))
    with pytest.raises(HarnessError, match=r"9\.8 KiB free, and 1\.0 MiB are to come; free some"):
        fetch.check_room([planned])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HarnessError, match="http://127.0.0.1:9 cannot be reached"):
        fetch.plan_fetch(need("org/tiny"))


def test_two_splits_of_a_data_set_come_once_and_need_room_once(hub, tmp_path, monkeypatch):
    here(monkeypatch, hub, tmp_path)
    train, test = (fetch.Fetch(need("org/rows", kind="dataset", split=split), "c", FILES, 0) for split in ("train", "test"))
    assert fetch.bytes_to_come([train, test]) == train.missing_bytes == 10_000
    # The files, and the tables that are made of them.
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 20_000}))
    fetch.check_room([train, test])


FILES = (fetch.HubFile("rows.jsonl", 10_000, "d", "sha256"),)


def test_tables_whose_making_was_killed_are_not_taken_for_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "datasets_cache", lambda: tmp_path)
    rows = need("org/rows", kind="dataset")
    table = tmp_path / "org___rows" / "default" / "0.0.0" / "hash.incomplete" / "rows-train.arrow"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"half")
    assert cache.find_missing(rows) == "is not in the cache"
    table.parent.rename(table.parent.with_suffix(""))
    assert cache.find_missing(rows) is None


def test_a_tokenizer_that_was_fetched_alone_is_not_taken_for_its_model(hub, tmp_path, monkeypatch):
    here(monkeypatch, hub, tmp_path)
    tokenizer = need("org/tiny", kind="tokenizer")
    planned = fetch.plan_fetch(tokenizer)
    fetch.download(planned)
    fetch.record_fetch(planned)
    assert verify_record(tokenizer)[0] == len(planned.files)
    with pytest.raises(HarnessError, match="is in the cache without model.safetensors .*run `harness fetch`"):
        verify_record(need("org/tiny"))


def test_a_fetch_that_waited_for_another_goes_on_behind_what_that_one_wrote(hub, tmp_path, monkeypatch):
    here(monkeypatch, hub, tmp_path)
    planned = fetch.plan_fetch(need("org/tiny"))
    weights = next(file for file in planned.files if file.path == "model.safetensors")
    partial = fetch.partial_of(planned.blob(weights))

    def wait_for_the_other(stream, operation):
        if getattr(stream, "name", None) == str(partial):
            partial.write_bytes((STORIES / "model.safetensors").read_bytes()[:1000])

    monkeypatch.setattr(fetch.fcntl, "flock", wait_for_the_other)
    hub.requests.clear()
    fetch.download(planned)
    assert ranges(hub, "model.safetensors") == ["bytes=1000-"]


def test_bytes_that_are_not_the_hubs_are_thrown_away(hub, tmp_path, monkeypatch):
    here(monkeypatch, hub, tmp_path)
    hub.corrupt.add("model.safetensors")
    planned = fetch.plan_fetch(need("org/tiny"))
    with pytest.raises(HarnessError, match="model.safetensors came with another digest than the hub says"):
        fetch.download(planned)
    hub.corrupt.clear()
    # What came beside it may be whole, or wait for the rest; of this one nothing is left.
    weights = next(file for file in planned.missing if file.path == "model.safetensors")
    assert not fetch.partial_of(planned.blob(weights)).exists()


# ---- what a recipe names


def named(*overrides: str, recipe: str = "tiny/sft-lora") -> list[tuple[str, str]]:
    return [(each.kind, each.id) for each in needs.find_needs([load(recipe, overrides)])]


def test_everything_that_a_recipe_takes_from_the_hub_is_found_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert named() == []
    assert named("model.name_or_path=a/b", "model.tokenizer=c/d", "data.train=e/f") == [
        ("model", "a/b"),
        ("tokenizer", "c/d"),
        ("dataset", "e/f"),
    ]
    assert named("model.name_or_path=a/b", "model.tokenizer=a/b") == [("model", "a/b")]
    assert named("model.name_or_path=runs/first") == []
    assert not needs.find_needs([load("tiny/sft-lora", ["model.name_or_path=a/b", "model.tokenizer=c/d"])])[0].with_tokenizer
    assert named("model.name_or_path=./a/b", "data.train=rows.jsonl") == []
    assert named("teacher.name_or_path=t/t", recipe="tiny/distill-offline") == [("model", "t/t")]
    rewards = "rlhf.rewards=[{type: reward_model, model: r/m}]"
    assert named(rewards, recipe="tiny/rlhf-rloo") == [("model", "r/m")]


def test_a_pipeline_is_fetched_with_all_its_stages_and_without_what_they_make_for_one_another(hub, tmp_path):
    place = Place(tmp_path, hub)
    (tmp_path / "two.yaml").write_text(
        "stages:\n  one: {recipe: mine.yaml, set: {data.train: 'embedded:base-train'}}\n"
        "  two: {recipe: mine.yaml, model: {from: one}, set: {data.train: org/rows}}\n"
    )
    done = harness("fetch", "two.yaml", "--dry-run", cwd=tmp_path, **place.environment)
    assert done.code == 0, done.output
    assert "org/tiny" in done.output and "org/rows" in done.output and "runs" not in done.output


def test_a_path_that_leads_nowhere_does_not_pass_for_one_that_lies_here(tmp_path):
    done = harness("fetch", "tiny/sft-lora", f"model.name_or_path={tmp_path}/nowhere")
    assert "takes nothing from the hub; but model.name_or_path = " in done.output and "there is no such file" in done.output
    assert "lies here" not in done.output
    misspelt = harness("fetch", "tiny/sft-lora", "--dryrun")
    assert misspelt.code == 2 and "did you mean `--dry-run`?" in misspelt.output


def test_submit_names_fetch_when_an_offline_job_would_not_find_its_model(tmp_path, monkeypatch):
    from harness.cluster.schema import Cluster
    from harness.cluster.submission import Submission, check_fetched

    monkeypatch.setattr(cache, "hub_cache", lambda: tmp_path)
    recipe = load("tiny/sft-lora", ["model.name_or_path=org/tiny"])

    def submit(**cluster):
        check_fetched(Submission(recipe, Cluster(name="here", **cluster), source="mine.yaml"))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    submit()  # the variable does not reach the job
    for cluster in ({"environment": ("HF_HUB_OFFLINE",)}, {"setup": ("export HF_HUB_OFFLINE=1",)}):
        with pytest.raises(LaunchError, match=r"org/tiny: is not in the cache .*`harness fetch mine.yaml` brings it"):
            submit(**cluster)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    submit(environment=("HF_HUB_OFFLINE",))
