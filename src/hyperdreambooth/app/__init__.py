"""A page in the browser on which the whole main job works; it calls the Python API and has no logic of its own.

page.py lays it out, actions.py is what its buttons (and Gradio's clients) call, downloads.py makes the files to download,
sessions.py keeps visitors apart, server.py runs it.
"""

from .page import SCHEDULERS
from .server import Server, check_host, start

__all__ = ["SCHEDULERS", "Server", "check_host", "start"]
