"""The errors that a user can cause. The command line prints their one message and exits with code 2; the API raises them."""


class InputError(ValueError):
    """Something that was given is wrong: the message says what, where, and what to do."""


class TrainingError(RuntimeError):
    """A training went wrong in a way that going on would hide (a loss that is not finite)."""
