"""Scaling: tables of many processes, killed or not, and packed tables equal that of one process; batches encode like single pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hyperdreambooth import checkpoint
from hyperdreambooth.cli import main
from hyperdreambooth.commands import engines, measure, train
from hyperdreambooth.data import FolderOfPeople, IdentityData, encoding, load_identities
from hyperdreambooth.errors import InputError
from hyperdreambooth.stages.dreambooth import Rows, chunks_of, parse_shard, preoptimize
from hyperdreambooth.tables import Table, merge, read_table, save_row
from hyperdreambooth.training import Run, fit
from hyperdreambooth.training_settings import LightweightConfig, PreoptimizeConfig, TrainingConfig

from . import test_training
from .conftest import picture, tiny_source

ROOT = Path(__file__).parents[1]
SMALL = ("--lightweight.down-dim", 12, "--lightweight.up-dim", 8, "--training.steps", 2, "--chunk", 2)


@pytest.fixture
def toon(world, monkeypatch):
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(world))


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Nine people with one to three pictures; one of them has none that can be read."""
    folder = tmp_path / "faces"
    for index in range(9):
        (folder / f"person {index}").mkdir(parents=True)
        for number in range(1 + index % 3):
            picture(10 * index + number).save(folder / f"person {index}" / f"{number}.png")
    (folder / "person 4" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    (folder / "person 4" / "1.png").unlink()
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def rows(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (table / "rows").glob("*")}


def config(chunk: int = 3) -> PreoptimizeConfig:
    light = LightweightConfig(down_dim=12, up_dim=8)
    return PreoptimizeConfig(
        lightweight=light, chunk=chunk, copies=2, training=TrainingConfig(steps=3, learning_rate=2e-2, max_grad_norm=0.0)
    )


def people(count: int = 10) -> IdentityData:
    """People with one to three pictures each."""
    who = torch.tensor([person for person in range(count) for _ in range(1 + person % 3)])
    latents = torch.randn(len(who), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    names = [f"p{index}" for index in range(count)]
    return IdentityData(latents, torch.zeros(len(who), 0, 0), who, names, [""] * len(who), torch.ones(len(who), dtype=torch.bool))


def test_shards_in_any_order_make_the_table_of_one_process(backbone, tmp_path):
    preoptimize(backbone, people(), config(), tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 10
    for count in (2, 3, 7):
        order = list(range(count))
        random.Random(count).shuffle(order)
        for index in [*order, *order[:2]]:  # two shards are made twice
            preoptimize(backbone, people(), config(), tmp_path / f"{count}", shard=(index, count))
        assert rows(tmp_path / f"{count}") == rows(tmp_path / "whole")


def test_every_identity_is_in_one_shard_and_chunks_never_depend_on_their_number():
    names = [f"{index}" for index in range(101)]
    whole = chunks_of(names, 4)
    for count in (1, 2, 5, 40):
        parts = [chunks_of(names, 4, (index, count)) for index in range(count)]
        assert sorted(chunk for part in parts for chunk in part) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "0/0", "0/", "/2", "0.5/2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(InputError, match="i/n"):
        parse_shard(text)


def test_rows_that_were_lost_are_made_again_to_the_bit(backbone, tmp_path, monkeypatch):
    """Whoever makes one row of a chunk trains with the whole of it."""
    preoptimize(backbone, people(), config(), tmp_path)
    before = rows(tmp_path)
    for name in ("p1", "p5", "p9"):
        (tmp_path / "rows" / f"{name}.safetensors").unlink()
    made = []
    saved = lambda folder, name, *row: made.append(name) or save_row(folder, name, *row)  # noqa: E731
    monkeypatch.setattr("hyperdreambooth.stages.dreambooth.save_row", saved)
    preoptimize(backbone, people(), config(), tmp_path)
    assert made == ["p1", "p5", "p9"]
    assert rows(tmp_path) == before


def test_two_threads_of_work_on_one_shard_do_not_break_each_other(backbone, tmp_path):
    """One is done with a chunk, and with its checkpoint, while the other is in the middle of it."""
    preoptimize(backbone, people(3), config(), tmp_path / "whole")
    settings = config()
    settings.training.checkpoint_minutes = 0.0
    second = Rows(backbone, people(3), settings, tmp_path / "both")
    train, met = second._train, []

    def meanwhile(photos, state):
        tokens = train(photos, state)
        preoptimize(backbone, people(3), settings, tmp_path / "both")
        met.append(sorted(rows(tmp_path / "both")))
        return tokens

    second._train = meanwhile
    second(people(3).names)
    assert len(met[0]) == 3
    assert rows(tmp_path / "both") == rows(tmp_path / "whole")
    assert [file for file in (tmp_path / "both" / "chunk").rglob("*") if file.is_file()] == []


def test_the_command_makes_shards_merges_them_and_names_who_is_missing(toon, faces, tmp_path, capsys):
    assert run("preoptimize", faces, "-o", tmp_path / "whole", *SMALL) == 0
    said = capsys.readouterr().err
    assert "1 identities have no row" in said
    assert "person 4" in said
    assert len(rows(tmp_path / "whole")) == 8
    assert (tmp_path / "whole" / "preview.png").is_file()
    for shard in ("2/3", "0/3"):
        assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", shard, *SMALL) == 0
    assert 0 < len(rows(tmp_path / "t")) < 8
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--merge", *SMALL) == 2
    assert "have no row yet" in capsys.readouterr().err
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", "1/3", *SMALL) == 0
    assert rows(tmp_path / "t") == rows(tmp_path / "whole")
    assert run("export", tmp_path / "t", "--identity", "person 1", "-o", tmp_path / "before.safetensors") == 0
    for _ in range(2):  # a second merge must change nothing
        assert run("preoptimize", faces, "-o", tmp_path / "t", "--merge", *SMALL) == 0
    assert rows(tmp_path / "t") == {}
    assert len(list((tmp_path / "t" / "packed").glob("*.safetensors"))) == 1
    assert "person 4" in capsys.readouterr().err
    assert run("export", tmp_path / "t", "--identity", "person 1", "-o", tmp_path / "after.safetensors") == 0
    one, other = load_file(tmp_path / "before.safetensors"), load_file(tmp_path / "after.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)
    # a packed table is complete, so nothing is trained; only a new person gets a new row
    assert run("preoptimize", faces, "-o", tmp_path / "t", *SMALL) == 0
    assert rows(tmp_path / "t") == {}
    shutil.copytree(faces / "person 1", faces / "person 9")
    assert run("preoptimize", faces, "-o", tmp_path / "t", *SMALL) == 0
    assert list(rows(tmp_path / "t")) == ["person 9.safetensors"]
    small = ["--training.steps", 2, "--batch", 2, "--hypernetwork.dim", 16, "--hypernetwork.heads", 2, *SMALL[:4]]
    assert run("train-hypernetwork", faces, "-o", tmp_path / "h", "--mode", "faithful", "--table", tmp_path / "t", *small) == 0


def test_a_table_of_other_settings_is_not_continued(toon, faces, tmp_path, capsys):
    # before any row exists, settings may be changed, for example because memory was short
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", "8/9", *SMALL[:-1], 9) == 0
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", "0/9", *SMALL) == 0
    for more, says in (
        (("--training.seed", 1), "training.seed 0, not 1"),
        (("--crop", "center"), "crop auto"),
        (("--copies", 1), "copies 4, not 1"),
    ):
        assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", "1/9", *SMALL, *more) == 2
        assert says in capsys.readouterr().err
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--shard", "1/9", *SMALL, "--training.checkpoint-minutes", 1) == 0


def table_of(folder: Path, count: int = 25) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"p{index}": torch.randn(3, 20, generator=generator) for index in range(count)}
    for name, tokens in made.items():
        save_row(folder, name, tokens, "here")
    return made


def same(table: Table, expected: dict[str, torch.Tensor]) -> bool:
    return set(table) == set(expected) and all(torch.equal(table[name], expected[name]) for name in expected)


def test_packed_rows_are_the_rows(tmp_path):
    made = table_of(tmp_path)
    made |= {"__metadata__": torch.ones(3, 20), "Zoë": torch.zeros(3, 20)}
    for name in ("__metadata__", "Zoë"):
        save_row(tmp_path, name, made[name], "here")
    merged = merge(tmp_path, "here", file_bytes=10 * 3 * 20 * 4)
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) == 3
    assert rows(tmp_path) == {}
    assert same(merged, made)
    assert same(read_table(tmp_path, "here"), made)
    index = json.loads((tmp_path / "packed" / "index.json").read_text())
    assert index["identities"] == 27
    for file, names in index["files"].items():
        tokens = load_file(tmp_path / "packed" / file)["tokens"]
        assert all(torch.equal(tokens[place], made[name]) for place, name in enumerate(names))
    save_row(tmp_path, "new", torch.ones(3, 20), "here")
    before = {file: file.stat().st_mtime_ns for file in files}
    assert same(merge(tmp_path, "here"), made | {"new": torch.ones(3, 20)})
    assert {file: file.stat().st_mtime_ns for file in files} == before


@pytest.mark.parametrize("moment", ["packed", "index", "removing"])
def test_a_merge_that_was_killed_goes_on(tmp_path, monkeypatch, moment):
    made = table_of(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    merge(tmp_path / "b", "here", file_bytes=2400)
    import hyperdreambooth.tables as tables

    class KilledError(BaseException):
        pass

    def after(count, function):
        calls = []

        def wrapped(*arguments, **more):
            calls.append(1)
            if len(calls) > count:
                raise KilledError
            return function(*arguments, **more)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "packed":
            patch.setattr(tables, "save_tensors", after(1, tables.save_tensors))
        elif moment == "index":
            patch.setattr(tables, "write_json", after(0, tables.write_json))
        else:
            patch.setattr(Path, "unlink", after(7, Path.unlink))
        with pytest.raises(KilledError):
            merge(tmp_path / "a", "here", file_bytes=2400)
    assert same(read_table(tmp_path / "a", "here"), made)
    merge(tmp_path / "a", "here", file_bytes=2400)
    assert rows(tmp_path / "a") == {}
    assert same(read_table(tmp_path / "a", "here"), made)
    if moment != "packed":
        packed = [{file.name: file.read_bytes() for file in (tmp_path / name / "packed").iterdir()} for name in "ab"]
        assert packed[0] == packed[1]


def test_damaged_tables_are_refused_and_nothing_is_removed(tmp_path):
    table_of(tmp_path)
    broken = tmp_path / "rows" / "p7.safetensors"
    whole = broken.read_bytes()
    for tokens, header, says in (
        (torch.full((3, 20), float("nan")), {"fingerprint": "here", "identity": "p7"}, "p7.safetensors is damaged"),
        (torch.ones(3, 20), {"fingerprint": "there", "identity": "p7"}, "fingerprint there, here here"),
        (torch.ones(3, 21), {"fingerprint": "here", "identity": "p7"}, "other sizes than"),
    ):
        save_file({"tokens": tokens}, broken, header)
        with pytest.raises(InputError, match=says):
            merge(tmp_path, "here")
        assert len(rows(tmp_path)) == 25
    broken.write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"p7\.safetensors is not a whole"):
        merge(tmp_path, "here")
    broken.write_bytes(whole)
    merge(tmp_path, "here")
    save_row(tmp_path, "p3", torch.ones(3, 20), "here")
    with pytest.raises(InputError, match="differs from the packed row of p3"):
        merge(tmp_path, "here")
    (tmp_path / "rows" / "p3.safetensors").unlink()
    pack = next((tmp_path / "packed").glob("*.safetensors"))
    with pytest.raises(InputError, match="fingerprint"):
        read_table(tmp_path, "there")
    pack.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is missing"):
        read_table(tmp_path, "here")


def test_pictures_in_batches_are_pictures_one_by_one(backbone, tmp_path, capsys):
    for index in range(75):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "40.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    encoder = tiny_source(backbone).encoder
    together = load_identities(tmp_path, backbone, encoder, "a face")
    again = load_identities(tmp_path, backbone, encoder, "a face")
    assert torch.equal(together.latents, again.latents)
    assert torch.equal(together.features, again.features)
    assert "40.png" in capsys.readouterr().err
    assert together.names == [f"{index}" for index in range(75) if index != 40]
    folder = FolderOfPeople(tmp_path, backbone)
    for place in (0, 31, 40, 73):
        name = together.names[place]
        torch.testing.assert_close(folder.latents_of([name])[name], together.latents[[place]], atol=1e-5, rtol=1e-4)
        alone = tmp_path / "alone" / name
        alone.mkdir(parents=True)
        shutil.copy(tmp_path / f"{name}.png", alone)
        one = load_identities(tmp_path / "alone", backbone, encoder, "a face")
        torch.testing.assert_close(one.features, together.features[[place]], atol=1e-5, rtol=1e-4)
        shutil.rmtree(tmp_path / "alone")
    assert folder.latents_of(["40"]) == {}


def test_pictures_are_in_memory_once(backbone, tmp_path, monkeypatch):
    """Batches are written into room for all of them, and the people who are held out are a part of it."""
    for index in range(96):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "95.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    monkeypatch.setattr("hyperdreambooth.data.LARGEST_BATCH", 8)
    data = load_identities(tmp_path, backbone, tiny_source(backbone).encoder, "a face", cache=tmp_path / "cache")
    batches = [FolderOfPeople(tmp_path, backbone).latents_of(data.names[start : start + 8]) for start in range(0, 95, 8)]
    assert torch.equal(data.latents, torch.cat([latents for batch in batches for latents in batch.values()]))
    first, last = data.split(5)
    for whole, part, rest in ((data.latents, first.latents, last.latents), (data.features, first.features, last.features)):
        assert whole.untyped_storage().nbytes() == 96 * whole[0].nbytes  # space for all 96 pictures, one of which is broken
        assert part.data_ptr() == whole.data_ptr()
        assert torch.equal(torch.cat([part, rest]), whole)
    again = load_identities(tmp_path, backbone, tiny_source(backbone).encoder, "a face", cache=tmp_path / "cache")
    assert torch.equal(again.latents, data.latents)
    assert torch.equal(again.features, data.features)
    done: list[str] = []

    def others(pieces: list[list[str]]) -> None:
        encode = encoding(tmp_path, backbone, tiny_source(backbone).encoder, "auto")
        for piece in reversed(pieces):
            encode(piece)
            done.append(piece[0])
            if len(done) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("hyperdreambooth.data.PIECE", 3)
    read = partial(load_identities, tmp_path, backbone, tiny_source(backbone).encoder, "a face", cache=tmp_path / "by others", share=others)
    with pytest.raises(KeyboardInterrupt):
        read()
    again = read()
    assert done == ["72", "48", "24", "0"], "pieces that were encoded must not be encoded again"
    assert again.names == data.names
    assert torch.equal(again.latents, data.latents)
    assert torch.equal(again.features, data.features)
    assert [file.suffix for file in (tmp_path / "by others").iterdir()] == [".safetensors"]
    order = torch.randperm(95, generator=torch.Generator().manual_seed(0))
    mixed = IdentityData(data.latents[order], data.features[order], order, data.names, [f"{i}" for i in order.tolist()], data.reference)
    some, others = mixed.split(5)  # the people are in random order
    assert others.names == data.names[90:]
    for part, names in ((some, data.names[:90]), (others, data.names[90:])):
        assert all(torch.equal(latents, data.latents_of([name])[name]) for name, latents in part.latents_of(names).items())
        assert all(data.names[int(prompt)] == part.names[person] for prompt, person in zip(part.prompts, part.people.tolist(), strict=True))
    for index in range(24, 48):
        (tmp_path / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    assert read().names == data.names[:24] + data.names[48:], "a piece without any readable picture must be skipped"


@contextlib.contextmanager
def a_worker_is_killed(found: Callable[[], bool]) -> Iterator[None]:
    """Ends one of this test's own workers of Ray as soon as they have `found` something."""
    psutil = pytest.importorskip("psutil")
    killed, over = [], threading.Event()

    def kill():
        while not over.wait(0.02) and not killed:
            if found():
                mine = psutil.Process().children(recursive=True)
                workers = [process for process in mine if process.is_running() and "MapWorker" in "".join(process.cmdline())]
                if workers:
                    workers[0].kill()
                    killed.append(workers[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert killed


@pytest.fixture
def ray(monkeypatch):
    """Ray's workers find the package; they and this process compute with one thread, as sums are rounded by their number."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_worker_of_ray_that_is_killed_loses_nothing(toon, faces, tmp_path, capsys, ray):
    small = (*SMALL[:4], "--training.steps", 6, "--chunk", 1)
    assert run("preoptimize", faces, "-o", tmp_path / "plain", *small) == 0
    with a_worker_is_killed(lambda: any((tmp_path / "ray" / "rows").glob("[!.]*"))):
        assert run("preoptimize", faces, "-o", tmp_path / "ray", "--engine", "ray", *small) == 0
    assert rows(tmp_path / "ray") == rows(tmp_path / "plain")
    assert "person 4" in capsys.readouterr().err


def loras(folder: Path) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Weights and headers of a folder's LoRAs, without the moment at which each was made."""
    found = {}
    for file in folder.glob("*.safetensors"):
        tensors, header = checkpoint.read_tensors(file)
        found[file.name] = tensors, {key: value for key, value in header.items() if "date" not in key}
    return found


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_folder_of_people_on_ray_gives_the_very_loras(toon, faces, tmp_path, capsys, monkeypatch, ray):
    """Three sizes of album are three batches; a run that lost a worker, and one whose LoRA was lost, end with the same weights."""
    for index in range(1, 12):
        picture(100 + index).save(faces / f"alone {index}.png")
    assert run("personalize", faces, "-o", tmp_path / "plain") == 0
    whole = loras(tmp_path / "plain")
    assert len(whole) == 19
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toon").mkdir()  # a folder of this name must not be taken for the base
    with a_worker_is_killed(lambda: any((tmp_path / "ray").glob("[!.]*.safetensors"))):
        assert run("personalize", faces.relative_to(tmp_path), "-o", "ray", "--engine", "ray") == 0
    said = capsys.readouterr().err
    assert "person 4 is left out" in said
    assert "19 people in" in said
    assert (tmp_path / "ray/preview.png").is_file()
    (tmp_path / "plain/alone 3.safetensors").unlink()
    assert run("personalize", faces, "-o", tmp_path / "plain") == 0
    assert "18 people are there already" in capsys.readouterr().err
    for again in (loras(tmp_path / "ray"), loras(tmp_path / "plain")):
        assert again.keys() == whole.keys()
        for name, (tensors, header) in whole.items():
            assert again[name][1] == header
            assert all(torch.equal(tensor, again[name][0][key]) for key, tensor in tensors.items())


def test_pictures_are_encoded_and_methods_compared_on_ray(toon, world, faces, tmp_path, monkeypatch, ray):
    """Encoded by workers, pictures give the same weights; by workers, methods get the same figures, from a folder that is named from here."""
    words = ("--lightweight.down-dim", 12, "--lightweight.up-dim", 8, "--batch", 2, "--training.steps", 2, "--crop", "center")
    for name, more in (("plain", ()), ("ray", ("--engine", "ray"))):
        assert run("train-hypernetwork", faces, "-o", tmp_path / name, *words, *more) == 0
    plain, by_ray = (checkpoint.read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("plain", "ray"))
    assert all(torch.equal(tensor, by_ray[name]) for name, tensor in plain.items())
    shutil.rmtree(faces / "person 4")
    for person in faces.iterdir():
        for number in range(2):
            picture(99 + number).save(person / f"{9 + number}.png")
    monkeypatch.chdir(tmp_path)
    words = ("--people", "faces", "--judges", "toon", "--methods", "hypernetwork", "lightweight DreamBooth", "--quick")
    found = []
    for name, more in (("plain.json", ()), ("ray.json", ("--engine", "ray"))):
        assert run("evaluate", *words, "-o", name, *more) == 0
        rows = json.loads(Path(name).read_text())["rows"]
        found.append({method: {key: value for key, value in row.items() if key != "seconds"} for method, row in rows.items()})
    assert found[0] == found[1]


def test_a_worker_in_another_folder_gets_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("people", "toon", "vit"):
        (tmp_path / name).mkdir()
    judges = ("clip:vit", "dino:ann/vit", "dlib", "vit")
    given = measure.Evaluate(output=Path("o.json"), base="toon", hypernetwork="vit", people=Path("people"), judges=judges)
    found = engines.absolute(given)
    assert (found.output, found.people) == (tmp_path / "o.json", tmp_path / "people")
    assert (found.base, found.hypernetwork) == ("toon", str(tmp_path / "vit"))
    assert found.judges == (f"clip:{tmp_path}/vit", "dino:ann/vit", "dlib", f"{tmp_path}/vit")
    assert engines.absolute(train.Preoptimize(folder=Path("s3://b/faces"), output=Path("t"))).folder == Path("s3://b/faces")


def test_ray_is_for_folders_of_people(toon, faces, tmp_path, capsys):
    assert run("personalize", faces / "person 0/0.png", "-o", tmp_path / "me.safetensors", "--engine", "ray") == 2
    assert "for a folder of people" in capsys.readouterr().err


def test_without_ray_its_engine_says_what_to_install(toon, faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--engine", "ray", *SMALL) == 2
    assert 'pip install "hyperdreambooth[ray]"' in capsys.readouterr().err
    assert run("preoptimize", faces, "-o", tmp_path / "t", "--address", "auto", *SMALL) == 2
    assert "--engine ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "rank", "count"),
    [("slurm.sh", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("sky.yaml", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="launchers are bash")
def test_a_launcher_makes_a_table(toon, faces, tmp_path, file, rank, count):
    """The launcher's own command, with the tiny world in place of its folders; `hyperdreambooth` notes its arguments."""
    text = (ROOT / "recipes/launchers" / file).read_text()
    script = yaml.safe_load(text)["run"] if file.endswith(".yaml") else text
    script = script.replace("/shared/faces", str(faces)).replace("/shared/table", str(tmp_path / "t")).replace("/shared/sd15", "toon")
    noted = tmp_path / "hyperdreambooth"
    noted.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    noted.chmod(0o755)
    for shard in ("0", "1"):
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", rank: shard, count: "2", "FACES": str(faces), "TABLE": str(tmp_path / "t")}
        words = subprocess.run(["bash", "-c", script], env=own, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
        assert f"{shard}/2" in words
        assert run(*words, *SMALL) == 0
    assert len(rows(tmp_path / "t")) == 8


WORKER = """
import dataclasses
import os
from hyperdreambooth.training import Run, fit, leave
from tests.test_training import PAIRED, batches, model, plain_step

config = dataclasses.replace(PAIRED, steps=6, gradient_accumulation=4 // int(os.environ["WORLD_SIZE"]))
fit(plain_step, model(), batches, config, Run(directory={folder!r}, quiet=True, device="cpu", on_step=lambda done: done == {stop}))
leave()
"""


def launched(folder: Path, processes: int, stop: int) -> None:
    (folder / "worker.py").write_text(WORKER.format(folder=str(folder / "run"), stop=stop))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(folder / "worker.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    """Where processes x accumulation stays, every step has the same batches: the weights agree but for the order of sums."""
    launched(tmp_path, 2, stop=2)
    launched(tmp_path, 4, stop=4)
    launched(tmp_path, 2, stop=0)
    alone = dataclasses.replace(test_training.PAIRED, steps=6, gradient_accumulation=4)
    net = test_training.model()
    fit(test_training.plain_step, net, test_training.batches, alone, Run(quiet=True, device="cpu"))
    model, _, _, meta = checkpoint.load(tmp_path / "run" / "state.safetensors")
    assert meta["step"] == 6
    for name, value in net.state_dict().items():
        torch.testing.assert_close(model[name], value, atol=1e-6, rtol=1e-4)
