"""Commands that make and use a personal LoRA: file headers and picture strips (further tests are in test_cli.py)."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperdreambooth import HyperDreamBooth, formats, photos

from . import test_cli
from .conftest import picture
from .test_cli import refused, run

pytestmark = pytest.mark.usefixtures("tiny_world")
me = test_cli.me


def test_a_strip_leads_from_one_person_to_the_other(tmp_path, me, capsys):
    picture(7).save(tmp_path / "b.png")
    assert run("personalize", tmp_path / "b.png", "--steps", 0, "--tokens", tmp_path / "b.tokens", "-o", tmp_path / "b.safetensors") == 0
    both = [f"{me.with_suffix('.tokens')}:0.5", f"{tmp_path}/b.tokens:0.5"]
    assert run("mix", *both, "-o", tmp_path / "mix.safetensors", "--strip", tmp_path / "strip.png") == 0
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width > 5 * strip.height / 2
    metadata = photos.read_png_metadata(tmp_path / "strip.png")
    assert [weight for _, weight in json.loads(metadata["hyperdreambooth"])["loras"]] == [0.5, 0.5]
    refused(capsys, "two token files, not 1", "mix", both[0], "-o", tmp_path / "one.safetensors", "--strip", tmp_path / "one.png")
    refused(capsys, "strip.png exists", "mix", *both, "-o", tmp_path / "one.safetensors", "--strip", tmp_path / "strip.png")


def test_a_photo_of_the_loras_name_is_never_replaced(tmp_path):
    photo = tmp_path / "ann.png"
    picture(4).save(photo)
    before = photo.read_bytes()
    for _ in range(2):
        assert run("personalize", photo, "--steps", 0, "-o", tmp_path / "ann.safetensors", "--overwrite") == 0
        assert photo.read_bytes() == before
        assert photos.is_generated(tmp_path / "ann.preview.png")


def test_a_generated_picture_that_is_the_photo_is_never_replaced(tmp_path):
    assert run("generate", "a [V] face", "--steps", 1, "-o", tmp_path) == 0
    photo, preview = tmp_path / "01-0.png", tmp_path / "01-0.preview.png"
    before = photo.read_bytes()
    assert run("personalize", photo, "--steps", 0, "-o", tmp_path / "01-0.safetensors") == 0
    assert photo.read_bytes() == before
    assert photos.is_generated(preview)
    assert photos.preview_path(tmp_path / "01-0.safetensors") == preview  # what `push` uploads


def test_a_file_of_ones_own_is_replaced_only_where_that_is_said(tmp_path, face, capsys):
    out, settings, shown = (tmp_path / f"zoe.{suffix}" for suffix in ("safetensors", "json", "png"))
    personalize = ["personalize", face, "--steps", 0, "-o", out]
    settings.write_text('{"likes": "tea"}')
    refused(capsys, "zoe.json exists", *personalize)
    settings.write_text('["tea"]')
    refused(capsys, "zoe.json exists", *personalize)
    settings.write_text('{"seed": 3}')
    assert run(*personalize, "--config", settings) == 0
    out.unlink()
    assert run(*personalize) == 0  # the settings and the preview are this command's own
    out.unlink()
    for file in (shown, tmp_path / "zoe.preview.png"):
        picture(4).save(file)
    refused(capsys, "zoe.preview.png exists", *personalize)
    (tmp_path / "generate.json").write_text("{}")
    refused(capsys, "generate.json exists", "generate", "a face", "-o", tmp_path)
    (tmp_path / "people").mkdir()
    picture(5).save(tmp_path / "people" / "ann.png")
    (tmp_path / "personalize.json").write_text("{}")
    refused(capsys, "personalize.json exists", "personalize", tmp_path / "people", "-o", tmp_path)


@pytest.mark.parametrize("name", ["me.safetensors", "me.tokens", "grid.png"])
def test_demo_replaces_none_of_its_outputs_by_itself(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"mine")
    refused(capsys, f"{name} exists", "demo", "-o", tmp_path)


def test_train_light_replaces_files_of_its_own_runs_alone(tmp_path, face, capsys):
    small = ["--training.steps", 1, "--lightweight.down-dim", 12, "--lightweight.up-dim", 8]
    for name in ("config.json", "preview.png"):
        (tmp_path / name).write_text('{"folder": "people", "config": {}}')  # such as a table of `preoptimize`
        refused(capsys, f"{name} exists", "train-light", face, "-o", tmp_path, *small)
        (tmp_path / name).unlink()
    for _ in range(2):
        assert run("train-light", face, "-o", tmp_path, *small) == 0
        (tmp_path / "lora.safetensors").unlink()


def test_what_a_command_cannot_do_is_said_before_it_works(tmp_path, face, capsys, monkeypatch):
    monkeypatch.setattr(HyperDreamBooth, "personalize", None)
    scratch = ["--hypernetwork", "none", "--tokens", tmp_path / "t.tokens", "-o", tmp_path / "t.safetensors"]
    refused(capsys, "t.tokens: only a hypernetwork's prediction has tokens", "personalize", face, *scratch)
    monkeypatch.setattr(HyperDreamBooth, "from_pretrained", None)
    refused(capsys, "there is no prompt", "generate", "-o", tmp_path)


def test_the_thumbnail_and_the_authors_words_are_in_the_file(tmp_path, face, me):
    assert formats.read_lora(me).metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert run("personalize", face, "--steps", 0, "--author", "ann", "--license", "CC0-1.0", "-o", tmp_path / "a.safetensors") == 0
    assert run("export", tmp_path / "a.safetensors", "--format", "kohya", "-o", tmp_path / "b.safetensors") == 0
    for name in "ab":
        metadata = formats.read_lora(tmp_path / f"{name}.safetensors").metadata
        assert metadata["modelspec.author"] == "ann"
        assert metadata["modelspec.license"] == "CC0-1.0"
        assert metadata["modelspec.title"] == name
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert metadata["modelspec.resolution"] == "64x64"


def test_a_caption_beside_the_photo_is_what_it_shows(tmp_path, capsys):
    picture(4).save(tmp_path / "ann.png")
    (tmp_path / "ann.txt").write_text("smiling on a\nblue background\n")
    assert run("personalize", tmp_path / "ann.png", "--steps", 1, "-o", tmp_path / "out" / "a.safetensors") == 0
    assert 'taken to show "a [V] face, smiling on a blue background"' in capsys.readouterr().err
    assert run("personalize", tmp_path / "ann.png", "--steps", 1, "--prompt", "a [V] face", "-o", tmp_path / "out" / "b.safetensors") == 0
    assert 'taken to show "a [V] face"' in capsys.readouterr().err


def test_styles_of_any_kind_are_drawn_with_beside_a_person(tmp_path, me, tiny_world, capsys):
    """A folder with a style of convolutions; without the style the picture is another, and the next one is as it was before."""
    layer = "unet.down_blocks.0.resnets.0.conv1"
    tensors = load_file(tiny_world / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    outputs, inputs = tensors[f"{layer[5:]}.weight"].shape[:2]
    sides = {f"{layer}.lora_A.weight": torch.randn(2, inputs, 3, 3), f"{layer}.lora_B.weight": torch.randn(outputs, 2, 1, 1)}
    (tmp_path / "style").mkdir()
    save_file(sides, tmp_path / "style" / "pytorch_lora_weights.safetensors")
    draw = ["generate", "a [V] face", "--lora", me, "--steps", 1, "--seed", 3]
    for name, more in (("plain", []), ("styled", ["--style", f"{tmp_path / 'style'}:0.8"]), ("again", [])):
        assert run(*draw, *more, "-o", tmp_path / name) == 0
    plain, styled, again = ((tmp_path / name / "01-3.png") for name in ("plain", "styled", "again"))
    with Image.open(plain) as one, Image.open(styled) as other, Image.open(again) as third:
        assert list(one.getdata()) == list(third.getdata()) != list(other.getdata())
    refused(capsys, "a LoRA of convolutions", "generate", "x", "--lora", tmp_path / "style", "-o", tmp_path / "x")
    save_file(sides, tmp_path / "style" / "pytorch.safetensors")
    (tmp_path / "style" / "pytorch_lora_weights.safetensors").rename(tmp_path / "style" / "other.safetensors")
    refused(
        capsys,
        "several LoRAs: other.safetensors, pytorch.safetensors",
        "generate",
        "x",
        "--style",
        tmp_path / "style",
        "-o",
        tmp_path / "x",
    )
    refused(
        capsys, "ann/none is no file or folder here, and no LoRA on the hub", "generate", "x", "--style", "ann/none", "-o", tmp_path / "x"
    )
