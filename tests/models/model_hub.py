"""A model hub on this machine: as much of the Hugging Face hub's HTTP interface as fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass
class HubModel:
    """A repository: its files at each commit, and what its branches and tags stand for."""

    files: Mapping[str, Mapping[str, bytes]]
    """By commit and name."""
    references: Mapping[str, str] = field(default_factory=dict[str, str])
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return self.references.get(revision, revision if revision in self.files else None)


class ModelHub:
    """Serves repositories by name; a context manager."""

    def __init__(self, models: Mapping[str, HubModel]) -> None:
        self.fetched: list[str] = []
        """Paths of files that were sent, without those that were only asked about."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, models)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, models: Mapping[str, HubModel]) -> None:
        path = request.path.partition("?")[0].strip("/")
        is_file = "/resolve/" in path
        verb = ""
        if is_file:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
        else:
            verb = "/tree/" if "/tree/" in path else "/revision/"
            name, _, revision = path.removeprefix("api/models/").partition(verb)
            file = ""
        model = models.get(name)
        if model is None:
            return self._refuse(request, 404, "RepoNotFound")
        if model.gated:
            return self._refuse(request, 403, "GatedRepo")
        commit = model.commit(revision or "main")
        if commit is None:
            return self._refuse(request, 404, "RevisionNotFound")
        if not is_file and verb == "/tree/":
            entries = [
                {"type": "file", "path": one, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for one, body in model.files[commit].items()
            ]
            return self._send(request, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if not is_file:
            files = [{"rfilename": one} for one in model.files[commit]]
            body = json.dumps({"id": name, "sha": commit, "siblings": files}).encode()
            return self._send(request, body, {"Content-Type": "application/json"})
        if file not in model.files[commit]:
            return self._refuse(request, 404, "EntryNotFound")
        body = model.files[commit][file]
        if request.command == "GET":
            self.fetched.append(f"{name}/{file}")
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self._send(request, body, {"ETag": etag, "X-Repo-Commit": commit})

    def _send(self, request: BaseHTTPRequestHandler, body: bytes, headers: Mapping[str, str]) -> None:
        request.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def directory_files(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
