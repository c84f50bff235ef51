"""Fake Hugging Face hub on loopback, with as much of its protocol as the libraries use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class FakeHub:
    """Fake hub: data sets by name, each a list of commits (hash, files), oldest first."""

    datasets: dict[str, list[tuple[str, Mapping[str, bytes]]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Requested paths, and the login of each request."""
    endpoint: str = ""
    sent_bytes: int = 0

    def push(self, name: str, files: Mapping[str, bytes]) -> str:
        """Add a commit; returns its hash."""
        commits = self.datasets.setdefault(name, [])
        sha = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def at(self, name: str, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        commits = self.datasets.get(name, [])
        return next((commit for commit in reversed(commits) if revision in ("main", commit[0])), None)


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[FakeHub]:
    """Point the libraries to a fake hub, with their cache in `cache`."""
    import datasets
    import huggingface_hub

    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    constants, resolve = huggingface_hub.constants, "resolve/{revision}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/{resolve}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", f"{hub.endpoint}/datasets/{{repo_id}}/{resolve}/{{path}}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "datasets" / "downloads")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{path} {self.headers.get('Authorization', '')}".strip())
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                return self._info(match[1], match[2] or "main")
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                return self._tree(match[1], match[2], match[3] or "")
            if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file(match[1], match[2], match[3])
            return self._none("RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path)
            found = match and hub.at(match[1], match[2])
            if not match or not found:
                return self._none("RepoNotFound")
            wanted = json.loads(body)["paths"]
            return self._json([self._entry(name, found[1]) for name in wanted if self._entry(name, found[1])])

        def _info(self, name: str, revision: str) -> None:
            found = hub.at(name, revision)
            if found is None:
                return self._none("RepoNotFound" if name not in hub.datasets else "RevisionNotFound")
            siblings = [{"rfilename": file} for file in found[1]]
            return self._json({"id": name, "sha": found[0], "siblings": siblings, "private": False, "tags": []})

        def _tree(self, name: str, revision: str, under: str) -> None:
            found = hub.at(name, revision)
            if found is None:
                return self._none("RepoNotFound")
            prefix = f"{under}/" if under else ""
            names = {prefix + file[len(prefix) :].split("/")[0] for file in found[1] if file.startswith(prefix)}
            if "recursive=true" in self.path.lower():
                names |= {file for file in found[1] if file.startswith(prefix)}
            return (
                self._json([self._entry(name, found[1]) for name in sorted(names)])
                if names
                else self._none("EntryNotFound")
            )

        def _entry(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any] | None:
            if name in files:
                oid = hashlib.sha1(files[name]).hexdigest()
                return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}
            if any(file.startswith(f"{name}/") for file in files):
                return {"type": "directory", "path": name, "oid": "0" * 40}
            return None

        def _file(self, name: str, revision: str, file: str) -> None:
            found = hub.at(name, revision)
            if found is None:
                return self._none("RepoNotFound")
            if file not in found[1]:
                return self._none("EntryNotFound", found[0])
            data, code = found[1][file], 200
            headers = {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, end = int(match[1]), int(match[2] or len(data) - 1)
                headers["Content-Range"], code = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}", 206
                data = data[begin : end + 1]
            return self._send(code, data, headers)

        def _none(self, code: str, commit: str = "") -> None:
            more = {"X-Repo-Commit": commit} if commit else {}
            self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **more})

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                hub.sent_bytes += self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
