"""The comparison of methods on a folder of people, for any base and any judges, without ground truth."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from hyperdreambooth import photos
from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.backbones import wrap
from hyperdreambooth.checkpoint import save_tensors
from hyperdreambooth.cli import main
from hyperdreambooth.commands import options
from hyperdreambooth.errors import InputError
from hyperdreambooth.evaluation.bench import Bench
from hyperdreambooth.evaluation.comparison import timed
from hyperdreambooth.evaluation.judges import Dlib, Vision, open_judges
from hyperdreambooth.evaluation.methods import METHODS
from hyperdreambooth.evaluation.protocol import LISTS, Atlas, Judges, read_people, read_prompts
from hyperdreambooth.folders import list_identities
from worlds.toon.base import build_tokenizer

from . import families
from .conftest import picture

ATLAS = Path(__file__).parents[1] / "benchmarks" / "atlas"


class Colors:
    """A judge who goes by colors, and finds nobody in a black picture."""

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)
        return torch.where((pixels.amax((1, 2, 3)) < -0.9)[:, None], torch.nan, torch.nn.functional.normalize(small, dim=-1))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models to judge by: clip, dino, and a ResNet, which has no class token."""
    root, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 32, **ids}
    clip = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(clip).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(root / "dino")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).save_pretrained(root / "resnet")
    return root


@pytest.fixture
def folk(tmp_path: Path) -> Path:
    """Three people with two photos or more, one with a broken second one, and a photo of nobody's folder."""
    folder = tmp_path / "folk"
    for person, name in enumerate(("ann", "bob", "cyd", "dan")):
        (folder / name).mkdir(parents=True)
        for number in range(3 if name == "ann" else 2):
            picture(10 * person + number).save(folder / name / f"{number + 9}.png")  # 9, 10, 11 must be sorted as numbers
    (folder / "dan" / "10.png").write_bytes(b"no picture")
    picture(50).save(folder / "eve.png")
    return folder


def measured(base: Path | str, folk: Path, out: Path, *words: object) -> int:
    return main([str(word) for word in ("evaluate", "--base", base, "--people", folk, "-o", out, "--quick", *words)])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_any_base_is_measured_on_a_folder_of_people(family, folk, models, tmp_path, capsys):
    families.make(family).save_pretrained(tmp_path / family)
    out, asked = tmp_path / "out.json", tmp_path / "asked.txt"
    asked.write_text("\ufeffa [V] face wearing a cap\n\na pencil sketch of a [V] face\n", encoding="utf-8")
    methods = ["base", "textual inversion", "DreamBooth-LoRA 4", "DreamBooth, 40 steps", "hypernetwork", "true render"]
    words = ["--prompts", asked, "--judges", f"dino:{models / 'dino'}", f"clip:{models / 'clip'}", models / "resnet", "--methods", *methods]
    assert measured(tmp_path / family, folk, out, *words) == 0
    said = capsys.readouterr().err
    for what in ("dan is left out", "eve is left out", "hypernetwork is left out", "true render is left out", "10.png is not a picture"):
        assert what in said
    found = json.loads(out.read_text())
    assert list(found["rows"]) == methods[:4]
    assert found["settings"]["photos"] == {"ann": 3, "bob": 2, "cyd": 2}
    assert found["settings"]["prompts"] == ["a [V] face wearing a cap", "a pencil sketch of a [V] face"]
    assert set(found["agreement"]) == {"dino:dino / clip:clip", "dino:dino / resnet", "clip:clip / resnet"}
    each = {"rank1", "rank1_lookalikes", "auc", "similarity", "copying", "leakage", "prior_drift", "diversity"}
    for name, row in found["rows"].items():
        for judge in ("dino:dino", "clip:clip", "resnet"):
            mine = {key.split(".")[-1] for key in row if key.startswith(f"{judge}.")}
            assert mine == each | ({"prompt"} if judge == "clip:clip" else set())
        assert row["steps"] == (0 if name == "base" else 10)
        assert not {"context", "perceptual_distance", "psnr"} & set(row)
    rows = found["rows"]
    assert rows["base"]["dino:dino.leakage"] == rows["base"]["pixel.prior_drift"] == [0, 0, 0]
    assert rows["DreamBooth, 40 steps"]["pixel.prior_drift"][0] > 0
    assert rows["DreamBooth-LoRA 4"]["bytes"] == 2 * rows["DreamBooth-LoRA 4"]["numbers"]
    assert rows["base"]["bytes"] == 0 < rows["textual inversion"]["bytes"] < rows["DreamBooth-LoRA 4"]["bytes"]
    page = out.with_suffix(".html").read_text()
    assert "<h2>ann, similarity" in page
    assert "dino:dino / resnet" in page
    assert "clip:clip prompt" in out.with_suffix(".md").read_text()
    # a second run, also with another judge, must reuse all pictures
    drawn = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*-*/*.safetensors"))
    assert measured(tmp_path / family, folk, out, *words) == 0
    assert json.loads(out.read_text())["rows"] == rows
    words[words.index(models / "resnet")] = "toon"
    assert measured(tmp_path / family, folk, out, *words) == 2  # the output has figures of other judges
    assert measured(tmp_path / family, folk, out, *words, "--overwrite") == 0
    assert "toon.rank1" in json.loads(out.read_text())["rows"]["base"]
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*-*/*.safetensors")) == drawn
    assert main(["evaluate", "compare", str(out), str(out)]) == 0


