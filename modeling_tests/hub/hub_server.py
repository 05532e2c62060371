# Copyright 2026 The yan_hf authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A small Hub on the loopback interface: the parts of its HTTP interface that `huggingface_hub` uses to create, push and
download a model repository. Commits are whole or not there; large files go through the LFS protocol.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCard


_METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


class Hub:
    """
    Repositories in memory, served until the block ends.

    Attributes:
        endpoint: Its address, for `HF_ENDPOINT`.
        repos: Repository → branch → list of commits, the newest last; a commit is file → content.
        drop_uploads_after: Bytes of an LFS upload after which the connection is cut; `None` lets them through.
        drop_commits: Whether a commit's connection is cut before it is made.
        requests: Method and path of every request.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.drop_uploads_after: int | None = None
        self.drop_commits = False
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any):
        self._server.shutdown()
        self._server.server_close()

    def commit_id(self, repo: str, revision: str, number: int | None = None) -> str:
        """As git's: forty digits, here of the repository, the branch and the commit's number."""
        count = len(self.repos[repo][revision]) if number is None else number
        return hashlib.sha1(f"{repo}@{revision}:{count}".encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a branch or of a commit."""
        branches = self.repos.get(repo, {})
        if revision in branches:
            commits = branches[revision]
            return self.commit_id(repo, revision), commits[-1]
        for branch, commits in branches.items():
            for number, files in enumerate(commits, start=1):
                if self.commit_id(repo, branch, number) == revision:
                    return revision, files
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any):
        pass

    # Requests and answers

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int = 200, content: Any = b"", headers: dict[str, str] | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self):
        self.close_connection = True
        self.connection.close()

    def _missing(self, code: str):
        self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _route(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, *match.groups())
        self._body()
        self._answer(404, {"error": f"no such page: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _route

    # Pages

    def fail(self, what: str):
        """What the test's own process asks for: which connections are cut from now on."""
        self._body()
        self.hub.drop_uploads_after = 50_000 if what == "upload" else None
        self.hub.drop_commits = what == "commit"
        self._answer()

    def whoami(self):
        self._answer(content={"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {}}})

    def validate_card(self):
        content = json.loads(self._body())["content"]
        found = _METADATA.match(content)
        try:
            metadata = yaml.safe_load(found.group(1)) if found else None
            if not isinstance(metadata, dict):
                raise ValueError("the card has no metadata")
            ModelCard(content)  # refuses a `model-index` that is not one
        except (ValueError, yaml.YAMLError) as error:
            self._answer(400, str(error).encode())
            return
        self._answer(content={"errors": [], "warnings": []})

    def create_repo(self):
        request = json.loads(self._body())
        owner = request.get("organization") or "tester"
        repo = f"{owner}/{request['name']}"
        exists = repo in self.hub.repos
        # A new repository has a first commit, as on the Hub.
        self.hub.repos.setdefault(repo, {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]})
        self._answer(409 if exists else 200, {"url": f"{self.hub.endpoint}/{repo}", "id": repo, "name": repo})

    def create_branch(self, repo: str, branch: str):
        self._body()
        branches = self.hub.repos[repo]
        exists = branch in branches
        branches.setdefault(branch, list(branches["main"]))
        self._answer(409 if exists else 200, {})

    def info(self, repo: str, revision: str | None = None):
        found = self.hub.files(repo, revision or "main")
        if found is None:
            self._missing("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        commit, files = found
        siblings = [{"rfilename": name} for name in sorted(files)]
        self._answer(
            content={"_id": repo, "id": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        )

    def tree(self, repo: str, revision: str, _folder: str | None = None):
        found = self.hub.files(repo, revision)
        if found is None:
            self._missing("RevisionNotFound" if repo in self.hub.repos else "RepoNotFound")
            return
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(found[1].items())
        ]
        self._answer(content=entries)

    def preupload(self, _repo: str, _revision: str):
        files = json.loads(self._body())["files"]
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self._answer(content={"files": answer})

    def lfs_batch(self, repo: str):
        objects = []
        for item in json.loads(self._body())["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/storage/{item['oid']}"
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(entry)
        self._answer(content={"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if self.hub.drop_uploads_after is not None:
            self.rfile.read(self.hub.drop_uploads_after)
            self._cut()
            return
        data = self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer(400, {"error": "the content is not what its name says"})
            return
        self.hub.objects[oid] = data
        self._answer()

    def verify(self, _repo: str):
        item = json.loads(self._body())
        data = self.hub.objects.get(item["oid"])
        self._answer(200 if data is not None and len(data) == item["size"] else 404, {})

    def commit(self, repo: str, revision: str):
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        if self.hub.drop_commits:
            self._cut()
            return
        commits = self.hub.repos[repo][revision]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commits.append(files)
        commit = self.hub.commit_id(repo, revision)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self._answer(content={"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo: str, revision: str, name: str):
        found = self.hub.files(repo, revision)
        if found is None or name not in found[1]:
            code = "EntryNotFound" if found else "RevisionNotFound" if repo in self.hub.repos else "RepoNotFound"
            self._missing(code)
            return
        commit, files = found
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if start is None:
            self._answer(content=data, headers=headers)
            return
        first = int(start.group(1))
        last = min(int(start.group(2) or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/fail/(\w+)", _Handler.fail),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", _Handler.verify),
    ("PUT", r"/storage/(\w+)", _Handler.upload),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
