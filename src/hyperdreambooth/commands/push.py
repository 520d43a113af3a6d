from dataclasses import dataclass
from pathlib import Path

import tyro

from ..errors import InputError
from ..progress import say


@dataclass
class Push:
    """Upload a LoRA file, or a hypernetwork's folder, to the model hub, with a card that describes it. Private by default.

    A LoRA of a face is biometric data: whoever has the file can draw this person. --yes says that the person agrees.
    The token is the hub's own (`hf auth login`, or HF_TOKEN); HF_ENDPOINT names another hub.

        hyperdreambooth push hypernetwork me/my-hypernetwork
        hyperdreambooth push me.safetensors me/my-face --yes
    """

    path: tyro.conf.Positional[Path]
    """A LoRA file (.safetensors) or a folder that `train-hypernetwork` wrote."""
    repository: tyro.conf.Positional[str]
    """user/name on the hub; made if it isn't there."""
    public: bool = False
    """Make a new repository public."""
    yes: bool = False
    """The person whose face it is agrees to the upload."""


def run(args: Push) -> None:
    from .. import hub

    if not args.path.exists():
        raise InputError(f"{args.path}: no such file or folder.")
    if args.path.is_file() and not args.yes:
        raise InputError(f"{hub.CONSENT} Then say --yes.")
    address = hub.push(args.path, args.repository, public=args.public)
    say(f"{address}: {args.path.name}{'' if args.public else ' (a new repository is private)'}")
