"""Vision models of transformers as encoders: tiny random ones, loaded from folders in the published format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from hyperdreambooth.api import HyperDreamBooth
from hyperdreambooth.cli import main
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.errors import InputError

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


def save(kind: str, folder: Path) -> Path:
    """A tiny model of `kind` and its preprocessing, as published folders have them."""
    torch.manual_seed(0)
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**{**SIZE, "mlp_ratio": 2}))
        processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    elif kind == "vit":
        model = ViTModel(ViTConfig(**SIZE))
        processor, mean, std = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}, [0.5] * 3, [0.5] * 3
    elif kind == "clip-vision":
        model = CLIPVisionModel(CLIPVisionConfig(**SIZE))
        processor, mean, std = CLIP_PROCESSOR, CLIP_MEAN, CLIP_STD
    else:
        text = {key: value for key, value in SIZE.items() if not key.endswith("_size") or key in ("hidden_size", "intermediate_size")}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZE, projection_dim=16))
        processor, mean, std = CLIP_PROCESSOR, CLIP_MEAN, CLIP_STD
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_mean": mean, "image_std": std}))
    return folder


@pytest.mark.parametrize(("kind", "size", "positions"), [("dinov2", 40, 26), ("vit", 32, 17), ("clip-vision", 32, 17), ("clip", 32, 17)])
def test_any_vision_model_gives_a_frozen_feature_sequence(tmp_path, kind, size, positions):
    encoder = FaceEncoder.from_pretrained(save(kind, tmp_path / kind)).eval()
    assert (encoder.size, encoder.dim) == (size, 32)
    if "clip" in kind:
        assert encoder.mean == pytest.approx(CLIP_MEAN)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    features = encoder(pixels)
    assert features.shape == (2, positions, 32)
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.save_pretrained(tmp_path / "again")
    again = FaceEncoder.from_pretrained(tmp_path / "again").eval()
    assert (again.size, again.mean, again.std) == (encoder.size, encoder.mean, encoder.std)
    torch.testing.assert_close(again(pixels), features)


def test_a_vit_sees_what_transformers_own_pipeline_gives_it(tmp_path):
    encoder = FaceEncoder.from_pretrained(save("clip-vision", tmp_path / "clip")).eval()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor(CLIP_MEAN).reshape(1, 3, 1, 1), torch.tensor(CLIP_STD).reshape(1, 3, 1, 1)
    with torch.no_grad():
        expected = CLIPVisionModel.from_pretrained(tmp_path / "clip").eval()(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected)


def test_a_hub_that_cannot_be_reached_is_said_before_transformers_retries(monkeypatch):
    def unreachable(*args: object, **more: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("hyperdreambooth.encoder.snapshot_download", unreachable)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", None)
    with pytest.raises(InputError, match="no network"):
        FaceEncoder.from_pretrained("ann/vit")


def test_no_vision_model_is_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="can't be opened as a vision model"):
        FaceEncoder.from_pretrained(tmp_path / "empty")
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(InputError, match="a BertModel, which"):
        FaceEncoder.from_pretrained(tmp_path / "bert")


@pytest.mark.usefixtures("tiny_world")
@pytest.mark.parametrize("kind", ["dinov2", "clip", "vit"])
def test_a_hypernetwork_is_trained_on_it_and_used(tmp_path, people, face, kind):
    encoder, folder = save(kind, tmp_path / "encoder"), tmp_path / "hyper"
    small = ["--training.steps", "2", "--batch", "2", "--hypernetwork.dim", "16", "--hypernetwork.heads", "2", "--hypernetwork.blocks", "1"]
    tokens = ["--lightweight.down-dim", "12", "--lightweight.up-dim", "8"]
    assert main(["train-hypernetwork", str(people), "-o", str(folder), "--encoder", str(encoder), *small, *tokens]) == 0
    hdb = HyperDreamBooth.from_pretrained("toon", hypernetwork=folder)
    assert hdb.source.encoder.dim == 32
    assert hdb.personalize(face, steps=1, quiet=True).tokens.shape == (len(hdb.info.targets), 20)
