"""The command `demo`: the whole pipeline on an example face."""

import time
from dataclasses import dataclass
from pathlib import Path

from .. import STARTED
from ..errors import InputError
from ..progress import say
from .options import Command, Output, Writing


@dataclass
class Demo(Command, Writing):
    """Run the whole pipeline offline: personalize an example face that wasn't trained on, draw it anew, and write a report."""

    output: Output = Path("demo")  # Folder for the LoRA, the token file, a grid of pictures and the report, index.html.
    face: int = 1  # Number of a shipped example face, from 1.


def run_demo(args: Demo) -> None:
    from PIL import Image

    from .. import photos
    from ..assets import toon
    from ..checkpoint import read_json, write_atomically
    from ..evaluation.report import document, embedded

    args.refuse_existing(*(args.output / name for name in ("index.html", "me.safetensors", "me.tokens", "grid.png")))
    hdb = args.machine.open("toon")
    folder = toon.directory("faces")
    about = read_json(folder / "faces.json")
    count, prompts, side = len(about["people"]), about["prompts"], about["size"]
    if not 1 <= args.face <= count:
        raise InputError(f"there are example faces 1 to {count}, not {args.face}.")
    reference = folder / f"face-{args.face:02d}.png"
    with Image.open(folder / "truth.webp") as sheet:  # one row per person: two photos, then the true picture for each prompt
        strip = sheet.convert("RGB").crop((0, (args.face - 1) * side, sheet.width, args.face * side))
    truths = [strip.crop((left, 0, left + side, side)) for left in range(2 * side, strip.width, side)]

    me = hdb.personalize(reference)
    lora = me.save(args.output / "me.safetensors", overwrite=True)
    me.save_tokens(args.output / "me.tokens", overwrite=True)
    took, drawing = {"personalize": sum(me.seconds.values()), **me.seconds}, time.perf_counter()
    say(f"drawing {3 * len(prompts)} pictures: by the base alone, by the prediction, and fine-tuned")
    drawn = [hdb.generate(prompts, person, seed=args.face) for person in (None, me.predicted, me)]
    took["pictures"] = time.perf_counter() - drawing
    photo = photos.load_photo(reference)
    columns = ["photo", "the base alone", "prediction only", "fine-tuned", "the right answer"]
    rows = [[photo, *row] for row in zip(*drawn, truths, strict=True)]
    whole = photos.grid(rows, prompts, columns, cell=128)
    grid = photos.save_png(whole, args.output / "grid.png", {"ai_generated": "true"}, overwrite=True)
    way = (
        "Nobody trained on this person. The hypernetwork saw the photo once and predicted a LoRA; "
        f"{me.metadata.get('hyperdreambooth.steps')} steps of rank-relaxed fine-tuning made it fit. The right answer is the same person, "
        "drawn as the prompt asks for. All of it is the embedded toon world, 64 x 64 pixels."
    )
    cost = (
        f"{', '.join(f'{name} {seconds:.1f} s' for name, seconds in took.items())}. "
        f"LoRA: {lora.name}, rank {me.rank}, {len(me.loras)} layers, {lora.stat().st_size / 1e3:.0f} KB."
    )
    table = [[prompt, *map(embedded, row)] for prompt, row in zip(prompts, rows, strict=True)]
    text = document("One photo in, a personal LoRA out", [{"texts": [way, cost], "head": ["prompt", *columns], "rows": table}])
    report = write_atomically(args.output / "index.html", lambda file: file.write_text(text, encoding="utf-8"))
    say(f"personalized in {took['personalize']:.1f} s, pictures {took['pictures']:.1f} s, in all {time.perf_counter() - STARTED:.1f} s")
    for path, what in ((lora, "the LoRA"), (grid, "the pictures"), (report, "the report: open it in a browser")):
        say(f"{path}: {what}")
