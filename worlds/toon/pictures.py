"""The pictures of the toon world: rendered people, style filters, captions.

A person is a number: training people count from 0, and validation and test people have separate ranges, so nothing can leak
between splits. A context is a dict of five choices (see contexts.json); "seen" contexts are those that hypernetworks may
train on, while the base is trained on all of them.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pixels import to_tensor as to_tensor

HERE = Path(__file__).parent
CONTEXTS: dict[str, dict[str, dict[str, Any]]] = json.loads((HERE / "contexts.json").read_text(encoding="utf-8"))
SIZE = 64
TRAIN_PEOPLE = 12_000
BASE_PEOPLE = 80_000
HYPER_PEOPLE = 130_000
"""The base and the recognizer train on more people than the classifier and the decoder do, hypernetworks on still more."""
CONTEXTS_EACH = 4
FIRST = {"train": 0, "validation": 1_000_000, "test": 2_000_000, "faces": 3_000_000, "gallery": 4_000_000}
"""First person of each split."""
STYLES = list(CONTEXTS["style"])
KINDS = list(CONTEXTS)
HAIR_COLOR = {
    "#272421": "black",
    "#3d2314": "brown",
    "#5a3825": "brown",
    "#8d5524": "brown",
    "#cc9966": "blond",
    "#b55239": "red",
    "#e9c67b": "blond",
    "#9c9c9c": "gray",
}
DARK_SKINS = {"#ad6453", "#74453d", "#5c3937"}
BROWN_SKINS = {"#bb876f", "#a67358"}


def render(out: Path, arguments: list[str]) -> None:
    """Runs the renderer (Node.js) unless its output, `out`.rgb and `out`.jsonl, exists."""
    if out.with_suffix(".jsonl").is_file() and out.with_suffix(".rgb").is_file():
        return
    if not (HERE / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + "-partial")
    subprocess.run(["node", "render.mjs", *arguments, "--out", str(temporary.resolve())], cwd=HERE, check=True)
    for suffix in (".rgb", ".jsonl"):
        temporary.with_suffix(suffix).replace(out.with_suffix(suffix))


def render_plan(out: Path, plan: list[dict[str, Any]]) -> Pictures:
    """Renders given people in given contexts: a list of {"person": n, "context": {...}}."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".plan")
    file.write_text("".join(json.dumps(job) + "\n" for job in plan), encoding="utf-8")
    out.with_suffix(".rgb").unlink(missing_ok=True)
    render(out, ["--plan", str(file.resolve())])
    return Pictures.load(out)


@dataclass
class Pictures:
    """Pictures (N, 64, 64, 3) uint8 after the style filters, and a row for each: person, context and identity."""

    pixels: np.ndarray
    rows: list[dict[str, Any]]

    @staticmethod
    def load(stem: Path) -> Pictures:
        rows = [json.loads(line) for line in stem.with_suffix(".jsonl").open(encoding="utf-8")]
        pixels = np.fromfile(stem.with_suffix(".rgb"), np.uint8).reshape(len(rows), SIZE, SIZE, 3)
        styles = np.array([STYLES.index(row["context"]["style"]) for row in rows])
        for index, style in enumerate(STYLES):
            hits = np.flatnonzero(styles == index)
            for start in range(0, len(hits) if style != "plain" else 0, 1000):
                chunk = hits[start : start + 1000]
                pixels[chunk] = filtered(pixels[chunk], style)
        return Pictures(pixels, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]

    @property
    def people(self) -> Tensor:
        return torch.tensor([row["person"] for row in self.rows])


def training_pictures(folder: Path) -> Pictures:
    """Training pictures of the encoder, the classifier and the decoder, rendered on first use (about 5 minutes)."""
    parts = []
    half = TRAIN_PEOPLE // 2
    for name, first in (("a", 0), ("b", half)):
        render(folder / name, ["--first", str(first), "--people", str(half), "--contexts", str(CONTEXTS_EACH)])
        parts.append(Pictures.load(folder / name))
    return Pictures(np.concatenate([p.pixels for p in parts]), [row for p in parts for row in p.rows])


def base_pictures(folder: Path) -> Pictures:
    """The base's and the recognizer's people, rendered on first use: half an hour of one core."""
    render(folder / "base", ["--first", "0", "--people", str(BASE_PEOPLE), "--contexts", str(CONTEXTS_EACH)])
    return Pictures.load(folder / "base")


