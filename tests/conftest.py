"""Fixtures: a tiny random Stable Diffusion of diffusers' real classes, so that every test runs on a CPU in moments."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for bit-identical sums, and so that concurrent tests don't oversubscribe the CPU

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetModel

from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.lora import LoraSet, find_targets
from hyperdreambooth.pretrained import HyperNetworkInfo, build, save_hypernetwork
from hyperdreambooth.sampling import Prompts, sample
from hyperdreambooth.settings import GenerateConfig
from hyperdreambooth.trainable_lora import PredictedLora
from hyperdreambooth.training_settings import HyperNetworkConfig, LightweightConfig
from worlds.toon.base import build_tokenizer

TOKENS = LightweightConfig(down_dim=12, up_dim=8, learnable=True)
DECODER = HyperNetworkConfig(dim=16, blocks=1, heads=2, passes=2)


def tiny_pipe(prediction: str = "v_prediction", seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    zero_snr = prediction == "v_prediction"
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def random_loras(
    backbone: StableDiffusion, batch: int | None = None, rank: int = 2, patterns: tuple[str, ...] = (), seed: int = 1
) -> LoraSet:
    from hyperdreambooth.lora import Lora

    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return LoraSet(
        {
            path: Lora(
                torch.randn(*lead, rank, shape.inputs, generator=generator) / shape.inputs**0.5,
                torch.randn(*lead, shape.outputs, rank, generator=generator) * 0.5,
            )
            for path, shape in find_targets(backbone.components, patterns or backbone.default_targets).items()
        }
    )


def conditioning(backbone: StableDiffusion, count: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return backbone.encode_prompts(["a [V] face", "a pencil sketch of a [V] face", "", "a smiling [V] face"][:count])


def sampled(backbone: Any, positive: Any, negative: Any, noise: torch.Tensor, *, plain: Any = None, personal: Any = None, **settings: Any):
    """`sample` with settings by their names; 20 steps at a guidance of 3 unless told otherwise."""
    config = GenerateConfig(**{"steps": 20, "guidance": 3.0, **settings})
    return sample(backbone, Prompts(positive, negative, plain), noise, config, personal=personal)


def tiny_source(backbone: StableDiffusion) -> PredictedLora:
    torch.manual_seed(5)
    encoder = FaceEncoder(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")), size=64)
    source = build(find_targets(backbone.components, backbone.default_targets), encoder, TOKENS, DECODER)
    with torch.no_grad():  # an untrained head predicts zero updates; random weights make them nonzero
        source.hypernetwork.head.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return source.eval()


@pytest.fixture(scope="session")
def _backbone() -> StableDiffusion:
    return StableDiffusion(tiny_pipe())


@pytest.fixture
def backbone(_backbone: StableDiffusion) -> StableDiffusion:
    for module in _backbone.components.modules():
        assert not module._forward_hooks, "an earlier test left forward hooks on the model"
    return _backbone


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny world on disk, as the shipped one is laid out: base, hypernetwork, judges, faces."""
    from hyperdreambooth.evaluation.judges import Judge
    from worlds.toon import pictures

    root = tmp_path_factory.mktemp("world")
    pipe = tiny_pipe()
    pipe.save_pretrained(str(root / "base"))
    backbone = StableDiffusion(pipe)
    source = tiny_source(backbone)
    info = HyperNetworkInfo(
        base="toon",
        targets={path: list(shape) for path, shape in source.lightweight.targets.items()},
        lightweight=asdict(TOKENS),
        hypernetwork=asdict(DECODER),
        personalize={"steps": 3, "rank": 2},
        generate={"steps": 3, "guidance": 2.0, "identity_guidance": 2.0},
    )
    save_hypernetwork(root / "hypernetwork", source, info, torch.float32)
    torch.manual_seed(0)
    small = {"num_channels": 3, "patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
    Judge(small, {"identity": [""] * 16}).save_pretrained(root / "recogniser")
    Judge(small, {kind: list(choices) for kind, choices in pictures.CONTEXTS.items()}).save_pretrained(root / "classifier")
    shipped = Path(__file__).parents[1] / "src/hyperdreambooth/assets/toon/faces"
    shutil.copytree(shipped, root / "faces")
    return root


@pytest.fixture
def tiny_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYPERDREAMBOOTH_TOON", str(world))
    return world


def picture(seed: int = 0, size: tuple[int, int] = (80, 64)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)


@pytest.fixture
def face(tmp_path: Path) -> Path:
    path = tmp_path / "face.png"
    picture().save(path)
    return path


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A folder of four identities, one of whom has two pictures."""
    folder = tmp_path / "people"
    for index, name in enumerate(("ann", "bob", "cyd", "dan")):
        (folder / name).mkdir(parents=True)
        picture(index).save(folder / name / "1.png")
    picture(9).save(folder / "ann" / "2.png")
    return folder
