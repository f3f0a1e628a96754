"""Where models come from: the bundled one, folders, a hub (here a small one on loopback)."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import g4lens
from g4lens.errors import ConfigError, HubError, InputError
from g4lens.load import resolve
from g4lens.resources import bundled
from tests.parity import checkpoints as made

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made.reference(made.config(made.E2B)).save_pretrained(folder)
    return folder


class Hub(BaseHTTPRequestHandler):
    """Just enough of a hub for one repository; it notes what is asked of it."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.asked.append(self.path)
        if self.path.startswith("/api/models/owner/model/tree/"):
            listing = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            return self.send(200, json.dumps(listing).encode(), body)
        if self.path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": name, "size": len(c)} for name, c in self.files.items()]
            info = {"id": "owner/model", "sha": COMMIT, "siblings": siblings, "private": False}
            return self.send(200, json.dumps(info).encode(), body)
        name = self.path.rpartition("/")[2].partition("?")[0]
        if self.path.startswith("/owner/model/resolve/") and name in self.files:
            content = self.files[name]
            etag = hashlib.sha256(content).hexdigest()
            return self.send(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if self.path.startswith("/api/models/owner/gated"):
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def send(self, code, content, body, headers=None):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(saved):
    tiny = bundled("data", "tiny")
    Hub.files = {file.name: file.read_bytes() for file in saved.iterdir()}
    names = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "processor_config.json")
    Hub.files |= {name: (tiny / name).read_bytes() for name in names}
    Hub.files |= {"evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"#"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(code, endpoint, home):
    """Run code in a process whose hub is ours."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", f"import g4lens\n{code}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_from_the_hub_without_code_or_pickles(hub, tmp_path):
    code = "from g4lens.load import resolve\nprint(resolve('owner/model'))"
    done = run(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = done.stdout.strip().splitlines()[-1]
    fetched = {path.name for path in Path(folder).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not fetched & {"evil.py", "pytorch_model.bin"}
    assert not any("evil.py" in path or ".bin" in path for path in Hub.asked)
    asked = len(Hub.asked)
    again = run("g4lens.load('owner/model', device='cpu')", "http://127.0.0.1:9", tmp_path)
    assert "InputError" in again.stderr or again.returncode == 0, again.stderr[-2000:]
    assert len(Hub.asked) == asked, "what is in the cache is not fetched again"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/absent", "no such folder here and no such model on the hub"),
        ("owner/gated", "owner/gated is gated: accept its licence"),
    ],
)
def test_models_that_the_hub_does_not_give(hub, tmp_path, name, says):
    done = run(f"g4lens.load({name!r})", hub, tmp_path)
    assert "HubError" in done.stderr and says in done.stderr, done.stderr[-2000:]


def test_without_a_network(tmp_path):
    done = run("g4lens.load('owner/model')", "http://127.0.0.1:9", tmp_path)
    assert "HubError" in done.stderr and "could not be reached" in done.stderr, done.stderr[-2000:]


def test_what_a_folder_gives(saved):
    model = g4lens.load(saved, device="cpu", dtype="bfloat16")
    assert model.processor is None and model.cfg.n_layers == 10
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(InputError, match="has no tokenizer"):
        model("text")
    assert g4lens.load(str(saved), device="cpu").source.name == str(saved)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tinny", {}, r"'tinny' is no folder, no bundled model \(tiny\).*Did you mean 'tiny'"),
        ("no/such/folder", {}, "is no folder"),
        ("../x", {}, "is no folder"),
        ("", {}, "is no folder"),
        ("tiny", {"revision": "main"}, "revision='main' is for models on the hub"),
        ("tiny", {"dtype": "float31"}, "dtype is 'float31', expected one of float64.*Did you mean"),
        ("tiny", {"dtype": torch.int8}, "dtype is torch.int8"),
        ("tiny", {"device": "gpu"}, "device 'gpu' cannot be used here"),
        ("tiny", {"device": "cuda:7"}, "device 'cuda:7' cannot be used here"),
    ],
)
def test_wrong_arguments(name, options, says):
    with pytest.raises(InputError, match=says):
        g4lens.load(name, **options)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        g4lens.load(tmp_path)


def test_names_resolve():
    assert resolve("tiny") == bundled("data", "tiny")
    assert issubclass(HubError, g4lens.G4LensError)
