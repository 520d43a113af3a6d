"""Runs the page: on the loopback address unless told otherwise, and then only with a password."""

import asyncio
import contextlib
import ipaddress
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before gradio is imported: nothing is reported to anyone
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..api import HyperDreamBooth
from ..errors import InputError
from .actions import Actions
from .page import CSS, HEAD, build, theme
from .sessions import Guard, Visits

SWEEP = 60
"""Seconds between two looks for visits that are over."""


@dataclass
class Server:
    """A running page. `url` is where; `close` ends it and deletes all that was uploaded and made."""

    page: gr.Blocks
    url: str
    visits: Visits
    cache: str | None

    def close(self) -> None:
        for session in list(self.visits.visits):
            self.visits.end(session)
        self.page.close(verbose=False)
        clean(self.visits, self.cache)


def clean(visits: Visits, cache: str | None) -> None:
    """Deletes all files, and gives the environment's name of Gradio's folder back to whoever had it."""
    shutil.rmtree(visits.root, ignore_errors=True)
    os.environ.pop("GRADIO_TEMP_DIR", None)
    os.environ |= {"GRADIO_TEMP_DIR": cache} if cache is not None else {}


def start(
    hdb: HyperDreamBooth,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    max_upload_mb: int = 50,
    browser: bool = False,
) -> Server:
    """Starts the page and returns at once.

    Args:
        port: None takes the first free one from 7860.
        auth: user and password, asked of everyone.
        max_upload_mb: larger files are refused while they arrive.

    Raises InputError for another address than loopback without `auth`, and where the port is taken.
    """
    check_host(host, auth)
    visits = Visits(Path(tempfile.mkdtemp(prefix="hyperdreambooth-")).resolve())
    cache = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(visits.root)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP)
                visits.sweep()

        task = asyncio.create_task(sweep())
        yield
        task.cancel()

    gates = [Middleware(Guard, visits=visits)]
    if is_loopback(host):  # a name that another site lets point here isn't answered
        gates.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host]))
    page = build(Actions(hdb, visits))
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            footer_links=["api"],
            max_file_size=max_upload_mb * 1_000_000,
            state_session_capacity=100,
            theme=theme(),
            css=CSS,
            head=HEAD,
            app_kwargs={"middleware": gates, "lifespan": lifespan},
        )
    except OSError as error:
        clean(visits, cache)
        raise InputError(f"port {port or '7860 and the hundred after it'} can't be used on {host}. Give another with --port.") from error
    return Server(page, url, visits, cache)


def check_host(host: str, auth: object) -> None:
    """Raises InputError where others can reach the address and nobody would be asked who they are."""
    if not is_loopback(host) and not auth:
        raise InputError(f"{host} can be reached by others: give --auth USER:PASSWORD as well, or leave --host out.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
