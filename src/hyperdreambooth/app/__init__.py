"""A page in the browser on which the whole main job works; it calls the Python API and has no logic of its own.

page.py lays it out and runs it, actions.py is what its buttons (and Gradio's clients) call, sessions.py keeps visitors apart.
"""

import os

# before gradio is imported: nothing is reported to anyone
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from .page import SCHEDULERS, Server, check_host, start

__all__ = ["SCHEDULERS", "Server", "check_host", "start"]
