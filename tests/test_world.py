"""The embedded toon world: the autoencoder with computed weights, the tokenizer, the captions, the filters, the judges."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.training import Run, fit
from hyperdreambooth.training_settings import TrainingConfig
from worlds import base, judges, synthesis
from worlds.autoencoder import Autoencoder, Components, reconstruction_losses
from worlds.toon import base as toon_base
from worlds.toon import hypernetworks as plans
from worlds.toon import pictures, train

from .conftest import picture, tiny_pipe


def images(count: int = 40) -> torch.Tensor:
    arrays = np.stack([np.asarray(picture(i, (64, 64))) for i in range(count)])
    return pictures.to_tensor(arrays)


SMALL = Autoencoder(size=64, kept=(8, 16, 24), widths=(16, 32, 56, 80), groups=1)
"""Less than all is kept at each level, which asks for other components than a whole patch's."""


def components(sizes: Autoencoder, count: int = 40) -> Components:
    return sizes.principal_components(lambda: images(count).split(15))


@pytest.mark.parametrize("sizes", [train.Toon.autoencoder, SMALL])
def test_the_written_encoder_is_the_pca(sizes, tmp_path):
    x = images()
    components(sizes).save(tmp_path / "components.safetensors")
    found = Components.load(tmp_path / "components.safetensors")
    expected = found.encode(x)
    vae = sizes.build()
    sizes.write_encoder(vae, found)
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(latents, expected, atol=2e-3, rtol=1e-3)
    assert expected.std().item() == pytest.approx(1, abs=0.05)
    rebuilt = found.linear_round_trip()(x)
    assert (rebuilt - x).square().mean() < 0.2 * x.var()


def test_components_of_a_whole_patch_are_the_best_there_are():
    x, sizes = images(), train.Toon.autoencoder
    patches = torch.nn.functional.unfold(x, 8, stride=8).mT.reshape(-1, 192)
    best = torch.linalg.svdvals((patches - patches.mean(0)).double())[32:].square().sum() / patches.numel()
    mean = patches.mean(0).reshape(1, 3, 8, 8).tile(1, 1, 8, 8)
    found = components(sizes)
    inverse = torch.linalg.pinv(found.matrix)
    rebuilt = torch.einsum("pc,nchw->nphw", inverse, found.encode(x) - found.encode(mean))
    rebuilt = torch.nn.functional.fold(rebuilt.flatten(2), 64, 8, stride=8) + mean
    assert (rebuilt - x).square().mean().item() == pytest.approx(best.item(), rel=1e-3)


