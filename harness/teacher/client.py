"""Asking an HTTP server for JSON, through whatever passes: a server that is busy, starts again or drops a connection is asked again.

The key is read from the environment for each question and kept nowhere: neither a pickle, a message nor a redirect carries it on.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import TeacherError

DELAYS_S = (1, 2, 4, 8, 16, 32)
"""Between attempts; a server that asks for more is given it, up to the last of these."""
WORDS = 300
"""Characters of a server's answer that an error repeats."""


class Refused(TeacherError):
    """The server does not take this question, and would not the next time."""

    status: int | None = None


class _Passing(Exception):
    """What may be otherwise in a moment."""

    def __init__(self, reason: str, advice: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.advice, self.wait_s = advice, wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Client:
    url: str
    """Of the API, without a path behind its version."""
    key_variable: str | None
    timeout_s: float
    setting: Callable[[str], str] = "teacher.server.{}".format
    """What a person calls one of these, and `concurrency`."""

    def ask(self, path: str, body: dict | None = None, *, patience: int | None = None) -> dict:
        """The answer to `body`, or without one to a GET. patience: how often it is asked again; left out: once for each of DELAYS_S.
        Threads may share a client.

        Raises Refused when the server says no, TeacherError when it does not answer or says nothing that can be read.
        """
        attempt, patience = 0, len(DELAYS_S) if patience is None else patience
        while True:
            try:
                return self._ask_once(path, body)
            except _Passing as passing:
                if attempt == patience:
                    raise TeacherError(f"{self.url}/{path}: {passing}, {patience + 1} times in a row; {passing.advice}") from None
                # Those who were turned away together shall not come back together.
                time.sleep(max(DELAYS_S[attempt], passing.wait_s) * random.uniform(0.7, 1.3))
                attempt += 1

    def _ask_once(self, path: str, body: dict | None) -> dict:
        where, key = f"{self.url}/{path}", self._key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(where, None if body is None else json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise self._explain(error, where, key) from None
        except ValueError:
            raise TeacherError(f"{where}: answers with something that is not JSON; give the url of an OpenAI-compatible API") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._passing(error) from None
        if not isinstance(found, dict):
            raise TeacherError(f"{where}: answers with JSON that is no object; give the url of an OpenAI-compatible API")
        return found

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable)
        if not key:
            raise TeacherError(
                f"{self.setting('api_key_variable')} = {self.key_variable}; it is not set on this machine; export it here too"
            )
        return key

    def _explain(self, error: urllib.error.HTTPError, where: str, key: str | None) -> Exception:
        said = f"answers {error.code}{_words_of(error, key)}"
        if error.code == 429 or error.code >= 500 and error.code != 501:
            asked = error.headers.get("Retry-After") or ""
            advice = f"lower {self.setting('concurrency')}" if error.code == 429 else "its own log says why"
            return _Passing(said, advice, min(float(asked), DELAYS_S[-1]) if asked.isdigit() else 0.0)
        if error.code in (401, 403):
            whose = f"the key in ${self.key_variable} is not the right one" if key else "name the variable with its key"
            said += f"; {whose} ({self.setting('api_key_variable')})"
        elif error.code == 404:
            said += f"; {self.setting('url')} ends with the version, as in http://host:8000/v1"
        elif error.code < 400:
            said += f"; give the address itself as {self.setting('url')} ({error.headers.get('Location')})"
        refused = Refused(f"{where}: {said}")
        refused.status = error.code
        return refused

    def _passing(self, error: Exception) -> _Passing:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return _Passing(
                f"does not answer within {self.timeout_s:g} s",
                f"raise {self.setting('timeout_s')}, or lower {self.setting('concurrency')}",
            )
        told = str(reason) or type(reason).__name__
        return _Passing(f"cannot be reached ({told})", f"start the server, or correct {self.setting('url')}; the same command goes on")


def _words_of(error: urllib.error.HTTPError, key: str | None) -> str:
    """What the server says of it, short, and without the key, which some repeat."""
    try:
        text = error.read(100_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = said if isinstance(said, str) else str(said.get("message") or said.get("detail") or text)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    if key:
        text = text.replace(key, "***")
    return f' ("{text[:WORDS]}")' if text else ""
