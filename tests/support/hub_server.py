"""A stand-in for the Hugging Face Hub: repositories in directories, served as the Hub's API serves them."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers for the files under `root`: ROOT/models/org/name and ROOT/datasets/org/name."""

    root: Path
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if path.startswith("api/"):
            return self.answer_api(path.removeprefix("api/"))
        repository, marker, rest = path.partition("/resolve/")
        kind = "" if repository.startswith("datasets/") else "models/"
        file = self.root / (kind + repository) / rest.partition("/")[2]
        if not marker or not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    do_HEAD = do_POST = do_GET

    def answer_api(self, path: str) -> None:
        kind, *name = path.split("/")
        directory = self.root / kind / "/".join(name[:2])
        if len(name) < 2 or not directory.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        entries = [
            {
                "type": "file",
                "path": str(file.relative_to(directory)),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
        action = name[2] if len(name) > 2 else "revision"
        if action == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            form = urllib.parse.parse_qs(body) if "=" in body else json.loads(body)
            return self.send_json([entry for entry in entries if entry["path"] in form["paths"]])
        if action == "tree":
            under = "/".join([*name[4:], ""]).lstrip("/")
            inside = [entry for entry in entries if entry["path"].startswith(under)]
            if "recursive=true" not in self.path.lower():
                parts = {
                    entry["path"].removeprefix(under).partition("/")[0]
                    for entry in inside
                    if "/" in entry["path"].removeprefix(under)
                }
                inside = [entry for entry in inside if "/" not in entry["path"].removeprefix(under)]
                inside += [
                    {"type": "directory", "path": under + part, "size": 0, "oid": COMMIT} for part in parts
                ]
            return self.send_json(inside)
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        repository = {"id": "/".join(name[:2]), "sha": COMMIT, "siblings": siblings}
        self.send_json(repository | {"private": False, "gated": False, "disabled": False, "tags": []})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a directory; its address, and the paths that were asked for."""
    requests: list[str] = []
    handler = type("Handler", (Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
