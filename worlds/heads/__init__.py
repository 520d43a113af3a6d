"""The heads world: rendered people, turned, lit and dressed. What others need is `person`, `context`, `render` and `caption`."""

from .contexts import PLAIN, Context, caption, context
from .people import Person, person
from .renderer import render

__all__ = ["PLAIN", "Context", "Person", "caption", "context", "person", "render"]
