"""The command `app`, which serves the web page."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..progress import say
from .options import WithHypernetwork

if TYPE_CHECKING:
    from ..api import HyperDreamBooth


@dataclass
class App(WithHypernetwork):
    """Serve a web page: upload a photo, see the person in new pictures, download the LoRA.

    Only this machine can reach it, unless --host names another address, which then needs --auth.

        hyperdreambooth app
        hyperdreambooth app --base path/to/stable-diffusion-v1-5
        hyperdreambooth app --bases dreamshaper.safetensors path/to/sdxl
        hyperdreambooth app --host 0.0.0.0 --auth anna:secret
    """

    bases: tuple[str, ...] = ()  # More bases to choose from on the page. Without --host and --auth any other can be typed in there too.
    host: str = "127.0.0.1"  # The address to listen on.
    port: int | None = None  # The port to listen on. Default: the first free one from 7860.
    auth: str | None = None  # USER:PASSWORD, which every visitor must enter. Required where other machines can reach the address.
    max_upload_mb: int = 50  # Largest upload that is accepted, in megabytes.
    browser: bool = False  # Also open the page in the default browser.


def run_app(args: App) -> None:
    try:
        from .. import app
    except ImportError as error:
        raise InputError(f'the page needs {error.name}: pip install "hyperdreambooth[app]".') from error
    user, colon, password = (args.auth or "").partition(":")
    if args.auth is not None and not (user and colon and password):
        raise InputError("--auth must be USER:PASSWORD.")
    app.check_host(args.host, args.auth)

    def open_base(name: str) -> HyperDreamBooth:
        return args.machine.open(name, args.hypernetwork if name == args.base else "auto")

    where: dict[str, Any] = {"host": args.host, "port": args.port, "auth": (user, password) if args.auth else None}
    more: dict[str, Any] = {"bases": args.bases, "max_upload_mb": args.max_upload_mb, "browser": args.browser}
    server = app.start(open_base(args.base), open_base=open_base, **where, **more)
    say(f"{server.url}: open it in a browser; Ctrl-C ends it and deletes what was uploaded and made")
    try:
        threading.Event().wait()
    finally:
        server.close()
