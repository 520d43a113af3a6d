"""The page in a real browser, on the shipped base: the whole way, bad files, two visitors, a phone. Minutes, so not in `make test`.

    make test-app

needs Chromium (Debian: apt-get install chromium; elsewhere name it with CHROMIUM=...) and the extra `app-tests`. Screenshots go
to build/app, to be looked at. With DOCS=1 it also writes docs/app.png and the times in docs/app.md.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from skimage.data import astronaut

from hyperdreambooth import photos
from hyperdreambooth.assets import toon
from tests.test_photos import png_header

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "app"
DOCS = os.environ.get("DOCS") == "1"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000
"""Milliseconds: a machine may be busy with something else."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hyperdreambooth", "app", "--port", str(port), "--max-upload-mb", "50"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    server = subprocess.Popen(command, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        assert server.wait(60) == 130


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=binary, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def visitor(browser: Browser, url: str) -> Iterator[object]:
    """Opens the page as a new visitor, and sees to it that it asks nobody else for anything."""
    contexts: list[BrowserContext] = []
    asked: set[str] = set()

    def enter(width: int = 1200, height: int = 900, scheme: str = "light") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.add(request.url))
        page.goto(url)
        page.wait_for_selector("#examples img")
        return page

    yield enter
    for context in contexts:
        context.close()
    away = [address for address in asked if not address.startswith((url, "data:", "blob:"))]
    assert not away, "the page asked for something outside this machine"


def says(page: Page, place: str, words: str) -> str:
    expect(page.locator(place)).to_contain_text(re.compile(words), timeout=PATIENCE)
    return page.inner_text(place)


def example(page: Page, number: int) -> None:
    page.locator("#examples button").nth(number - 1).click()
    says(page, "#note", f"Example face {number}")


def set_steps(page: Page, steps: int) -> None:
    box = page.locator("#steps input[type=number]")
    box.fill(str(steps))
    box.press("Enter")


def shoot(page: Page, name: str) -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(700)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    return SHOTS / f"{name}.png"


def problem(page: Page, words: str) -> None:
    """One plain sentence in a message, which is then closed."""
    toast = page.locator(".toast-body").filter(has_text=re.compile(words)).first
    expect(toast).to_be_visible(timeout=PATIENCE)
    assert "Traceback" not in page.content()
    toast.get_by_test_id("toast-close").click()


def test_the_whole_way(visitor, tmp_path):
    page = visitor()
    shoot(page, "start")
    example(page, 3)
    started = time.monotonic()
    page.click("#personalize")
    page.wait_for_selector("#previews img")
    first = time.monotonic() - started
    says(page, "#progress", "Done: 25 steps")
    whole = time.monotonic() - started
    print(f"first picture after {first:.1f} s, the finished LoRA after {whole:.1f} s")

    for name in ("santa hat", "dark glasses", "pencil sketch", "blueprint"):
        page.get_by_label(name, exact=True).check()
    expect(page.locator("#prompts textarea")).to_have_value(re.compile("blueprint"))
    page.click("#draw")
    says(page, "#drawing", "5 of 5 pictures. Each says")
    assert "a pencil sketch of a [V] face (seed 0)" in page.inner_text("#pictures")
    assert not page.locator(".toast-body").count()
    docs = shoot(page, "desktop")
    if DOCS:
        place = page.locator("#previews").bounding_box()
        crop(docs, place["y"] + page.evaluate("scrollY") + place["height"] + 12)
        record(first, whole)

    with page.expect_download() as caught:
        page.locator("#files a").filter(has_text="KB").nth(0).click()
    lora = tmp_path / "person.safetensors"
    caught.value.save_as(lora)
    pipe = StableDiffusionPipeline.from_pretrained(toon.directory("base"))
    pipe.load_lora_weights(str(lora))
    assert pipe.get_active_adapters(), "diffusers opens the downloaded LoRA"
    source = page.locator("#pictures img").nth(0).get_attribute("src")
    (tmp_path / "picture.png").write_bytes(page.request.get(source).body())
    assert photos.read_png_metadata(tmp_path / "picture.png")["ai_generated"] == "true"

    page.click("#compare")
    says(page, "#drawing", "15 of 15 pictures. Each says")
    for label in ("without the LoRA", "prediction", "with the LoRA"):
        assert f"{label}: a [V] face wearing a santa hat on a purple background (seed 0)" in page.inner_text("#compared")
    page.get_by_text("Mix two people").click()
    page.locator("#second-example input").click()
    page.get_by_role("option", name="example face 9", exact=True).click()
    page.click("#mix")
    says(page, "#mixed", "50 % the second person")
    shoot(page, "desktop-compared-and-mixed")

    base = page.locator("#base input")
    base.fill("not/there.safetensors")
    base.press("Enter")
    problem(page, "there.safetensors")
    base.fill(str(toon.directory("base")))
    base.press("Enter")
    says(page, "#about", "without a hypernetwork: a person is trained from scratch")
    expect(page.locator("#steps input[type=number]")).to_have_value("300")
    expect(page.locator("#draw")).not_to_be_visible()
    shoot(page, "desktop-another-base")

    page = visitor()  # another day
    page.get_by_text("Or go on with").click()
    page.locator("#earlier input[type=file]").set_input_files(lora)
    says(page, "#progress", "Loaded person.safetensors: rank 12")
    page.click("#draw")
    says(page, "#drawing", "1 of 1 pictures. Each says")


