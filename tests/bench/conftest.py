"""A W&B server as far as runs go, on this machine: what wandb sends to it in earnest can be looked at."""

import gzip
import json
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

PROJECT = {"id": "project", "name": "cegbench", "entity": {"id": "entity", "name": "us"}}


@dataclass
class ServerRun:
    """What the server knows of a run.

    Attributes:
        lines: its history, as it came.
        told: what the client said of it, the newest of each.
        exits: the exit codes with which it was declared finished.
    """

    lines: list[str] = field(default_factory=list)
    told: dict = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[dict]:
        """Without what W&B adds to them, and their steps."""
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("_")} for line in self.lines]

    @property
    def steps(self) -> list[int]:
        return [json.loads(line)["_step"] for line in self.lines]


class WandbServer(ThreadingHTTPServer):
    """Answers what wandb asks when a run begins, goes on, and ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, ServerRun] = {}
        self.takes_rows = True

    @property
    def run(self) -> ServerRun:
        (run,) = self.runs.values()
        return run

    def query(self, operation: str, variables: dict) -> dict:
        name = variables.get("name")
        if operation == "RunResumeStatus":
            run = self.runs.get(name)
            return {"model": {**PROJECT, "bucket": run and self.bucket(name)}}
        if operation == "UpsertBucket":
            inserted = name not in self.runs
            self.runs.setdefault(name, ServerRun()).told.update({k: v for k, v in variables.items() if v is not None})
            return {"upsertBucket": {"bucket": {**self.bucket(name), "project": PROJECT}, "inserted": inserted}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": []}}
        viewer = {"id": "v", "entity": "us", "username": "us", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer} if operation == "Viewer" else {}

    def bucket(self, name: str) -> dict:
        lines = self.runs[name].lines
        empty = {"summaryMetrics": "{}", "config": "{}", "eventsTail": "[]", "tags": [], "notes": "", "sweepName": None}
        counts = {"historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0}
        tail = {"historyTail": json.dumps(lines[-1:]), "wandbConfig": '{"t": 1}'}
        return {"id": name, "name": name, "displayName": name, "description": "", **empty, **counts, **tail}

    def stream(self, name: str, content: dict) -> None:
        run = self.runs[name]
        history = defaultdict(dict, content.get("files") or {})["wandb-history.jsonl"]
        if history:
            run.lines[history["offset"] :] = history["content"]
        if content.get("complete"):
            run.exits.append(content["exitcode"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        status, answer = 200, {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.query(asked["operationName"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            if self.server.takes_rows:
                self.server.stream(self.path.split("/")[-2], json.loads(body))
            else:
                status = 403
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def wandb_server(monkeypatch):
    """The server that wandb=online means in a test."""
    wandb = pytest.importorskip("wandb")
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # what it read of the environment before
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()
