"""The README's claims: its commands and code run, its file tree exists, its figures are the measured ones."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hyperdreambooth.cli import main

from .conftest import picture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--lightweight.down-dim", "12", "--lightweight.up-dim", "8"]
DECODER = ["--training.steps", "2", "--batch", "2", "--hypernetwork.dim", "16", "--hypernetwork.heads", "2"]
FASTER = {  # arguments added to the README's commands, so that they take seconds on the tiny world
    "train-light": ["--training.steps", "2", *SMALL],
    "preoptimize": ["--training.steps", "2", *SMALL],
    "train-hypernetwork": [*DECODER, *SMALL],
    "recipe": [*DECODER, *SMALL, "--people", "4"],
    "--hypernetwork none": ["--steps", "2"],
    "generate": ["--steps", "2"],
    "demo": [],
}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("hyperdreambooth")]


@pytest.fixture
def newcomer(tmp_path, world, monkeypatch):
    """A folder with what the README's commands name, and the tiny world in place of the shipped one."""
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(world))
    monkeypatch.chdir(tmp_path)
    skimage = pytest.importorskip("skimage")
    Image.fromarray(skimage.data.astronaut()).save("me.jpg")
    for name in ("alice", "bob", "carol"):
        (Path("faces") / name).mkdir(parents=True)
        picture(len(name)).save(Path("faces") / name / "1.png")
    shutil.copytree(world / "base", "path/to/stable-diffusion-v1-5")
    shutil.copytree(world / "faces", "src/hyperdreambooth/assets/toon/faces")
    for name in ("alice", "bob"):
        assert main(["personalize", f"faces/{name}/1.png", "-o", "style.safetensors", "--tokens", f"{name}.tokens", "--overwrite"]) == 0
    return tmp_path


def test_every_command_runs(newcomer):
    ran = 0
    for line in commands():
        words = shlex.split(line)[1:]
        if words[0] in ("app", "evaluate"):  # too long here: tests/test_app.py and test_cli.py test them
            continue
        more = next((flags for key, flags in FASTER.items() if key in line), [])
        written = [words[i + 1] for i, word in enumerate(words) if word == "-o"]
        for name in written:
            if Path(name).is_file():
                Path(name).unlink()
            elif name == "pictures" and Path(name).exists():
                shutil.rmtree(name)
        code = main([*words, *more])
        assert code == 0, line
        ran += 1
    assert ran >= 12


def test_the_python_example_runs(newcomer):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names: dict[str, object] = {}
    exec(compile(code, "README", "exec"), names)
    assert len(names["images"]) == 1
    assert Path("me.safetensors").is_file()


def test_the_tree_exists():
    tree = README[README.index("## The tree") :].split("```")[0]
    names = re.findall(r"[\w./]+(?:\.py|/)(?=[\s,])", tree)
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "src/hyperdreambooth" / name).exists(), name
    for file in (ROOT / "src/hyperdreambooth").glob("*.py"):
        assert file.name in tree or file.name == "__init__.py", f"{file.name} isn't in the README's tree"


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_tables_are_the_measured_figures():
    subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], check=True, cwd=ROOT)


def test_the_picture_of_the_house_is_of_this_house():
    subprocess.run([sys.executable, str(ROOT / "docs/imports.py"), "--check"], check=True, cwd=ROOT)
