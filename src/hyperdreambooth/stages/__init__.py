"""The stages of training: each a dataclass of settings and a function. `api` and the commands alone import them."""
