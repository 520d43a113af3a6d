"""The command line: finds a command by its name, parses its flags, runs it.

Every command is a dataclass whose fields are its flags; the comment behind a field, or the string below it, is its help text;
`--config FILE` reads fields from YAML or JSON. A user's mistake is reported as one line on stderr with exit code 2, never as a traceback.
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

# set before transformers is imported: without torchvision it prints two warnings at import, and torchvision isn't needed here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

USAGE = """usage: hyperdreambooth COMMAND [OPTIONS]      (hyperdreambooth COMMAND --help explains each)

One face photo in, a personal LoRA out, for any Stable Diffusion. --debug shows the whole trace of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 where stdout was closed, 2 after an error or without a command, 130 after Ctrl-C."""
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
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM is handled like Ctrl-C
        kind, run = commands.load(name)
        code = run(parse(name, kind, arguments[1:])) or 0
        if "WORLD_SIZE" in os.environ:  # a launcher started several processes
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
    """Makes a command's dataclass from its flags; where `--config` names a file, its values are the defaults. Raises InputError."""
    arguments = [part for given in arguments for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    default, file = None, None
    arguments = getattr(kind, "expanded", list)(arguments)
    if "--config" in arguments[:-1]:
        file = arguments.pop(arguments.index("--config") + 1)
        arguments.remove("--config")
        default, values = kind(**dict.fromkeys(required(kind), tyro.MISSING)), read_config(file)  # flags may give required fields
        # fields of the nested `config` may be given at the top level too, as their flags are
        config = vars(default.config).keys() - vars(default).keys() if hasattr(default, "config") else ()
        inner = {key: values.pop(key) for key in list(values) if str(key).replace("-", "_") in config}
        default = updated(updated(default, {"config": inner} if inner else {}, file), values, file)
    # tyro keeps indented lines as they are; examples that aren't indented would be joined into one paragraph
    lines = inspect.cleandoc(str(kind.__doc__)).splitlines()
    about = "\n".join(f"    {line}" if line.startswith("hyperdreambooth ") else line for line in lines)
    args = tyro.cli(kind, prog=f"hyperdreambooth {name}", args=arguments, default=default, description=about)
    args.config_file = file
    return args
