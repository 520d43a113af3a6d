"""The commands from end to end on a tiny world: their files, their output, and the inputs that they refuse."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperdreambooth import commands, formats, photos, progress, settings
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.cli import main
from hyperdreambooth.commands import options
from hyperdreambooth.errors import InputError
from hyperdreambooth.settings import GenerateConfig
from hyperdreambooth.training_settings import TrainingConfig

from .conftest import picture
from .test_photos import png_header
from .test_training import in_two_processes

pytestmark = pytest.mark.usefixtures("tiny_world")
SMALL = ["--lightweight.down-dim", "12", "--lightweight.up-dim", "8"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def me(tmp_path, face):
    assert run("personalize", face, "-o", tmp_path / "me.safetensors", "--tokens", tmp_path / "me.tokens") == 0
    return tmp_path / "me.safetensors"


def test_personalize_writes_a_lora_a_preview_its_tokens_and_its_config(me):
    file = formats.read_lora(me)
    assert file.metadata["modelspec.trigger_phrase"] == "a [V] face"
    assert max(lora.rank for lora in file.loras.values()) == 3  # rank 1 of the prediction + rank 2 of the residual
    assert photos.read_png_metadata(me.with_suffix(".png"))["ai_generated"] == "true"
    assert formats.is_tokens(me.with_suffix(".tokens"))
    assert json.loads(me.with_suffix(".json").read_text())["base"] == "toon"


def test_personalize_with_zero_steps_from_several_photos_and_from_scratch(tmp_path, face):
    picture(3).save(tmp_path / "second.png")
    assert run("personalize", face, tmp_path / "second.png", "--steps", 0, "-o", tmp_path / "zero.safetensors") == 0
    assert max(lora.rank for lora in formats.read_lora(tmp_path / "zero.safetensors").loras.values()) == 1
    assert (
        run("personalize", face, "--hypernetwork", "none", "--steps", 2, "--targets", "unet*to_q", "-o", tmp_path / "scratch.safetensors")
        == 0
    )
    layers = formats.read_lora(tmp_path / "scratch.safetensors").loras
    assert all(path.endswith("to_q") for path in layers)
    assert run("personalize", face, "--order", "merged", "--steps", 2, "--format", "kohya", "-o", tmp_path / "merged.safetensors") == 0
    assert formats.read_lora(tmp_path / "merged.safetensors").layout == "kohya"


def test_a_folder_of_people_gives_what_each_alone_gives_and_a_broken_photo_stops_nobody(tmp_path, people, capsys):
    (people / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    assert run("personalize", people, "-o", tmp_path / "loras") == 0
    said = capsys.readouterr().err
    assert "broken is left out" in said
    names = sorted(file.stem for file in (tmp_path / "loras").glob("*.safetensors"))
    assert len(names) >= 3
    assert "broken" not in names
    for name in names[:2]:
        photos_of = sorted(people.glob(f"{name}/*")) or sorted(people.glob(f"{name}.*"))
        assert run("personalize", *photos_of, "-o", tmp_path / "alone" / f"{name}.safetensors") == 0
        together, alone = (formats.read_lora(tmp_path / folder / f"{name}.safetensors").loras for folder in ("loras", "alone"))
        for path in alone:
            a, b = (loras[path].up.float() @ loras[path].down.float() for loras in (together, alone))
            torch.testing.assert_close(a, b, atol=2e-3 * float(b.abs().max()), rtol=0)
    before = {name: (tmp_path / "loras" / f"{name}.safetensors").stat().st_mtime_ns for name in names}
    (tmp_path / "loras" / f"{names[0]}.safetensors").unlink()
    assert run("personalize", people, "-o", tmp_path / "loras") == 0
    assert f"{len(names) - 1} people are there already" in capsys.readouterr().err
    after = {name: (tmp_path / "loras" / f"{name}.safetensors").stat().st_mtime_ns for name in names}
    assert {name for name in names if after[name] != before[name]} == {names[0]}
    refused(capsys, "--tokens is for one person", "personalize", people, "-o", tmp_path / "x", "--tokens", tmp_path / "t")


def test_a_caption_names_the_person_in_a_folder_as_it_does_alone(tmp_path, tiny_world):
    (tmp_path / "people").mkdir()
    for seed, name in enumerate(("anna", "bob")):
        picture(seed).save(tmp_path / "people" / f"{name}.png")
        (tmp_path / "people" / f"{name}.txt").write_text("wearing a cap")
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu")
    assert [me.shown for _, me in hdb.personalize_all(tmp_path / "people", crop="center", quiet=True)] == [
        ["a [V] face, wearing a cap"]
    ] * 2


def test_notes_on_photos_are_said_for_one_person_and_for_many(tmp_path, tiny_world, capsys):
    frames = [picture(1), picture(2)]
    frames[0].save(tmp_path / "anna.gif", save_all=True, append_images=frames[1:])
    note, hdb = f"{tmp_path / 'anna.gif'}: took the first of 2 frames.", HyperDreamBooth.from_pretrained("toon", device="cpu")
    hdb.personalize(tmp_path / "anna.gif", steps=0, crop="center")
    assert capsys.readouterr().err.count(note) == 1
    for quiet in (False, True):
        assert [me.notes for _, me in hdb.personalize_all(tmp_path, steps=0, crop="center", quiet=quiet)] == [[note]]
        assert capsys.readouterr().err.count(note) == (not quiet)
    assert run("personalize", tmp_path, "-o", tmp_path / "loras", "--steps", 0, "--crop", "center") == 0
    assert capsys.readouterr().err.count(note) == 1


def test_a_batch_that_is_too_large_for_the_memory_is_halved_and_loses_nobody(tiny_world, monkeypatch):
    from hyperdreambooth import api

    real, tried = api.personalize, []

    def short_of_memory(backbone, subject, *args, **more):
        tried.append(len(subject.latents))
        if len(subject.latents) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(backbone, subject, *args, **more)

    monkeypatch.setattr(api, "personalize", short_of_memory)
    hdb = HyperDreamBooth.from_pretrained("toon", device="cpu")
    people = {str(seed): picture(seed) for seed in range(5)}
    assert [name for name, _ in hdb.personalize_all(people, crop="center", quiet=True)] == list(people)
    assert tried == [5, 2, 2, 1]


def test_people_from_scratch_side_by_side_are_those_alone(tiny_world):
    hdb = HyperDreamBooth.from_pretrained("toon", hypernetwork=None, device="cpu")
    three = {str(seed): picture(seed) for seed in range(3)}
    settings = {"steps": 2, "targets": ("unet*to_q",)}
    together = dict(hdb.personalize_all(three, side_by_side=2, quiet=True, crop="center", **settings))
    assert list(together) == list(three)
    for name, image in three.items():
        alone = hdb.personalize(image, quiet=True, crop="center", **settings).loras
        for path, lora in alone.items():
            delta = lora.up @ lora.down
            mine = together[name].loras[path]
            torch.testing.assert_close(mine.up @ mine.down, delta, atol=2e-3 * float(delta.abs().max()), rtol=0)


def test_a_photo_unlike_all_training_is_said_before_and_after_and_not_described(tmp_path, face, tiny_world, monkeypatch, capsys):
    shutil.copytree(tiny_world, tmp_path / "world")
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(tmp_path / "world"))
    config = tmp_path / "world" / "hypernetwork" / "config.json"
    values = json.loads(config.read_text()) | {"describe": [["a"], ["smiling", "angry"], ["[V] face"]]}
    config.write_text(json.dumps(values | {"familiar": 1e-6}))
    assert run("personalize", face, "-o", tmp_path / "me.safetensors") == 0
    said = capsys.readouterr().err
    assert said.count("unlike anything that toon was trained on") == 2
    assert "taken to show" not in said
    config.write_text(json.dumps(values | {"familiar": 1e6}))
    assert run("personalize", face, "-o", tmp_path / "me.safetensors", "--overwrite") == 0
    said = capsys.readouterr().err
    assert "unlike anything" not in said
    assert "taken to show" in said


def test_an_interrupted_personalize_goes_on_and_leaves_nothing(tmp_path, face, monkeypatch):
    from hyperdreambooth.stages import dreambooth

    out = tmp_path / "out"
    common = ["personalize", face, "--steps", 4, "--device", "cpu"]  # results must be bit-identical, so all runs use the CPU
    assert run(*common, "-o", out / "whole.safetensors") == 0
    real, calls = dreambooth.denoising_loss, []

    def stopped(*args: object, **more: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(dreambooth, "denoising_loss", stopped)
    assert run(*common, "-o", out / "me.safetensors") == 130
    assert not (out / "me.safetensors").exists()
    assert run(*common, "-o", out / "me.safetensors") == 0
    assert len(calls) == 3 + 2  # the resumed run repeats the third step and does the fourth
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
    whole, resumed = (formats.read_lora(out / f"{name}.safetensors").loras for name in ("whole", "me"))
    assert all(torch.equal(whole[path].up, resumed[path].up) for path in whole)


def test_what_the_prompt_names_changes_what_is_learnt(tmp_path, face):
    for name, more in (("plain", []), ("named", ["--prompt", "a [V] face on a blue background"])):
        assert run("personalize", face, "--steps", 2, *more, "-o", tmp_path / f"{name}.safetensors") == 0
    plain, named = (formats.read_lora(tmp_path / f"{name}.safetensors") for name in ("plain", "named"))
    assert any(not torch.equal(plain.loras[path].up, named.loras[path].up) for path in plain.loras)
    assert plain.metadata["modelspec.trigger_phrase"] == named.metadata["modelspec.trigger_phrase"] == "a [V] face"


def test_a_config_file_gives_the_flags(tmp_path, face, capsys):
    (tmp_path / "c.yaml").write_text("config:\n  steps: 1\n  rank: 3\n  learning_rate: 1e-3\nformat: kohya\ncrop: center\nface: null\n")
    assert run("personalize", face, "-o", tmp_path / "a.safetensors", "--config", tmp_path / "c.yaml") == 0
    file = formats.read_lora(tmp_path / "a.safetensors")
    assert file.layout == "kohya"
    assert max(lora.rank for lora in file.loras.values()) == 4
    for text, says in (
        ("nonsense: 1", "unknown setting"),
        ("config: {steps: many}", "steps"),
        ("- a", "mapping"),
        ("a: [", "neither YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert run("personalize", face, "-o", tmp_path / "b.safetensors", "--config", tmp_path / "bad.yaml") == 2
        assert says in capsys.readouterr().err
    assert run("personalize", "--config", tmp_path / "a.json", "--overwrite") == 0  # saved settings are valid as --config


def test_off_and_no_of_yaml_are_the_choices_of_that_name(tmp_path):
    """YAML 1.1 reads them as False."""
    (tmp_path / "c.yaml").write_text("identity_guidance: off\n")
    assert settings.updated(GenerateConfig(identity_guidance=2.0), settings.read_config(tmp_path / "c.yaml"), "c").identity is None
    (tmp_path / "c.yaml").write_text("mixed_precision: no\n")
    assert settings.updated(TrainingConfig(mixed_precision="bf16"), settings.read_config(tmp_path / "c.yaml"), "c").mixed_precision == "no"
    with pytest.raises(InputError, match="c: identity_guidance must be float or off, not True"):
        settings.updated(GenerateConfig(), {"identity_guidance": True}, "c")
    with pytest.raises(InputError, match="c: width must be int or null, not 'wide'"):
        settings.updated(GenerateConfig(), {"width": "wide"}, "c")


def test_generate_makes_pictures_that_say_what_they_are(tmp_path, me):
    out = tmp_path / "out"
    formats.save_lora(tmp_path / "style.safetensors", formats.read_lora(me).loras.scaled(0.1), {})
    arguments = [
        "generate",
        "a [V] face",
        "a pencil sketch of a [V] face",
        "--lora",
        f"{me}:0.9",
        "--lora",
        f"{tmp_path}/style.safetensors:0.7",
    ]
    assert run(*arguments, "--count", 2, "--steps", 2, "--seed", 5, "-o", out) == 0
    assert sorted(file.name for file in out.iterdir()) == ["01-5.png", "01-6.png", "02-5.png", "02-6.png", "generate.json", "grid.png"]
    metadata = photos.read_png_metadata(out / "02-6.png")
    settings = json.loads(metadata["hyperdreambooth"])
    assert settings["prompt"] == "a pencil sketch of a [V] face"
    assert settings["seed"] == 6
    assert settings["loras"][0] == ["me.safetensors", 0.9]
    assert "trainedAlgorithmicMedia" in metadata["XML:com.adobe.xmp"]
    # the same seed must give the same picture
    assert (
        run(
            "generate",
            "a [V] face",
            "--lora",
            f"{me}:0.9",
            "--style",
            f"{tmp_path}/style.safetensors:0.7",
            "--steps",
            2,
            "--seed",
            6,
            "-o",
            tmp_path / "again",
        )
        == 0
    )
    again, before = (np.asarray(Image.open(folder / "01-6.png")).astype(int) for folder in (tmp_path / "again", out))
    assert np.abs(again - before).max() <= 1  # rounding depends on the batch size


def test_generate_takes_token_files_and_no_lora_at_all(tmp_path, me):
    assert run("generate", "a [V] face", "--lora", me.with_suffix(".tokens"), "--steps", 1, "-o", tmp_path / "t") == 0
    assert run("generate", "a face", "--steps", 1, "--scheduler", "DDIMScheduler", "--negative", "hat", "-o", tmp_path / "n") == 0


def test_generate_reads_tokens_with_ones_own_hypernetwork(tmp_path, me, tiny_world, capsys):
    draw = ["generate", "a [V] face", "--base", tiny_world / "base", "--lora", me.with_suffix(".tokens"), "--steps", 1]
    refused(capsys, "no hypernetwork here", *draw, "-o", tmp_path / "without")
    assert run(*draw, "--hypernetwork", tiny_world / "hypernetwork", "-o", tmp_path / "with") == 0


def test_info_targets_export_and_mix(tmp_path, me, capsys):
    assert run("info", me) == 0
    assert "trigger: a [V] face" in capsys.readouterr().out
    assert run("info", me.with_suffix(".tokens"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "tokens"
    assert run("targets", "toon", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["layers"] == len(about["shapes"]) == len(formats.read_lora(me).loras)
    assert about["token_variables"] == 150 * about["layers"]
    assert run("targets") == 0
    assert run("export", me.with_suffix(".tokens"), "-o", tmp_path / "e.safetensors") == 0
    assert run("export", me, "--format", "kohya", "-o", tmp_path / "k.safetensors") == 0
    assert (
        run(
            "mix",
            f"{me.with_suffix('.tokens')}:0.5",
            f"{me.with_suffix('.tokens')}:0.5",
            "-o",
            tmp_path / "m.safetensors",
            "--tokens",
            tmp_path / "m.tokens",
        )
        == 0
    )
    assert run("mix", me.with_suffix(".tokens"), me.with_suffix(".tokens"), "-o", tmp_path / "equal.safetensors") == 0
    again = formats.read_lora(tmp_path / "k.safetensors").metadata
    assert again["modelspec.title"] == "k"  # the title is the copy's own file name
    one, both, equal = (formats.read_lora(tmp_path / f"{name}.safetensors").loras for name in ("e", "m", "equal"))
    path = next(iter(one))
    torch.testing.assert_close(one[path].delta(), both[path].delta(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(one[path].delta(), equal[path].delta(), atol=1e-2, rtol=1e-2)  # default: equal weights


def test_the_papers_numbers_come_out_of_the_published_architecture(capsys):
    assert run("targets", "sd15", "--preset", "paper", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    layers = about["shapes"]
    assert about["layers"] == 192
    assert sum(path.endswith("ff.net.0.proj") for path in layers) == 16
    assert sum(path.startswith("text_encoder.text_model.encoder") for path in layers) == 48
    assert about["token_variables"] == 28_800
    assert about["token_file_bytes"] == 115_200
    assert about["lora_variables"] == 385_344
    assert about["tokens_over_lora"] == pytest.approx(0.075, abs=5e-4)
    assert run("targets", "sd15", "--preset", "paper", "--targets", "unet*") == 2


def test_train_light_and_its_export(tmp_path, face):
    assert run("train-light", face, "-o", tmp_path / "light", "--training.steps", 2, *SMALL) == 0
    names = {file.name for file in (tmp_path / "light").iterdir()}
    assert {"lora.safetensors", "preview.png", "config.json", "rows"} <= names
    assert run("export", tmp_path / "light", "-o", tmp_path / "again.safetensors") == 0
    a, b = (formats.read_lora(file).loras for file in (tmp_path / "light" / "lora.safetensors", tmp_path / "again.safetensors"))
    path = next(iter(a))
    torch.testing.assert_close(a[path].delta(), b[path].delta(), atol=1e-3, rtol=1e-2)


def test_train_light_of_another_person_starts_anew_where_it_may_overwrite(tmp_path, people):
    alice, bob = sorted(people.rglob("*.png"))[:2]
    words = ["--training.steps", 2, *SMALL]
    for photo, folder in ((alice, "light"), (bob, "light"), (bob, "alone")):
        assert run("train-light", photo, "-o", tmp_path / folder, "--overwrite", *words) == 0
    a, b = (formats.read_lora(tmp_path / folder / "lora.safetensors").loras for folder in ("light", "alone"))
    assert all(torch.equal(a[path].down, b[path].down) and torch.equal(a[path].up, b[path].up) for path in b)


WORKER = """
import runpy, sys
import torch
sys.argv[1:] = ["train-light", {face!r}, "-o", {folder!r}, "--training.steps", "1", "--device", "cpu", *{small!r}]
try:
    runpy.run_module("hyperdreambooth", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert torch.distributed.is_available() and not torch.distributed.is_initialized()
"""


def test_a_command_in_two_processes_ends_their_group(tmp_path, face):
    in_two_processes(tmp_path, WORKER.format(face=str(face), folder=str(tmp_path / "light"), small=SMALL))
    assert formats.read_lora(tmp_path / "light" / "lora.safetensors").loras


def test_the_seeds_chain_preoptimize_train_personalize(tmp_path, people, face, capsys):
    table, folder = tmp_path / "table", tmp_path / "hyper"
    assert run("preoptimize", people, "-o", table, "--training.steps", 2, "--chunk", 3, *SMALL) == 0
    assert run("export", table, "--identity", "cyd", "-o", tmp_path / "cyd.safetensors") == 0
    assert run("export", table, "-o", tmp_path / "which.safetensors") == 2
    assert "ann, bob" in capsys.readouterr().err
    small = ["--training.steps", 2, "--batch", 2, "--hypernetwork.dim", 16, "--hypernetwork.heads", 2, "--hypernetwork.blocks", 1]
    assert run("train-hypernetwork", people, "-o", folder, "--mode", "faithful", "--table", table, *small, *SMALL) == 0
    assert (folder / "preview.png").is_file()
    assert run("personalize", face, "--hypernetwork", folder, "--steps", 1, "-o", tmp_path / "f.safetensors") == 0
    assert run("train-hypernetwork", people, "-o", tmp_path / "pro", *small, *SMALL) == 0
    assert json.loads((tmp_path / "pro" / "config.json").read_text())["mode"] == "pro"
    assert "identity_gain" in capsys.readouterr().err


def test_demo_writes_a_report_that_needs_nothing_else(tmp_path):
    assert run("demo", "-o", tmp_path / "demo", "--face", 2) == 0
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 5 * 8
    assert "http" not in page.replace("<!doctype html>", "")
    assert (tmp_path / "demo" / "grid.png").is_file()
    assert formats.read_lora(tmp_path / "demo" / "me.safetensors").loras


def test_help_teaches(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (
        "personalize",
        "generate",
        "demo",
        "train-light",
        "preoptimize",
        "train-hypernetwork",
        "export",
        "info",
        "targets",
        "evaluate",
    ):
        assert name in text
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
    assert main(["--version"]) == 0


def test_help_of_every_command_needs_no_torch():
    code = (
        "import contextlib, sys\nfrom hyperdreambooth.cli import main\nfrom hyperdreambooth.commands import COMMANDS\n"
        "for name in COMMANDS:\n    with contextlib.suppress(SystemExit):\n        main([name, '--help'])\n"
        "    assert not {'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent.parent / "src")


def test_info_of_a_lora_and_of_tokens_needs_no_torch(me):
    code = (
        "import sys\nfrom hyperdreambooth.cli import main\nassert main(['info', sys.argv[1], '--json']) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)\n"
    )
    for file in (me, me.with_suffix(".tokens")):
        where = Path(__file__).parent.parent / "src"
        done = subprocess.run([sys.executable, "-c", code, file], check=True, capture_output=True, cwd=where, text=True)
        about = json.loads(done.stdout)
        assert about["layers"] > 10
        assert len(about["fingerprint"]) == 16 or about["kind"] == "tokens"


def test_a_tracker_gets_losses_rates_gain_and_pictures(tmp_path, people):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--training.tracker", "tensorboard", "--training.steps", 4, "--training.log-every", 2, "--training.validate-every", 2]
    small = ["--hypernetwork.dim", "16", "--hypernetwork.heads", "2", "--batch", "2"]
    assert run("train-hypernetwork", people, "-o", tmp_path / "pro", *small, *SMALL, *more) == 0
    files = sorted((tmp_path / "pro").rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    read = EventAccumulator(str(files[0].parent)).Reload()
    assert {event.step for event in read.Scalars("loss")} == {2, 4}
    assert read.Scalars("learning_rate")[-1].step == 4
    assert [event.step for event in read.Scalars("identity_gain")] == [2, 4]
    assert [event.step for event in read.Images("preview")] == [2, 4]


@pytest.mark.parametrize(
    ("tracker", "says"), [("mlflow", "pip install mlflow"), ("wandb", "hyperdreambooth[wandb]"), ("x", "is no tracker")]
)
def test_a_tracker_that_is_missing_is_refused_before_any_work(tracker, says, tmp_path, people, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == tracker else real(name, *more))
    with pytest.raises(SystemExit) as ended:
        run("train-hypernetwork", people, "-o", tmp_path / "pro", "--training.tracker", tracker)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pro").exists()


def refused(capsys, says: str, *arguments: object) -> None:
    before = capsys.readouterr()
    assert before is not None
    assert run(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("hyperdreambooth: ")
    assert says in said[0], said[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.png", None),
        ("text.png", b"hello"),
        ("empty.png", b""),
        ("bomb.png", png_header(30_000, 30_000)),
        ("dot.png", png_header(1, 1)),
        ("cut.png", png_header(64, 64)),
    ],
)
def test_bad_photos_are_one_line_and_leave_nothing(tmp_path, capsys, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(capsys, name, "personalize", tmp_path / name, "-o", tmp_path / "out" / "me.safetensors")
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_one_line(tmp_path, capsys, face, me, people):
    refused(capsys, "no command", "nonsense")
    refused(capsys, "--overwrite", "personalize", face, "-o", me)
    refused(capsys, "no such folder", "preoptimize", tmp_path / "nowhere", "-o", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    refused(capsys, "holds no pictures", "preoptimize", tmp_path / "empty", "-o", tmp_path / "t")
    refused(capsys, "no such file or directory, and a hub id", "generate", "x", "--base", tmp_path / "nowhere", "-o", tmp_path / "g")
    refused(capsys, "model_index.json", "generate", "x", "--base", tmp_path / "empty", "-o", tmp_path / "g")
    refused(capsys, "isn't a hypernetwork", "personalize", face, "--hypernetwork", tmp_path / "empty", "-o", tmp_path / "h.safetensors")
    refused(capsys, "matches no layer", "targets", "toon", "--targets", "unet.nothing*")
    refused(capsys, "matches none", "personalize", face, "--steps", 1, "--targets", "unet.nothing*", "-o", tmp_path / "n.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(me.read_bytes()[:100])
    refused(capsys, "cut.safetensors", "info", cut)
    refused(capsys, "cut.safetensors", "generate", "x", "--lora", cut, "-o", tmp_path / "g")
    refused(capsys, "no scheduler", "generate", "x", "--scheduler", "Nope", "-o", tmp_path / "g")
    refused(capsys, "no such file or folder", "export", tmp_path / "nothing", "-o", tmp_path / "x.safetensors")
    refused(capsys, "table", "train-hypernetwork", people, "--mode", "faithful", "-o", tmp_path / "f")
    refused(capsys, "is no method", "evaluate", "--rows", "nonsense", "-o", tmp_path / "e.json")


def test_a_lora_of_another_base_is_refused(tmp_path, capsys, me):
    tensors = load_file(me)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, key: torch.zeros(3, 7)}, tmp_path / "other.safetensors")
    refused(capsys, "another base", "generate", "x", "--lora", tmp_path / "other.safetensors", "-o", tmp_path / "g")
    save_file(
        {"unet.elsewhere.lora_A.weight": torch.zeros(1, 7), "unet.elsewhere.lora_B.weight": torch.zeros(7, 1)}, tmp_path / "far.safetensors"
    )
    refused(capsys, "another base", "generate", "x", "--lora", tmp_path / "far.safetensors", "-o", tmp_path / "g")


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, capsys, face, monkeypatch):
    from hyperdreambooth import checkpoint

    def full(*args: object, **more: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert run("personalize", face, "--steps", 0, "-o", tmp_path / "out" / "me.safetensors") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_says_so(monkeypatch, face, tmp_path, capsys):
    from hyperdreambooth.commands import files

    def stop(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "run_info", stop)
    assert run("info", face) == 130
    assert "stopped" in capsys.readouterr().err


def test_settings_say_where_they_came_from_and_can_be_given_back(me, face, tmp_path, capsys):
    saved = me.with_suffix(".json")
    said = json.loads(saved.read_text())["resolved"]
    assert "steps = 3 (hypernetwork)" in said  # the default of the tiny world's hypernetwork
    assert "copies = 4 (default)" in said
    more = ["--tokens", tmp_path / "again.tokens", "--copies", 2, "--verbose"]
    assert run("personalize", face, "--config", saved, "-o", tmp_path / "again.safetensors", *more) == 0
    assert "copies = 2 (given)" in capsys.readouterr().err
    one, other = (formats.read_lora(file).loras for file in (me, tmp_path / "again.safetensors"))
    assert one.keys() == other.keys()
    assert run("generate", "a [V] face", "--lora", f"{me}:0.5", "-o", tmp_path / "drawn", "--verbose") == 0
    assert "strength = 0.5 (given, times the LoRA's own weight)" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_a_sentence_and_debug_shows_the_trace(monkeypatch, face, capsys):
    from hyperdreambooth.commands import files

    def stumble(args: object) -> None:
        raise RuntimeError("some library\nsays why.")

    monkeypatch.setattr(files, "run_info", stumble)
    refused(capsys, "RuntimeError: says why", "info", face)
    with pytest.raises(RuntimeError, match="some library"):
        run("info", face, "--debug")


@pytest.mark.parametrize("name", ["me.v1", "me.ckpt", "me"])
def test_a_lora_is_never_written_under_another_suffix(tmp_path, face, capsys, name):
    refused(capsys, f"Name it {name}.safetensors", "personalize", face, "-o", tmp_path / name)
    assert not list(tmp_path.glob("me*"))


def test_evaluate_measures_resumes_and_tabulates(tmp_path, capsys, tiny_world):
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    for name in ("validation.webp", "validation.json"):
        shutil.copy(Path(__file__).parents[1] / "benchmarks" / "atlas" / name, atlas)
    save_file({"embeddings": torch.nn.functional.normalize(torch.randn(50, 16), dim=1)}, atlas / "training.safetensors")
    out = tmp_path / "e.json"
    common = ["evaluate", "--split", "validation", "--people", 3, "--pictures", 1, "--atlas", atlas, "-o", out]
    assert run(*common, "--rows", "true", "base", "prediction") == 0
    first = json.loads(out.read_text())
    assert run(*common, "--rows", "finetuned+guidance", "reconstruction") == 0
    second = json.loads(out.read_text())
    assert set(second["rows"]) == {"true", "reconstruction", "base", "prediction", "finetuned+guidance"}
    assert second["rows"]["base"] == first["rows"]["base"]
    for figures in second["rows"].values():
        mean, low, high = figures["rank1"]
        assert 0 <= low <= mean <= high <= 1
    assert "| prediction |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").is_file()
    refused(capsys, "other settings", *common, "--rows", "base", "--pictures", 2)
    faithful = shutil.copytree(tiny_world / "hypernetwork", tmp_path / "faithful")
    assert run(*common, "--rows", "faithful", "--faithful", faithful) == 0
    assert run(*common, "--rows", "faithful", "--faithful", faithful) == 0
    measured = json.loads(out.read_text())
    weights = load_file(faithful / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, faithful / "model.safetensors")
    refused(capsys, "other settings", *common, "--rows", "faithful", "--faithful", faithful)
    assert run(*common, "--rows", "prediction+guidance") == 0
    assert json.loads(out.read_text())["settings"] == measured["settings"]


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_examples_of_the_help_keep_their_lines(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    hyperdreambooth ")]
    said = [line.strip() for line in str(commands.load(name)[0].__doc__).splitlines() if line.strip().startswith("hyperdreambooth ")]
    assert shown == said


def test_a_file_is_called_what_it_is(tmp_path, capsys):
    for content, words in (
        (b"<!DOCTYPE html><p>sign in", "is a web page"),
        (b"Dear Sir or Madam,\n\nyour model is attached to this letter, as was promised.", "is a text file"),
        (b"", "is empty"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00\x00\x01\x02", "Was it cut off"),
    ):
        file = tmp_path / "base.safetensors"
        file.write_bytes(content)
        refused(capsys, words, "targets", file)
        refused(capsys, words, "info", file)
    refused(capsys, "is a folder: name a LoRA", "info", tmp_path)


def test_one_wrong_value_is_named_alone(face, tmp_path, capsys):
    refused(capsys, "steps must be at least 0, not -5.", "personalize", face, "--steps", -5, "-o", tmp_path / "x.safetensors")
    (tmp_path / "c.yaml").write_text("stepz: 3\n")
    refused(
        capsys,
        "unknown setting 'stepz'. Did you mean steps?",
        "personalize",
        face,
        "--config",
        tmp_path / "c.yaml",
        "-o",
        tmp_path / "x.safetensors",
    )


def test_everything_that_is_written_is_said(tmp_path, face, capsys):
    assert (
        run("personalize", face, "--steps", 0, "-o", tmp_path / "out" / "me.safetensors", "--tokens", tmp_path / "out" / "me.tokens") == 0
    )
    assert run("generate", "a [V] face", "--lora", tmp_path / "out" / "me.safetensors", "--steps", 1, "-o", tmp_path / "out") == 0
    said = capsys.readouterr().err
    for file in (tmp_path / "out").iterdir():
        assert f"{file}: " in said


def test_info_prints_a_line_a_value_that_cannot_steer_the_terminal(tmp_path, me, capsys):
    about = formats.read_lora(me)
    words = {"ss_tag_frequency": "tag " * 900, "ss_title": "two\nlines \x1b[31mred", "key\x1b[2J": "x"}
    formats.save_lora(tmp_path / "other.safetensors", about.loras, about.metadata | words)
    assert run("info", tmp_path / "other.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "metadata:" in lines
    assert "  modelspec.title: me" in lines
    assert "  ss_title: two lines  [31mred" in lines
    assert any("ss_tag_frequency: tag" in line and "(3600 characters" in line for line in lines)
    assert max(map(len, lines)) < 300
    assert all(line.isprintable() and "{'" not in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (29.5, "30 s"), (59.0, "59 s"), (59.5, "1 min"), (200, "3 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_printed_in_rounded_units(seconds, said):
    assert progress.format_duration(seconds) == said


def test_brackets_in_a_message_are_printed(capsys):
    progress.Progress("training", 1).note("see hyperdreambooth[faces]")
    assert "training: see hyperdreambooth[faces]" in capsys.readouterr().err


def test_a_log_says_the_seconds_of_the_last_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = progress.Progress("training", 10)
    for done, says in ((2, "12 s left"), (9, "2 s left"), (10, "done")):
        now[0] = 1.5 * done
        log.log(done, loss=0.1, rate=1e-3)
        assert capsys.readouterr().err.strip().endswith(says)


def test_that_other_programs_keep_a_core_busy_is_said_with_what_helps(tmp_path, face, capsys, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        process = psutil.Process()
        options.busy_elsewhere(process)
        time.sleep(1)
        found = options.busy_elsewhere(process)
        busy.kill()
    assert found > 0.2
    for threads, cores, said in ((2, 1.0, 1), (1, 1.0, 0), (2, 0.1, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(options, "busy_elsewhere", lambda process, cores=cores: cores)
        assert run("personalize", face, "-o", tmp_path / "me.safetensors", "--steps", 1, "--overwrite") == 0
        assert capsys.readouterr().err.count("OMP_NUM_THREADS=1") == said
