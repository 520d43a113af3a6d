"""`hyperdreambooth evaluate` writes figures as JSON, a table, a report, and a grid of the people whom the last method resembles least."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import photos
from ..api import HyperDreamBooth
from ..checkpoint import read_json, write_json
from ..data import Share
from ..errors import InputError, in_range
from ..pretrained import load_hypernetwork
from ..progress import say
from ..settings import parsed
from . import Request, comparison, protocol, report
from .bench import PIXEL, Bench, named
from .judges import Vision, open_judges
from .methods import GROUPS, METHODS, Method
from .protocol import Atlas, Judges

FAITHFUL = Path("benchmarks/faithful")
TITLES = read_json(report.ASSETS / "columns.json")
"""Figures and their titles, in the order of a table's columns."""
Opener = Callable[[str, str], HyperDreamBooth]  # Takes a base and a hypernetwork.


def run(args: Request, output: Path, open_base: Opener, share: Share | None = None) -> None:
    """Measures what the flags ask for. Figures that the output has already are kept, unless `overwrite` is set.

    Args:
        share: has workers generate the pictures first, see `compare_methods`.
    """
    bench, methods, about = prepare(args, output, open_base)
    everyone = args.people if isinstance(args.people, int) else 2 if args.quick else len(bench.atlas.people)
    if args.search:
        search(output, bench, methods, about, everyone)
    else:
        compare_methods(args, output, bench, methods, about, everyone, share)


def prepare(args: Request, output: Path, open_base: Opener) -> tuple[Bench, dict[str, Method], dict[str, Any]]:
    """The bench, the methods to measure on it, and the output's contents with this run's settings.

    Raises InputError for wrong flags, before a base is loaded where possible.
    """
    methods, before, folder = chosen_methods(args), previous(args, output), args.people if isinstance(args.people, Path) else None
    in_range(args.pictures, 1, 10, "--pictures")  # a prompt has ten seeds
    names = args.judges or ("dlib",)
    if folder:
        prompts, files = protocol.read_prompts(args.prompts or "hyperdreambooth"), protocol.list_people(folder)
        judges = Judges(open_judges(names))
        if args.base != "toon" and not args.settings:
            say("rates and steps are those that suit the embedded world: give your base's own as --settings (docs/evaluation.md).")
    else:
        if args.base != "toon" or args.hypernetwork != "auto" or args.prompts or args.judges:
            raise InputError("--base, --hypernetwork, --prompts and --judges are for people of your own: name their folder with --people.")
        atlas, judges = protocol.load_atlas(args.atlas, args.split), protocol.world_judges(args.atlas)
        in_range(1 if args.people is None else int(str(args.people)), 1, len(atlas.people), "--people")
    needed = any(method.faithful for method in methods.values())
    if needed and not args.faithful and args.base == "toon" and FAITHFUL.is_dir():
        args.faithful = FAITHFUL  # set here, since workers in other folders would not find it
    other = str(args.faithful or "none")
    for name in {args.hypernetwork, other} - {"auto", "none"}:
        load_hypernetwork(name)
    hdb = open_base(args.base, args.hypernetwork)  # under a launcher on this process's own GPU, so it comes before `one_of_several`
    faithful = open_base(args.base, other) if needed and other != "none" else None
    for embedder in judges.embedders.values():
        if isinstance(embedder, Vision):
            embedder.to(hdb.device)
    settings: dict[str, Any] = {"pictures": args.pictures, "personalize": plain(hdb.personalize_config())}
    drawing: dict[str, Any] = {"guidance": args.guidance, "context_guidance": args.context_guidance, "context_until": args.context_until}
    drawing = {name: value for name, value in {**drawing, "steps": args.denoising_steps}.items() if value is not None}
    if folder:
        quick = {"steps": 8} if args.quick else {}
        generation = hdb.generate_config(**{"identity_guidance": "off", **quick, **drawing})  # plain guidance, the same for all methods
        references, embeddings = protocol.read_people(files, hdb.backbone.size, judges.embedders)
        atlas = Atlas(references, torch.zeros(0), torch.zeros(len(embeddings), len(prompts), 0), prompts, [], [], list(embeddings))
        settings |= {"generate": plain(generation), "base": args.base, "hypernetwork": args.hypernetwork}
    else:
        generation, embeddings = hdb.generate_config(**{**protocol.GUIDANCE, **drawing}, batch=40), {}
        settings |= {"split": args.split, "people": len(atlas.people), "denoising_steps": generation.steps}
        settings |= {"guidance": {name: getattr(generation, name) for name in protocol.GUIDANCE}}
        settings |= {"identity_guidance": {"guidance": generation.guidance, **protocol.IDENTITY_GUIDANCE}}
    settings["weights"] = protocol.fingerprint(hdb, atlas, judges)
    stamp = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    bench = Bench(hdb, atlas, judges, output.with_suffix(".cache"), stamp, faithful, count=args.pictures)
    bench.generation, bench.photo_embeddings = generation, embeddings
    if faithful is not None:
        settings["faithful"] = bench.faithful_stamp = protocol.fingerprint(faithful, atlas, judges)
    if folder:  # added after the stamp, since pictures don't depend on these
        counts = {name: len(next(iter(found.values()))) for name, found in embeddings.items()}
        settings |= {"people of": str(folder), "photos": counts, "prompts": prompts, "judges": list(names)}
    for name in list(methods):
        if why := bench.lacks(methods[name]):
            say(f"{name} is left out: {why}.")
            del methods[name]
    if not methods:
        raise InputError("no method is left that could be measured.")
    old = before.get("settings", {})
    if before and (not old or not agree(old, settings)):
        raise InputError(f"{output} was measured with other settings or weights. Give --overwrite, or another path.")
    command = " ".join(["hyperdreambooth", *sys.argv[1:]])
    about = {"command": command, **protocol.environment(hdb), "settings": {**old, **settings}}  # this run may lack some of the old ones
    return bench, methods, {**before, **about}


