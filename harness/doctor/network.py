"""What is asked over a network: the hub and W&B, with answers within NETWORK_S; and whether a recipe's models and data lie here already."""

import base64
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request

from harness.doctor.check import Check
from harness.errors import HarnessError, first_line
from harness.hub.cache import endpoint, find_missing, hub_cache, is_offline
from harness.hub.needs import find_needs
from harness.recipe import Recipe
from harness.tracking.login import load_login

AREA = "network"
NETWORK_S = 2.5


def check_hub() -> list[Check]:
    if is_offline():
        return [Check(AREA, "hub", "ok", f"not asked: HF_HUB_OFFLINE is set; what is fetched lies in {hub_cache()}")]
    asked = time.monotonic()
    error = ask(f"{endpoint()}/api/models?limit=1")
    if error:
        remedy = (
            "`harness fetch RECIPE` on a node with a network brings models and data to the cache; HF_HUB_OFFLINE=1 then saves the waiting"
        )
        return [Check(AREA, "hub", "warn", f"{endpoint()} is not reached: {error}", remedy)]
    account = "with a token" if hub_token() else "without a token, which gated models need (`hf auth login`, or HF_TOKEN)"
    return [Check(AREA, "hub", "ok", f"{endpoint()} in {time.monotonic() - asked:.1f} s, {account}")]


def hub_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def check_inputs(recipe: Recipe, *, trains: bool = True) -> list[Check]:
    """One line for each model, tokenizer and data set of the hub; the hub is asked only where one is missing. trains: not a teacher's share
    of work, for which nothing can be spared."""
    checks, reached = [], None
    for need in find_needs([recipe]):
        missing = find_missing(need)
        if missing is None:
            checks.append(Check("recipe", need.kind, "ok", f"{need.shown} is in the cache ({hub_cache()})"))
            continue
        if reached is None:
            # Twice, because a job ends at a no.
            reached = not is_offline() and any(ask(f"{endpoint()}/api/models?limit=1") is None for _ in range(2))
        what = f"{need.shown} {missing} ({hub_cache()})"
        if reached:
            checks.append(Check("recipe", need.kind, "warn", f"{what}; a run would load it from {endpoint()}", FETCH))
        else:
            why = "HF_HUB_OFFLINE is set" if is_offline() else f"{endpoint()} is not reached"
            checks.append(Check("recipe", need.kind, "warn" if need.spared and trains else "fail", f"{what}, and {why}", FETCH))
    return checks


FETCH = "`harness fetch RECIPE` where there is a network, with the same HF_HOME"


def check_wandb(mode: str = "auto") -> list[Check]:
    """A key is tried on the server that it is for. Without one a run records offline, which is no fault."""
    mode = os.environ.get("WANDB_MODE") or mode
    if mode in ("offline", "disabled", "dryrun"):
        later = "" if mode == "disabled" else "; `harness sync RUN` sends it later"
        return [Check(AREA, "W&B", "ok", f"{mode}, as WANDB_MODE or the recipe says{later}")]
    try:
        login = load_login()
    except HarnessError as error:
        return [Check(AREA, "W&B", "warn", first_line(error), "mend it, or set WANDB_MODE=offline")]
    if not login.can_log_in:
        remedy = "`wandb login`, or WANDB_API_KEY; runs record offline without it, and `harness sync RUN` sends them later"
        return [Check(AREA, "W&B", "warn", "no key on this machine", remedy)]
    return [judge_wandb(login.server, login.key)]


def judge_wandb(base_url: str, key: str | None) -> Check:
    query = json.dumps({"query": "query { viewer { username } }"}).encode()
    login = {"Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode()} if key else {}
    request = urllib.request.Request(f"{base_url}/graphql", query, {"Content-Type": "application/json", **login})
    refused = Check(AREA, "W&B", "fail", f"{base_url} does not accept this machine's key", "`wandb login --relogin`, or mend WANDB_API_KEY")
    try:
        with urllib.request.urlopen(request, timeout=NETWORK_S) as answer:
            viewer = (json.load(answer).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return refused if error.code in (401, 403) else Check(AREA, "W&B", "warn", f"{base_url} answers {error.code}", OFFLINE_RUNS)
    except (OSError, ValueError) as error:
        return Check(AREA, "W&B", "warn", f"{base_url} is not reached: {reason(error)}", OFFLINE_RUNS)
    if key is None:
        return Check(AREA, "W&B", "ok", f"{base_url} is reached; logs in by an identity token")
    return Check(AREA, "W&B", "ok", f"logged in to {base_url} as {viewer['username']}") if viewer else refused


OFFLINE_RUNS = "WANDB_MODE=offline saves the waiting; `harness sync RUN` sends a run later, from where there is a network"


def ask(url: str) -> str | None:
    """Why there is no answer within NETWORK_S; None when there is one, whatever it says."""
    said: queue.SimpleQueue = queue.SimpleQueue()
    # A name server that is silent, as a node without a network has it, holds up its caller for longer than any timeout of a connection.
    threading.Thread(target=lambda: said.put(_ask(url)), daemon=True).start()
    try:
        return said.get(timeout=NETWORK_S + 0.2)
    except queue.Empty:
        return f"no answer within {NETWORK_S:g} s"


def _ask(url: str) -> str | None:
    try:
        urllib.request.urlopen(url, timeout=NETWORK_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    return first_line(str(getattr(error, "reason", error)))