def test_a_hypernetwork_of_the_base_is_measured_with_it(folk, models, tmp_path, world):
    out = tmp_path / "out.json"
    methods = ["--methods", "hypernetwork", "hypernetwork + fine-tuning", "faithful hypernetwork", "prediction+guidance"]
    given = ["--hypernetwork", world / "hypernetwork", "--faithful", world / "hypernetwork", "--judges", f"dino:{models / 'dino'}"]
    assert measured(world / "base", folk, out, *given, *methods) == 0
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == set(methods[1:])
    own = {name: {key: value for key, value in row.items() if "." in key} for name, row in rows.items()}
    assert own["hypernetwork"] == own["faithful hypernetwork"]
    assert all(own["hypernetwork"] != own[name] for name in ("hypernetwork + fine-tuning", "prediction+guidance"))
    assert 0 < rows["hypernetwork"]["bytes"] < rows["hypernetwork + fine-tuning"]["bytes"]


def test_people_are_read_by_name_and_who_shows_no_face_is_left_out(folk, capsys):
    first, seen = read_people(list_identities(folk), 64, {"colors": Colors()})
    assert {name: len(found["colors"]) for name, found in seen.items()} == {"ann": 3, "bob": 2, "cyd": 2}
    for person, name in enumerate(seen):
        expected = photos.read_photos([folk / name / "9.png"], 64)[0]
        torch.testing.assert_close(first[person : person + 1], expected)
        torch.testing.assert_close(seen[name]["colors"][:1], Colors().embed(expected))
    Image.new("RGB", (64, 64)).save(folk / "ann" / "10.png")  # ann still has another readable photo
    Image.new("RGB", (64, 64)).save(folk / "bob" / "10.png")
    assert list(read_people(list_identities(folk), 64, {"colors": Colors()})[1]) == ["ann", "cyd"]
    assert "bob is left out, with 2 that can be read: colors finds no face" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(folk / "cyd" / "9.png")
    with pytest.raises(InputError, match="1 people are left, and two are needed"):
        read_people(list_identities(folk), 64, {"colors": Colors()})


def opened(hdb: HyperDreamBooth, folk: Path, cache: Path, prompts: list[str]) -> Bench:
    judges = Judges({"colors": Colors()})
    first, seen = read_people(list_identities(folk), 64, judges.embedders)
    atlas = Atlas(first, torch.zeros(0), torch.zeros(3, len(prompts), 0), prompts, [], [], list(seen))
    return Bench(hdb, atlas, judges, cache, "tiny", photo_embeddings=seen)


@pytest.fixture
def bench(folk, tmp_path) -> Bench:
    hdb = HyperDreamBooth(wrap(families.make("sd1"), "tiny"), "tiny")
    return opened(hdb, folk, tmp_path / "cache", ["a [V] face", "a [V] face with a cap"])


