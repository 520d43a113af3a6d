"""Keeps visitors apart: each has files, results and running jobs of their own, which are deleted when they leave.

A *visitor* is a browser (or an API client), identified by a random cookie; a *visit* is one open tab, identified by Gradio's session
hash. Gradio serves any file in its cache to anyone who knows the path. Here every path belongs to the visitor who uploaded it or in whose
folder it was made (the folder's name is a hash of the cookie), and `Guard` refuses it to all others, as a download and as an input.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from .. import assets
from ..assets import toon
from ..errors import InputError
from ..personal_lora import PersonalLora

COOKIE = "hyperdreambooth-visitor"
IDLE = 3600.0  # Seconds after which an idle visit ends and its files are deleted.
MAX_BODY = 2_000_000  # The largest JSON body of a call, in bytes. Files aren't in it: they are uploaded before.
GREETING = Path(assets.__file__).with_name("greeting.webp").resolve()  # An example at the top of the page, readable by everyone.
# With it, the browser itself restricts what the page loads and sends to this server.
CONTENT_POLICY = "; ".join(json.loads(Path(assets.__file__).with_name("content-policy.json").read_text(encoding="utf-8")))


@dataclass
class Picture:
    """A picture to generate, and its file once it is made."""

    prompt: str
    seed: int
    label: str
    file: Path = Path()


@dataclass
class Visit:
    """One open tab: what was uploaded, made and is running in it."""

    folder: Path
    owner: str
    base: str = ""  # The chosen base; "" is the one that the page began with.
    pixels: Tensor | None = None  # The cropped photos (n, 3, size, size) in -1..1.
    needs_consent: bool = True
    personalized: PersonalLora | None = None  # The person who was personalized or loaded.
    person: PersonalLora | None = None  # The person who is drawn: the same one, or a mix with a second one.
    pictures: list[Picture] = field(default_factory=list)
    downloads: Path | None = None  # The folder of the latest files to download.
    stop: threading.Event = field(default_factory=threading.Event)
    detecting: threading.Lock = field(default_factory=threading.Lock)  # Held while faces are detected in uploaded photos.
    busy: bool = False
    closed: bool = False
    seen: float = field(default_factory=time.monotonic)  # When the visitor last did something.

    def new_folder(self) -> Path:
        """Creates a folder in the visit's own, so that no path is ever used for two files. Raises InputError after the visit's end."""
        if self.closed:
            raise InputError("this visit is over.")
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder

    def save(self, image: Image.Image) -> Path:
        """Writes a photo to a new file, for the browser to show."""
        file = self.new_folder() / "photo.png"
        image.save(file)
        return file

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Marks a job as running; a request to stop is cleared at its end."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False
            self.seen = time.monotonic()
            self.stop.clear()


class Visits:
    """All visits, and the owners of all files. The files lie under `root`, which is deleted with the server."""

    def __init__(self, root: Path):
        self.root = root
        self.public = [toon.directory("faces").resolve(), GREETING]
        self.visits: dict[str, Visit] = {}
        # (path, visitor) -> time of the upload. Gradio stores equal files under the same path, so one may have several owners.
        self.uploads: dict[tuple[str, str], float] = {}
        self.lock, self.over = threading.Lock(), threading.Event()

    def folder(self, owner: str) -> Path:
        """The folder of a visitor."""
        return self.root / f"visitor-{hashlib.sha256(owner.encode()).hexdigest()[:32]}"

    def of(self, session: str | None, owner: str | None) -> Visit:
        """The visit of a tab, begun at its first call. Raises InputError for another visitor's tab, and without a cookie."""
        if not session or not owner:
            raise InputError("this page needs its cookie to keep visitors apart. Allow cookies for it, then load it again.")
        with self.lock:
            if session not in self.visits:
                self.visits[session] = Visit(self.folder(owner) / secrets.token_hex(8), owner)
            visit = self.visits[session]
            if visit.owner != owner:
                raise InputError("this visit belongs to another browser. Load the page again.")
            visit.seen = time.monotonic()
            return visit

    def end(self, session: str | None) -> None:
        """Ends the visit of a closed tab: its job stops, its files are deleted, and with the visitor's last tab the uploads too."""
        with self.lock:
            if visit := self.visits.pop(session or "", None):
                visit.closed = True
                visit.stop.set()
                shutil.rmtree(visit.folder, ignore_errors=True)
                if all(other.owner != visit.owner for other in self.visits.values()):
                    shutil.rmtree(self.folder(visit.owner), ignore_errors=True)
                    self._forget(lambda owner, when: owner == visit.owner)

    def sweep(self) -> None:
        """Ends visits that were idle for `IDLE` seconds, and deletes uploads and leftover folders."""
        now = time.monotonic()
        for session, visit in list(self.visits.items()):
            if now - visit.seen > IDLE and not visit.busy:
                self.end(session)
        with self.lock:
            self._forget(lambda owner, when: now - when > IDLE)
            kept = {visit.folder for visit in self.visits.values()}
            for folder in self.root.glob("visitor-*/*"):  # left by a visit that ended while its job was writing
                if folder not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def _forget(self, gone: Callable[[str, float], bool]) -> None:
        """Removes uploads for which `gone`(visitor, time) is true, and deletes files that then have no owner."""
        forgotten = [key for key, when in self.uploads.items() if gone(key[1], when)]
        self.uploads = {key: when for key, when in self.uploads.items() if key not in forgotten}
        for path in {path for path, _ in forgotten} - {path for path, _ in self.uploads}:
            Path(path).unlink(missing_ok=True)

    def uploaded(self, owner: str, paths: list[str]) -> None:
        """Records the visitor as the owner of uploaded files."""
        with self.lock:
            self.uploads |= {(os.path.abspath(path), owner): time.monotonic() for path in paths}

    def may_read(self, owner: str, path: str) -> bool:
        """Whether a file belongs to this visitor or is public."""
        whole = Path(os.path.abspath(path))  # resolves ".." by the text alone, without reading the disk
        return any(map(whole.is_relative_to, [self.folder(owner), *self.public])) or (str(whole), owner) in self.uploads