def filtered(pixels: np.ndarray, style: str) -> np.ndarray:
    """Draws pictures (N, 64, 64, 3) uint8 in another style."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    gray = (x * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(gray, (2, 2, 2, 2), mode="replicate"), 5, 1)
    lines = (gray / blurred.clamp(min=0.05)).clamp(0, 1) ** 1.5  # dodge: dark strokes on white paper
    if style == "sketch":
        y = (0.75 * lines + 0.25 * gray).expand(-1, 3, -1, -1)
    elif style == "mono":
        y = gray.expand(-1, 3, -1, -1)
    elif style == "sepia":
        y = gray * torch.tensor([1.0, 0.86, 0.66]).reshape(1, 3, 1, 1) + torch.tensor([0.06, 0.03, 0.0]).reshape(1, 3, 1, 1)
    elif style == "blueprint":
        y = torch.tensor([0.1, 0.25, 0.6]).reshape(1, 3, 1, 1) + (1 - lines + 0.2 * (1 - gray)) * torch.tensor([0.9, 0.75, 0.4]).reshape(
            1, 3, 1, 1
        )
    elif style == "pixel":
        small = torch.nn.functional.avg_pool2d(x, 4)
        y = torch.nn.functional.interpolate((small * 7).round() / 7, scale_factor=4, mode="nearest")
    elif style == "poster":
        y = torch.where(x > 0.66, 1.0, torch.where(x > 0.33, 0.55, 0.1))
    else:
        raise ValueError(style)
    return y.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def is_seen(context: dict[str, str]) -> bool:
    """Whether hypernetworks may train on a context: every one of its choices is a seen one."""
    return all(CONTEXTS[kind][value]["seen"] for kind, value in context.items())


def identity_words(identity: dict[str, str], draw: random.Random) -> str:
    """A random partial description of a person, as in captions of real data sets: "bald man with a beard"."""
    adjectives = []
    hair = identity["hair"]
    if hair in ("bald", "short-bald"):
        adjectives += ["bald"] if draw.random() < 0.7 else []
    elif draw.random() < 0.7:
        length = (
            "long"
            if identity["hairBg"] != "none" or hair in ("longHair", "shaggy1", "shaggy2", "dreads")
            else "short"
            if "short" in hair or "fade" in hair.lower() or "crop" in hair
            else ""
        )
        adjectives.append(f"with {length} {HAIR_COLOR[identity['hairColor'].lower()]} hair".replace("  ", " "))
    tail = [a for a in adjectives if a.startswith("with")]
    head = [a for a in adjectives if not a.startswith("with")]
    skin = identity["skin"].lower()
    if draw.random() < 0.5:
        head.append("dark skinned" if skin in DARK_SKINS else "brown skinned" if skin in BROWN_SKINS else "light skinned")
    beard = identity["facialHair"]
    if beard != "none" and draw.random() < 0.7:
        kind = (
            "a mustache"
            if "mustache" in beard
            else "sideburns"
            if "sideburns" in beard or "mutton" in beard
            else "a goatee"
            if "goatee" in beard.lower() or "soul" in beard
            else "a beard"
        )
        tail.append(f"and {kind}" if tail else f"with {kind}")
    noun = "man" if identity["gender"] == "male" else "woman"
    return " ".join([*head, noun, *tail])


def caption(
    context: dict[str, str],
    *,
    mention: float = 1.0,
    draw: random.Random | None = None,
    identity: dict[str, str] | None = None,
    subject: str = "[V] face",
) -> str:
    """The caption of a context or of a part of one: "a pencil sketch of a smiling [V] face wearing a cap on a blue background".

    Every choice is mentioned with probability `mention`; with `identity`, the person is described too.
    """
    draw = draw or random.Random(0)
    said = {kind: CONTEXTS[kind][value]["words"] if draw.random() < mention else "" for kind, value in context.items()}
    words = dict.fromkeys(CONTEXTS, "") | said
    if context.get("background") == "white" and (not CONTEXTS["style"][context.get("style", "plain")]["colors"] or draw.random() < 0.6):
        words["background"] = ""
    who = subject + (f" of a {identity_words(identity, draw)}" if identity else "")
    who = f"{words['expression']} {who}".strip()
    text = f"a {words['style']} of a {who}" if words["style"] else f"a {who}"
    text = " ".join(part for part in (text, words["headwear"], words["eyewear"], words["background"]) if part)
    return text.replace("a angry", "an angry")


def written_prompts() -> list[str]:
    """Prompts of seen contexts as users write them: one choice alone (each prompt twice), and pairs of choices."""
    seen = [(kind, value) for kind, values in CONTEXTS.items() for value, choice in values.items() if choice["seen"] and choice["words"]]
    pairs = [dict(pair) for pair in itertools.combinations(seen, 2) if {kind for kind, _ in pair} != {"background", "style"}]
    alone = [{kind: value} for kind, value in seen]
    return [caption(context) for context in (*alone, *alone, *(pair for pair in pairs if len(pair) == 2))]


def slots() -> list[list[str]]:
    """The alternative phrases for each part of a photo's caption, as `stages.describe` takes them. Photos are plain drawings."""
    words = {kind: list(dict.fromkeys(choice["words"] for choice in choices.values())) for kind, choices in CONTEXTS.items()}
    return [["a"], words["expression"], ["[V] face"], words["headwear"], words["eyewear"], words["background"]]


def training_caption(row: dict[str, Any], draw: random.Random) -> str:
    """A caption for the base: sometimes empty, sometimes with [V], sometimes with a description of the person."""
    roll = draw.random()
    if roll < 0.1:
        return ""
    if roll < 0.6:
        return caption(row["context"], mention=0.93, draw=draw)
    if roll < 0.75:
        return caption(row["context"], mention=0.93, draw=draw, subject="face")
    return caption(row["context"], mention=0.93, draw=draw, subject="face", identity=row["identity"])


def vocabulary() -> list[str]:
    """Every word that a caption can contain."""
    fixed = "a an of the and with on in wearing face picture drawing portrait person man woman photo cartoon bald hair short long black brown blond red gray dark light skinned beard mustache goatee sideburns"
    words = set(fixed.split())
    for kind in CONTEXTS.values():
        for choice in kind.values():
            words.update(choice["words"].split())
    return sorted(words)
