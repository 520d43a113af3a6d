from dataclasses import dataclass
from pathlib import Path

import tyro

from ..errors import InputError
from ..progress import say
from .options import Output, WithHypernetwork, Writing, check_lora_name, weighted


@dataclass
class Mix(WithHypernetwork, Writing):
    """Blend several people's token files, or LoRAs: FILE:WEIGHT each, or equal shares.

    hyperdreambooth mix alice.tokens:0.5 bob.tokens:0.5 -o both.safetensors
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """FILE[:WEIGHT] of each person; without a weight, an equal share."""
    output: Output
    """The LoRA file to write."""
    tokens: Path | None = None
    """Also write the blend as a token file."""
    strip: Path | None = None
    """Also draw the way from the first of two people to the second, in five pictures of one seed (.png)."""
    prompt: str | None = None
    """Prompt of the strip; default: the person's own prompt."""
    seed: int = 0
    """Seed of the strip's pictures."""


def run(args: Mix) -> None:
    from .. import photos

    check_lora_name(args.output)
    args.refuse_existing(args.output, args.tokens, args.strip)
    if args.strip and len(args.files) != 2:
        raise InputError(f"a strip leads from one person to another: it takes two token files, not {len(args.files)}.")
    hdb = args.machine.open(args.base, args.hypernetwork)
    shares = [weighted(file, 1 / len(args.files)) for file in args.files]
    people = [hdb.load(file) for file, _ in shares]
    me = hdb.mix([(person, weight) for person, (_, weight) in zip(people, shares, strict=True)])
    me.save(args.output, overwrite=args.overwrite)
    say(f"{args.output}: {' + '.join(args.files)}")
    if args.tokens:
        me.save_tokens(args.tokens, overwrite=args.overwrite)
        say(str(args.tokens))
    if args.strip:
        steps, (first, second) = (0.0, 0.25, 0.5, 0.75, 1.0), people
        prompt = args.prompt or me.prompt
        blends = [hdb.mix([(first, 1 - step), (second, step)]) for step in steps]
        row = [hdb.generate(prompt, blend, seed=args.seed)[0] for blend in blends]
        metadata = hdb.picture_metadata(prompt, args.seed, hdb.generate_config(), shares)
        photos.save_png(photos.grid([row], [""], [f"{step:g}" for step in steps]), args.strip, metadata, overwrite=True)
        say(f"{args.strip}: from {args.files[0]} (0) to {args.files[1]} (1)")