def one_of_several() -> tuple[int, int]:
    """This process's number, and how many a launcher (`accelerate launch`, `torchrun`) has started. Both are removed from the environment:
    the processes divide the people, and each trains on its own."""
    process, processes = (int(os.environ.pop(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    os.environ.pop("LOCAL_RANK", None)
    return process, processes


def plain(config: Any) -> dict[str, Any]:
    """Settings as values of JSON, without where they came from and how photos are cropped."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("origins", "crop", "face")}
    return dict(json.loads(json.dumps(values)))


def agree(old: Any, new: Any) -> bool:
    """Whether settings are equal wherever both have a value: another version of the library may have more of them, or fewer."""
    return (
        all(agree(old[name], new[name]) for name in old.keys() & new.keys())
        if isinstance(old, dict) and isinstance(new, dict)
        else old == new
    )


def previous(args: Request, output: Path) -> dict[str, Any]:
    """What the output holds already. Raises InputError where that is a search but a comparison is asked for, or the other way round."""
    if output.suffix != ".json":  # the table and pictures get the same name with other suffixes
        raise InputError(f"{output}: figures go into a .json file. Name it {output.name}.json.")
    before = read_json(output) if output.is_file() and not args.overwrite else {}
    if before and ("rows" in before or "search" not in before) == args.search:  # a comparison may hold a search's results too
        raise InputError(f"{output} is no {'search' if args.search else 'comparison'}. Give --overwrite, or another path.")
    return before


def chosen_methods(args: Request) -> dict[str, Method]:
    """The methods that are asked for, with what --settings says, and ten steps at most for --quick. Raises InputError for wrong names."""
    words = (*args.methods, *args.rows) or ("all" if args.search or args.quick or isinstance(args.people, Path) else "ours",)
    names = list(dict.fromkeys(name for word in words for name in GROUPS.get(word, [word])))
    if unknown := [name for name in names if name not in METHODS]:
        raise InputError(f"{unknown[0]!r} is no method; there are {', '.join((*GROUPS, *METHODS))}.")
    methods = {name: METHODS[name] for name in names}
    if args.settings:
        methods = comparison.with_settings(methods, args.settings)
    if args.quick:
        methods = {name: dataclasses.replace(method, steps=min(method.steps, 10)) for name, method in methods.items()}
    if args.search:
        if isinstance(args.people, Path):
            raise InputError("a search needs right answers, which photos don't have: give rates and steps as --settings.")
        methods = {name: method for name, method in methods.items() if method.rates}
    if not methods:
        able = ", ".join(name for name, method in METHODS.items() if method.rates)
        raise InputError(f"nothing of {', '.join(names)} can be searched: that can be {able}.")
    return methods


def search(output: Path, bench: Bench, methods: dict[str, Method], about: dict[str, Any], people: int) -> None:
    """Searches the methods' settings, and writes the results after each method. Of several processes only the first one works."""
    if one_of_several()[0]:
        return
    found = about.get("search", {})
    few = dataclasses.replace(bench, atlas=bench.atlas.part(prompts=slice(None, None, 2)), extras=False)
    for name, method in methods.items():
        say(name)
        found[name] = found.get(name) or comparison.search(few, method, name, people)
        write_json(output, {**about, "people": people, "search": found})
    say(f"{output}: all that was tried, and the best of it")


def compare_methods(
    args: Request, output: Path, bench: Bench, methods: dict[str, Method], about: dict[str, Any], everyone: int, share: Share | None
) -> None:
    """Measures the methods on the first `everyone` people, and writes after every few of them: JSON, a table, a report and a grid.

    Figures that were measured with the same settings on as many people or more are kept. Of several processes each generates the pictures
    of some people, and the first one measures and writes. `share` has workers generate the pictures: a piece of their work is the first
    person's number, the number after the last one's, the bench's stamp, and the methods' names.
    """
    had, rows = about.get("methods", {}), about.get("rows", {})
    people = about.get("people", len(bench.atlas.people))  # of rows without a count of their own
    settings = {**had, **{name: plain(method) for name, method in methods.items()}}
    todo = {}
    for name, method in methods.items():
        measured = rows.get(name, {}).get("people", people if name in rows else 0)
        if measured < everyone or had.get(name, plain(METHODS[name])) != settings[name]:
            todo[name] = method
    together = 4 if bench.hdb.backbone.size <= 256 else 1  # one person's batch fills the memory with a large base
    process, processes = one_of_several()
    pieces = [range(start, min(start + together, everyone)) for start in range(0, everyone, together) if todo]
    for piece in pieces[process::processes] if processes > 1 else ():
        comparison.make_some(bench, todo, piece)
    if process:
        return
    if processes > 1:
        comparison.wait_for(bench, todo, everyone)
    if share:
        share([[str(piece.start), str(piece.stop), bench.stamp, *todo] for piece in pieces])
    timings = about.get("timings", {})
    if any("bytes" not in timings.get(name, {}) for name in todo):
        timings = {**timings, **comparison.timed(bench, todo)}
    everybody = {name: parsed(Method, settings[name], f"{output}: {name}") for name in METHODS if name in settings}
    tried = read_json(args.settings)["search"] if args.settings else about.get("search", {})
    about |= {"methods": settings, "timings": timings, "search": tried}
    for new, curves, people in comparison.compare(bench, todo, timings, everyone, together) if todo else [({}, {}, everyone)]:
        rows, curves = {**rows, **new}, about.get("curves", {}) | curves
        shown = {n: m for n, m in everybody.items() if not bench.missing(n, m, range(people), [bench.steps(m)])}
        figures = {**about, "people": people, "rows": rows, "curves": curves, "agreement": bench.agreement(shown, people)}
        write_json(output, figures)
        table, grids = markdown_table(rows), bench.worst(shown, people)
        main = named(next(iter(bench.judges.embedders)), "similarity")
        output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        page = report.page(figures, table, grids, bench.atlas.prompts, main)
        output.with_suffix(".html").write_text(page, encoding="utf-8")
        if curves:
            output.with_suffix(".svg").write_text(report.curves(curves, "seconds", main), encoding="utf-8")
        if grids:
            lines = [(f"{title}: {name}", row) for title, grid in grids.items() for name, row in grid.items()]
            sheet = photos.grid([row for _, row in lines], [label for label, _ in lines], bench.atlas.prompts, cell=128)
            photos.save_png(sheet, output.with_suffix(".png"), {"ai_generated": "true"}, overwrite=True)
        say(f"{output}, .md, .html and .png: {people} people")
    say(table)


def compare(words: Sequence[str]) -> None:
    """`compare A.json B.json`: prints which settings differ, and a Markdown table of the figures whose intervals don't overlap."""
    if len(words) != 3 or words[0] != "compare":
        raise InputError(f"{' '.join(words)!r} isn't understood: `compare A.json B.json` compares two results.")
    results = [read_json(Path(word)) for word in words[1:]]
    one, other = (result.get("rows", {}) for result in results)
    if not (common := [row for row in one if row in other]):
        raise InputError(f"the two have no row in common: {', '.join(one) or 'none'}; and {', '.join(other) or 'none'}.")
    methods = [row for row in common if all(row in result.get("methods", {}) for result in results)]
    first, second = (
        {**result.get("settings", {}), "people": result.get("people"), **{row: result["methods"][row] for row in methods}}
        for result in results
    )
    if differ := [name for name in {**first, **second} if first.get(name) != second.get(name)]:
        say(f"They were measured with other {', '.join(differ)}, so figures may differ for that reason.")
    lines = ["| row | figure | first | second |", "|---|---|---|---|"]
    for row in common:
        for name, figure in one[row].items():
            after = other[row].get(name)
            if isinstance(figure, list) and isinstance(after, list) and (figure[2] < after[1] or after[2] < figure[1]):
                before, now = (f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in (figure, after))
                lines.append(f"| {row} | {name} | {before} | {now} |")
    say("\n".join(lines))


def markdown_table(rows: Mapping[str, Any], figures: Sequence[str] = tuple(TITLES)) -> str:
    """A Markdown table of rows by figures with 95 % intervals, shares in percent, grouped by judge, without figures that no row has."""
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    judges = sorted(dict.fromkeys(key.rpartition(".")[0] for key in keys), key=lambda judge: (not judge, judge == PIXEL))
    columns = [(judge, figure) for judge in judges for figure in figures if named(judge, figure) in keys]
    titles = [f"{judge} {TITLES[figure]}".strip() for judge, figure in columns]
    lines = [f"| row | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name in [name for name in dict.fromkeys((*METHODS, *rows)) if name in rows]:
        cells = [cell(rows[name].get(named(judge, figure)), figure) for judge, figure in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(found: list[float] | float | None, figure: str) -> str:
    """A figure as a table shows it: a count, or mean and 95 % interval; "-" where there is none."""
    if not isinstance(found, list):
        return "-" if found is None else f"{found:,}"
    mean, low, high = found
    share = figure.startswith(("rank1", "context", "copied", "no_face"))
    return f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})" if share else f"{mean:.3f} ({low:.3f}-{high:.3f})"