class Guard:
    """ASGI middleware in front of Gradio: sets the visitor's cookie and security headers, and refuses access to the files of others."""

    def __init__(self, app: ASGIApp, visits: Visits):
        self.app, self.visits = app, visits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, path = Request(scope, receive), str(scope["path"])
        cookie = request.cookies.get(COOKIE, "")
        known = len(cookie) >= 32  # as long as a cookie set below, at least
        owner, body, files, rest = cookie if known else secrets.token_urlsafe(24), b"", [], receive

        async def answer(message: Message) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({"content-security-policy": CONTENT_POLICY, "referrer-policy": "no-referrer"})
                if not known:
                    headers.append("set-cookie", f"{COOKIE}={owner}; Path=/; HttpOnly; SameSite=Strict")
            elif path.endswith("/upload"):
                body += message.get("body", b"")
                if not message.get("more_body"):
                    with contextlib.suppress(ValueError):  # the answer to a refused upload isn't JSON
                        self.visits.uploaded(owner, json.loads(body))
            await send(message)

        if any(part in path for part in ("/proxy=", "/component_server", "/deep_link", "/stream/")):
            await PlainTextResponse("not found", 404)(scope, receive, answer)
            return
        if "/file=" in path or "/file/" in path:
            files = [path.split("/file", 1)[1][1:]]
        elif request.method == "POST" and request.headers.get("content-type", "").startswith("application/json"):
            content = b""
            with contextlib.suppress(ClientDisconnect):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > MAX_BODY:
                        await PlainTextResponse("too long", 413)(scope, receive, answer)
                        return
            files, waiting = paths_in(content), [{"type": "http.request", "body": content}]

            async def again() -> Message:  # replays the body, which is read already, to Gradio
                return waiting.pop() if waiting else await receive()

            rest = again
        allowed = all(self.visits.may_read(owner, file) for file in files)
        await (self.app if allowed else PlainTextResponse("this file isn't yours", 403))(scope, rest, answer)


def paths_in(content: bytes) -> list[str]:
    """The file paths in a call's JSON body, at any depth; none if it isn't JSON, which Gradio itself refuses."""
    objects: list[list[tuple[str, object]]] = []
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(content, object_pairs_hook=objects.append)
        return [value for pairs in objects for key, value in pairs if key == "path" and isinstance(value, str)]
    return []