@torch.no_grad()
def test_the_written_decoder_is_the_inverse():
    x, found = images(), components(SMALL)
    assert all(have >= least for have, least in zip(SMALL.widths, synthesis.widths(SMALL.kept), strict=True))
    vae = SMALL.build()
    SMALL.write_encoder(vae, found)
    synthesis.write_decoder(SMALL, vae, found, found.encode(x[:8]))
    expected = found.linear_round_trip()(x)
    rebuilt = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert (rebuilt - expected).abs().max() < 0.02
    torch.testing.assert_close(vae.decode(found.encode(x)).sample, expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(vae.half().float().decode(found.encode(x)).sample, expected, atol=3e-2, rtol=0)  # shipped in fp16


def test_the_written_decoder_gets_better_and_keeps_what_is_written():
    x, found = images(5), components(SMALL, 16)
    latents = found.encode(x)
    torch.manual_seed(0)
    vae = SMALL.build()
    synthesis.write_decoder(SMALL, vae, found, latents)
    decoder = synthesis.trainable(vae.decoder)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with torch.no_grad():
        first = reconstruction_losses(decoder, (latents, x)).mean()
    config = TrainingConfig(steps=20, learning_rate=3e-4, optimizer="muon", cooldown=0.5)
    fit(reconstruction_losses, decoder, lambda index, generator: (latents, x), config, Run(quiet=True, device="cpu"))
    with torch.no_grad():
        assert reconstruction_losses(decoder, (latents, x)).mean() < 0.98 * first
    changed = {name for name, value in decoder.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".resnets." in name and "mid_block" not in name for name in changed)
    for name in (name for name in changed if "conv2" in name):
        assert torch.equal(decoder.state_dict()[name][-7:], before[name][-7:])


def test_the_tokenizer_knows_its_words_and_survives_the_disk(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = toon_base.build_tokenizer()
    assert len(tokenizer) <= 1000
    tokenizer.save_pretrained(str(tmp_path))
    for one in (tokenizer, CLIPTokenizer.from_pretrained(str(tmp_path))):
        ids = one("a pencil sketch of a [V] face").input_ids
        assert len(ids) == 9  # every word is one token, including [V]
        assert one.convert_ids_to_tokens(ids)[6] == "[V]"
        assert one.unk_token_id not in one("zebra").input_ids[1:-1]


def test_words_that_get_into_each_other_s_way_are_still_whole():
    words = ["man", "an", "woman", "santa", "ant", "bandana", "banana", "nana"]
    assert any(len(base.build_tokenizer(words, 16, whole=False).tokenize(word)) > 1 for word in words)
    assert all(base.build_tokenizer(words, 16).tokenize(word) == [word + "</w>"] for word in words)


def test_the_base_s_held_out_loss_falls_in_training_and_is_the_same_every_time():
    identity = {"gender": "male", "hair": "bald", "hairBg": "none", "hairColor": "#272421", "skin": "#f2d6cb", "facialHair": "none"}
    context = {kind: next(iter(choices)) for kind, choices in pictures.CONTEXTS.items()}
    rows = [{"context": context, "identity": identity}] * 70  # more than one chunk
    backbone = StableDiffusion(tiny_pipe())
    shape = backbone.latent_shape()
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).expand(70, *shape)
    draw = random.Random(5)
    held = base.HeldOutLoss(backbone, latents, [pictures.caption(row["context"], mention=0.93, draw=draw) for row in rows])
    with torch.no_grad():
        before, again = (held(0, backbone.components)["loss"] for _ in range(2))
    assert before == again > 0
    training = base.BaseTraining(backbone, latents, lambda index, draw: pictures.training_caption(rows[index], draw), batch=8, seed=3)
    config = TrainingConfig(steps=12, learning_rate=1e-2, optimizer="muon")
    fit(training.losses, backbone.components, training.draw, config, Run(quiet=True, device="cpu"))
    with torch.no_grad():
        assert held(12, backbone.components)["loss"] < before


def test_captions_use_known_words_and_say_the_context():
    known = {*pictures.vocabulary(), "[V]"}
    draw = random.Random(0)
    identity = {"gender": "male", "hair": "bald", "hairBg": "none", "hairColor": "#272421", "skin": "#f2d6cb", "facialHair": "goatee1"}
    for _ in range(300):
        context = {kind: draw.choice(list(choices)) for kind, choices in pictures.CONTEXTS.items()}
        text = pictures.training_caption({"context": context, "identity": identity}, draw)
        assert set(text.split()) <= known, text
    context = {"style": "sketch", "background": "white", "headwear": "cap", "eyewear": "none", "expression": "angry"}
    assert pictures.caption(context) == "a pencil sketch of an angry [V] face wearing a cap"
    assert (
        pictures.caption({**context, "style": "plain", "headwear": "none", "background": "red"}) == "an angry [V] face on a red background"
    )


@pytest.mark.parametrize("style", [s for s in pictures.STYLES if s != "plain"])
def test_filters_change_the_picture_and_keep_its_shape(style):
    pixels = np.stack([np.asarray(picture(i, (64, 64))) for i in range(3)])
    drawn = pictures.filtered(pixels, style)
    assert drawn.shape == pixels.shape
    assert drawn.dtype == np.uint8
    assert np.abs(drawn.astype(int) - pixels).mean() > 3
    assert np.array_equal(drawn[1:2], pictures.filtered(pixels[1:2], style))


def test_plans_hold_out_contexts_and_splits_do_not_overlap():
    for job in plans.plan(0, 50):
        assert pictures.is_seen(job["context"])
    starts = sorted(pictures.FIRST.values())
    assert starts[0] + pictures.TRAIN_PEOPLE <= starts[1]
    assert plans.plan(3, 1) == plans.plan(0, 4)[12:]


def test_judges_and_encoder_share_no_architecture_and_survive_the_disk(tmp_path):
    torch.manual_seed(0)
    judge = judges.build_judge((8, 16, 16), {"identity": [""] * 4, "style": ["a", "b"]}).eval()
    judge.save_pretrained(tmp_path / "judge")
    x = images(3)
    again = Judge.from_pretrained(tmp_path / "judge")
    torch.testing.assert_close(judge.embed(x), again.embed(x), atol=1e-2, rtol=0.1)
    assert torch.allclose(again.embed(x).norm(dim=-1), torch.ones(3))
    assert {row["style"] for row in again.classify(x)} <= {"a", "b"}
    encoder = train.Toon().build_encoder().eval()
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = FaceEncoder.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), encoder(x), atol=1e-5, rtol=1e-4)
    assert loaded(x).shape == (3, 16, 256)
    assert type(loaded.model).__name__ != type(judge.backbone).__name__


class MeanColor(torch.nn.Module):
    """Tells people apart by one color."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"identity": pixels.mean((2, 3)) * self.scale}


def test_the_contrastive_loss_is_small_where_both_pictures_are_the_same_person_s():
    people = torch.cat([torch.eye(3), -torch.eye(3)])[:, :, None, None].expand(-1, -1, 64, 64)
    for first, second, low, high in ((people, 0.5 * people, 0, 0.5), (people, people.roll(1, 0), 5, 100)):
        shown = judges.augmented(torch.cat([first, second]), torch.Generator().manual_seed(0), lambda images: images)
        losses = judges.contrastive_losses(MeanColor(), shown)
        assert losses.shape == (12,)
        assert low <= losses.min() <= losses.max() <= high


def test_the_contrastive_loss_keeps_its_precision_under_autocast():
    found = []
    for half in (False, True):
        shown = judges.augmented(torch.cat([images(4), images(4)]), torch.Generator().manual_seed(0), lambda x: x)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(judges.contrastive_losses(MeanColor(), shown).float())
    torch.testing.assert_close(found[0], found[1])


def test_the_recogniser_goes_on_from_the_last(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6 * pictures.CONTEXTS_EACH, 64, 64, 3), np.uint8)
    shown = pictures.Pictures(pixels, [{"context": {}}] * len(pixels))
    monkeypatch.setattr(train.Toon, "base_pictures", lambda self: shown)
    monkeypatch.setattr(train.Toon, "validation_pictures", lambda self: shown)
    monkeypatch.setattr(train.Toon, "judge_widths", (8, 16, 16))
    components(train.Toon.autoencoder).save(tmp_path / "components.safetensors")
    torch.manual_seed(9)
    last = judges.build_judge((8, 16, 16), {"identity": [""] * 128}).eval()
    last.save_pretrained(tmp_path / "recogniser" / "model")
    assert train.Toon(tmp_path).train_recogniser(None, steps=2)
    trained = Judge.from_pretrained(tmp_path / "recogniser" / "model")
    alike = (last.embed(images(4)) * trained.embed(images(4))).sum(-1)
    assert 0.9 < alike.min() < 0.99999
