"""`--push`: a repository is uploaded to a stand-in for the Hugging Face hub, on loopback, and refusals are told."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from convert import ConversionError, load_weights
from tests.convert.conftest import refused, run

_REPO, _TOKEN, _COMMIT = "somebody/crossvit", "hf_" + "a" * 20, "1" * 40


class _Hub(BaseHTTPRequestHandler):
    """Knows one user, takes files inside of commits, remembers them, and gives them back."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repo, is_file, rest = self.path.partition("/resolve/")
        if not is_file:
            self._answer({"name": "somebody", "type": "user"} if self.path == "/api/whoami-v2" else None)
            return
        revision, _, name = rest.partition("/")
        is_known = repo == f"/{_REPO}" and revision in ("main", _COMMIT)
        content = self.server.files.get(name) if is_known else None
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if is_known else "RevisionNotFound")
        self.send_header("X-Repo-Commit", _COMMIT)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

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
            commit = {"commitUrl": f"{self.server.address}/{_REPO}/commit/{_COMMIT}", "commitOid": _COMMIT}
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
def hub(monkeypatch, tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.made, server.files = [], {}
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
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

    # and comes back, at a revision too
    written = load_weights(folder)
    for source in (f"hf-hub:{_REPO}", f"hf-hub:{_REPO}@{_COMMIT}"):
        weights = load_weights(source)
        assert (weights.config, weights.notes) == (written.config, ())
        assert all(np.array_equal(weights.tensors[name], array) for name, array in written.tensors.items())
    with pytest.raises(ConversionError, match="the repository has no revision 'v2'"):
        load_weights(f"hf-hub:{_REPO}@v2")


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
