"""`hyperdreambooth evaluate`: JSON, a table, and a grid of people beside the right answers."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import photos
from ..api import HyperDreamBooth
from ..assets import toon
from ..checkpoint import read_json, read_tensors, write_json
from ..errors import InputError
from ..progress import say
from ..settings import GenerateConfig, PersonalizeConfig
from . import Request, harness, photographs, report
from .evaluate import GUIDANCE, IDENTITY_GUIDANCE, Atlas, Judges, environment, fingerprint, load_atlas
from .harness import Bench
from .judges import Judge, open_judges
from .methods import METHODS, ROWS, Method

TITLES = read_json(report.ASSETS / "columns.json")
COLUMNS, COMPARED = (list(TITLES[name].items()) for name in ("rows", "methods"))
"""Figures and their titles in the table of rows, and in the comparison of methods."""
TOGETHER = 10  # People of a row who are fine-tuned side by side.
SHEET = ("base", "prediction", "prediction+guidance", "finetuned", "finetuned+guidance")  # Rows on the contact sheet.


def run(args: Request, output: Path, open_base: Callable[[str, str], HyperDreamBooth]) -> None:
    """Measures; keeps what the output has already, unless `overwrite`."""
    methods = chosen_methods(args)
    if isinstance(args.people, Path):
        run_photos(args, output, open_base, methods)
        return
    if args.base != "toon" or args.hypernetwork != "auto" or args.prompts or args.judges:
        raise InputError("--base, --hypernetwork, --prompts and --judges are for people of your own: name their folder with --people.")
    compared = bool(args.methods or args.search or args.quick)
    people = args.people or (2 if args.quick else None)
    hdb = open_base("toon", "auto")
    atlas = load_atlas(args.atlas, args.split).first(None if compared else people)
    files = [args.atlas / f"{name}.safetensors" for name in ("training", "strangers")]
    known = [read_tensors(file)[0]["embeddings"].float() if file.is_file() else None for file in files]
    judges = Judges(Judge.from_pretrained(toon.directory("recogniser")), Judge.from_pretrained(toon.directory("classifier")), *known)
    folder, faithful = args.faithful or Path("benchmarks/faithful"), None
    if any(method.faithful for method in methods.values()) and folder.is_dir():
        faithful = open_base("toon", str(folder))
    else:
        methods = {name: method for name, method in methods.items() if not method.faithful}
    settings = {
        "split": args.split,
        "people": len(atlas.people),
        "pictures": args.pictures,
        "personalize": plain(hdb.personalize_config()),
        "denoising_steps": hdb.generate_config().steps,
        "guidance": GUIDANCE,
        "identity_guidance": IDENTITY_GUIDANCE,
        "weights": fingerprint(hdb, atlas, judges),
    }
    bench = Bench(hdb, atlas, judges, output.with_suffix(".cache"), stamp(settings), faithful, count=args.pictures, extras=compared)
    if faithful is not None:
        settings["faithful"] = bench.faithful_stamp = fingerprint(faithful, atlas, judges)
    form = run_search if args.search else run_methods if compared else run_rows
    form(args, output, bench, methods, record(hdb, settings), people or len(atlas.people))


def run_photos(args: Request, output: Path, open_base: Callable[[str, str], HyperDreamBooth], methods: dict[str, Method]) -> None:
    """The comparison on people of a folder, with any base."""
    if args.search:
        raise InputError("a search needs right answers, which photos don't have: give rates and steps as --settings.")
    prompts, hdb = photographs.read_prompts(args.prompts or "hyperdreambooth"), open_base(args.base, args.hypernetwork)
    faithful = open_base(args.base, str(args.faithful)) if args.faithful else None
    lacking = {name: photographs.lacks(method, hdb, faithful is not None) for name, method in methods.items()}
    for name in [name for name, why in lacking.items() if why]:
        say(f"{name} is left out: {lacking[name]}.")
        del methods[name]
    if not methods:
        raise InputError("no method is left that could be measured.")
    if args.base != "toon" and not args.settings:
        say("rates and steps are those that suit the embedded world: give your base's own as --settings (docs/evaluation.md).")
    names = args.judges or ("dlib",)
    judges = open_judges(names, hdb.device)
    references, folk = photographs.read_people(Path(str(args.people)), hdb.backbone.size, judges)
    atlas = Atlas(references, torch.zeros(0), torch.zeros(len(folk), len(prompts), 0), prompts, [], [], list(range(len(folk))))
    drawn = hdb.generate_config(identity_guidance="off", steps=8 if args.quick else None)  # plain guidance, for all alike
    settings = {"pictures": args.pictures, "personalize": plain(hdb.personalize_config()), "generate": plain(drawn)}
    settings |= {"base": args.base, "hypernetwork": args.hypernetwork, "weights": fingerprint(hdb, atlas)}
    more: dict[str, Any] = {"folk": folk, "names": list(folk), "eyes": judges, "main": f"{next(iter(judges))}.similarity", "drawn": drawn}
    cache = output.with_suffix(".cache")
    bench = photographs.PhotoBench(hdb, atlas, None, cache, stamp(settings), faithful, count=args.pictures, **more)
    if faithful is not None:
        settings["faithful"] = bench.faithful_stamp = fingerprint(faithful, atlas)
    counts = {name: len(next(iter(found.values()))) for name, found in folk.items()}
    settings |= {"people of": str(args.people), "photos": counts, "prompts": prompts, "judges": list(names)}
    run_methods(args, output, bench, methods, record(hdb, settings), 2 if args.quick else len(folk))


def plain(config: PersonalizeConfig | GenerateConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("origins", "crop", "face")}


def stamp(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def record(hdb: HyperDreamBooth, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result says of itself."""
    command = " ".join(["hyperdreambooth", *sys.argv[1:]])
    return {"command": command, **environment(hdb), "settings": json.loads(json.dumps(settings))}


