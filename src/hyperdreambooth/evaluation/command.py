"""`hyperdreambooth evaluate`: JSON, a table, and a grid of people beside the right answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import photos
from ..api import HyperDreamBooth
from ..assets import toon
from ..checkpoint import read_json, read_tensors, write_json
from ..errors import InputError
from ..progress import say
from . import Request, harness, report
from .atlas import Atlas, load_atlas
from .evaluate import GUIDANCE, IDENTITY_GUIDANCE, ROWS, Judges, environment, evaluate, fingerprint
from .judges import Judge
from .methods import METHODS, Method

COLUMNS = {
    "rank1": "rank-1",
    "rank1_crowd": "in the crowd",
    "rank1_lookalikes": "among look-alikes",
    "similarity": "similarity",
    "context_seen": "context, seen",
    "context_held_out": "context, held out",
    "perceptual_distance": "perceptual distance",
    "pixel_distance": "pixel distance",
    "copied": "copies",
}

COMPARED = {
    **{key: COLUMNS[key] for key in ("rank1", "rank1_crowd")},
    "auc": "AUC",
    "similarity": "similarity",
    "context": "context",
    "perceptual_distance": "perceptual distance",
    "leakage": "leakage",
    "prior_drift": "prior drift",
    "diversity": "diversity",
    "steps": "steps",
    "seconds": "seconds",
    "numbers": "trained numbers",
}
"""Columns of the comparison of methods."""

SHEET = ("base", "prediction", "prediction+guidance", "finetuned", "finetuned+guidance")
"""Rows on the contact sheet."""


def run(args: Request, open_base: Callable[[str, str], HyperDreamBooth]) -> None:
    """Measures; keeps rows that the output has already, unless `overwrite`."""
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        raise InputError(f"{min(unknown)} is no row; there are {', '.join(ROWS)}.")
    chosen = chosen_methods(args) if args.methods or args.search or args.quick else {}
    hdb = open_base("toon", "auto")
    atlas = load_atlas(args.atlas, args.split)
    files = [args.atlas / f"{name}.safetensors" for name in ("training", "strangers")]
    known = [read_tensors(file)[0]["embeddings"].float() if file.is_file() else None for file in files]
    judges = Judges(Judge.from_pretrained(toon.directory("recogniser")), Judge.from_pretrained(toon.directory("classifier")), *known)
    folder = args.faithful or Path("benchmarks/faithful")
    asked = any(method.faithful for method in chosen.values()) if chosen else "faithful" in (args.rows or ROWS)
    faithful = open_base("toon", str(folder)) if asked and folder.is_dir() else None
    if not chosen:
        atlas = atlas.first(args.people)
    settings = {
        "split": args.split,
        "people": len(atlas.people),
        "pictures": args.pictures,
        "personalize": _fields(hdb.personalize_config()),
        "denoising_steps": hdb.generate_config().steps,
        "guidance": GUIDANCE,
        "identity_guidance": IDENTITY_GUIDANCE,
        "weights": fingerprint(hdb, atlas, judges),
    }
    if faithful is not None:
        settings["faithful"] = fingerprint(faithful, atlas, judges)
    about = {"command": " ".join(["hyperdreambooth", *sys.argv[1:]]), **environment(hdb)}
    if chosen:
        stamp = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        bench = harness.Bench(hdb, atlas, judges, args.output.with_suffix(".cache"), stamp, faithful)
        run_methods(args, bench, chosen, about | {"settings": settings})
        return
    done: dict[str, Any] = {}
    if args.output.is_file() and not args.overwrite:
        before = json.loads(args.output.read_text(encoding="utf-8"))
        settings = {**before["settings"], **settings}  # of faithful weights too, where this run doesn't measure them
        if "methods" in before or any(before["settings"].get(name, value) != value for name, value in settings.items()):
            raise InputError(f"{args.output} was measured with other settings or weights. Give --overwrite, or another path.")
        done = before["rows"]

    def save(row: str, figures: dict[str, Any]) -> None:
        done[row] = figures
        write_json(args.output, {**about, "settings": settings, "rows": {name: done[name] for name in ROWS if name in done}})

    _, drawn = evaluate(hdb, atlas, judges, args.rows or ROWS, pictures=args.pictures, faithful=faithful, done=done, on_row=save)
    table = markdown_table(done)
    say(table)
    args.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    # pictures aren't kept: a run that only went on would overwrite the whole sheet with a part of it
    if drawn and all(name in drawn for name in SHEET if name in done):
        sheet = args.output.with_suffix(".png")
        photos.save_png(contact_sheet(atlas, drawn), sheet, {"ai_generated": "true"}, overwrite=True)
        say(f"{sheet}: the first people")
    say(f"{args.output}: all figures")


def compare(words: Sequence[str]) -> None:
    """`compare A.json B.json`: what differs beyond the intervals."""
    if len(words) != 3 or words[0] != "compare":
        raise InputError(f"{' '.join(words)!r} isn't understood: `compare A.json B.json` compares two results.")
    one, other = (read_json(Path(word)).get("rows") for word in words[1:])
    if not one or not other:
        raise InputError(f"{words[1] if not one else words[2]} holds no rows: it isn't a result of evaluate.")
    say(report.differences(one, other))


def chosen_methods(args: Request) -> dict[str, Method]:
    """The methods that are asked for, with the settings that a search found, and few steps where it must be quick."""
    names = METHODS if not args.methods or args.methods == ("all",) else args.methods
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no method; there are {', '.join(METHODS)}.")
    methods = {name: METHODS[name] for name in names}
    if args.settings:
        methods = harness.with_settings(methods, read_json(args.settings).get("search", {}))
    if args.quick:
        methods = {name: dataclasses.replace(method, steps=min(method.steps, 10)) for name, method in methods.items()}
    return {name: method for name, method in methods.items() if method.rates} if args.search else methods


def run_methods(args: Request, bench: harness.Bench, methods: dict[str, Method], about: dict[str, Any]) -> None:
    """Searches or compares, and writes what it has after every few people: JSON, a table, and a report."""
    before = read_json(args.output) if args.output.is_file() and not args.overwrite else {}
    if before and (before["settings"] != about["settings"] or ("search" if args.search else "methods") not in before):
        raise InputError(f"{args.output} was measured with other settings or weights. Give --overwrite, or another path.")
    people = args.people or (2 if args.quick else len(bench.atlas.people))
    if args.search:
        found = before.get("search", {})
        few = dataclasses.replace(bench, atlas=bench.atlas.only(range(0, len(bench.atlas.prompts), 2)), extras=False)
        for name, method in methods.items():
            say(name)
            found[name] = found.get(name) or harness.search(few, method, name, people)
            write_json(args.output, {**about, "people": people, "search": found})
        say(f"{args.output}: all that was tried, and the best of it")
        return
    if bench.faithful is None:
        methods = {name: method for name, method in methods.items() if not method.faithful}
    timings = before.get("timings", {})
    if not {name for name, method in methods.items() if bench.steps(method)} <= set(timings):
        timings = harness.timed(bench, methods)
    settings = {name: dataclasses.asdict(method) for name, method in methods.items()}
    searched = read_json(args.settings).get("search", {}) if args.settings else {}

    def save(rows: dict[str, Any], curves: dict[str, Any], done: int) -> None:
        figures = {**about, "methods": settings, "people": done, "timings": timings, "rows": rows, "curves": curves, "search": searched}
        write_json(args.output, figures)
        table = markdown_table(rows, COMPARED)
        texts = {
            ".md": table + "\n",
            ".html": report.page("Methods of personalization", figures, table, bench.worst(methods, done)),
        }
        if curves:
            texts[".svg"] = report.curves(curves, "seconds")
        for suffix, text in texts.items():
            args.output.with_suffix(suffix).write_text(text, encoding="utf-8")
        say(f"{args.output}, .md and .html: {done} people")

    harness.compare(bench, methods, timings, people, save)
    say(markdown_table(read_json(args.output)["rows"], COMPARED))


def _fields(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name != "origins"}


def markdown_table(rows: dict[str, Any], columns: dict[str, str] = COLUMNS) -> str:
    """Rows x figures with their 95 % intervals; shares in per cent."""
    lines = ["| row | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in [name for name in dict.fromkeys((*ROWS, *METHODS)) if name in rows]:
        cells = [_cell(rows[name].get(key), key) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: list[float] | float | None, key: str) -> str:
    if figure is None:
        return "-"
    if not isinstance(figure, list):
        return f"{figure:,}"
    mean, low, high = figure
    plain = key in ("similarity", "auc", "leakage", "prior_drift", "diversity") or key.endswith("_distance")
    return f"{mean:.3f} ({low:.3f}-{high:.3f})" if plain else f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def contact_sheet(atlas: Atlas, drawn: dict[str, Tensor], people: int = 20) -> Any:
    """A row a person: the reference, then for two prompts the right answer and every row's first picture."""
    shown = [name for name in SHEET if name in drawn]
    rows, columns = [], ["reference"]
    prompts = [0, len(atlas.prompts) - 3] if len(atlas.prompts) > 3 else [0]
    columns += ["true", *shown] * len(prompts)
    for person in range(min(people, len(atlas.people))):
        cells = [atlas.references[person]]
        for prompt in prompts:
            cells += [atlas.truths[person, prompt], *(drawn[name][person, prompt, 0] for name in shown)]
        rows.append([image for cell in cells for image in photos.to_images(cell[None])])
    return photos.grid(rows, [""] * len(rows), columns, cell=128)
