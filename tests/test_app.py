"""The web page's actions through Gradio's client, on a real server on loopback: results, refused inputs, and isolation of visitors."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import threading
import time
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")
import gradio as gr
import httpx
from diffusers import StableDiffusionPipeline
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hyperdreambooth import HyperDreamBooth, app, formats, photos
from hyperdreambooth.app import page, sessions
from hyperdreambooth.app.actions import Actions
from hyperdreambooth.app.sessions import Visits, paths_in
from hyperdreambooth.assets import toon
from hyperdreambooth.cli import main
from hyperdreambooth.errors import InputError
from worlds.toon import pictures

from .conftest import picture
from .families import make
from .test_photos import png_header

ROOT = Path(__file__).parents[1]
DRAW = {"seed": 3, "count": 1, "strength": 1, "guidance": 2, "identity": 2, "steps": 1, "scheduler": "", "styles": [], "style_weight": 0.7}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERDREAMBOOTH_TOON", str(world))
        running = app.start(HyperDreamBooth.from_pretrained("toon", device="cpu"), port=free_port(), max_upload_mb=2)
        yield running
        running.close()
        assert not running.visits.root.exists()


@pytest.fixture
def connect(server, tmp_path):
    """Makes clients, each a visitor of its own."""
    clients = []

    def one() -> Client:
        clients.append(Client(server.url, verbose=False, download_files=tmp_path / f"client-{len(clients)}", analytics_enabled=False))
        return clients[-1]

    yield one
    for client in clients:
        server.visits.end(client.session_hash)


def photo(file: Path) -> list[dict[str, object]]:
    return [{"image": handle_file(file), "caption": None}]


def refused(client: Client, words: str, *args: object, api_name: str, **more: object) -> None:
    with pytest.raises(AppError, match=words) as caught:
        client.predict(*args, api_name=api_name, **more)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert "/tmp" not in text


def names(gallery: list[dict[str, object]]) -> list[object]:
    return [cell["caption"] for cell in gallery]


def test_the_whole_way(connect, face, tmp_path, world):
    client = connect()
    crops, note = client.predict(photo(face), 1, api_name="/look")
    assert "no face was found" in note
    assert Image.open(crops[0]["image"]).size == (64, 64)
    job = client.submit(2, True, api_name="/personalize")
    status, previews = job.result()
    assert names(previews) == ["prediction", "step 1", "fine-tuned"]
    assert "2 steps" in status
    assert any(len(shown) == 1 and "prediction" in words for words, shown in job.outputs()), "the prediction must be shown first"

    draw = client.submit("a [V] face\na pencil sketch of a [V] face\n", **{**DRAW, "count": 2}, api_name="/draw")
    _, drawn = draw.result()
    assert len(drawn) == 4
    assert sorted({len(shown) for _, shown in draw.outputs()}) == [0, 1, 2, 3, 4], "pictures must arrive one by one"
    made = photos.read_png_metadata(drawn[3]["image"])
    assert made["ai_generated"] == "true"
    settings = json.loads(made["hyperdreambooth"])
    assert (settings["prompt"], settings["seed"], settings["strength"]) == ("a pencil sketch of a [V] face", 4, 1)
    _, compared = client.predict("a [V] face", **DRAW, api_name="/compare")
    assert [str(name).split(":")[0] for name in names(compared)] == ["without the LoRA", "prediction", "with the LoRA"]

    files = {Path(file).name: Path(file) for file in client.predict(api_name="/take")}
    assert set(files) == {"person.safetensors", "person-kohya.safetensors", "person.tokens", "pictures.zip"}
    pipe = StableDiffusionPipeline.from_pretrained(world / "base")
    pipe.load_lora_weights(str(files["person.safetensors"]))
    assert pipe.get_active_adapters()
    assert formats.read_lora(files["person-kohya.safetensors"]).layout == "kohya"
    with zipfile.ZipFile(files["pictures.zip"]) as archive:
        assert len(archive.namelist()) == 1 + 3 + 4 + 3  # the contact sheet, previews, pictures, comparison
        assert archive.namelist()[0] == "contact-sheet.png"

    other = connect()  # a new visitor who continues from the downloaded files
    assert "rank 3" in other.predict(handle_file(files["person.safetensors"]), api_name="/load")[0]
    assert "rank 1" in other.predict(handle_file(files["person.tokens"]), api_name="/load")[0]
    _, mixed = other.predict(None, 2, 0.25, False, api_name="/mix")
    assert names(mixed) == ["25 % the second person"]
    assert any(file.endswith(".tokens") for file in other.predict(api_name="/take"))
    other.predict(handle_file(files["person.safetensors"]), 0, 0.5, False, api_name="/mix")
    assert not any(file.endswith(".tokens") for file in other.predict(api_name="/take")), "a mix with a LoRA file has no tokens"


def test_where_there_are_several_faces_one_is_chosen(connect, tmp_path):
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("cv2")
    large = Image.fromarray(skimage.data.astronaut())
    both = Image.new("RGB", (832, 512), "white")
    both.paste(large, (0, 0))
    both.paste(large.resize((320, 320)), (512, 96))
    both.save(tmp_path / "eileen.jpg")
    client = connect()
    assert "2 faces, took the largest; change the face" in client.predict(photo(tmp_path / "eileen.jpg"), 1, api_name="/look")[1]
    assert "face 2 is taken" in client.predict(photo(tmp_path / "eileen.jpg"), 2, api_name="/look")[1]
    refused(client, "there is no face 3; 2 were found", photo(tmp_path / "eileen.jpg"), 3, api_name="/look")


def test_who_personalizes_while_a_face_is_still_looked_for_waits(connect, face, monkeypatch):
    real, began = photos.prepare, threading.Event()

    def slow(*args: object) -> object:
        began.set()
        time.sleep(1.5)
        return real(*args)

    monkeypatch.setattr(photos, "prepare", slow)
    client = connect()
    client.submit(photo(face), 1, api_name="/look")
    assert began.wait(60)
    assert names(client.predict(0, True, api_name="/personalize")[1]) == ["prediction"]


def test_a_base_without_a_hypernetwork(world, face):
    running = app.start(HyperDreamBooth.from_pretrained(world / "base", hypernetwork=None, device="cpu"), port=free_port())
    try:
        client = Client(running.url, verbose=False)
        client.predict(1, api_name="/example")
        refused(client, "Choose more steps", 0, False, api_name="/personalize")
        assert names(client.predict(2, False, api_name="/personalize")[1]) == ["step 1", "fine-tuned"]
        compared = client.predict("a [V] face", **DRAW, api_name="/compare")[1]
        assert [str(name).split(":")[0] for name in names(compared)] == ["without the LoRA", "with the LoRA"]
        assert not any(file.endswith(".tokens") for file in client.predict(api_name="/take"))
    finally:
        running.close()


@pytest.mark.parametrize("family", ["sd3", "flux-schnell"])
def test_a_person_on_a_transformer_is_taken_home_in_the_layout_that_it_has(family, tmp_path):
    hdb = HyperDreamBooth.from_pipeline(make(family))
    actions, request = Actions(hdb, Visits(tmp_path)), gr.Request(session_hash="one")
    request.request = SimpleNamespace(cookies={sessions.COOKIE: "x" * 40})
    actions.visit(request).person = hdb.personalize(picture(), steps=1, quiet=True)
    assert [Path(file).name for file in actions.take(request)] == ["person.safetensors"]
    assert "opens in diffusers and ComfyUI;" in page.first_values(hdb)["home"]


def test_a_visit_chooses_its_base(world, face):
    other = str(world / "base")
    opened: list[weakref.ref[object]] = []
    in_memory: list[int] = []

    def open_base(name: str) -> HyperDreamBooth:
        gc.collect()
        in_memory.append(sum(base() is not None for base in opened))
        hdb = HyperDreamBooth.from_pretrained(name, device="cpu")
        opened.append(weakref.ref(hdb.backbone.denoiser))
        return hdb

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERDREAMBOOTH_TOON", str(world))
        running = app.start(open_base("toon"), open_base=open_base, bases=[other], port=free_port())
        try:
            first, second = (Client(running.url, verbose=False) for _ in range(2))
            for client in (first, second):
                client.predict(1, api_name="/example")
                client.predict(0, False, api_name="/personalize")
            note, steps, prompts, *_ = first.predict(other, api_name="/choose")
            assert f"`{other}`" in note
            assert "trained from scratch" in note
            assert "cartoon" not in note
            assert (steps, prompts) == (300, "a [V] face")
            refused(first, "There is no photo yet", 1, False, api_name="/personalize")
            refused(first, "There is nobody to draw yet", "a [V] face", **DRAW, api_name="/draw")
            first.predict(1, api_name="/example")
            assert names(first.predict(2, False, api_name="/personalize")[1]) == ["step 1", "fine-tuned"]
            assert any(file.endswith(".tokens") for file in second.predict(api_name="/take")), "other visitors must keep their person"
            assert names(second.predict(0, False, api_name="/personalize")[1]) == ["prediction"]
            refused(first, "there.safetensors", "not/there.safetensors", api_name="/choose")
            assert names(first.predict(2, False, api_name="/personalize")[1]) == ["step 1", "fine-tuned"], "the open base must stay open"
            assert len(in_memory) > 4
            assert not any(in_memory), "a base must be freed before the next one is loaded"
        finally:
            running.close()


def test_who_comes_from_elsewhere_has_the_bases_that_are_offered(world, tmp_path):
    actions = Actions(HyperDreamBooth.from_pretrained(world / "base", device="cpu"), Visits(tmp_path), lambda name: None, ["another"])
    request = gr.Request(session_hash="one", username=None)
    request.request = type("Request", (), {"cookies": {sessions.COOKIE: "x" * 40}})()
    with pytest.raises(gr.Error, match=r"has the bases .*, another. Start it with --bases"):
        actions.choose("/etc/passwd", request)


def test_the_docs_example_runs(server, face):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "app.md").read_text(encoding="utf-8"), re.S).group(1)
    for theirs, here in (
        ("http://127.0.0.1:7860/", server.url),
        ("face.png", str(face)),
        ("predict(25", "predict(1"),
        ("steps=10", "steps=1"),
    ):
        assert theirs in code
        code = code.replace(theirs, here)
    found: dict[str, object] = {}
    exec(compile(code, "docs/app.md", "exec"), found)
    assert len(found["pictures"]) == 2
    server.visits.end(found["client"].session_hash)


def test_style_loras_and_schedulers(connect, face):
    client = connect()
    client.predict(1, api_name="/example")
    client.predict(0, False, api_name="/personalize")
    style = next(file for file in client.predict(api_name="/take") if file.endswith("person.safetensors"))
    plain = client.predict("a [V] face", **DRAW, api_name="/draw")[1][0]["image"]
    styled = client.predict("a [V] face", **{**DRAW, "styles": [handle_file(style)]}, api_name="/draw")[1][0]["image"]
    assert Image.open(plain).tobytes() != Image.open(styled).tobytes()
    assert [name for name, _ in json.loads(photos.read_png_metadata(styled)["hyperdreambooth"])["loras"]] == [
        "person",
        "person.safetensors",
    ]
    for scheduler in app.SCHEDULERS:
        assert client.predict("a [V] face", **{**DRAW, "scheduler": scheduler}, api_name="/draw")[1]


def wait_for(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_stop_keeps_what_there_is(connect):
    client = connect()
    client.predict(1, api_name="/example")
    job = client.submit(400, False, api_name="/personalize")
    wait_for(lambda: any("step 2 " in words for words, _ in job.outputs()))
    assert "Stopping" in client.predict(api_name="/stop")
    status, previews = job.result()
    done = int(status.split("Done: ")[1].split()[0])
    assert 2 <= done < 400
    assert names(previews)[-1] == "fine-tuned"
    assert len(client.predict(api_name="/take")) == 4
    assert "2 steps" in client.predict(2, False, api_name="/personalize")[0], "a stop must not affect the next job"


def test_a_closed_tab_cancels_its_job_and_its_files_go(connect, server):
    client = connect()
    client.predict(1, api_name="/example")
    job = client.submit(400, False, api_name="/personalize")
    wait_for(lambda: any("step 2 " in words for words, _ in job.outputs()))
    visit = server.visits.visits[client.session_hash]
    assert list(visit.folder.iterdir())
    server.visits.end(client.session_hash)
    wait_for(job.done)
    assert len(job.outputs()) < 100
    assert not visit.folder.exists()
    again = connect()  # the canceled job must have released the model
    again.predict(1, api_name="/example")
    assert again.predict(0, False, api_name="/personalize")[1]


def test_several_visitors_wait_for_one_another_and_lose_nothing(connect):
    clients = [connect() for _ in range(4)]
    for index, client in enumerate(clients):
        client.predict(index + 1, api_name="/example")
    jobs = [client.submit(1, False, api_name="/personalize") for client in clients]
    assert all(names(job.result()[1]) == ["prediction", "fine-tuned"] for job in jobs)
    tokens = [next(file for file in client.predict(api_name="/take") if file.endswith(".tokens")) for client in clients]
    assert len({Path(file).read_bytes() for file in tokens}) == 4, "every visitor must get their own person"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("letter.png", b"Dear Sir or Madam", "letter.png is not a picture"),
        ("empty.png", b"", "empty.png is empty"),
        ("bomb.png", png_header(30_000, 30_000), "bomb.png has .* pixels"),
        ("dot.png", png_header(1, 1), "dot.png has 1 x 1 pixels"),
    ],
)
def test_bad_photos_are_one_sentence(connect, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(connect(), words, photo(tmp_path / name), 1, api_name="/look")


def test_what_is_missing_is_one_sentence(connect, face, tmp_path):
    client = connect()
    refused(client, "There is no photo yet", 1, True, api_name="/personalize")
    refused(client, "nobody to draw yet", "a [V] face", **DRAW, api_name="/draw")
    refused(client, "nobody to mix", None, 1, 0.5, False, api_name="/mix")
    refused(client, "no example face 99", 99, api_name="/example")
    client.predict(photo(face), 1, api_name="/look")
    refused(client, "Tick that you are", 1, False, api_name="/personalize")
    client.predict(1, api_name="/example")
    client.predict([], 2, api_name="/look")  # the face number changes, which has no effect on an example
    assert client.predict(0, False, api_name="/personalize")
    refused(client, "9 photos", photo(face) * 9, 1, api_name="/look")
    refused(client, "no prompt", " \n ", **DRAW, api_name="/compare")
    refused(client, "pictures are more than", "\n".join("abcdefg"), **{**DRAW, "count": 8}, api_name="/compare")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    refused(client, "cut.safetensors", handle_file(tmp_path / "cut.safetensors"), api_name="/load")


def test_a_file_that_is_too_large_is_refused_while_it_arrives(connect, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(3_000_000))
    with pytest.raises((httpx.HTTPStatusError, ValueError), match=r"413|maximum"):
        connect().predict(photo(tmp_path / "large.png"), 1, api_name="/look")


def test_a_crash_is_logged_and_not_shown(connect, server, monkeypatch, caplog):
    def broken(self: Actions, *args: object) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Actions, "_preview", broken)
    client = connect()
    client.predict(1, api_name="/example")
    with pytest.raises(AppError, match="Something went wrong") as caught:
        client.predict(0, False, api_name="/personalize")
    assert "secret" not in str(caught.value)
    assert "a secret of the server" in caplog.text


def test_one_visitors_files_are_nobody_elses(connect, server, face, world):
    mine, theirs = connect(), connect()
    mine.predict(photo(face), 1, api_name="/look")
    mine.predict(1, True, api_name="/personalize")
    mine.predict(api_name="/take")
    visit = server.visits.visits[mine.session_hash]
    made = [str(file) for file in visit.folder.rglob("*") if file.is_file()]
    uploaded = [path for path, owner in server.visits.uploads if owner == visit.owner]
    assert len(made) > 4
    assert uploaded
    for path in [*made, *uploaded]:
        url = f"{server.url}gradio_api/file={path}"
        assert httpx.get(url, cookies=mine.cookies).status_code == 200
        assert httpx.get(url, cookies=theirs.cookies).status_code == 403
        assert httpx.get(url).status_code == 403
        assert httpx.get(f"{server.url}gradio_api/file/{path}", cookies=theirs.cookies).status_code == 403
    for path in ("/etc/passwd", f"{toon.directory('faces')}/../palette.json", str(server.visits.root), "http://127.0.0.1:1/x", "../app.py"):
        assert httpx.get(f"{server.url}gradio_api/file={path}", cookies=mine.cookies).status_code == 403, path
    for path in (uploaded[0], "http://127.0.0.1:1/x.png", "/etc/passwd"):  # nor may such a file be the input of an action
        stolen = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [[{"image": stolen, "caption": None}], 1], "session_hash": "abcdefghij"}
        for route in ("call/look", "run/look", "queue/join"):
            answer = httpx.post(f"{server.url}gradio_api/{route}", json=body, cookies=theirs.cookies)
            assert answer.status_code == 403, (route, path)
    with pytest.raises(InputError, match="another browser"):
        server.visits.of(mine.session_hash, "somebody else's cookie")


def test_the_page_asks_nothing_of_the_world_and_answers_to_its_own_name(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
    for cookie, known in (("x" * 32, True), ("short", False)):
        again = httpx.get(server.url, headers={"cookie": f"a=b; {sessions.COOKIE}={cookie}"})
        assert ("set-cookie" not in again.headers) == known
    assert httpx.get(server.url, headers={"host": "evil.example"}).status_code == 400
    assert httpx.post(f"{server.url}gradio_api/queue/join", json={"data": ["x" * 3_000_000]}).status_code == 413
    assert httpx.get(f"{server.url}gradio_api/deep_link?session_hash=x").status_code == 404


def test_the_page_says_what_the_base_draws_and_what_comes_later(server, world):
    def texts(page: gr.Blocks) -> str:
        return "\n".join(str(block.value) for block in page.blocks.values() if isinstance(block, gr.Markdown))

    assert "a photograph of a person won't come out as that person" in texts(server.page)
    plain = HyperDreamBooth.from_pretrained(world / "base", hypernetwork=None, device="cpu")
    other = page.build(Actions(plain, server.visits), plain)
    assert "won't come out" not in texts(other)
    later = next(block for block in server.page.blocks.values() if block.elem_id == "later")
    assert not later.visible
    shown = [function for function in server.page.fns.values() if function.outputs == [later]]
    triggers = {server.page.fns[function.trigger_after].api_name for function in shown}
    assert triggers == {"personalize", "load"}
    assert shown[0].fn().visible is True

    def within(block: object) -> bool:
        return block is not None and (block is later or within(block.parent))

    named = {block.elem_id: block for block in server.page.blocks.values() if block.elem_id}
    assert all(within(named[name]) for name in ("prompts", "draw", "compare", "pictures", "second", "mix", "files"))
    assert not any(within(named[name]) for name in ("photos", "personalize", "earlier", "previews", "about", "base"))
    config = httpx.get(f"{server.url}config").json()
    assert re.search('property="og:title" content="hyperdreambooth"', config["head"])
    assert 'property="og:description"' in config["head"]


def test_a_clients_call_has_the_names_that_the_docs_give(connect):
    found = connect().view_api(return_format="dict")["named_endpoints"]
    assert set(found) == {
        f"/{name}" for name in ["look", "example", "stop", "personalize", "load", "draw", "compare", "mix", "take", "choose"]
    }
    for name in ("/draw", "/compare"):
        assert [one["parameter_name"] for one in found[name]["parameters"]] == ["prompts", *DRAW]


def test_listening_elsewhere_needs_a_password(world, monkeypatch, capsys):
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(world))
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        assert main(["app", "--host", host]) == 2
        assert "--auth" in capsys.readouterr().err
    assert main(["app", "--auth", "anna"]) == 2
    assert "USER:PASSWORD" in capsys.readouterr().err
    app.check_host("127.0.0.1", None)
    app.check_host("::1", None)
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu")
    port = free_port()
    running = app.start(hdb, port=port, auth=("anna", "secret"))
    try:
        assert httpx.get(f"{running.url}config").status_code == 401
        assert httpx.post(f"{running.url}gradio_api/queue/join", json={"data": []}).status_code == 401
        assert httpx.post(f"{running.url}login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert Client(running.url, auth=("anna", "secret"), verbose=False).predict(1, api_name="/example")
        with pytest.raises(InputError, match="--port"):
            app.start(hdb, port=port)
    finally:
        running.close()


@pytest.mark.parametrize("before", [None, "/tmp/own"])
def test_a_page_leaves_the_environment_as_it_was(world, monkeypatch, before):
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(world))
    monkeypatch.setenv("GRADIO_TEMP_DIR", before or "")
    if before is None:
        monkeypatch.delenv("GRADIO_TEMP_DIR")
    with socket.socket() as taken:  # the page starts and, since its port is taken, closes
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            app.start(HyperDreamBooth.from_pretrained("toon", device="cpu"), port=taken.getsockname()[1])
    assert os.environ.get("GRADIO_TEMP_DIR") == before


def test_the_palette_is_what_the_base_knows():
    known = {"background": "white", "headwear": "none", "eyewear": "none", "expression": "neutral", "style": "plain"}
    every = {
        pictures.caption({**known, kind: name}, draw=None, mention=1.0) for kind, choices in pictures.CONTEXTS.items() for name in choices
    }
    every |= {  # captions of hats also name a background
        pictures.caption({**known, "headwear": hat, "background": background}, draw=None, mention=1.0)
        for hat in pictures.CONTEXTS["headwear"]
        for background in pictures.CONTEXTS["background"]
    }
    listed = {prompt for group in toon.palette().values() for prompt in group.values()}
    assert listed <= every
    assert {pictures.caption({**known, "style": name}) for name in pictures.CONTEXTS["style"] if name != "plain"} <= listed


def test_ticking_the_palette_keeps_ones_own_lines(server):
    actions = Actions.__new__(Actions)
    actions.palette = {"contexts": {"cap": "a [V] face wearing a cap"}, "styles": {"poster": "a poster of a [V] face"}}
    text = actions.pick(["cap"], ["poster"], "mine, with [V]")
    assert text == "mine, with [V]\na [V] face wearing a cap\na poster of a [V] face"
    assert actions.pick([], ["poster"], text) == "mine, with [V]\na poster of a [V] face"


def test_visits_end_with_their_last_tab_or_after_an_hour(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    visits = Visits(tmp_path)
    first, second, other = visits.of("s1", "ann"), visits.of("s2", "ann"), visits.of("s3", "bob")
    first.seen = second.seen = other.seen = 0.0
    upload = tmp_path / "upload.png"
    upload.write_bytes(b"x")
    visits.uploaded("ann", [str(upload)])
    visits.uploaded("bob", [str(upload)])
    files = [visit.save(picture()) for visit in (first, second, other)]
    visits.end("s1")
    assert [file.exists() for file in files] == [False, True, True]
    visits.end("s2")
    assert not visits.may_read("ann", str(upload))
    assert upload.exists(), "the file must stay, as bob uploaded it too"
    now[0] = 3000
    visits.sweep()
    assert files[2].exists()
    other.busy, now[0] = True, 4000
    visits.sweep()
    assert files[2].exists(), "files must stay while the visitor's job runs"
    assert not upload.exists()
    other.busy = False
    visits.sweep()
    assert not files[2].exists()
    with pytest.raises(InputError, match="over"):
        other.new_folder()
    with pytest.raises(InputError, match="cookie"):
        visits.of("s1", None)


def test_every_file_that_a_call_names_is_found():
    body = {"data": [[{"image": {"path": "a"}}], {"path": "b", "deep": [{"x": {"path": "c"}}]}, "path", {"path": 3}]}
    assert sorted(paths_in(json.dumps(body).encode())) == ["a", "b", "c"]
    assert list(paths_in(b"not json")) == []
    assert list(paths_in(b"[" * 100_000)) == []


def test_gradio_reports_nothing():
    import os

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not gr.Blocks().analytics_enabled
