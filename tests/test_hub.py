"""Uploads to and downloads from a hub on loopback with the real hub's HTTP API, and model cards."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hyperdreambooth import hub
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.checkpoint import read_header
from hyperdreambooth.errors import InputError
from hyperdreambooth.pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork

from . import test_cli
from .conftest import picture
from .test_cli import refused, run

pytestmark = pytest.mark.usefixtures("tiny_world")
me = test_cli.me
SHA = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload and a download take. `server.files`: what it holds; `server.made`: repositories."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name'].split('/')[-1]}"
            self.server.made[name] = wanted
            self.answer({"url": f"{self.server.address}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            name = self.path.split("/api/models/")[1].split("/commit/")[0]
            self.answer({"success": True, "commitOid": SHA, "commitUrl": f"{self.server.address}/{name}/commit/{SHA}"})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self, body=True):
        path = unquote(self.path.split("?")[0])
        if "/resolve/" in path:
            content = self.server.files.get(path.split(f"/resolve/{SHA}/")[-1])
            if content is None:
                return self.answer({"error": "no such file"}, 404)
            return self.answer(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": SHA}, body)
        if "/tree/" in path and self.server.files:
            found = [{"type": "file", "path": name, "size": len(data), "oid": SHA} for name, data in self.server.files.items()]
            return self.answer(found)
        if path.startswith(("/api/models/", "/api/datasets/")):
            if not self.server.files:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer(
                {"id": "ann/hyper", "sha": SHA, "siblings": siblings, "private": True, "tags": [], "downloads": 0, "likes": 0}
            )
        return self.answer({"error": path}, 404)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, content, status=200, headers=None, body=True):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files, server.made = f"http://127.0.0.1:{server.server_port}", {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point(monkeypatch, server.address, tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def point(monkeypatch, address, tmp_path):
    """huggingface_hub reads its settings once, at import."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def test_a_hypernetwork_goes_up_and_comes_down(server, tiny_world, tmp_path):
    folder = shutil.copytree(tiny_world / "hypernetwork", tmp_path / "hyper")
    (folder / "cache").mkdir()
    (folder / "cache" / "faces.safetensors").write_bytes(b"people's faces")
    (folder / "training.json").write_text('{"folder": "/home/ann/faces"}')
    assert run("push", folder, "ann/hyper") == 0
    assert server.made["ann/hyper"]["visibility"] == "private"
    encoder = {f"encoder/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    assert set(server.files) == {"README.md", "config.json", "model.safetensors", *encoder}  # neither photos nor files with local paths
    source, info = load_hypernetwork("ann/hyper")
    assert info.base == "toon"
    expected, _ = load_hypernetwork(folder)
    pixels = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(source.tokens(pixels), expected.tokens(pixels))
    hdb = HyperDreamBooth.from_pretrained("toon", hypernetwork="ann/hyper")
    assert hdb.push_to_hub("ann/again", public=True) == f"{server.address}/ann/again"
    assert server.made["ann/again"]["visibility"] == "public"


def test_a_lora_goes_up_with_consent_alone_and_with_a_card(server, me, capsys):
    refused(capsys, "biometric data", "push", me, "ann/face")
    assert not server.made
    assert not server.files
    assert run("push", me, "ann/face", "--yes") == 0
    assert set(server.files) == {"README.md", "me.safetensors", "me.png"}  # not me.json, which has local paths
    assert server.files["me.safetensors"] == me.read_bytes()
    card = server.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["instance_prompt"] == "a [V] face"
    assert "lora" in front["tags"]
    assert 'load_lora_weights("me.safetensors")' in card
    assert "biometric" in card


def test_a_photo_is_never_uploaded(server, me, tmp_path):
    picture(4).save(tmp_path / "me.png")  # an ordinary picture that replaces the generated preview
    assert run("push", me, "ann/face", "--yes") == 0
    assert set(server.files) == {"README.md", "me.safetensors"}
    assert "![" not in server.files["README.md"].decode()


def test_what_cant_be_uploaded_is_one_line(server, tmp_path, capsys, me):
    (tmp_path / "photo.safetensors").write_bytes(b"nothing")
    refused(capsys, "not a whole safetensors", "push", tmp_path / "photo.safetensors", "ann/x", "--yes")
    refused(capsys, "no such file", "push", tmp_path / "nowhere", "ann/x")
    (tmp_path / "empty").mkdir()
    refused(capsys, "isn't a hypernetwork", "push", tmp_path / "empty", "ann/x")
    refused(capsys, "can't be uploaded to a b/c/d", "push", me, "a b/c/d", "--yes")
    assert not server.files


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path, capsys, me, face):
    point(monkeypatch, "http://127.0.0.1:9", tmp_path)  # the discard port, where nothing listens
    refused(capsys, "Check the network", "push", me, "ann/face", "--yes")
    refused(capsys, "ann/hyper is neither a folder nor a model on the hub that can be reached", "personalize", face, "--hypernetwork", "ann/hyper", "-o", tmp_path / "x.safetensors")  # fmt: skip


