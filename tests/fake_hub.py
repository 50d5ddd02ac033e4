"""A server on loopback that speaks as much of the Hugging Face hub's protocol as its client needs
to make a repository, to commit files (small ones inside the commit, others by git-lfs), and to
fetch them."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """`repositories` maps user/name to {file: bytes}, `private` to whether it is; `hidden_size` is
    added to the sizes that it states."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.objects = {}, {}, {}
        self.fetched = []
        self.stated = {}  # file: a size that is stated in place of its own

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body, path = self._body(), urlsplit(self.path).path
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":  # of a model card
            return self._say({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": name, "uploadMode": modes[name.endswith("tensors")], "shouldIgnore": False}
                for name in names
            ]
            return self._say({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._upload_places(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(found[1], body)
        self._say({"error": path}, 404)

    def do_PUT(self):
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._say({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        if found := re.fullmatch(r"/api/models/(.+)/tree/.+", path):
            return self._tree(found[1])
        if found := re.fullmatch(r"/api/models/(.+)/revision/.+", path):
            return self._about(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._about(found[1])
        if found := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
            return self._file(*found.groups())
        self._say({"error": path}, 404)

    def _create(self, asked):
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.private.setdefault(name, private)
        url = f"{self.server.address}/{name}"
        self._say({"url": url, "id": name, "name": name}, 409 if there else 200)

    def _upload_places(self, asked):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._say({"transfer": "basic", "objects": objects})

    def _commit(self, name, body):
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.server.address}/{name}/commit/{'0' * 40}"
        self._say({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _tree(self, name):
        if name not in self.server.repositories:
            return self._missing()
        self._say(
            [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in self.server.repositories[name].items()
            ]
        )

    def _about(self, name):
        if name not in self.server.repositories:
            return self._missing()
        files = self.server.repositories[name]
        siblings = [
            {"rfilename": path, "size": self.server.stated.get(path, len(content))}
            for path, content in files.items()
        ]
        self._say({"id": name, "sha": "0" * 40, "siblings": siblings})

    def _file(self, name, path):
        content = self.server.repositories.get(name, {}).get(path)
        if content is None:
            return self._missing()
        if self.command == "GET":
            self.server.fetched.append(path)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        self._send(content, 200, headers)

    def _missing(self):
        self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, answer, code=200):
        self._send(json.dumps(answer).encode(), code, {"Content-Type": "application/json"})

    def _send(self, content, code, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running():
    """A hub that answers inside."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
