"""The heads world: rendered people, turned, lit and dressed. `person`, `context`, `render` and `caption` are all that others need."""
