"""
A small stand-in of the Hub's HTTP API on the loopback, for tests of uploads and of loading back.

It speaks the requests of the installed `huggingface_hub` for models and datasets: create a repository, preupload, LFS
batch and upload, commit (NDJSON), repository info, tree, paths info, resolve with ETag and ranges. Clients read
`HF_ENDPOINT` when they are imported, so they run in processes of their own, with [`HubServer.environment`].

    with HubServer(tmp_path) as server:
        subprocess.run([...], env=server.environment())
"""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_local_test_token"
USER = "user"
DATE = "2025-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".pt", ".pth", ".arrow")
LFS_SIZE = 10 << 20  # larger files go through LFS whatever their name


@dataclass
class File:
    """A file of a commit."""

    sha256: str
    size: int
    git_oid: str
    lfs: bool


@dataclass
class Repository:
    """A repository: every commit is a whole tree, the last one is `main`."""

    kind: str  # models or datasets
    name: str  # user/name
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        """Id of the last commit."""
        return list(self.commits)[-1]

    def add_commit(self, files: dict[str, File], message: str) -> str:
        """Adds a commit and gives its id."""
        text = json.dumps([self.kind, self.name, len(self.commits), message, sorted(files)])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code


class HubServer:
    """
    The server; a context manager that runs it in a thread.

    Args:
        folder: where blobs, and the caches of clients, are kept.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.blobs = self.folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.refused: list[str] = []  # what it answered with an error
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, client: str = "client", login: bool = True) -> dict[str, str]:
        """
        Environment of a client process.

        Args:
            client: two processes with the same name share a cache.
            login: gives it a token; the server refuses uploads without.
        """
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "PYTHONPATH")
        proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
        environment = {name: value for name, value in os.environ.items() if name not in (*offline, *proxies)}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / "clients" / client),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HUGGINGFACE_HUB_CACHE"):
            environment.pop(name, None)
        return environment | ({"HF_TOKEN": TOKEN} if login else {})

    def files(self, name: str, kind: str = "models") -> dict[str, Path]:
        """Paths in the last commit of a repository, and where their bytes lie."""
        repository = self.repositories[kind, name]
        return {path: self.blobs / file.sha256 for path, file in repository.commits[repository.head].items()}

    # Contents

    def store(self, content: bytes, lfs: bool) -> File:
        """Keeps the bytes of a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.blobs / sha256).write_bytes(content)
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(sha256, len(content), git_oid, lfs)

    def find(self, kind: str, name: str, token: str | None) -> Repository:
        """Gives a repository that the client may see."""
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and token != TOKEN):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def commit_id(self, repository: Repository, revision: str) -> str:
        """Resolves `main` or a commit id."""
        if revision in ("main", "HEAD"):
            return repository.head
        if revision in repository.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        (
            "GET",
            r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?",
            "tree",
        ),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs-upload/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        (
            "GET",
            r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            "resolve",
        ),
    )

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        method = "GET" if self.command == "HEAD" else self.command
        self.body_read = False
        try:
            for allowed, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if allowed == method and match:
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    if "resolve" in pattern or "lfs/objects" in pattern:
                        arguments["kind"] = "datasets" if "kind" in arguments else "models"
                    getattr(self, name)(**arguments)
                    return
            raise HubError(404, f"{line} is not spoken here")
        except HubError as error:
            self.hub.refused.append(f"{error.status} {line}: {error}")
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send_json({"error": str(error)}, error.status, headers)

    # Requests and answers

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _require_login(self):
        if self.token != TOKEN:
            raise HubError(401, "Invalid username or password.")

    def _body(self) -> bytes:
        self.body_read = True
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send_json(self, value, status: int = 200, headers: dict[str, str] | None = None):
        content = json.dumps(value).encode()
        self._send(
            status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send(self, status: int, headers: dict[str, str]):
        if not self.body_read:
            self._body()  # what is left of a request would be taken for the next one
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # Account and repositories

    def whoami(self):
        self._require_login()
        self._send_json({"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def create(self):
        self._require_login()
        request = json.loads(self._body())
        kind = f"{request.get('type') or 'model'}s"
        name = f"{request.get('organization') or USER}/{request['name']}"
        if kind not in ("models", "datasets"):
            raise HubError(400, f"Repositories of type {kind} are not kept here")
        if not name.startswith(f"{USER}/"):
            raise HubError(403, f"You don't have the rights to create {name}")
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else 'datasets/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                self._send_json({"error": "You already created this repo", "url": url}, 409)
                return
            private = request.get("private") or request.get("visibility") == "private"
            repository = Repository(kind, name, bool(private))
            repository.add_commit({".gitattributes": self.hub.store(b"", False)}, "initial commit")
            self.hub.repositories[kind, name] = repository
        self._send_json({"url": url, "name": name, "id": name})

    def validate_yaml(self):
        request = json.loads(self._body())
        match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", request["content"], re.DOTALL)
        try:
            valid = match is None or isinstance(yaml.safe_load(match.group(1)), dict)
            problem = "it is no mapping"
        except yaml.YAMLError as error:
            valid, problem = False, str(error)
        errors = [] if valid else [{"message": problem}]
        self._send_json({"errors": errors, "warnings": []}, 200 if valid else 400)

    def info(self, kind: str, name: str, revision: str = "main"):
        repository = self.hub.find(kind, name, self.token)
        oid = self.hub.commit_id(repository, revision)
        files = repository.commits[oid]
        self._send_json(
            {
                "_id": "0",
                "id": name,
                ("modelId" if kind == "models" else "datasetId"): name,
                "author": name.split("/")[0],
                "sha": oid,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def refs(self, kind: str, name: str):
        repository = self.hub.find(kind, name, self.token)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
        self._send_json({"branches": [branch], "converts": [], "tags": []})

    def tree(self, kind: str, name: str, revision: str, path: str = ""):
        repository = self.hub.find(kind, name, self.token)
        files = repository.commits[self.hub.commit_id(repository, revision)]
        recursive = self.query.get("recursive", "false").lower() in ("true", "1")
        entries = {}
        for file_path, file in sorted(files.items()):
            if path and not file_path.startswith(f"{path}/"):
                continue
            inner = PurePosixPath(file_path).relative_to(path or ".")
            for depth in range(1, len(inner.parts)):
                if recursive or depth == 1:
                    folder = str(PurePosixPath(path, *inner.parts[:depth]))
                    entries.setdefault(folder, _folder_entry(folder))
            if recursive or len(inner.parts) == 1:
                entries[file_path] = _file_entry(file_path, file)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self._send_json(list(entries.values()))

    def paths_info(self, kind: str, name: str, revision: str):
        repository = self.hub.find(kind, name, self.token)
        files = repository.commits[self.hub.commit_id(repository, revision)]
        body = self._body().decode()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body).get("paths", [])
        entries = []
        for path in paths if isinstance(paths, list) else [paths]:
            if path in files:
                entries.append(_file_entry(path, files[path]))
            elif any(file.startswith(f"{path}/") for file in files):
                entries.append(_folder_entry(path))
        self._send_json(entries)

    # Uploads

    def preupload(self, kind: str, name: str, revision: str):
        self._require_login()
        repository = self.hub.find(kind, name, self.token)
        files = repository.commits[self.hub.commit_id(repository, revision)]
        answer = []
        for file in json.loads(self._body())["files"]:
            path = file["path"]
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            known = files.get(path)
            oid = (known.sha256 if known.lfs else known.git_oid) if known else None
            mode = "lfs" if lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def lfs_batch(self, kind: str, name: str):
        self._require_login()
        self.hub.find(kind, name, self.token)
        objects = []
        for item in json.loads(self._body())["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.blobs / item["oid"]).exists():
                upload = {"href": f"{self.hub.endpoint}/lfs-upload/{item['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/lfs-verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"The content is not that of {oid}")
        temporary = self.hub.blobs / f".{oid}.{threading.get_ident()}"
        temporary.write_bytes(content)
        temporary.rename(self.hub.blobs / oid)
        self._send(200, {"Content-Length": "0", "ETag": f'"{oid}"'})

    def lfs_verify(self):
        self._require_login()
        item = json.loads(self._body())
        blob = self.hub.blobs / item["oid"]
        if not blob.exists() or blob.stat().st_size != item["size"]:
            raise HubError(404, f"{item['oid']} was not uploaded")
        self._send_json({"oid": item["oid"], "size": item["size"]})

    def commit(self, kind: str, name: str, revision: str):
        self._require_login()
        repository = self.hub.find(kind, name, self.token)
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise HubError(400, "A commit starts with a header that has a summary")
        with self.hub.lock:
            head = self.hub.commit_id(repository, revision)
            parent = lines[0]["value"].get("parentCommit")
            if head != repository.head or (parent and not head.startswith(parent)):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.commits[head])
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            oid = repository.add_commit(files, lines[0]["value"]["summary"])
        prefix = "" if kind == "models" else "datasets/"
        url = f"{self.hub.endpoint}/{prefix}{name}/commit/{oid}"
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, File], operation: str, value: dict):
        path = value["path"]
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise HubError(400, f"{path} is no path in a repository")
        if operation == "file":
            if value.get("encoding") != "base64":
                raise HubError(400, f"{path}: the encoding must be base64")
            files[path] = self.hub.store(base64.b64decode(value["content"], validate=True), False)
        elif operation == "lfsFile":
            blob = self.hub.blobs / value["oid"]
            if value.get("algo") != "sha256" or not blob.exists():
                raise HubError(400, f"{path}: {value['oid']} was not uploaded")
            git_oid = hashlib.sha1(value["oid"].encode()).hexdigest()
            files[path] = File(value["oid"], blob.stat().st_size, git_oid, True)
        elif operation == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif operation == "deletedFolder":
            for inside in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[inside]
        else:
            raise HubError(400, f"Unknown operation {operation}")

    # Downloads

    def resolve(self, kind: str, name: str, revision: str, path: str):
        repository = self.hub.find(kind, name, self.token)
        oid = self.hub.commit_id(repository, revision)
        file = repository.commits[oid].get(path)
        if file is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            self.hub.refused.append(f"404 {self.command} {self.path}: entry not found")
            self._send_json({"error": "Entry not found"}, 404, code)
            return
        first, last, status = 0, file.size - 1, 200
        headers = {
            "ETag": f'"{file.sha256 if file.lfs else file.git_oid}"',
            "X-Repo-Commit": oid,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match and any(match.groups()) and file.size:
            first, last = _range(*match.groups(), file.size)
            if first >= file.size:
                self._send(416, {"Content-Range": f"bytes */{file.size}", "Content-Length": "0"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        self._send(status, headers | {"Content-Length": str(last - first + 1)})
        if self.command != "HEAD":
            with open(self.hub.blobs / file.sha256, "rb") as blob:
                blob.seek(first)
                if last == file.size - 1:
                    shutil.copyfileobj(blob, self.wfile)
                else:
                    self.wfile.write(blob.read(last - first + 1))


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


def _file_entry(path: str, file: File) -> dict:
    entry = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path}
    return entry | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {})


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
