"""Small Hugging Face hub on loopback: model and data repositories with pinned commits, downloads by ranges, and pushes.

It speaks as much of the hub's protocol as `huggingface_hub` needs, so that tests need no network. Weights are in large
file storage (LFS), as on the real hub; Xet storage is left out: `environment` switches it off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_small"
"""Login that may create repositories and push."""
_LFS_NAMES = re.compile(r".*\.(safetensors|bin|parquet|zst|gz)")
_REPOSITORY = r"([^/]+/[^/]+)"
_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class HubCommit:
    """Commit of a repository: its hash, all files at it, and its message."""

    sha: str
    files: Mapping[str, bytes]
    message: str = ""


@dataclass
class SmallHub:
    """Hub's repositories by kind and name (`models/owner/name`), each a list of commits, oldest first."""

    kind: str = "models"
    """Kind of the repositories to which `push` adds commits: "models" or "datasets"."""
    repositories: dict[str, list[HubCommit]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Each request: method, path, and login if there was one."""
    endpoint: str = ""
    sent_bytes: int = 0
    """Bytes of files sent."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Files, by name, whose next download breaks off after so many bytes."""
    altered: Callable[[str, bytes], bytes] = lambda name, data: data
    """Returns what is sent instead of a file's bytes, given its name."""
    _uploads: dict[str, bytes] = field(default_factory=dict)

    def push(self, name: str, files: Mapping[str, bytes], kind: str = "", message: str = "") -> str:
        """Add a commit whose files are exactly `files`; return its hash."""
        kind = kind or self.kind
        commits = self.repositories.setdefault(f"{kind}/{name}", [])
        sha = hashlib.sha1(f"{kind}/{name} {len(commits)}".encode()).hexdigest()
        commits.append(HubCommit(sha, dict(files), message))
        return sha

    def push_folder(self, name: str, folder: Path) -> str:
        """Add a commit with the files of a folder; return its hash."""
        return self.push(name, {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})

    def at(self, repository: str, revision: str = "main") -> HubCommit | None:
        """Return a commit of `models/owner/name` by its hash or as the newest; None if there is none."""
        commits = self.repositories.get(repository, [])
        return next((each for each in reversed(commits) if revision in ("main", each.sha)), None)

    def files(self, name: str, revision: str = "main") -> Mapping[str, bytes]:
        """Return the files of a model repository at a revision."""
        commit = self.at(f"models/{name}", revision)
        assert commit is not None, f"no {name} at {revision}"
        return commit.files

    def downloads(self) -> list[str]:
        """Return the names of the files whose bytes were asked for, in order."""
        asked = (re.match(r"GET /.*/resolve/[^/]+/(\S+)", each) for each in self.asked)
        return [match[1] for match in asked if match]

    def environment(self, cache: Path, token: str = "") -> dict[str, str]:
        """Return the variables with which a process uses this hub alone, with its downloads in `cache`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
        }

    def use_in(self, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str = "") -> None:
        """Make this process use this hub alone: `huggingface_hub` has read the environment when it was imported."""
        from huggingface_hub import constants

        for name, value in self.environment(cache, token).items():
            monkeypatch.setenv(name, value)
        resolve = f"{self.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(constants, "HF_HOME", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """Serve a hub until the block ends."""
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: SmallHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        # ------------------------------------------------------------- reading

        def do_GET(self) -> None:
            path = self._note()
            if path == "/api/whoami-v2":
                user = {"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}}
                return self._json(user) if self._may_write() else self._refuse(401)
            if match := re.fullmatch(rf"/api/(models|datasets)/{_REPOSITORY}(?:/revision/(.+))?", path):
                return self._info(f"{match[1]}/{match[2]}", match[3] or "main")
            if match := re.fullmatch(rf"/api/(models|datasets)/{_REPOSITORY}/tree/([^/]+)(?:/(.*))?", path):
                return self._tree(f"{match[1]}/{match[2]}", match[3], match[4] or "")
            if match := re.fullmatch(rf"/(datasets/)?{_REPOSITORY}/resolve/([^/]+)/(.+)", path):
                return self._file(f"{'datasets' if match[1] else 'models'}/{match[2]}", match[3], match[4])
            return self._none("RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def _info(self, repository: str, revision: str) -> None:
            commit = hub.at(repository, revision)
            if commit is None:
                return self._none("RevisionNotFound" if repository in hub.repositories else "RepoNotFound")
            names = [{"rfilename": name} for name in commit.files]
            if "blobs" in parse_qs(urlsplit(self.path).query):
                for entry in names:
                    found = self._entry(entry["rfilename"], commit.files)
                    lfs = found.get("lfs")
                    entry |= {"size": found["size"], "blobId": found["oid"]}
                    entry |= {"lfs": {**lfs, "sha256": lfs["oid"]}} if lfs else {}
            name = repository.split("/", 1)[1]
            return self._json({"id": name, "sha": commit.sha, "siblings": names, "private": False, "tags": []})

        def _tree(self, repository: str, revision: str, under: str) -> None:
            commit = hub.at(repository, revision)
            if commit is None:
                return self._none("RevisionNotFound" if repository in hub.repositories else "RepoNotFound")
            prefix = f"{under}/" if under else ""
            inside = [name for name in commit.files if name.startswith(prefix)]
            names = {prefix + name[len(prefix) :].split("/")[0] for name in inside}
            if "recursive=true" in self.path.lower():
                names |= set(inside)
            if not names:
                return self._none("EntryNotFound")
            return self._json([self._entry(name, commit.files) for name in sorted(names)])

        def _entry(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
            if name not in files:
                return {"type": "directory", "path": name, "oid": "0" * 40}
            data = files[name]
            entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_oid(data)}
            if _LFS_NAMES.fullmatch(name):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            return entry

        def _file(self, repository: str, revision: str, name: str) -> None:
            commit = hub.at(repository, revision)
            if commit is None:
                return self._none("RevisionNotFound" if repository in hub.repositories else "RepoNotFound")
            if name not in commit.files:
                return self._none("EntryNotFound", commit.sha)
            data, code = commit.files[name], 200
            lfs = _LFS_NAMES.fullmatch(name)
            etag = hashlib.sha256(data).hexdigest() if lfs else _blob_oid(data)
            headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if lfs:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            data = hub.altered(name, data)
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, end = int(match[1]), int(match[2] or len(data) - 1)
                headers["Content-Range"], code = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}", 206
                data = data[begin : end + 1]
            cut = None if self.command == "HEAD" else hub.cuts.pop(name, None)
            return self._send(code, data, headers, cut)

        # ------------------------------------------------------------- writing

        def do_POST(self) -> None:
            path, body = self._note(), self._body()
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if match := re.fullmatch(rf"/api/(models|datasets)/{_REPOSITORY}/paths-info/(.+)", path):
                commit = hub.at(f"{match[1]}/{match[2]}", match[3])
                if commit is None:
                    return self._none("RepoNotFound")
                wanted = json.loads(body)["paths"]
                there = [name for name in wanted if any(f"{file}/".startswith(f"{name}/") for file in commit.files)]
                return self._json([self._entry(name, commit.files) for name in there])
            if not self._may_write():
                return self._refuse(401)
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if match := re.fullmatch(rf"/api/(models|datasets)/{_REPOSITORY}/preupload/(.+)", path):
                return self._preupload(f"{match[1]}/{match[2]}", match[3], json.loads(body))
            if re.fullmatch(rf"/(?:datasets/)?{_REPOSITORY}\.git/info/lfs/objects/batch", path):
                return self._batch(json.loads(body))
            if match := re.fullmatch(rf"/api/(models|datasets)/{_REPOSITORY}/commit/(.+)", path):
                return self._commit(f"{match[1]}/{match[2]}", match[3], body)
            return self._none("RepoNotFound")

        def do_PUT(self) -> None:
            path, body = self._note(), self._body()
            match = re.fullmatch(r"/lfs/([0-9a-f]{64})", path)
            if match is None or hashlib.sha256(body).hexdigest() != match[1]:
                return self._refuse(400)
            hub._uploads[match[1]] = body
            return self._send(200, b"", {})

        def _create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
            repository = f"{wanted.get('type') or 'model'}s/{name}"
            exists = repository in hub.repositories
            hub.repositories.setdefault(repository, [])
            self._json({"url": f"{hub.endpoint}/{name}", "name": name}, 409 if exists else 200)

        def _preupload(self, repository: str, revision: str, wanted: dict[str, Any]) -> None:
            if repository not in hub.repositories:
                return self._none("RepoNotFound")
            commit = hub.at(repository, revision)
            files = {} if commit is None else commit.files
            told = []
            for item in wanted["files"]:
                mode = "lfs" if _LFS_NAMES.fullmatch(item["path"]) else "regular"
                oid = _blob_oid(files[item["path"]]) if item["path"] in files and mode == "regular" else None
                told.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return self._json({"files": told})

        def _batch(self, wanted: dict[str, Any]) -> None:
            objects = []
            for item in wanted["objects"]:
                told = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in hub._uploads:
                    told["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}", "header": {}}}
                objects.append(told)
            self._json({"transfer": "basic", "objects": objects})

        def _commit(self, repository: str, revision: str, body: bytes) -> None:
            if repository not in hub.repositories:
                return self._none("RepoNotFound")
            before = hub.at(repository, revision)
            files = {} if before is None else dict(before.files)
            message = ""
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                match item["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in hub._uploads:
                            return self._refuse(400)
                        files[value["path"]] = hub._uploads[value["oid"]]
                    case "deletedFile":
                        del files[value["path"]]
                    case "deletedFolder":
                        folder = value["path"].rstrip("/") + "/"
                        files = {name: data for name, data in files.items() if not name.startswith(folder)}
            kind, name = repository.split("/", 1)
            sha = hub.push(name, files, kind, message)
            return self._json({"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{name}/commit/{sha}"})

        # ------------------------------------------------------------- both

        def _note(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path} {self.headers.get('Authorization', '')}".strip())
            return path

        def _may_write(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _none(self, code: str, commit: str = "") -> None:
            more = {"X-Repo-Commit": commit} if commit else {}
            self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **more})

        def _refuse(self, code: int) -> None:
            self._send(code, b'{"error": "refused"}', {"X-Error-Message": "refused"})

        def _json(self, value: Any, code: int = 200) -> None:
            self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, code: int, data: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            view = memoryview(data)[:cut]
            for begin in range(0, len(view), _PIECE_BYTES):
                hub.sent_bytes += self.wfile.write(view[begin : begin + _PIECE_BYTES])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