def kept(args: Request, output: Path, about: dict[str, Any], kind: str) -> dict[str, Any]:
    """What the output has already. Raises InputError where that is of another kind, or was measured with other settings or weights."""
    before = read_json(output) if output.is_file() and not args.overwrite else {}
    found = next((name for name in ("methods", "rows", "search") if name in before), "")  # a comparison has all three
    settings = before.get("settings")
    if before and (found != kind or not settings or any(settings.get(name, value) != value for name, value in about["settings"].items())):
        raise InputError(f"{output} was measured with other settings or weights. Give --overwrite, or another path.")
    return before


def run_rows(args: Request, output: Path, bench: Bench, methods: dict[str, Method], about: dict[str, Any], people: int) -> None:
    """Measures this project's own rows; writes JSON, a table and a contact sheet."""
    before = kept(args, output, about, "rows")
    about["settings"] = {**before.get("settings", {}), **about["settings"]}  # of faithful weights too, where this run doesn't measure them
    rows = before.get("rows", {})
    methods = {name: method for name, method in methods.items() if name not in rows}
    for start in range(0, people, TOGETHER):
        for name, method in methods.items():
            bench.make(name, method, range(start, min(start + TOGETHER, people)))
    for name, method in methods.items():
        rows[name] = bench.figures(name, method, bench.steps(method), people)
        write_json(output, {**about, "rows": {name: rows[name] for name in ROWS if name in rows}})
    table = markdown_table(rows)
    say(table)
    output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    shown = [name for name in SHEET if name in rows]
    # rows that were measured elsewhere came without their pictures: a part of the sheet wouldn't replace the whole
    if shown and not any(bench.missing(name, ROWS[name], range(people), [bench.steps(ROWS[name])]) for name in shown):
        drawn = {name: bench.pictures(name, ROWS[name], bench.steps(ROWS[name]), people) for name in shown}
        sheet = output.with_suffix(".png")
        photos.save_png(contact_sheet(bench.atlas, drawn), sheet, {"ai_generated": "true"}, overwrite=True)
        say(f"{sheet}: the first people")
    say(f"{output}: all figures")


def compare(words: Sequence[str]) -> None:
    """`compare A.json B.json`: a Markdown table of the figures whose intervals don't meet, and which settings differ."""
    if len(words) != 3 or words[0] != "compare":
        raise InputError(f"{' '.join(words)!r} isn't understood: `compare A.json B.json` compares two results.")
    results = [read_json(Path(word)) for word in words[1:]]
    one, other = (result.get("rows") for result in results)
    if not one or not other:
        raise InputError(f"{words[1] if not one else words[2]} holds no rows: it isn't a result of evaluate.")
    if not one.keys() & other.keys():
        raise InputError(f"the two have no row in common: {', '.join(one)}; and {', '.join(other)}.")
    mine, theirs = ({**result.get("settings", {}), **{key: result[key] for key in ("people",) if key in result}} for result in results)
    if differ := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]:
        say(f"They were measured with other {', '.join(differ)}, so figures may differ for that reason.")
    lines = ["| row | figure | first | second |", "|---|---|---|---|"]
    for row in [row for row in one if row in other]:
        for name, figure in one[row].items():
            after = other[row].get(name)
            if isinstance(figure, list) and isinstance(after, list) and (figure[2] < after[1] or after[2] < figure[1]):
                before, now = (f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in (figure, after))
                lines.append(f"| {row} | {name} | {before} | {now} |")
    say("\n".join(lines))