def keep(bench: Bench, name: str, person: int, drawn: torch.Tensor) -> None:
    """Puts pictures (6, 3, 64, 64) where the bench looks for what it drew of a person."""
    pixels = ((drawn[:, None] + 1) * 127.5).round().to(torch.uint8)
    save_tensors(bench.file(name, METHODS[name], METHODS[name].steps, person), {"pictures": pixels})


def test_figures_by_hand(bench, folk):
    own = [photos.read_photos([folk / name / f"{number}.png" for number in (9, 10)], 64)[0] for name in ("ann", "bob", "cyd")]
    for person in range(3):
        keep(bench, "base", person, torch.stack([own[(person + 1) % 3][1]] * 6))
    name, method = "DreamBooth-LoRA 4", METHODS["DreamBooth-LoRA 4"]
    # pictures of ann: her other photo and her reference; of bob: cyd's and a black one; of cyd: his other photo twice
    black = -torch.ones(3, 64, 64)
    for person, asked in enumerate(([own[0][1], own[0][0]], [own[2][1], black], [own[2][1], own[2][1]])):
        keep(bench, name, person, torch.stack([*asked, own[person][1], own[(person + 1) % 3][1], own[0][0], own[0][0]]))
    found = {key: mean for key, (mean, *_) in bench.figures(bench.measurements(name, method, 60, 3)).items()}
    vectors = [[Colors().embed(photo[None])[0] for photo in mine] for mine in own]
    gallery = [torch.nn.functional.normalize(seen["colors"][1:].mean(0), dim=-1) for seen in bench.photo_embeddings.values()]
    ann, cyd = [float(vectors[0][number] @ gallery[0]) for number in (1, 0)], float(vectors[2][1] @ gallery[2])
    similar = [sum(ann) / 2, float(vectors[2][1] @ gallery[1]), cyd]
    assert found["colors.similarity"] == pytest.approx(sum(similar) / 3, abs=1e-3)  # bob's mean leaves out the black picture
    alike = [[float(vectors[0][number] @ one) for one in gallery] for number in (1, 0)]
    right = sum(max(row) == row[0] for row in alike)
    assert found["colors.rank1"] == pytest.approx((right + 0 + 2) / 6, abs=1e-3)  # the black picture counts as wrong
    copies = [float(vectors[2][1] @ vectors[1][0]), float(vectors[2][1] @ vectors[2][0])]
    beyond = [float((seen["colors"][1:] @ seen["colors"][0]).mean()) for seen in bench.photo_embeddings.values()]
    own_copy = (float(vectors[0][1] @ vectors[0][0]) + 1) / 2 - beyond[0]
    assert found["colors.copying"] == pytest.approx((own_copy + copies[0] - beyond[1] + copies[1] - beyond[2]) / 3, abs=1e-3)
    # of the two prompts that name nobody, the first gives the person, and the second the base's picture
    leaked = [float(vectors[p][1] @ gallery[p] - vectors[(p + 1) % 3][1] @ gallery[p]) / 2 for p in range(3)]
    assert found["colors.leakage"] == pytest.approx(sum(leaked) / 3, abs=1e-3)
    drifts = [1 - float(vectors[p][1] @ vectors[(p + 1) % 3][1]) for p in range(3)]
    assert found["colors.prior_drift"] == pytest.approx(sum(drifts) / 6, abs=1e-3)
    assert found["colors.diversity"] == found["pixel.diversity"] == 0
    assert 0 < found["colors.auc"] < 1
    assert next(iter(bench.worst({name: method}, 3))).startswith("bob, similarity")


def test_where_no_picture_shows_a_face_likeness_is_no_figure(bench):
    for name in ("base", "DreamBooth-LoRA 4"):
        for person in range(3):
            keep(bench, name, person, -torch.ones(6, 3, 64, 64))
    found = bench.figures(bench.measurements("DreamBooth-LoRA 4", METHODS["DreamBooth-LoRA 4"], 60, 3))
    assert found["colors.rank1"] == found["colors.auc"] == [0, 0, 0]
    assert not {"colors.similarity", "colors.copying", "colors.leakage"} & set(found)
    json.dumps(found, allow_nan=False)


