"""Draws docs/imports.svg, the import graph in layers: every top-level module or package stands above all others that it imports.

python docs/imports.py      (with --check it only compares the file: exit status 1 if it is out of date)
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "hyperdreambooth"
PICTURE = Path(__file__).with_name("imports.svg")
LEFT_OUT = {"__init__", "__main__", "assets"}


def rooms() -> dict[str, set[str]]:
    """The top-level modules and packages of hyperdreambooth, each with the others that it imports."""
    found: dict[str, set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        room = found.setdefault(parts[0].removesuffix(".py"), set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                room |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    names = set(found) - LEFT_OUT
    return {name: (found[name] & names) - {name} for name in names}


def floors() -> list[list[str]]:
    """The modules and packages by layer, the lowest first: the length of the longest import chain down to one that imports no other."""
    imports = rooms()

    @cache
    def height(name: str) -> int:
        return 1 + max((height(other) for other in imports[name]), default=-1)

    top = max(map(height, imports))
    return [sorted(name for name in imports if height(name) == level) for level in range(top + 1)]


def drawn() -> str:
    levels = floors()[::-1]
    width, tall = 920, 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{tall * len(levels)}" font-family="system-ui, sans-serif" font-size="13">'
    ]
    for row, names in enumerate(levels):
        step = width / len(names)
        for column, name in enumerate(names):
            x, y = column * step + 6, row * tall + 6
            lines.append(f'<rect x="{x:.0f}" y="{y}" width="{step - 12:.0f}" height="30" rx="6" fill="#eef1fb" stroke="#8795c9"/>')
            lines.append(f'<text x="{x + step / 2 - 6:.0f}" y="{y + 20}" text-anchor="middle" fill="#1f2a5c">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    if "--check" in sys.argv:
        return int(PICTURE.read_text(encoding="utf-8") != drawn())
    PICTURE.write_text(drawn(), encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
