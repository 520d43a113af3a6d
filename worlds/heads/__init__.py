"""The heads world: rendered people in many poses, lights and clothes. Its interface is `person`, `context`, `render` and `caption`."""

from .contexts import PLAIN, Context, caption, context
from .people import Person, person
from .renderer import render

__all__ = ["PLAIN", "Context", "Person", "caption", "context", "person", "render"]
