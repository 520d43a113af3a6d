"""Recipes: the shipped ones parse, and run with reduced sizes; killed runs resume; refusals name the reason."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hyperdreambooth.backbones.architectures import architecture
from hyperdreambooth.cli import main, parse
from hyperdreambooth.commands import load
from hyperdreambooth.commands.recipe import SHIPPED
from hyperdreambooth.errors import InputError
from hyperdreambooth.lora import find_targets
from hyperdreambooth.pretrained import load_hypernetwork

from . import families, test_hub, test_resume
from .conftest import picture
from .test_encoder import save

hub_server, server, terminal = test_hub.server, test_resume.server, test_resume.terminal
KILLS = int(os.environ.get("RECIPE_KILLS", "3"))
ROOT = Path(__file__).parents[1]
LARGE = [name for name in SHIPPED if not name.startswith("toon")]
SMALL = [
    "--lightweight.down-dim",
    "12",
    "--lightweight.up-dim",
    "8",
    "--batch",
    "2",
    "--hypernetwork.dim",
    "16",
    "--hypernetwork.heads",
    "2",
]
SHORT = ["--training.steps", "4", "--training.validate-every", "2", "--table.training.steps", "3", "--table.chunk", "2"]
OFTEN = ["--training.checkpoint-minutes", "0", "--table.training.checkpoint-minutes", "0"]


def recipe(*words: object) -> int:
    return main(["recipe", *map(str, words)])


def outcome(run: Path) -> dict[str, bytes]:
    """What a recipe makes, byte for byte; neither clocks nor what training keeps to go on with."""
    kept = [
        *(run / "people").rglob("*"),
        *(run / "held-out").rglob("*"),
        *(run / "table").rglob("rows/*"),
        *(run / "hypernetwork").rglob("*"),
    ]
    files = [file for file in [*kept, run / "data.json"] if file.is_file()]
    left = [file for file in files if not {"cache", "run", "training.json"} & {*file.relative_to(run).parts}]
    return {str(file.relative_to(run)): file.read_bytes() for file in left}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(6):
        picture(index).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_parses_and_its_targets_are_the_familys(name):
    args = parse("recipe", load("recipe")[0], [name, "-o", "run", "--table.copies", "3"])
    assert args.config.mode == name.split("-")[1]
    assert args.config.lightweight.learnable == (args.config.mode == "pro")
    assert args.table.copies == 3
    assert (args.table.targets, args.table.lightweight.down_dim) == (args.config.targets, args.config.lightweight.down_dim)
    if name in LARGE:
        shapes = find_targets(architecture(name.split("-")[0]), args.config.targets or ("unet.*attn?.to_[qkv]",))
        assert min(min(shape) for shape in shapes.values()) >= 100
        assert args.config.give_up == 0.2


def test_the_launchers_line_is_the_commands(tmp_path):
    task = yaml.safe_load((ROOT / "recipes/launchers/recipe.yaml").read_text())
    words = shlex.split(task["run"].replace("$RECIPE", task["envs"]["RECIPE"]))
    args = parse("recipe", load("recipe")[0], words[2:])
    assert (args.recipe, args.data, str(args.output)) == ("sd15-pro", "/shared/faces", "/shared/runs/sd15-pro")


@pytest.mark.parametrize("name", ["sd15-pro", "sdxl-faithful"])
def test_a_recipe_runs_on_a_tiny_base(name, tmp_path, people):
    families.make({"sd15": "sd1", "sdxl": "sdxl"}[name.split("-")[0]]).save_pretrained(tmp_path / "base")
    own = ["--base", tmp_path / "base", "--encoder", save("dinov2", tmp_path / "encoder"), "--data", people, "--give-up", "0"]
    assert recipe(name, *own, *SMALL, *SHORT, "-o", tmp_path / "run") == 0
    _, info = load_hypernetwork(tmp_path / "run/hypernetwork")
    assert info.mode == name.split("-")[1]
    assert info.hypernetwork["passes"] == yaml.safe_load(SHIPPED[name].read_text())["config"]["hypernetwork"]["passes"]


def test_a_recipe_says_what_it_takes_and_holds_the_last_people_out(tiny_world, people, tmp_path, capsys):
    (people / "bob/broken.png").write_bytes(b"nothing")
    run = tmp_path / "run"
    assert recipe("toon-faithful", "--data", people, "--price", "2.5", *SMALL, *SHORT, "-o", run) == 0
    said = capsys.readouterr().err
    assert "4 people, 6 pictures" in said
    assert "at 2.5 an hour" in said
    assert "GB needed" in said
    assert {file.name for file in (run / "people").iterdir()} == {"ann", "bob"}
    assert {file.name for file in (run / "held-out").iterdir()} == {"cyd", "dan"}
    data = json.loads((run / "data.json").read_text())
    assert (data["people"], data["held_out"], data["pictures"]) == (2, 2, 5)
    assert data["broken"] == [str(people / "bob/broken.png")]
    flight = json.loads((run / "preflight.json").read_text())
    assert min(flight[name] for name in ("step", "chunk_step", "encoded", "state", "row")) > 0
    assert {file.stem for file in (run / "table/rows").iterdir()} == {"ann", "bob"}
    _, info = load_hypernetwork(run / "hypernetwork")
    assert info.trained["validation"][-1]["identity_gain_interval"] > 0
    with Image.open(run / "hypernetwork/preview.png") as sheet:  # for each of two people, a photo and the pictures of four prompts
        assert sheet.height > 5 * 64
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    assert recipe("toon-faithful", "--data", people, "--price", "9", *SMALL, *SHORT, "-o", run) == 0  # all is done: nothing changes
    after = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    assert after == before
    for command, settings in (("preoptimize", "table/config.json"), ("train-hypernetwork", "hypernetwork/training.json")):
        assert main([command, "--config", str(run / settings)]) == 0  # as other processes would share a stage
    assert recipe("toon-faithful", "--data", people, *SMALL, *SHORT, "--people", "4", "-o", run) == 2  # other settings need another folder
    assert "people None, not 4" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_recipe_that_is_killed_goes_on_and_ends_the_same(terminal, faces, tmp_path):
    if KILLS > 3:  # large pictures, so that some kills interrupt the face alignment
        for index in range(24):
            picture(index).resize((3000, 3000)).save(faces / f"{index}.png", compress_level=1)
    words = ("recipe", "toon-faithful", "--data", faces, *SMALL, *SHORT, *OFTEN, "-o")
    begun = time.monotonic()
    terminal.run(*words, tmp_path / "whole")
    seconds, whole, draw, run, ended = time.monotonic() - begun, outcome(tmp_path / "whole"), random.Random(0), tmp_path / "killed", 0
    assert {"data.json", "hypernetwork/preview.png", "hypernetwork/model.safetensors", "table/rows/3.safetensors"} <= whole.keys()
    stages = ("preflight", "data", "table", "trained")
    kills = dict.fromkeys((*stages, "its end"), 0)
    while sum(kills.values()) < KILLS:
        fresh, begun = not run.exists(), time.monotonic()
        process = terminal.start([*words, run])
        process.join(draw.uniform(0.05, 0.9) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert outcome(run) == whole
            shutil.rmtree(run)
            ended += 1
            seconds = min(seconds, time.monotonic() - begun) if fresh else seconds  # earlier runs may have been slower
        else:
            kills[next((stage for stage in stages if not (run / f"{stage}.json").is_file()), "its end")] += 1
        print(f"kills by stage: {kills}; recipes that ended, byte for byte the same: {ended}", flush=True)
    terminal.run(*words, run)
    assert outcome(run) == whole
    print(f"kills by stage: {kills}; recipes that ended, byte for byte the same: {ended + 1}")


def test_a_training_that_tells_nobody_apart_stops(tiny_world, faces, tmp_path, capsys):
    words = ["toon-pro", "--data", faces, *SMALL, *SHORT, "--training.learning-rate", "0", "-o", tmp_path / "run"]
    assert recipe(*words, "--give-up", "0.2") == 2
    said = capsys.readouterr().err
    assert "identity gain is 0 ± 0 after 2 of 4 steps" in said
    assert "--give-up 0" in said
    assert not (tmp_path / "run/hypernetwork/config.json").exists()
    assert recipe(*words, "--give-up", "0") == 0  # resumes in the same folder


def test_a_yaml_file_of_ones_own_is_a_recipe(tiny_world, faces, tmp_path):
    own = yaml.safe_load(SHIPPED["toon-pro"].read_text()) | {"data": str(faces), "held_out": 3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    assert recipe(tmp_path / "mine.yaml", *SMALL, *SHORT, "-o", tmp_path / "run") == 0
    assert len(list((tmp_path / "run/held-out").iterdir())) == 3


def test_what_is_no_recipe_or_too_small_is_refused(tiny_world, faces, tmp_path, capsys):
    for words, reason in (
        (["sd99-pro"], "sd15-pro"),
        ([], "sd15-pro"),
        (["--data", faces, "toon-pro"], "first word"),
        (["toon-pro", "--data", tmp_path / "nowhere"], "no such folder"),
        (["toon-pro", "--data", faces, "--people", "3", *SMALL], "held out"),
        (["toon-pro", "--data", faces, "--held-out", "1", *SMALL], "held out"),
        (["sd15-pro", "--base", tiny_world / "base", "--encoder", "auto", "--data", faces], "--encoder"),
    ):
        assert recipe(*words, "-o", tmp_path / "run") == 2, words
        assert reason in capsys.readouterr().err
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_disk_that_is_too_small_is_refused(tiny_world, faces, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert recipe("toon-pro", "--data", faces, *SMALL, *SHORT, "-o", tmp_path / "run") == 2
    assert "isn't enough disk for 6 pictures" in capsys.readouterr().err
    assert not (tmp_path / "run/people").exists()
    monkeypatch.undo()


def test_people_of_a_data_set_on_the_hub(hub_server, tiny_world, faces, tmp_path, capsys):
    for file in faces.iterdir():
        hub_server.files[f"{file.stem}/{file.name}"] = file.read_bytes()
    hub_server.files |= {"README.md": b"faces", "data.parquet": b"none"}
    run = tmp_path / "run"
    assert recipe("toon-pro", "--data", "hf:ann/faces", "--push", "ann/hyper", *SMALL, *SHORT, "-o", run) == 0
    assert {file.name for file in (run / "people").iterdir()} == set("0123")
    assert "model.safetensors" in hub_server.files  # the hypernetwork was uploaded by --push
    assert not any(name.startswith("people") for name in hub_server.files)
    assert "hf:ann/faces" in (run / "hypernetwork/README.md").read_text()


def test_people_of_parquet_files(hub_server, tiny_world, faces, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from hyperdreambooth.parquet import unpack

    files = sorted(faces.iterdir())
    pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    whose = ["ann", "../ann", ".bob", "ann", None, "cyd"]
    for number in (0, 1):  # two parquet shards
        rows = slice(3 * number, 3 * number + 3)
        parquet.write_table(pyarrow.table({"image": pictures[rows], "celeb_id": whose[rows]}), tmp_path / f"train-{number}.parquet")
        hub_server.files[f"data/train-{number}.parquet"] = (tmp_path / f"train-{number}.parquet").read_bytes()
    folder = unpack(sorted(tmp_path.glob("*.parquet")), tmp_path / "unpacked")
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    names = ["ann/0000", "..%2Fann/0000", "%2Ebob/0000", "ann/0001", "0000004/0000", "cyd/0000"]
    assert found == {name.replace("..%2F", "%2E.%2F"): file.read_bytes() for name, file in zip(names, files, strict=True)}
    assert "the column celeb_id says who is in a picture" in capsys.readouterr().err
    run = tmp_path / "run"
    assert recipe("toon-pro", "--data", "hf:ann/tables/data", *SMALL, *SHORT, "-o", run) == 0
    known = {file.name for part in ("people", "held-out") for file in (run / part).iterdir()}
    assert known == {"ann", "%2E.%2Fann", "%2Ebob", "0000004", "cyd"}
    assert not (run / "unpacked").exists(), "the unpacked copy must be removed"
    parquet.write_table(pyarrow.table({"text": ["none"]}), tmp_path / "text.parquet")
    with pytest.raises(InputError, match="no column of pictures, only text"):
        unpack([tmp_path / "text.parquet"], tmp_path / "other")
    parquet.write_table(pyarrow.table({"image": [file.read_bytes() for file in files]}), tmp_path / "plain.parquet")
    assert len(list(unpack([tmp_path / "plain.parquet"], tmp_path / "plain").iterdir())) == len(files)


def test_parquet_files_with_different_columns(faces, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from hyperdreambooth.parquet import unpack

    def write(file, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / file)
        return tmp_path / file

    files = [file.read_bytes() for file in sorted(faces.iterdir())[:2]]
    named, plain = write("a.parquet", image=files, name=["ann", ""]), write("b.parquet", extra=[1, 2], image=files)
    assert sorted(place.name for place in unpack([named], tmp_path / "named").iterdir()) == ["0000001", "ann"]
    for order in ([named, plain], [plain, named]):
        folder = unpack(order, tmp_path / f"{order[0].stem}-first")
        assert sorted(place.name for place in folder.iterdir()) == [f"{number:07}" for number in range(4)]
        assert "no column that every file has says who" in capsys.readouterr().err
    for order in ([named, write("c.parquet", image=["words"])], [named, write("d.parquet", text=["words"])]):
        with pytest.raises(InputError, match=rf"{order[1].name} has no column of pictures called image, only"):
            unpack(order, tmp_path / "none")


def test_a_data_set_that_cant_be_read_is_refused(hub_server, tiny_world, faces, tmp_path, capsys):
    from hyperdreambooth import hub

    hub_server.files |= {"data/train.zip": b"none", "README.md": b"faces"}
    with pytest.raises(InputError, match="neither picture files nor parquet files"):
        hub.download_pictures("ann/archives")
    hub_server.files |= {"data/train.parquet": b"none"}
    assert recipe("toon-pro", "--data", "hf:ann/tables/data", *SMALL, *SHORT, "-o", tmp_path / "run") == 2
    assert "parquet files of" in capsys.readouterr().err
    hub_server.files.pop("data/train.parquet")
    for file in faces.iterdir():
        hub_server.files |= {f"{split}/{file.name}": file.read_bytes() for split in ("train", "test")}
    assert recipe("toon-pro", "--data", "hf:ann/faces", *SMALL, *SHORT, "-o", tmp_path / "run") == 2  # two splits, not people
    assert "in a folder below" in capsys.readouterr().err
    assert {file.name for file in hub.download_pictures("ann/faces/train").iterdir()} == {f"{index}.png" for index in range(6)}
    hub_server.files.clear()
    with pytest.raises(InputError, match="ann/nothing can't be fetched"):
        hub.download_pictures("ann/nothing")
