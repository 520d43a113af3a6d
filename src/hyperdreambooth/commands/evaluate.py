"""Fidelity on people that were never trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ..errors import InputError
from ..evaluation.request import Request
from .options import Flat, Machine


@dataclass
class Evaluate(Request):
    """Measure fidelity on people that were never trained on: identity, context, copying; a JSON and a table.

    hyperdreambooth evaluate -o fidelity.json
    hyperdreambooth evaluate --split validation --people 20 --rows prediction -o quick.json
    hyperdreambooth evaluate --split validation --people 8 --search -o search.json
    hyperdreambooth evaluate --methods all --settings search.json -o comparison.json
    hyperdreambooth evaluate compare before.json after.json
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """compare A.json B.json: which figures of two results differ beyond their intervals."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)


def run(args: Evaluate) -> None:
    from ..evaluation import command

    if args.words:
        command.compare(args.words)
    elif args.output is None:
        raise InputError("where do the figures go? Give -o FILE.json.")
    else:
        command.run(args, args.output, args.machine.open)
