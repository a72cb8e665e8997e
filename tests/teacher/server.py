"""A small OpenAI-compatible server that scores given tokens with a real model, by vLLM's protocol; and fails on demand in every way that a
server has of failing. The protocol is that of vLLM's vllm/entrypoints/openai/completion (protocol.py, serving.py)."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class TeacherServer:
    """As a context it serves; `url` is where. Whatever is set here holds from the next question on."""

    def __init__(self, model, tokenizer, **faults):
        self.model, self.tokenizer = model, tokenizer
        self.name, self.max_model_len, self.key = "teacher", 512, None
        self.ways = {"prompt_logprobs", "echo"}
        """Which fields it knows; what it does not know it ignores, as servers do."""
        self.names_by_text = False
        self.max_logprobs: int | None = None
        """More are refused, as vLLM does."""
        self.tells: int | None = None
        """So many entries at most, in silence."""
        self.statuses: list[int] = []
        """Of the next questions, in place of an answer."""
        self.retry_after: str | None = None
        self.words = "no"
        self.slow_s = 0.0
        self.dies_after: int | None = None
        """So many answers; then connections end without one."""
        self.models: dict | None = None
        """In place of the list of its models."""
        self.body: bytes | None = None
        """In place of any answer to a question."""
        self.change_logs = lambda logs: logs
        """[T, V] -> what is told as log-probabilities."""
        self.change_ids = lambda ids: ids
        """What is scored in place of the given ids."""
        self.change_choice = lambda choice: choice
        self.questions: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        for name, value in faults.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, question):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer._answer(self, question)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, question: dict | None) -> None:
        self.headers.append(dict(handler.headers))
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self._send(handler, 401, {"error": f"Incorrect key {handler.headers.get('Authorization')}"})
        if question is None:
            listed = [{"id": self.name, "object": "model", "max_model_len": self.max_model_len}]
            return self._send(handler, 200, self.models or {"object": "list", "data": listed})
        with self._lock:
            self.questions.append(question)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            status = self.statuses.pop(0) if self.statuses else None
            is_dead = self.dies_after is not None and len(self.questions) > self.dies_after
        try:
            time.sleep(self.slow_s)
            if is_dead:
                handler.close_connection = True
            elif status:
                self._send(handler, status, {"error": {"message": self.words, "code": status}})
            elif self.body is not None:
                self._send(handler, 200, self.body)
            else:
                self._send(handler, *self._complete(question))
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: dict | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        if self.retry_after and status == 429:
            handler.send_header("Retry-After", self.retry_after)
        if 300 <= status < 400:
            handler.send_header("Location", "http://elsewhere.invalid/v1/completions")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _complete(self, question: dict) -> tuple[int, dict]:
        assert question["model"] == self.name and all(isinstance(token, int) for token in question["prompt"])
        ids = self.change_ids(question["prompt"])
        echoes = bool(question.get("echo")) and "echo" in self.ways
        most = question.get("logprobs") if echoes else question.get("prompt_logprobs") if "prompt_logprobs" in self.ways else None
        if self.max_logprobs is not None and most is not None and most > self.max_logprobs:
            text = f"Requested prompt logprobs of {most}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": text, "type": "BadRequestError", "code": 400}}
        if len(ids) + question["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len} tokens.", "code": 400}}
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": None}
        if most is not None:
            tables = self._score(ids, min(most, self.tells or most))
            if echoes:
                names = [self._name(token) for token in ids]
                told = [table and {self._name(token): log for token, log in table.items()} for table in tables]
                scores = [table and table[token] for table, token in zip(tables, ids, strict=True)]
                choice["logprobs"] = {"tokens": names, "token_logprobs": scores, "top_logprobs": told, "text_offset": [0] * len(ids)}
            else:
                choice["prompt_logprobs"] = [
                    table and {str(token): {"logprob": log, "rank": 1, "decoded_token": "x"} for token, log in table.items()}
                    for table in tables
                ]
        elif question.get("logprobs"):
            # Of what it generates alone.
            name = self._name(5)
            choice["logprobs"] = {"tokens": [name], "token_logprobs": [-1.0], "top_logprobs": [{name: -1.0}], "text_offset": [0]}
        return 200, {"object": "text_completion", "model": self.name, "choices": [self.change_choice(choice)]}

    def _name(self, token: int) -> str:
        return self.tokenizer.decode([token]) if self.names_by_text else f"token_id:{token}"

    def _score(self, ids: list[int], most: int) -> list[dict[int, float] | None]:
        """The given token first, and then the most probable ones, as vLLM lists them."""
        with self._lock, torch.no_grad():
            logs = self.change_logs(self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1))
        tables: list[dict[int, float] | None] = [None]
        for log, token in zip(logs[:-1], ids[1:], strict=True):
            values, best = log.topk(min(most, len(log)))
            table = {token: float(log[token])} | dict(zip(best.tolist(), values.tolist(), strict=True))
            tables.append({key: max(value, -9999.0) for key, value in table.items()})
        return tables
