"""A hub for tests: as much of the Hugging Face hub's HTTP as huggingface_hub and datasets ask for, with faults.

with Hub() as hub:
    hub.add("org/tiny", {"config.json": b"…"})              a model; repo_type="dataset" for data
    HF_ENDPOINT=hub.url
    hub.requests                                             [(method, path, Range or None)]
    hub.cut = ("model.safetensors", 1000)                    the first answer with this file ends after so many bytes
    hub.stall = ("model.safetensors", 1000)                  it stands still there, until hub.go.set()
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_ABOVE = 4096


class Hub:
    def __init__(self):
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.corrupt: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: tuple[str, int] | None = None
        self.stall: tuple[str, int] | None = None
        self.go = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], repo_type: str = "model") -> None:
        self.repositories[f"{repo_type}s", name] = files

    def commit(self, kind: str, name: str) -> str:
        files = self.repositories[kind, name]
        return hashlib.sha1("".join(f"{path} {oid(content)}" for path, content in sorted(files.items())).encode()).hexdigest()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *arguments) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    found = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
    if len(content) > LFS_ABOVE:
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        asked = re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|refs|paths-info)(?:/([^/]+))?(?:/(.*))?)?", path)
        file = re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        kind, name, revision = (asked[1], asked[2], asked[4]) if asked else (file[1] or "models", file[2], file[3]) if file else (None,) * 3
        if kind is None:
            self.refuse(404, "EntryNotFound")
        elif (kind, name) not in self.hub.repositories:
            self.refuse(401, "RepoNotFound")
        elif name in self.hub.gated and not self.headers.get("Authorization"):
            self.refuse(401, "GatedRepo")
        elif revision not in (None, "main", self.hub.commit(kind, name)):
            self.refuse(404, "RevisionNotFound")
        elif asked:
            self.tell(kind, name, asked[3], asked[5] or "")
        else:
            self.give(kind, name, file[4])

    def refuse(self, code: int, error: str) -> None:
        self.reply(code, b"", {"X-Error-Code": error, "X-Error-Message": error})

    def tell(self, kind: str, name: str, what: str | None, below: str) -> None:
        files, commit = self.hub.repositories[kind, name], self.hub.commit(kind, name)
        entries = [entry(path, content) for path, content in files.items()]
        if what == "tree":
            self.say([one for one in entries if one["path"].startswith(below)])
        elif what == "paths-info":
            paths = self.body.get("paths", [])
            self.say([one for one in entries if one["path"] in ([paths] if isinstance(paths, str) else paths)])
        elif what == "refs":
            self.say({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit}], "tags": [], "converts": []})
        else:
            siblings = [{"rfilename": path} for path in files]
            self.say(
                {"_id": "1", "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
            )

    def say(self, content) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def give(self, kind: str, name: str, path: str) -> None:
        content = self.hub.repositories[kind, name].get(path)
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        about = entry(path, content)
        headers = {"ETag": f'"{about.get("lfs", about)["oid"]}"', "X-Repo-Commit": self.hub.commit(kind, name), "Accept-Ranges": "bytes"}
        if "lfs" in about:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if path in self.hub.corrupt:
            content = bytes(len(content))
        begin = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.reply(206 if begin else 200, content[begin:], headers, path=path)

    def reply(self, code: int, body: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for fault in ("cut", "stall"):
            named = getattr(self.hub, fault)
            if named and path == named[0]:
                setattr(self.hub, fault, None)
                self.wfile.write(body[: named[1]])
                self.wfile.flush()
                if fault == "stall":
                    self.hub.go.wait(60)
                self.close_connection = True
                self.connection.close()
                return
        self.wfile.write(body)
