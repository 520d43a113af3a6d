from dataclasses import dataclass

import tyro

from ..errors import InputError
from ..evaluation.request import Request
from .options import Command


@dataclass
class Evaluate(Request, Command):
    """Measure fidelity on people that were never trained on: identity, context, copying; a JSON and a table.

    hyperdreambooth evaluate -o fidelity.json
    hyperdreambooth evaluate --split validation --people 20 --rows prediction -o quick.json
    hyperdreambooth evaluate --split validation --people 8 --search -o search.json
    hyperdreambooth evaluate --methods all --settings search.json -o comparison.json
    hyperdreambooth evaluate compare before.json after.json
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """compare A.json B.json: which figures of two results differ beyond their intervals."""


def run(args: Evaluate) -> None:
    from ..evaluation import command

    if args.words:
        command.compare(args.words)
    elif args.output is None:
        raise InputError("where do the figures go? Give -o FILE.json.")
    else:
        command.run(args, args.output, args.machine.open)
