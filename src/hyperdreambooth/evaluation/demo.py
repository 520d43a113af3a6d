"""`hyperdreambooth demo`: one example face, the whole way, and a report that opens anywhere."""

import html
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from .. import photos
from ..api import HyperDreamBooth
from ..assets import toon
from ..checkpoint import write_atomically
from ..errors import InputError
from ..progress import say
from .report import cells, document, embedded


def demo(hdb: HyperDreamBooth, output: Path, face: int) -> None:
    """Personalizes example face number `face`, draws it in every context, and writes `output`/index.html."""
    started = time.perf_counter()
    folder = toon.directory("faces")
    about = json.loads((folder / "faces.json").read_text(encoding="utf-8"))
    count, prompts = len(about["people"]), about["prompts"]
    if not 1 <= face <= count:
        raise InputError(f"there are example faces 1 to {count}, not {face}.")
    reference = folder / f"face-{face:02d}.png"
    side = about["size"]
    with Image.open(folder / "truth.webp") as sheet:
        row = np.asarray(sheet.convert("RGB"))[(face - 1) * side : face * side]
    truths = [Image.fromarray(cell) for cell in np.split(row, row.shape[1] // side, axis=1)[2:]]

    me = hdb.personalize(reference)
    lora = me.save(output / "me.safetensors", overwrite=True)
    me.save_tokens(output / "me.tokens", overwrite=True)
    took, drawing = {"personalize": sum(me.seconds.values()), **me.seconds}, time.perf_counter()
    drawn = [hdb.generate(prompts, person, seed=face) for person in (None, me.predicted, me)]
    took["pictures"] = time.perf_counter() - drawing
    photo = photos.load_photo(reference)
    columns = ["photo", "the base alone", "prediction only", "fine-tuned", "the right answer"]
    rows = [[photo, *row] for row in zip(*drawn, truths, strict=True)]
    grid = photos.save_png(photos.grid(rows, prompts, columns, cell=128), output / "grid.png", {"ai_generated": "true"}, overwrite=True)
    text = document(
        "One photo in, a personal LoRA out",
        "<p>Nobody trained on this person. The hypernetwork saw the photo once and predicted a LoRA; "
        f"{me.metadata.get('hyperdreambooth.steps')} steps of rank-relaxed fine-tuning made it fit. The right answer is the same person, "
        "drawn as the prompt asks for. All of it is the embedded toon world, 64 x 64 pixels.</p>",
        f"<p>{', '.join(f'{name} {seconds:.1f} s' for name, seconds in took.items())}. "
        f"LoRA: {lora.name}, rank {me.rank}, {len(me.loras)} layers, {lora.stat().st_size / 1e3:.0f} KB.</p>",
        cells([[html.escape(prompt), *map(embedded, row)] for prompt, row in zip(prompts, rows, strict=True)], ["prompt", *columns]),
    )
    report = write_atomically(output / "index.html", lambda file: file.write_text(text, encoding="utf-8"))
    whole = time.perf_counter() - started
    say(f"personalized in {took['personalize']:.1f} s, {3 * len(prompts)} pictures in {took['pictures']:.1f} s, in all {whole:.1f} s")
    for path, what in ((lora, "the LoRA"), (grid, "the pictures"), (report, "the report: open it in a browser")):
        say(f"{path}: {what}")
