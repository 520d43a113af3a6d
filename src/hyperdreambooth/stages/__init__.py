"""The five stages: each a dataclass of settings and a function. `api` and `cli` alone import them."""
