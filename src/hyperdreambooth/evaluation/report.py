"""What was measured, for people: tables, curves, and one HTML page that opens anywhere."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import assets

STYLE = (Path(assets.__file__).parent / "report.css").read_text(encoding="utf-8")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
"""Told apart by everybody (Okabe and Ito)."""


def embedded(image: Image.Image) -> str:
    """A picture as a part of the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def cells(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """An HTML table of ready cells."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Curves as an SVG: each line's points are (x, y), x on a logarithmic scale with 0 at its left end."""
    width, height, left, top = 720, 340, 60, 16
    points = [point for line in lines.values() for point in line]
    least = min((at for at, _ in points if at > 0), default=1.0)
    scale = [math.log10(max(at, least / 2)) for at, _ in points]
    low, high = min(scale), max(max(scale), min(scale) + 0.1)
    bottom, best = min(0.0, *(value for _, value in points)), max(value for _, value in points) or 1.0

    def place(at: float, value: float) -> tuple[float, float]:
        across = (math.log10(max(at, least / 2)) - low) / (high - low)
        return left + across * (width - left - 16), top + (best - value) / (best - bottom) * (height - top - 46)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 20 * len(lines)}" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="100%" height="100%" fill="#ffffff"/>')
    most = max(at for at, _ in points)
    marks = [0.0] * any(at == 0 for at, _ in points) + [
        digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5) if least <= digit * 10.0**power <= most
    ]
    parts += [f'<text x="{place(mark, 0)[0]:.0f}" y="{height - 28}" text-anchor="middle">{mark:g}</text>' for mark in marks]
    for value in (bottom + (best - bottom) * step / 4 for step in range(5)):
        across = place(least, value)[1]
        parts.append(f'<path d="M{left} {across:.0f}H{width - 16}" stroke="#dddddd"/><text x="4" y="{across + 4:.0f}">{value:.3f}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">{html.escape(x)}; up: {html.escape(y)}</text>')
    for index, (name, line) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        placed = [place(*point) for point in line]
        parts.append(f'<path d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in placed)}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in placed]
        parts.append(f'<text x="{left}" y="{height + 12 + 20 * index}" fill="{color}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], over: str, figure: str = "similarity") -> str:
    """The methods' figure over steps or seconds."""
    return plot({name: [(point[over], point[figure][0]) for point in line] for name, line in found.items()}, over, figure)


def document(title: str, *parts: str) -> str:
    """A whole HTML page, which needs no other file; the last line says what is AI-generated."""
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    foot = '<p class="small">The pictures are AI-generated, but for photos and right answers.</p></html>'
    return "\n".join([head, f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>", *parts, foot])


def page(title: str, figures: Mapping[str, Any], table: str, grids: Mapping[str, tuple[list[list[str]], list[str]]]) -> str:
    """The report: the Markdown table's figures, the curves, what the search tried, and grids of pictures (rows of cells, heads)."""
    head, _, *rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in table.splitlines()]
    parts = [f"<p>{figures['people']} people of the {figures['settings']['split']} split, 95 % intervals over people.</p>"]
    parts.append(f'<div class="wide">{cells(rows, head)}</div>')
    if figures["curves"]:
        parts += [f"<h2>Identity over {over}</h2>{curves(figures['curves'], over)}" for over in ("seconds", "steps")]
    for name, (lines, columns) in grids.items():
        parts.append(f'<h2>{html.escape(name)}</h2><div class="wide">{cells(lines, columns)}</div>')
    for name, found in figures.get("search", {}).items():
        tried: dict[str, list[tuple[float, float]]] = {}
        for one in found["tried"]:
            tried.setdefault(f"rate {one['rate']:g}, {one['levels']} levels", []).append((one["steps"], one["perceptual_distance"][0]))
        parts.append(f"<h2>Search: {html.escape(name)}</h2>{plot(tried, 'steps', 'perceptual distance (low is good)')}")
    return document(title, *parts)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Two results as a Markdown table of the figures whose intervals don't meet: row, figure, before, after."""
    lines = ["| row | figure | first | second |", "|---|---|---|---|"]
    for row in [row for row in one if row in other]:
        for name, figure in one[row].items():
            after = other[row].get(name)
            if isinstance(figure, list) and isinstance(after, list) and (figure[2] < after[1] or after[2] < figure[1]):
                before, now = (f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in (figure, after))
                lines.append(f"| {row} | {name} | {before} | {now} |")
    return "\n".join(lines)
