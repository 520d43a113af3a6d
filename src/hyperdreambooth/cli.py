"""The command line: a mapping of names to plain functions.

Every command is a dataclass whose fields are its flags; what stands behind or below each is its help; `--config FILE` reads them
from YAML or JSON. What a user got wrong is one line on stderr and exit code 2, never a traceback.
"""

import inspect
import os
import signal
import sys
from collections.abc import Sequence

import tyro

from . import __version__, commands
from .errors import InputError, TrainingError, unexpected
from .settings import read_config, required, updated

# before transformers is imported: without torchvision it prints two lines at import that concern nobody here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

USAGE = """usage: hyperdreambooth COMMAND [OPTIONS]      (hyperdreambooth COMMAND --help explains each)

One face photo in, a personal LoRA out, for any Stable Diffusion. --debug shows the whole trace of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help", "help"):
        print(USAGE)
        for group, names in commands.GROUPS.items():
            lines = [f"  {command:<19} {str(commands.load(command)[0].__doc__).splitlines()[0]}" for command in names]
            print("\n".join([group, *lines, ""]))
        return 0 if arguments else 2
    if name == "--version":
        print(__version__)
        return 0
    try:
        if name not in commands.COMMANDS:
            raise InputError(f"{name} is no command. There are: {', '.join(commands.COMMANDS)}.")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        kind, run = commands.load(name)
        code = run(parse(name, kind, arguments[1:])) or 0
        if "WORLD_SIZE" in os.environ:  # one of several processes
            from .training import leave

            leave()
        return code
    except KeyboardInterrupt:
        print("hyperdreambooth: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if debug:
            raise
        foreseen = isinstance(error, (InputError, TrainingError))
        print(f"hyperdreambooth: {error if foreseen else f'{unexpected(error)} --debug shows the trace.'}", file=sys.stderr)
        return 2


def parse(name: str, kind: type, arguments: list[str]) -> object:
    """A command's dataclass from flags, over a config file where `--config` names one."""
    arguments = [part for given in arguments for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    default = None
    arguments = getattr(kind, "expanded", list)(arguments)
    if "--config" in arguments[:-1]:
        file = arguments.pop(arguments.index("--config") + 1)
        arguments.remove("--config")
        default, values = kind(**dict.fromkeys(required(kind), tyro.MISSING)), read_config(file)  # what is required may still be given
        # a setting of `config` may stand beside it as well, as its flag does
        config = vars(default.config).keys() - vars(default).keys() if hasattr(default, "config") else ()
        inner = {key: values.pop(key) for key in list(values) if str(key).replace("-", "_") in config}
        default = updated(updated(default, {"config": inner} if inner else {}, file), values, file)
    # lines that are indented stay as they are; examples at the margin would be one paragraph
    lines = inspect.cleandoc(str(kind.__doc__)).splitlines()
    about = "\n".join(f"    {line}" if line.startswith("hyperdreambooth ") else line for line in lines)
    return tyro.cli(kind, prog=f"hyperdreambooth {name}", args=arguments, default=default, description=about)
