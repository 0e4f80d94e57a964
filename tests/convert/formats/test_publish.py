"""`--push`: a repository is uploaded to a stand-in for the Hugging Face hub, on loopback, and refusals are told."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.convert.conftest import refused, run

_REPO, _TOKEN = "somebody/crossvit", "hf_" + "a" * 20


class _Hub(BaseHTTPRequestHandler):
    """Knows one user, takes files inside of commits, and remembers them."""

    def do_GET(self):
        self._answer({"name": "somebody", "type": "user"} if self.path == "/api/whoami-v2" else None)

    def do_POST(self):
        body = self._body()
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body)["name"])
            self._answer({"url": f"{self.server.address}/{_REPO}"})
        elif self.path == f"/api/models/{_REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path == f"/api/models/{_REPO}/commit/main":
            entries = [json.loads(line) for line in body.splitlines()]
            files = (entry["value"] for entry in entries if entry["key"] == "file")
            self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            commit = {"commitUrl": f"{self.server.address}/{_REPO}/commit/{'1' * 40}", "commitOid": "1" * 40}
            self._answer(commit | {"success": True})
        else:
            self._answer({} if self.path == "/api/validate-yaml" else None)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, answer):
        allowed = self.headers.get("Authorization") == f"Bearer {_TOKEN}"
        text = json.dumps({"error": "nothing here"} if answer is None else answer).encode()
        self.send_response(401 if not allowed else 404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.made, server.files = [], {}
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", _TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repository_is_made_and_gets_what_is_in_the_folder(hub, weights_file, tmp_path, capsys):
    folder = tmp_path / "out.hf"
    status, out, err = run(capsys, weights_file, folder, "--push", _REPO)
    assert (status, out.splitlines()[-1]) == (0, f"published   {hub.address}/{_REPO}"), err
    assert hub.made == ["crossvit"]
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert b'timm.create_model("hf-hub:somebody/crossvit", pretrained=True)' in hub.files["README.md"]


def test_what_cannot_be_published_is_told_before_anything_is_written(hub, weights_file, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out.hf"

    def told(*args):
        message = refused(capsys, weights_file, *args)
        assert not list(tmp_path.glob("out*"))
        assert hub.made == []
        return message

    assert "--push is for a folder .hf" in told(tmp_path / "out.pth", "--push", _REPO)
    assert "--push is for a folder .hf" in told(tmp_path / "out.onnx", "--push", _REPO)
    assert "a repository is named OWNER/NAME" in told(folder, "--push", "crossvit")
    assert "--push a/b/c: " in told(folder, "--push", "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "--push somebody/crossvit: the hub did not take it: " in told(folder, "--push", _REPO)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token of the hub: set HF_TOKEN" in told(folder, "--push", _REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in told(folder, "--push", _REPO)
