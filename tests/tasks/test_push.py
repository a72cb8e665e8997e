"""What is handed over loads without us, says where it comes from, and takes nothing along that is nobody's business."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import harness
from exported import amend, export_run
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from harness.cli.push import command
from harness.embedded import resolve
from harness.errors import EvaluationError, HarnessError, ModelError, RecipeError
from harness.model.export import MANIFEST, digest_file, verify_export
from harness.tasks.card import redact
from harness.tasks.push import plan_push, push_to_folder, push_to_hub, secrets_here
from harness.teacher.resident import weights_digest

BASE = "meta-llama/Llama-3.2-1B"


@pytest.fixture(scope="module")
def full(tmp_path_factory, cache):
    return export_run(tmp_path_factory.mktemp("full") / "run", "tiny/sft-full")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, cache):
    return export_run(tmp_path_factory.mktemp("lora") / "run", "tiny/sft-lora")


@pytest.fixture(scope="module")
def reward(tmp_path_factory, cache):
    return export_run(tmp_path_factory.mktemp("reward") / "run", "tiny/reward-lora", "model.lora=null")


def plan(run, export="final", name="org/model", **options):
    return plan_push(run, export, name, **{"base": None, "license": None, "evaluations": [], "local": True, **options})


def card_of(planned) -> dict:
    return ModelCard(planned.card).data.to_dict()


# ---- it loads


LOADS = """
import json, sys
sys.modules["harness"] = None  # an import of it fails
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

said, ids = {}, torch.arange(2, 12)[None]
loaders = {"full": AutoModelForCausalLM, "lora": AutoPeftModelForCausalLM, "reward": AutoModelForSequenceClassification}
for name, loader in loaders.items():
    folder = f"{sys.argv[1]}/{name}"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with torch.no_grad():
        said[name] = loader.from_pretrained(folder).eval()(input_ids=ids).logits[0].flatten()[:20].tolist()