def test_a_name_that_the_hub_doesnt_have_is_one_error(server):
    with pytest.raises(InputError, match="ann/nobody is neither a folder nor a model"):
        load_hypernetwork("ann/nobody")


def info(**more) -> HyperNetworkInfo:
    return HyperNetworkInfo(
        base="runwayml/stable-diffusion-v1-5",
        targets={"unet.a": [4, 4], "unet.b": [4, 4]},
        lightweight={"rank": 1, "down_dim": 100, "up_dim": 50},
        hypernetwork={},
        **more,
    )


def test_a_hypernetworks_card_says_what_it_is():
    trained = {"steps": 1200, "identities": 15000, "validation": [{"step": 1, "loss": 1.0}, {"step": 1200, "identity_gain": 0.30016}]}
    card = hub.hypernetwork_card(asdict(info(data="CelebA-HQ", license="openrail", trained=trained)))
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "runwayml/stable-diffusion-v1-5"
    assert front["license"] == "openrail"
    for words in ("2 layers, 300 numbers", "CelebA-HQ", "identities: 15000", "identity gain: 0.3002", "consent", "arXiv 2307.06949"):
        assert words in card
    code = re.search(r"```python\n(.*?)\n```", card, re.S).group(1)
    assert sum(bool(line) for line in code.splitlines()) == 3
    compile(code, "card", "exec")


def test_cards_of_little_known_things_invent_nothing(tmp_path):
    card = hub.hypernetwork_card(asdict(info()))
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert card.count("Not stated.") == 2
    assert "None were measured." in card
    named = hub.hypernetwork_card(asdict(info(license="My own terms")))
    assert yaml.safe_load(named.split("---")[1])["license_name"] == "My own terms"
    lora = hub.lora_card({}, "x.safetensors")
    assert "base_model" not in yaml.safe_load(lora.split("---")[1])


def test_a_folder_on_this_machine_isnt_named(tmp_path, world):
    own = info()
    own.base = str(world / "base")
    assert str(world) not in hub.hypernetwork_card(asdict(own))


def test_no_file_that_can_be_uploaded_names_a_folder_of_this_machine(tmp_path, world):
    hdb = HyperDreamBooth.from_pretrained(world / "base", hypernetwork=world / "hypernetwork", device="cpu")
    me = hdb.personalize(picture(), steps=0, quiet=True)
    lora, tokens = me.save(tmp_path / "me.safetensors"), me.save_tokens(tmp_path / "me.tokens")
    save_hypernetwork(tmp_path / "hyper", hdb.source, replace(hdb.info, base=hdb.base))
    shown = hdb.picture_metadata("a [V] face", 0, hdb.generate_config(), [(str(lora), 0.5), ("ann/style", 1.0)])
    settings = json.loads(shown["hyperdreambooth"])
    assert (settings["base"], settings["loras"]) == ("base", [["me.safetensors", 0.5], ["ann/style", 1.0]])
    assert read_header(tokens)[1]["base"] == "base"
    assert load_hypernetwork(tmp_path / "hyper")[1].base == "base"
    written = [file.read_bytes() for file in (lora, tokens, *(tmp_path / "hyper").rglob("*")) if file.is_file()]
    assert not any(str(folder).encode() in content for folder in (world, tmp_path) for content in [*written, str(shown).encode()])


def test_every_saved_folder_has_its_card(world):
    assert (world / "hypernetwork" / "README.md").read_text().startswith("---\n")
    assert load_file(world / "hypernetwork" / "model.safetensors")
