"""A Gradio page for personalizing and generating in the browser, on top of the Python API.

page.py lays it out and serves it, actions.py has the handlers of its buttons (and of Gradio's API), replies.py the messages, sessions.py
keeps visitors and their files apart.
"""

import os

# Turns off Gradio's analytics; Gradio reads it when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from .page import SCHEDULERS, Server, check_host, start

__all__ = ["SCHEDULERS", "Server", "check_host", "start"]