print(json.dumps(said))
"""


def test_what_was_handed_over_loads_with_plain_transformers_and_peft_and_says_what_the_run_says(full, lora, reward, tmp_path):
    from peft import PeftModel

    for name, run in (("full", full), ("lora", lora), ("reward", reward)):
        base = resolve("embedded:tiny-llama") if name == "lora" else None
        push_to_folder(plan(run, name=name, base=base), tmp_path / name, force=False)
        verify_export(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", LOADS, tmp_path], cwd="/", capture_output=True, text=True, check=True)
    said, ids = json.loads(done.stdout), torch.arange(2, 12)[None]
    ours = {
        "full": AutoModelForCausalLM.from_pretrained(full.final),
        "lora": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama")), lora.final),
        "reward": AutoModelForSequenceClassification.from_pretrained(reward.final),
    }
    for name, model in ours.items():
        with torch.no_grad():
            assert said[name] == pytest.approx(model.eval()(input_ids=ids).logits[0].flatten()[:20].tolist(), abs=1e-5), name


# ---- what the card says


def test_the_card_names_what_the_hub_reads(lora, full, reward):
    assert card_of(plan(lora, base=BASE, license="llama3.2")) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["harness", "trl", "sft", "lora"],
    }
    # Drawn weights have no base, and nobody has said a licence.
    assert card_of(plan(full)).keys() == {"library_name", "license", "pipeline_tag", "tags"}
    assert card_of(plan(full))["license"] == "unknown"
    assert card_of(plan(reward))["pipeline_tag"] == "text-classification"


def test_licences_are_told_where_they_are_known_and_unknown_where_they_are_not(tmp_path, full):
    (base := tmp_path / "base").mkdir()
    for file in Path(resolve("embedded:tiny-llama")).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    sources = 'data.train=[{path: secret/place/rows.jsonl, license: cc-by-4.0}, {path: org/rows}, {path: "embedded:base-train"}]'
    run = export_run(tmp_path / "run", "tiny/sft-lora", sources, "data.eval=[]", "train.eval_steps=null", base=str(base))
    planned = plan(run, base=str(base))
    assert "Licence of its base: `mit`" in planned.card
    assert "| `rows.jsonl` | training | `cc-by-4.0` |" in planned.card
    assert "| `org/rows` | training | unknown |" in planned.card
    assert "| `embedded:base-train` | training | `apache-2.0`, generated by harness |" in planned.card
    assert card_of(planned)["datasets"] == ["org/rows"]
    assert "Licence of its base: unknown" in plan(full).card


def test_a_licence_that_is_found_out_later_is_no_other_recipe():
    from harness.recipe import load, recipe_digest

    before, after = (load("tiny/sft-lora", [f'data.train=[{{path: "embedded:base-train"{more}}}]']) for more in ("", ", license: mit"))
    assert recipe_digest(before) == recipe_digest(after)


def test_the_card_tells_figures_with_their_command_and_lineage(full):
    said = plan(full).card
    assert "| `eval/loss` | 1.25 |" in said and "eval/runtime_s" not in said
    assert "by `harness run`" in said
    # As a life that was killed while it wrote leaves it.
    whole = full.metrics.read_text()
    full.metrics.write_text(f'{{"step": 20, "eval/lo\n{whole}')
    assert "| `eval/loss` | 1.25 |" in plan(full).card
    full.metrics.write_text(whole)
    assert f"git_commit `{'c' * 40}`, step 20" in said and "`task: sft`, from `embedded:tiny-llama`" in said


def summary_of(weights: str) -> dict:
    category = {"n": 4, "correct": 3, "rate": 0.75, "interval": [0.3, 0.95], "by_class": {"right": 3, "wrong_tool": 1}, "measures": {}}
    category |= {"asked_in_vain": 0, "cut_off": 0, "prompt_tokens": 9, "answer_tokens": 9}
    suite = {"note": "", "files": {"/data/of/mine/calls.jsonl": "0" * 64}, "left_out": {}, "categories": {"all": category}}
    settings = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0, "max_items": None, "batch_size": 16}
    about = {"harness": "0.1.0", "versions": {"transformers": "5"}, "settings": settings}
    return {"target": {"run": "/home/me/run", "weights": weights}, **about, "suites": {"calls": suite}}


def save_evaluation(folder: Path, weights: str) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary_of(weights)))
    (folder / "items.jsonl").write_text("")
    return folder


def test_an_evaluation_is_told_only_of_these_very_weights(full, tmp_path):
    mine = save_evaluation(tmp_path / "mine", weights_digest(full.final))
    said = plan(full, evaluations=[mine]).card
    assert "harness evaluate MODEL --suite calls=calls.jsonl --max-new-tokens 64" in said
    # Those that can be given again: neither the answers beside the questions nor each file of a folder.
    summary = summary_of(weights_digest(full.final))
    (suite,) = summary["suites"].values()
    questions = "BFCL_v4_multiple.json"
    hub = ("questions/questions_torchhub_0_shot.jsonl", "api/torchhub_api.jsonl", "torchhub_eval.json")
    found = {"bfcl": [f"/d/bfcl/{questions}", f"/d/bfcl/possible_answer/{questions}"], "apibench": [f"/d/gorilla/{file}" for file in hub]}
    summary["suites"] = {name: suite | {"files": dict.fromkeys(files, "0")} for name, files in found.items()}
    summary["settings"]["underscore_names"] = True
    (mine / "summary.json").write_text(json.dumps(summary))
    told = plan(full, evaluations=[mine]).card
    assert f"--suite bfcl={questions} --suite apibench=gorilla --max-new-tokens 64 --underscore-names" in told
    assert "| calls | all | 75.0% | 30.0% to 95.0% | 3 of 4 |" in said
    with pytest.raises(EvaluationError, match="weights are not those that are handed over"):
        plan(full, evaluations=[save_evaluation(tmp_path / "other", "0" * 32)])


# ---- what does not leave


def test_an_export_that_was_altered_is_not_handed_over(tmp_path):
    run = export_run(tmp_path / "run", "tiny/sft-full")
    with open(run.final / "model.safetensors", "r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x00\x00\x00\x40")
    with pytest.raises(ModelError, match="is not what was exported"):
        plan(run)
    # With its digest mended it is still no model: reopened, it holds what is not finite.
    with open(run.final / "model.safetensors", "r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x00\x00\x80\x7f")
    amend(run, files={file.name: digest_file(file) for file in run.final.iterdir() if file.name != MANIFEST})
    with pytest.raises(ModelError, match="not finite"):
        plan(run)


def test_what_the_export_does_not_list_stays_and_a_training_s_state_in_it_is_refused(tmp_path):
    run = export_run(tmp_path / "run", "tiny/sft-full")
    (run.final / "optimizer.pt").write_bytes(b"state")
    assert "optimizer.pt" not in {file.name for file in plan(run).files}
    amend(run, files={**json.loads((run.final / MANIFEST).read_text())["files"], "optimizer.pt": digest_file(run.final / "optimizer.pt")})
    with pytest.raises(ModelError, match="optimizer.pt, which is a training's state"):
        plan(run)


@pytest.mark.parametrize("leak", ["hf_abcdefghijklmnopqrstuvwxyz", "0123456789abcdef-key", "/home/ann/models/base"])
def test_a_secret_or_a_home_directory_in_a_file_stops_it(tmp_path, monkeypatch, leak):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef-key")
    assert "0123456789abcdef-key" in secrets_here()
    run = export_run(tmp_path / "run", "tiny/sft-full")
    config = json.loads((run.final / "config.json").read_text())
    (run.final / "config.json").write_text(json.dumps(config | {"note": leak}))
    amend(run, files={file.name: digest_file(file) for file in run.final.iterdir() if file.name != MANIFEST})
    with pytest.raises(ModelError, match=r"config.json: (holds a secret|names the home directory)") as found:
        plan(run)
    assert leak not in str(found.value) or leak.startswith("/home")


def test_no_path_of_this_machine_stands_in_what_leaves(tmp_path):
    run = export_run(tmp_path / "run", "tiny/sft-lora", base=resolve("embedded:tiny-llama"))
    for file in plan(run, base=BASE, local=False).files:
        if not file.name.endswith((".safetensors", "tokenizer.json")):
            text = (file.content.read_bytes() if isinstance(file.content, Path) else file.content).decode()
            assert str(tmp_path) not in text and resolve("embedded:tiny-llama") not in text, file.name
            assert file.name != "adapter_config.json" or json.loads(text)["base_model_name_or_path"] == BASE


def test_paths_and_addresses_are_redacted_and_words_are_not():
    assert redact("/home/ann/runs/x/final") == "…/final"
    assert redact("asked ~/keys/one at http://10.0.0.1:8000/v1") == "asked …/one at (an address)"
    assert redact("1/2 of org/name, right/wrong") == "1/2 of org/name, right/wrong"


def test_an_adapter_whose_base_nobody_else_has_is_refused_with_what_to_do(lora):
    with pytest.raises(RecipeError, match="embedded:tiny-llama, which others do not have.*--base.*--merge"):
        plan(lora)
    with pytest.raises(RecipeError, match="must be the base's id on the hub"):
        plan(lora, base=resolve("embedded:tiny-llama"), local=False)


def test_a_folder_that_is_no_export_is_not_replaced(full, tmp_path):
    (tmp_path / "mine").mkdir()
    for force in (False, True):
        with pytest.raises(RecipeError, match="no export that could be replaced"):
            push_to_folder(plan(full), tmp_path / "mine", force=force)
    push_to_folder(plan(full), tmp_path / "handed", force=False)
    with pytest.raises(RecipeError, match="--force"):
        push_to_folder(plan(full), tmp_path / "handed", force=False)
    push_to_folder(plan(full), tmp_path / "handed", force=True)


# ---- the command, and a hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a commit of small files needs."""

    got: dict = {}
    there: tuple[str, ...] = (".gitattributes",)

    def do_GET(self):
        if self.path.startswith("/api/models/org/tools/tree/main"):
            self._answer([{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in self.there])
            return
        self._answer({"id": BASE, "cardData": {"license": "llama3.2"}} if self.path.startswith(f"/api/models/{BASE}") else {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got[self.path] = body
        hub = f"http://{self.headers['Host']}"
        answers = {
            "/api/repos/create": {"url": f"{hub}/org/tools", "name": "org/tools"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/org/tools/commit/main": {"success": True, "commitOid": "a" * 40, "commitUrl": f"{hub}/org/tools/commit/a"},
        }
        if self.path.endswith("/preupload/main"):
            named = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]})
        else:
            self._answer(answers[self.path])

    def _answer(self, content: dict | list) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


def test_one_commit_to_the_hub_holds_exactly_the_planned_files(lora):
    import base64

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + "x" * 24}
    done = harness("push", lora.path, "--to", "org/tools", "--base", BASE, "--private", **online)
    server.shutdown()
    assert done.code == 0, done.output
    assert "/org/tools/commit/a" in done.output
    assert "private" in Hub.got["/api/repos/create"].decode()
    lines = [json.loads(line) for line in Hub.got["/api/models/org/tools/commit/main"].splitlines()]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
    assert sent.keys() == json.loads((lora.final / MANIFEST).read_text())["files"].keys() | {MANIFEST, "README.md"}
    assert sent["adapter_model.safetensors"] == (lora.final / "adapter_model.safetensors").read_bytes()
    assert "Licence of its base: `llama3.2`" in sent["README.md"].decode()