def test_methods_say_what_they_lack(bench):
    lacking = {name for name, method in METHODS.items() if bench.lacks(method)}
    assert lacking == {name for name, method in METHODS.items() if method.kind in ("true", "reconstruction", "prediction", "relaxed")}
    assert dataclasses.replace(bench, faithful=bench.hdb).lacks(METHODS["faithful hypernetwork"]) == ""
    bench.hdb.backbone.denoiser.to(torch.bfloat16)
    assert "float32" in bench.lacks(METHODS["DreamBooth"])
    assert bench.lacks(METHODS["DreamBooth-LoRA 4"]) == ""


@pytest.mark.parametrize("family", ["sd3-no-t5", "flux-dev"])
def test_costs_are_those_of_one_person_in_every_family(family, tmp_path, folk):
    hdb = HyperDreamBooth(wrap(families.make(family), "tiny"), "tiny")
    bench = opened(hdb, folk, tmp_path / "cache", ["a [V] face"])
    methods = {name: METHODS[name] for name in ("base", "textual inversion", "DreamBooth", "DreamBooth-LoRA 16", "lightweight DreamBooth")}
    costs = timed(bench, methods, rounds=1, steps=2)
    assert {name: cost["bytes"] > 0 for name, cost in costs.items()} == {name: name != "base" for name in methods}
    assert costs["DreamBooth"]["bytes"] == 2 * sum(weight.numel() for weight in hdb.backbone.denoiser.parameters())
    assert costs["lightweight DreamBooth"]["bytes"] > 2 * costs["lightweight DreamBooth"]["numbers"]  # the LoRA's size, not the tokens'


def test_prompt_lists_and_files(tmp_path):
    for name, values in LISTS.items():
        prompts = read_prompts(name)
        assert len(set(prompts)) == len(prompts) >= 5
        assert all("[V]" in prompt for prompt in prompts)
        assert "Ruiz" in values["source"]
    file = tmp_path / "prompts.txt"
    file.write_text("a [V] face\n\na face in the snow\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts.txt, line 3: 'a face in the snow' doesn't name the person"):
        read_prompts(str(file))
    for content in (b"\n\n", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"prompts.txt"):
            read_prompts(str(file))
    with pytest.raises(InputError, match="no list of prompts \\(dreambooth, hyperdreambooth\\)"):
        read_prompts("stylegan")


def test_judges_are_what_transformers_computes(models):
    pixels = photos.to_tensor([picture(number, (32, 32)) for number in range(3)])
    clip, unit = CLIPModel.from_pretrained(models / "clip").eval(), torch.nn.functional.normalize
    judge = Vision(str(models / "clip"), texts=True)
    with torch.no_grad():
        torch.testing.assert_close(judge.embed(pixels), unit(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1))
        ids = build_tokenizer()(["a face", "a face wearing a cap"], padding=True, return_tensors="pt")
        texts = unit(clip.get_text_features(**ids).pooler_output, dim=-1)
        torch.testing.assert_close(judge.embed_texts(["a face", "a face wearing a cap"]), texts)
        dino = Dinov2Model.from_pretrained(models / "dino").eval()
        small = torch.nn.functional.interpolate(pixels, (28, 28), mode="bicubic", antialias=True)
        expected = unit(dino(pixel_values=small).last_hidden_state[:, 0], dim=-1)
        torch.testing.assert_close(Vision(str(models / "dino")).embed(pixels), expected, atol=1e-5, rtol=0)
        judge = Vision(str(models / "resnet"))
        torch.testing.assert_close(judge.embed(pixels), unit(judge.encoder(pixels).mean(1), dim=-1))


