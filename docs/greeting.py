"""Draws the welcome picture of the web page, an example face beside pictures generated of it: `python docs/greeting.py`."""

from pathlib import Path

from PIL import Image

from hyperdreambooth import HyperDreamBooth, assets
from hyperdreambooth.assets import toon

FACE = 5
PROMPTS = (
    "a [V] face wearing a santa hat on a purple background",
    "a smiling [V] face wearing a cap on a red background",
    "a [V] face with dark glasses on a pink background",
    "a pencil sketch of a [V] face",
    "a blueprint of a [V] face",
)
SIDE, GAP = 160, 48


def main() -> None:
    photo = toon.directory("faces") / f"face-{FACE:02d}.png"
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu")
    drawn = hdb.generate(list(PROMPTS), hdb.personalize(photo, quiet=True), seed=1)
    strip = Image.new("RGBA", (6 * SIDE + GAP + 4 * 8, SIDE))
    for index, picture in enumerate([Image.open(photo), *drawn]):
        x = index * (SIDE + 8) + (GAP - 8) * (index > 0)
        strip.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, 0))
    strip.save(Path(assets.__file__).with_name("greeting.webp"), quality=88)


if __name__ == "__main__":
    main()