def test_weights_that_lie_on_the_hub_already_are_not_left_to_be_loaded_with_these(full, monkeypatch):
    # transformers puts the adapter on the whole model, and takes the single file before the shards.
    monkeypatch.setattr(
        Hub, "there", ("LICENSE", "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "notes/model.bin")
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + "x" * 24}
    refused = harness("push", full.path, "--to", "org/tools", **online)
    assert refused.code == 2 and "holds adapter_config.json, adapter_model.safetensors of another model" in refused.output, refused.output
    done = harness("push", full.path, "--to", "org/tools", "--force", **online)
    server.shutdown()
    assert done.code == 0, done.output
    lines = [json.loads(line) for line in Hub.got["/api/models/org/tools/commit/main"].splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] == "deletedFile"] == ["adapter_config.json", "adapter_model.safetensors"]


def push(*arguments) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_a_dry_run_shows_the_card_and_the_files_and_writes_nothing(full, tmp_path):
    done = push(full.path, "--to", tmp_path / "there", "--dry-run")
    assert done.exit_code == 0 and "license: unknown" in done.output and "model.safetensors" in done.output
    assert "nothing is written" in done.output and not (tmp_path / "there").exists()


def test_a_dry_run_refuses_the_folder_that_the_push_would_refuse(full, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = push(full.path, "--to", tmp_path, "--force", "--dry-run")
    assert isinstance(done.exception, RecipeError) and "no export that could be replaced" in str(done.exception)


def test_the_exports_of_a_run_are_not_replaced_by_what_is_handed_over(full, lora):
    before = (lora.final / MANIFEST).read_bytes()
    for place in (full.final, full.path / "pushed", lora.final, lora.path / "checkpoint-9" / "x"):
        done = push(full.path, "--to", place, "--force")
        assert isinstance(done.exception, RecipeError) and "lies in the run" in str(done.exception)
        assert place.exists() == (place.name == "final")
    assert (lora.final / MANIFEST).read_bytes() == before


def test_a_hub_that_cannot_be_reached_is_one_line_with_what_to_do(full):
    # HF_HUB_OFFLINE is set for the tests.
    with pytest.raises(HarnessError, match="org/model: cannot be pushed: HF_HUB_OFFLINE is set; unset it") as found:
        push_to_hub(plan(full), "org/model", private=False, force=False)
    assert "\n" not in str(found.value)
    # Nobody listens at that port.
    done = harness("push", full.path, "--to", "org/model", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.code == 1 and "127.0.0.1:9 cannot be reached" in done.output and "HTTPS_PROXY" in done.output
    assert "Traceback" not in done.output


def test_a_target_that_is_neither_and_an_export_that_is_not_there_are_refused(full):
    for arguments, message in (
        (("--to", "model"), "must be ORG/NAME on the hub, or a folder"),
        (("--to", "./model", "--private"), "--private is for the hub"),
        (("--to", "./model", "--export", "merged"), "has none; make it: harness export .* --merge"),
        (("--to", "./model", "--export", "checkpoint-3"), "must be final, merged or gguf-TYPE"),
        (("--to", "./model", "--license", "Apache 2.0"), "--license Apache 2.0; must be written as the hub does: apache-2.0,"),
    ):
        found = push(full.path, *arguments)
        assert isinstance(found.exception, RecipeError) and re.search(message, str(found.exception))