def test_judges_by_name(models, tmp_path, monkeypatch):
    assert list(open_judges([f"dino:{models / 'dino'}", str(models / "dino"), "toon"])) == ["dino:dino", "dino", "toon"]
    (tmp_path / "dino").mkdir()
    for file in (models / "dino").iterdir():
        (tmp_path / "dino" / file.name).write_bytes(file.read_bytes())
    names = [f"dino:{models / 'dino'}", f"dino:{tmp_path / 'dino'}"]
    assert list(open_judges(names)) == ["dino:dino", names[1]]
    (tmp_path / "file").write_text("no model", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for wrong in ("magic", "lpips:alex/net", str(tmp_path / "file"), "clip:"):
        with pytest.raises(InputError, match="is no judge"):
            open_judges([wrong])
    with pytest.raises(InputError, match="empty"):
        open_judges([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="isn't a CLIP"):
        open_judges([f"clip:{models / 'dino'}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "hyperdreambooth\[judges\]"'):
        open_judges(["dlib"])


def test_dlib_tells_faces_apart_and_says_where_there_is_none():
    pytest.importorskip("dlib")
    pytest.importorskip("numba")
    from worlds.heads import PLAIN, context, person, render

    smile = context(3, expression="smile", light="studio", style="photo", yaw=0.0, pitch=0.0, headwear="none", eyewear="none")
    drawn = np.stack([render(person(2_000_000 + number), where, 128) for number in range(2) for where in (PLAIN, smile)])
    pixels = torch.cat([torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1, -torch.ones(1, 3, 128, 128)])
    found = Dlib().embed(pixels)
    assert found.shape == (5, 128)
    assert found[4].isnan().all()
    alike = found[:4] @ found[:4].mT
    torch.testing.assert_close(alike.diagonal(), torch.ones(4))
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2:].max(), alike[1, 2:].max())


def test_what_cannot_be_measured_is_refused_before_a_base_is_loaded(folk, tmp_path, models, capsys, monkeypatch, tiny_world):
    families.make("sd1").save_pretrained(tmp_path / "sd1")
    words = [str(word) for word in ("evaluate", "--base", tmp_path / "sd1", "-o", tmp_path / "e.json")]
    judge = ["--judges", f"dino:{models / 'dino'}"]
    monkeypatch.setattr(options.Machine, "open", None)  # these errors must come before a base is loaded
    (tmp_path / "searched.json").write_text('{"search": {"DreamBooth": {"best": {"rate": "fast"}}}}', encoding="utf-8")
    (tmp_path / "alone" / "ann").mkdir(parents=True)
    for number in range(2):
        picture(number).save(tmp_path / "alone" / "ann" / f"{number}.png")
    for more, expected in (
        ([], "name their folder with --people"),
        (["--people", "3"], "name their folder with --people"),
        (["--people", str(tmp_path / "none"), *judge], "no such folder"),
        (["--people", str(folk), "--judges", "magic"], "'magic' is no judge"),
        (["--people", str(folk), "--prompts", "none"], "no list of prompts"),
        (["--people", str(folk), "--search"], "a search needs right answers"),
        (["--people", str(folk), *judge, "--hypernetwork", str(tmp_path / "none")], "isn't a hypernetwork"),
        (["--people", str(folk), *judge, "--faithful", str(tmp_path / "none")], "isn't a hypernetwork"),
        (["--people", str(folk), *judge, "--pictures", "0"], "--pictures must lie in 1 to 10"),
        (["--people", str(folk), *judge, "--settings", str(tmp_path / "searched.json")], "DreamBooth: rate must be float, not 'fast'"),
        (["--people", str(tmp_path / "alone"), *judge], "1 of its people have two photos or more"),
        (["--people", str(folk), *judge, "-o", str(tmp_path / "e.md")], "Name it e.md.json"),
    ):
        assert main([*words, *more]) == 2
        assert expected in capsys.readouterr().err
    for more, expected in (
        (["--people", "0"], "--people must lie in 1 to 100, not 0"),
        (["--people", "101"], "--people must lie in 1 to 100, not 101"),
        (["--search", "--methods", "base", "true"], "nothing of base, true can be searched"),
        (["--faithful", str(tmp_path / "none")], "isn't a hypernetwork"),
    ):
        assert main(["evaluate", "--atlas", str(ATLAS), "-o", str(tmp_path / "e.json"), *more]) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*words, "--people", str(folk), *judge, "--methods", "hypernetwork"]) == 2
    assert "no method is left" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()
