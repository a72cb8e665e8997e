"""The page on localhost, as long as the command runs: read anew when the runs have grown, and never written anywhere.

    GET /TOKEN/        the page
    GET /TOKEN/body    what stands in its <main>, under an ETag: 304 while nothing is new

Only this machine can connect, and of its users only whoever knows the address: a login node has many. A page of another site cannot
reach it either, because a request that names another host is refused.
"""

import getpass
import hashlib
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click

from harness.errors import HarnessError, LaunchError
from harness.report.page import render_body, render_page
from harness.report.story import Reader
from harness.run import RunDir

HOST = "127.0.0.1"
AT_LEAST_S = 2.0
"""Between two looks at the runs, however many pages are open."""
STATE_EVERY_S = 20.0
"""So often the page is read anew though no file has changed: what Slurm says, and the time that goes by."""


class Page:
    """What is served: made anew when it is asked for and the runs have changed since."""

    def __init__(self, runs: Sequence[RunDir], said: str):
        self._reader, self._said = Reader(runs, STATE_EVERY_S), said
        self._lock = threading.Lock()
        self._looked = self._read = float("-inf")
        self._signature: tuple | None = None
        self._stories: list = []
        self._body = ""

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked >= AT_LEAST_S:
            signature = self._reader.signature()
            if signature != self._signature or now - self._read >= STATE_EVERY_S:
                self._stories, self._body = self._reader.read(), ""
                self._signature, self._read = signature, now
            # Not where it could not be read: who asks next is told so too.
            self._looked = now

    # Drawn under the lock as well: the next look takes new lines into the same columns.

    def whole(self) -> str:
        with self._lock:
            self._look()
            return render_page(self._stories, live=self._said)

    def body(self) -> str:
        with self._lock:
            self._look()
            self._body = self._body or render_body(self._stories, live=self._said)
            return self._body


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, runs: Sequence[RunDir], port: int | None):
        try:
            super().__init__((HOST, port or 0), _Handler)
        except OSError as error:
            raise LaunchError(f"--port {port}: {error.strerror}; give another, or leave it out for a free one") from error
        self.token = secrets.token_urlsafe(9)
        self.page = Page(runs, "Live: this page follows the run as long as the command that serves it runs.")

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            return self._answer(403, "this page is for this machine alone")
        _, *parts = self.path.partition("?")[0].split("/")
        if len(parts) != 2 or not secrets.compare_digest(parts[0].encode(), self.server.token.encode()) or parts[1] not in ("", "body"):
            return self._answer(404, "not here; the command that serves the page says its address")
        try:
            text = self.server.page.body() if parts[1] else self.server.page.whole()
        except (HarnessError, OSError) as error:
            # The page asks again.
            return self._answer(503, f"the run cannot be read now: {error}")
        return self._answer(200, text, "text/html")

    def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
        content = text.encode(errors="replace")
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        if status == 200 and self.headers.get("If-None-Match") == tag:
            status, content = 304, b""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        """Not on the terminal."""


def serve(runs: Sequence[RunDir], port: int | None) -> None:
    """Until Ctrl-C. Raises LaunchError where the port is taken."""
    with Server(runs, port) as server:
        here = f"{getpass.getuser()}@{socket.gethostname()}"
        click.echo(f"live: {server.url}\nfrom another machine, first: ssh -N -L {server.port}:{HOST}:{server.port} {here}\nCtrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            click.echo("\nended; nothing was written")