def chosen_methods(args: Request) -> dict[str, Method]:
    """What is asked for: rows, or methods with the settings that a search found, and few steps where it must be quick."""
    known, names, kind = ROWS, args.rows or tuple(ROWS), "row"
    if args.methods or args.search or args.quick or isinstance(args.people, Path):
        if args.rows:
            raise InputError("--rows can't be given with --methods, --search, --quick or people of a folder: a result has rows or methods.")
        known, names, kind = METHODS, tuple(METHODS) if args.methods in ((), ("all",)) else args.methods, "method"
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no {kind}; there are {', '.join(known)}.")
    methods = {name: known[name] for name in names}
    if args.settings:
        methods = harness.with_settings(methods, read_json(args.settings).get("search", {}))
    if args.quick:
        methods = {name: dataclasses.replace(method, steps=min(method.steps, 10)) for name, method in methods.items()}
    return {name: method for name, method in methods.items() if method.rates} if args.search else methods


def run_search(args: Request, output: Path, bench: Bench, methods: dict[str, Method], about: dict[str, Any], people: int) -> None:
    """Searches the methods' settings, and writes what it has after each method."""
    found = kept(args, output, about, "search").get("search", {})
    few = dataclasses.replace(bench, atlas=bench.atlas.only(range(0, len(bench.atlas.prompts), 2)), extras=False)
    for name, method in methods.items():
        say(name)
        found[name] = found.get(name) or harness.search(few, method, name, people)
        write_json(output, {**about, "people": people, "search": found})
    say(f"{output}: all that was tried, and the best of it")


def run_methods(args: Request, output: Path, bench: Bench, methods: dict[str, Method], about: dict[str, Any], everyone: int) -> None:
    """Compares, and writes what it has after every few people: JSON, a table, and a report."""
    timings = kept(args, output, about, "methods").get("timings", {})
    if not {name for name, method in methods.items() if bench.names or bench.steps(method)} <= set(timings):
        timings = harness.timed(bench, methods)
    settings = {name: dataclasses.asdict(method) for name, method in methods.items()}
    searched = read_json(args.settings).get("search", {}) if args.settings else {}
    together = 4 if bench.hdb.backbone.size <= 256 else 1  # a large base's memory is full with one person's batch
    for rows, curves, people in harness.compare(bench, methods, timings, everyone, together):
        figures = {**about, "methods": settings, "people": people, "timings": timings, "rows": rows, "curves": curves, "search": searched}
        columns: Sequence[tuple[str, str]] = COMPARED
        if isinstance(bench, photographs.PhotoBench):
            figures["agreement"], columns = bench.agreement(methods, people), bench.columns(rows, TITLES["photos"])
        write_json(output, figures)
        table = markdown_table(rows, columns)
        page = report.page("Methods of personalization", figures, table, bench.worst(methods, people), bench.main)
        texts = {".md": table + "\n", ".html": page, **({".svg": report.curves(curves, "seconds", bench.main)} if curves else {})}
        for suffix, text in texts.items():
            output.with_suffix(suffix).write_text(text, encoding="utf-8")
        say(f"{output}, .md and .html: {people} people")
    say(table)


def markdown_table(rows: dict[str, Any], columns: Sequence[tuple[str, str]] = COLUMNS) -> str:
    """Rows x figures with their 95 % intervals; shares in per cent."""
    lines = ["| row | " + " | ".join(title for _, title in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in [name for name in dict.fromkeys((*ROWS, *METHODS)) if name in rows]:
        cells = [_cell(rows[name].get(key), key) for key, _ in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: list[float] | float | None, key: str) -> str:
    if figure is None:
        return "-"
    if not isinstance(figure, list):
        return f"{figure:,}"
    mean, low, high = figure
    plain = not key.rsplit(".", 1)[-1].startswith(("rank1", "context", "copied", "no_face"))
    return f"{mean:.3f} ({low:.3f}-{high:.3f})" if plain else f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def contact_sheet(atlas: Atlas, drawn: dict[str, Tensor], people: int = 20) -> Any:
    """A row a person: the reference, then for two prompts the right answer and every row's first picture."""
    shown = [name for name in SHEET if name in drawn]
    rows, prompts = [], [0, len(atlas.prompts) - 3] if len(atlas.prompts) > 3 else [0]
    columns = ["reference", *["true", *shown] * len(prompts)]
    for person in range(min(people, len(atlas.people))):
        cells = [atlas.references[person]]
        for prompt in prompts:
            cells += [atlas.truths[person, prompt], *(drawn[name][person, prompt, 0] for name in shown)]
        rows.append([image for cell in cells for image in photos.to_images(cell[None])])
    return photos.grid(rows, [""] * len(rows), columns, cell=128)
