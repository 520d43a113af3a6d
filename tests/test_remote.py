"""Pictures on remote file systems through fsspec; its `memory://` stands in for cloud storage."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from hyperdreambooth import folders, photos
from hyperdreambooth.checkpoint import path_at, read_tensors
from hyperdreambooth.errors import InputError
from hyperdreambooth.tables import read_table

from .test_cli import SMALL, refused, run

upath = pytest.importorskip("upath")
pytestmark = pytest.mark.usefixtures("tiny_world")


@pytest.fixture
def bucket(people, tmp_path):
    """The people of a folder here, and there."""
    there = upath.UPath(f"memory://{tmp_path.name}/faces")
    for file in people.rglob("*"):
        if file.is_file():
            place = there.joinpath(*file.relative_to(people).parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return there


def test_the_same_people_are_found_as_here(people, bucket):
    here, there = folders.list_identities(people), folders.list_identities(str(bucket))
    assert [(name, [file.name for file in files]) for name, files in here.items()] == [
        (name, [file.name for file in files]) for name, files in there.items()
    ]
    for mine, theirs in zip(itertools.chain(*here.values()), itertools.chain(*there.values()), strict=True):
        one, other = photos.prepare(mine, 64, "center"), photos.prepare(theirs, 64, "center")
        assert np.array_equal(np.asarray(one[0]), np.asarray(other[0]))
    with pytest.raises(InputError, match=r"memory://.*/nowhere: no such folder"):
        folders.list_identities(f"{bucket}/nowhere")


def test_captions_elsewhere_are_read(bucket):
    (bucket / "zoe.txt").write_text("a [V] face\nwearing a cap")
    assert folders.caption_of([bucket / "zoe.png"]) == folders.caption_of(bucket / "zoe.jpg") == "a [V] face wearing a cap"
    assert folders.caption_of([bucket / "yan.png"]) is None


def test_a_table_elsewhere_is_that_of_the_same_people_here(people, bucket, tmp_path, capsys):
    """Made by shards, packed, and read again; there is nothing but the table. A broken picture is named by its address."""
    (bucket / "zed.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    words, here, there = [*SMALL, "--training.steps", 2, "--chunk", 2, "--crop", "center"], tmp_path / "here", f"{bucket.parent}/table"
    for shard in ("0/2", "1/2"):
        assert run("preoptimize", bucket, "-o", there, *words, "--shard", shard) == 0
    assert f"skipped: {bucket}/zed.png is not a picture" in capsys.readouterr().err
    assert run("preoptimize", people, "-o", here, *words) == 0
    name = next(iter(folders.list_identities(people)))
    for packed in (False, True):
        if packed:
            assert run("preoptimize", bucket, "-o", there, *words, "--merge") == 0
            assert run("preoptimize", people, "-o", here, *words, "--merge") == 0
        mine, theirs = (
            {"/".join(file.relative_to(table).parts): file.read_bytes() for file in table.rglob("*.safetensors")}
            for table in (here, path_at(there))
        )
        assert mine
        assert mine == theirs
        assert run("export", there, "--identity", name, "-o", tmp_path / f"{packed}.safetensors") == 0
    assert run("export", here, "--identity", name, "-o", tmp_path / "here.safetensors") == 0
    loras = [read_tensors(tmp_path / f"{which}.safetensors")[0] for which in ("here", False, True)]
    assert all(torch.equal(tensor, other[key]) for key, tensor in loras[0].items() for other in loras[1:])
    path_at(f"{there}/{next(iter(mine))}").write_bytes(b"cut off")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_table(there, "")


def test_parquet_files_elsewhere(bucket, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from hyperdreambooth.commands.recipe import Recipe, people_of

    files = [file for group in folders.list_identities(bucket).values() for file in group][:3]
    rows = pyarrow.table({"image": [file.read_bytes() for file in files], "person": ["a", "b", "b"]})
    parquet.write_table(rows, tmp_path / "part.parquet")
    place = bucket.parent / "tables" / "train"
    (place / "part.parquet").write_bytes((tmp_path / "part.parquet").read_bytes())
    found = people_of(Recipe("toon-pro", output=tmp_path / "run", data=f"{bucket.parent}/tables"))
    assert {name: [file.read_bytes() for file in group] for name, group in found.items()} == {
        "a": [files[0].read_bytes()],
        "b": [files[1].read_bytes(), files[2].read_bytes()],
    }


def test_a_recipe_takes_its_pictures_from_elsewhere(bucket, tmp_path, capsys):
    from hyperdreambooth.commands.recipe import Recipe, align

    recipe = Recipe("toon-pro", output=tmp_path / "run", data=str(bucket), crop="center", held_out=2)
    found = align(recipe, 64)
    assert found["people"] + found["held_out"] == len(folders.list_identities(bucket))
    assert found["pictures"] == len(list((tmp_path / "run").rglob("*.png")))


def test_what_is_missing_for_an_address_is_said(tmp_path, capsys, monkeypatch):
    refused(
        capsys, "nosuch://b/faces can't be opened: Unsupported filesystem", "preoptimize", "nosuch://b/faces", "-o", tmp_path / "t", *SMALL
    )
    monkeypatch.setitem(sys.modules, "upath", None)
    refused(capsys, 'It needs pip install "hyperdreambooth[remote]"', "preoptimize", "s3://b/faces", "-o", tmp_path / "t", *SMALL)