def test_photos_and_bad_files(visitor, tmp_path):
    page = visitor()
    near = Image.fromarray(astronaut())
    both = Image.new("RGB", (912, 512), "white")
    both.paste(near, (0, 0))
    both.paste(near.resize((400, 400)), (512, 112))
    both.save(tmp_path / "eileen.jpg")
    photo = page.locator("#photos input[type=file]").first
    photo.set_input_files(tmp_path / "eileen.jpg")
    says(page, "#note", "eileen.jpg: 2 faces, took the largest; change the face's number")
    page.click("#personalize")
    problem(page, "Tick that you are the person")
    page.locator("#consent input").check()
    set_steps(page, 1)
    page.click("#personalize")
    says(page, "#progress", "Done: 1 steps")
    shoot(page, "photo")

    bad = {
        "letter.png": (b"Dear Sir or Madam", "letter.png is not a picture"),
        "empty.png": (b"", "empty.png is empty"),
        "bomb.png": (png_header(30_000, 30_000), "bomb.png has .* pixels"),
        "large.png": (b"\x89PNG" + bytes(60_000_000), "exceed the maximum allowed size"),
    }
    for name, (content, words) in bad.items():
        page = visitor()
        (tmp_path / name).write_bytes(content)
        page.locator("#photos input[type=file]").first.set_input_files(tmp_path / name)
        problem(page, words)
    page = visitor()
    Image.new("RGB", (300, 200), "teal").save(tmp_path / "sea.png")
    page.locator("#photos input[type=file]").first.set_input_files(tmp_path / "sea.png")
    says(page, "#note", "sea.png: no face was found, so the middle of the picture is taken")
    page = visitor()
    page.click("#personalize")
    problem(page, "There is no photo yet")
    expect(page.locator("#progress")).not_to_contain_text("Waiting")
    for place in ("#prompts", "#draw", "#mix", "#files"):  # until there is somebody
        expect(page.locator(place)).not_to_be_visible()


def test_stop_and_reload_in_the_middle(visitor):
    page = visitor()
    example(page, 5)
    set_steps(page, 400)
    page.click("#personalize")
    says(page, "#progress", "step [3-9] of 400, about .* left")
    page.click("#stop")
    done = int(says(page, "#progress", "Done: ").split("Done: ")[1].split()[0])
    assert 3 <= done < 400
    says(page, "#files", "tokens")

    example(page, 6)
    page.click("#personalize")
    says(page, "#progress", "step [3-9] of 400")
    source = page.locator("#previews img").first.get_attribute("src")
    assert page.request.get(source).status == 200
    page.reload()
    page.wait_for_selector("#examples img")
    for _ in range(60):  # the earlier visit is over, and its files with it
        if page.request.get(source).status != 200:
            break
        page.wait_for_timeout(500)
    assert page.request.get(source).status != 200
    example(page, 7)
    set_steps(page, 0)
    page.click("#personalize")
    says(page, "#progress", "Done: 0 steps")


def test_visitors_wait_in_a_line_and_cannot_read_one_anothers_files(visitor):
    mine, theirs = visitor(), visitor()
    for page, number in ((mine, 1), (theirs, 2)):
        example(page, number)
    set_steps(mine, 400)
    mine.click("#personalize")
    says(mine, "#progress", r"step \d+ of 400")
    theirs.click("#personalize")
    says(theirs, "#previews", "queue: 1/1|queue: 2/2")
    shoot(theirs, "waiting")
    sources = [image.get_attribute("src") for image in mine.locator("#previews img, #understood img").all()]
    assert len(sources) >= 2
    for source in sources:
        assert mine.request.get(source).status == 200
        assert theirs.request.get(source).status == 403
    mine.click("#stop")
    says(mine, "#progress", "Done: ")
    says(theirs, "#progress", "Done: 25 steps")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visitor, scheme):
    page = visitor(390, 844, scheme)
    shoot(page, f"phone-start-{scheme}")
    example(page, 3)
    set_steps(page, 0)
    page.click("#personalize")
    says(page, "#progress", "Done: ")
    page.get_by_label("santa hat", exact=True).check()
    expect(page.locator("#prompts textarea")).to_have_value(re.compile("santa"))
    page.click("#draw")
    says(page, "#drawing", "2 of 2 pictures. Each says")
    says(page, "#files", "tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the screen"
    shoot(page, f"phone-{scheme}")


def test_the_keyboard_alone(visitor):
    page = visitor()

    def tab_to(selector: str) -> None:
        for _ in range(120):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement?.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} can't be reached by keyboard")

    tab_to("#examples button")
    page.keyboard.press("Enter")
    says(page, "#note", "Example face 1")
    tab_to("#steps input[type=number]")
    page.keyboard.press("Control+A")
    page.keyboard.type("0")
    tab_to("#personalize")
    page.keyboard.press("Enter")
    says(page, "#progress", "Done: 0 steps")
    tab_to("#styles input")
    page.keyboard.press("Space")
    tab_to("#draw")
    page.keyboard.press("Enter")
    says(page, "#drawing", "2 of 2 pictures. Each says")
    tab_to("#files a")


def crop(shot: Path, bottom: float) -> None:
    """The page's upper part for the docs."""
    with Image.open(shot) as image:
        shown = image.convert("RGB").crop((80, 0, image.width - 80, round(bottom)))
        shown.quantize(192).save(ROOT / "docs" / "app.png", optimize=True)  # a third of the bytes


def record(first: float, whole: float) -> None:
    """Puts the measured times into docs/app.md."""
    file = ROOT / "docs" / "app.md"
    table = (
        "| from the click on *Personalize*, in the browser | seconds |\n|---|---|\n"
        f"| to the first picture (the prediction's) | {first:.1f} |\n| to the finished LoRA (25 steps) with its pictures | {whole:.1f} |\n"
    )
    text = re.sub(r"(<!-- times -->\n).*?(<!-- /times -->)", lambda found: found[1] + table + found[2], file.read_text("utf-8"), flags=re.S)
    file.write_text(text, encoding="utf-8")
