"""Messages on the page: errors in one sentence, and the status of a job."""

import contextlib
import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..errors import InputError, TrainingError

log = logging.getLogger(__name__)


def in_one_sentence(action: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an action or generator: errors of users are shown on the page, without the server's folders; others are logged too."""

    @contextlib.contextmanager
    def sentence(self: Any) -> Iterator[None]:
        text = "Something went wrong on the server, whose log says what. Nothing that you made is lost: try again."
        try:
            yield
        except Exception as error:
            if isinstance(error, (InputError, TrainingError)):
                text = self.without_folders(str(error))
                text = text if "." in text.split()[0] else text[0].upper() + text[1:]  # a file name keeps its case
            else:
                log.exception("%s failed", action.__name__, exc_info=error)
            raise gr.Error(html.escape(text), duration=None, print_exception=False) from None

    @functools.wraps(action)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        with sentence(self):
            return action(self, *args, **named)

    @functools.wraps(action)
    def steps(self: Any, *args: Any, **named: Any) -> Iterator[Any]:
        with sentence(self):
            yield from action(self, *args, **named)

    return steps if inspect.isgeneratorfunction(action) else call


def bar(text: str, done: float = 0, total: float = 0) -> str:
    """HTML for a status message that screen readers announce, with a progress bar at `done` of `total` unless `total` is 0."""
    progress = f'<progress value="{done}" max="{total}" aria-label="{html.escape(text)}"></progress>' if total else ""
    return f'<div role="status" class="hdb-status">{progress}<span>{html.escape(text)}</span></div>'
