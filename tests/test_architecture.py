"""Which modules may import which, and how large a module may be."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "hyperdreambooth"
BASE = {"errors", "checkpoint", "progress"}
MAY = {  # module or package -> the modules of this library that it may import
    "lora": {"errors"},
    "settings": {"errors"},
    "training_settings": {"errors"},
    "encoder": BASE,
    "trainable_lora": {"encoder", "errors", "lora", "training_settings"},
    "backbones": {"errors", "assets", "backbones", "checkpoint", "lora", "progress"},
    "objectives": {"backbones", "lora", "training_settings"},
    "optimizers": {"errors", "training_settings"},
    "replay": {"progress"},
    "training": {*BASE, "optimizers", "replay", "training_settings"},
    "faces": {"errors"},
    "hub": {"errors", "formats", "photos"},
    "personal_lora": {"errors", "formats", "lora", "trainable_lora"},
    "photos": {*BASE, "faces", "settings"},
    "folders": {*BASE, "photos"},
    "sampling": {"backbones", "data", "errors", "lora", "progress", "replay", "settings"},
}


def imports(file: Path) -> set[str]:
    """The first-level modules of ours that a file imports, wherever in it."""
    depth = len(file.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = [ROOT.name, *file.relative_to(ROOT).parts[:-1]][: depth + 2 - node.level]
            names = [*package[1:], *(node.module.split(".") if node.module else [])]
            found |= {names[0]} if names else {alias.name for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_data_flows_one_way():
    for file in files():
        top = file.relative_to(ROOT).parts[0].removesuffix(".py")
        found = imports(file)
        if top in MAY:
            assert found <= MAY[top], f"{file.name} imports {found - MAY[top]}"
        if top not in ("api", "cli", "commands", "stages", "evaluation"):
            assert "stages" not in found, f"{file.name}: only api, cli, commands and evaluation may import stages"
        if top not in ("__main__", "cli", "commands"):
            assert not found & {"cli", "commands"} or "TYPE_CHECKING" in file.read_text(), (
                f"{file.name}: only __main__, cli and commands may import cli or commands"
            )
        if top not in ("app", "cli", "commands", "evaluation", "__init__"):
            assert "api" not in found, file.name


def test_rooms_stay_small_and_nothing_unpickles():
    for file in files():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, f"{file.name} has more than 350 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert (node.end_lineno or 0) - node.lineno < 80, f"{file.name}: {node.name} has more than 80 lines"
                assert len(set(names) - {"self", "cls"}) <= 8, f"{file.name}: {node.name} has more than 8 parameters"
        assert "torch.load(" not in text
        assert "import pickle" not in text


def test_the_cli_starts_without_torch():
    import subprocess
    import sys

    code = "import sys; sys.argv=['x','--help']; from hyperdreambooth.cli import main; main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def imported(file: Path) -> set[Path]:
    """The files of ours that a file imports, wherever in it: in functions and for types alone, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:  # a submodule, or a name that is defined in the module or package itself
                paths = [
                    package / f"{alias.name}.py",
                    package / alias.name / "__init__.py",
                    package.with_suffix(".py"),
                    package / "__init__.py",
                ]
                found |= set([path for path in paths if path in ALL][:1])
    return found - {file, ROOT / "__init__.py"}  # __init__.py imports the public names lazily


ALL = set(files())


def circles(graph: dict[Path, set[Path]]) -> list[set[str]]:
    """Groups of files each of which imports, in one step or several, all others of its group."""
    reached = {}
    for file in graph:
        seen, todo = set(), list(graph[file])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += graph[other]
        reached[file] = seen
    groups = {frozenset(str(other.relative_to(ROOT)) for other in reached[file] if file in reached[other]) for file in graph}
    return [set(group) for group in groups if group]


def test_no_files_import_one_another():
    assert circles({file: imported(file) for file in ALL}) == []
