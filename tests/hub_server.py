"""A server on this machine that stands where the Hub would be and keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """Answers what `create_repo` and `create_commit` ask, and takes every file inline."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://127.0.0.1:{self.server.server_port}/someone/model"
        if self.path.endswith("/repos/create"):
            self._answer({"url": address, "name": "someone/model", "id": "someone/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitOid": "a" * 40, "commitUrl": f"{address}/commit/aaaa", "pullRequestUrl": None})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({}, 404)

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(name="hub")
def serve_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use_hub(monkeypatch, server.server_port)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def use_hub(monkeypatch, port):
    monkeypatch.setenv("HF_TOKEN", "hf_someone")
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the address of the first call
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
