"""Reports for readers: curves as SVG, and an HTML page in a single file."""

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image, ImageOps

from .. import assets

ASSETS = Path(assets.__file__).parent / "report"
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True)
LARGEST = 256  # The largest side in pixels of pictures on a page.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")  # Distinct for the color-blind, too (Okabe and Ito).


def embedded(image: Image.Image) -> Markup:
    """An <img> element that contains the picture itself; a large one as a thumbnail."""
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= LARGEST else "webp"
    if kind == "webp":
        image = ImageOps.contain(image, (LARGEST, LARGEST))
    image.save(buffer, format=kind)
    return Markup(f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">')


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Markup:
    """Curves as SVG: each line's points are (x, y), on a logarithmic x axis with 0 at its left end. `x` and `y` are the axes' titles."""
    width, height, left, top = 720, 340, 60, 16
    points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
    least, most = min((at for at, _ in points if at > 0), default=1.0), max(at for at, _ in points)
    low = math.log10(max(min(at for at, _ in points), least / 2))
    high = max(math.log10(max(most, least / 2)), low + 0.1)
    bottom, best = min(0.0, *(value for _, value in points)), max(value for _, value in points) or 1.0

    def place(at: float, value: float) -> tuple[float, float]:
        across = (math.log10(max(at, least / 2)) - low) / (high - low)
        return left + across * (width - left - 16), top + (best - value) / (best - bottom) * (height - top - 46)

    marks = [0.0] * any(at == 0 for at, _ in points) + [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    levels = [bottom + (best - bottom) * step / 4 for step in range(5)]
    drawn = TEMPLATES.get_template("plot.svg").render(
        size=(width, height, left),
        axes=(x, y),
        marks=[(f"{mark:g}", place(mark, 0)[0]) for mark in marks if mark == 0 or least <= mark <= most],
        levels=[(f"{level:.3f}", place(least, level)[1]) for level in levels],
        lines=[(name, color, [place(*point) for point in line]) for (name, line), color in zip(lines.items(), itertools.cycle(COLORS))],
    )
    return Markup(drawn)


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], over: str, figure: str) -> Markup:
    """A plot of one figure of the methods, over "steps" or "seconds"."""
    lines = {name: [(point[over], point[figure][0]) for point in line if figure in point] for name, line in found.items()}
    return plot({name: line for name, line in lines.items() if line}, over, figure)


def document(title: str, sections: Sequence[Mapping[str, Any]]) -> str:
    """A whole HTML page, which needs no other file; its last line says which pictures are AI-generated.

    Args:
        sections: each may have `title`, `texts` (paragraphs), `head` and `rows` (cells of a table; `wide` halves its pictures), and
            `plot`. Text is escaped.
    """
    return TEMPLATES.get_template("page.html").render(title=title, sections=sections)


def page(
    figures: Mapping[str, Any], table: str, grids: Mapping[str, Mapping[str, Sequence[Image.Image]]], prompts: Sequence[str], main: str
) -> str:
    """The report: the Markdown `table`, curves of the figure `main`, grids of pictures by person and method, and a search's results."""
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    settings = figures["settings"]
    source = f"the {settings['split']} split" if "split" in settings else settings["people of"]
    texts = [f"{figures['people']} people of {source}, 95 % intervals over people."]
    texts += [f"Agreement of {pair}, Spearman's correlation over all pictures: {found}." for pair, found in figures["agreement"].items()]
    sections: list[dict[str, Any]] = [{"texts": texts, "head": head, "rows": rows, "wide": True}]
    shown = ("seconds", "steps") if figures["curves"] else ()
    sections += [{"title": f"Identity over {over}", "plot": curves(figures["curves"], over, main)} for over in shown]
    for person, grid in grids.items():
        cells = [[name, *map(embedded, pictures)] for name, pictures in grid.items()]
        sections.append({"title": person, "head": ["", *prompts], "rows": cells, "wide": True})
    for name, found in figures["search"].items():
        tried: dict[str, list[tuple[float, float]]] = {}
        for one in found.get("tried", []):
            tried.setdefault(f"rate {one['rate']:g}, {one['levels']} levels", []).append((one["steps"], one["perceptual_distance"][0]))
        sections.append({"title": f"Search: {name}", "plot": plot(tried, "steps", "perceptual distance (low is good)")})
    return document("Methods of personalization", sections)
