"""Checks LoRA files against the readers of other libraries: `python -m benchmarks.readers` writes the table in docs/files.md.

A random LoRA of mixed ranks on the attention and feed-forward layers of the denoiser and on every text encoder's attention is
written by `formats.save_lora` and opened by each reader in turn; then the same prompts are sampled from the same noise. The error is
the largest difference of any pixel (0..1) from the pictures that the hooks of `lora.applied` give; the effect is the largest difference
of any pixel between pictures with and without the LoRA. The pipelines are tiny random models of diffusers' real classes.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hyperdreambooth import formats
from hyperdreambooth.lora import Lora, LoraSet, applied, canonical, find_targets
from worlds.toon.base import build_tokenizer

DOCS = Path(__file__).parents[1] / "docs" / "files.md"
PROMPTS = ["a [V] face", "a pencil sketch of a [V] face"]
TARGETS = ["unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0", "unet.*ff.net.0.proj", "unet.*ff.net.2", "text_encoder*self_attn.*_proj"]


def parts() -> tuple[Any, CLIPTextConfig, AutoencoderKL, EulerDiscreteScheduler]:
    """The parts that both families share: a tokenizer, a text encoder's config, an autoencoder, a scheduler."""
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64)
    return tokenizer, text, vae, EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 2, "attention_head_dim": 4, "norm_num_groups": 8}


def sd() -> StableDiffusionPipeline:
    """A tiny Stable Diffusion 1.x, whose transformer projections (proj_in, proj_out) are 1 x 1 convolutions."""
    torch.manual_seed(0)
    tokenizer, text, vae, scheduler = parts()
    unet = UNet2DConditionModel(
        **UNET,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def sdxl() -> StableDiffusionXLPipeline:
    """A tiny Stable Diffusion XL: two text encoders, size conditioning, several transformer blocks in a layer."""
    torch.manual_seed(0)
    tokenizer, text, vae, scheduler = parts()
    unet = UNet2DConditionModel(
        **UNET,
        cross_attention_dim=64,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    second = CLIPTextModelWithProjection(text)
    return StableDiffusionXLPipeline(vae, CLIPTextModel(text), second, tokenizer, build_tokenizer(), unet, scheduler, add_watermarker=False)


FAMILIES: dict[str, Callable[[], Any]] = {"SD 1.x": sd, "SDXL": sdxl}


def components(pipe: Any) -> nn.ModuleDict:
    """The models of a pipeline that can have a LoRA, by their names in the pipeline."""
    return nn.ModuleDict({name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)})


def random_lora(pipe: Any, seed: int) -> LoraSet:
    """A random LoRA of ranks 1 to 3, large enough to change the pictures visibly."""
    generator = torch.Generator().manual_seed(seed)
    loras = LoraSet()
    for index, (path, shape) in enumerate(find_targets(components(pipe), TARGETS).items()):
        rank = 1 + index % 3
        down = torch.randn(rank, shape.inputs, generator=generator) / shape.inputs**0.5
        loras[path] = Lora(down, torch.randn(shape.outputs, rank, generator=generator) * 0.3)
    return loras


@torch.no_grad()
def draw(pipe: Any) -> Tensor:
    """The prompts' pictures (2, 3, 64, 64) in 0..1, from the same noise each time."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures: Tensor = pipe(PROMPTS, num_inference_steps=3, guidance_scale=3.0, height=64, width=64, latents=noise, output_type="pt").images
    return pictures


def by_diffusers(pipe: Any, file: Path) -> None:
    """Loads with `load_lora_weights`, which converts a kohya file itself."""
    pipe.load_lora_weights(str(file))


def by_fusing(pipe: Any, file: Path) -> None:
    """Loads with `load_lora_weights`, then merges the update into the weights with `fuse_lora`."""
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=list(components(pipe)))
    pipe.unload_lora_weights()


def by_peft(pipe: Any, file: Path) -> None:
    """Loads with PEFT only: injects an adapter into every component and fills it by `set_peft_model_state_dict`."""
    tensors = load_file(file)
    for name, model in components(pipe).items():
        live = {canonical(f"{name}.{path}"): path for path, _ in model.named_modules()}  # PEFT needs the modules' actual paths
        mine = {re.sub(r"\.lora_[AB]\.weight$", "", key): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        ranks = {live[path]: value.shape[1] for path, value in mine.items()}  # lora_B comes last and has shape (out, rank)
        config = LoraConfig(r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks))
        inject_adapter_in_model(config, model)
        state = {f"{live[path]}.lora_{side}.weight": tensors[f"{path}.lora_{side}.weight"] for path in mine for side in "AB"}
        report = set_peft_model_state_dict(model, state)
        assert not report.unexpected_keys, report.unexpected_keys


READERS: list[tuple[formats.Layout, str, Callable[[Any, Path], None]]] = [
    ("diffusers", "diffusers, `load_lora_weights`", by_diffusers),
    ("diffusers", "diffusers, `fuse_lora`", by_fusing),
    ("diffusers", "PEFT, `set_peft_model_state_dict`", by_peft),
    ("kohya", "diffusers' kohya converter", by_diffusers),
]


def measure(make: Callable[[], Any], folder: Path) -> Iterator[tuple[str, str, float, float]]:
    """Yields (layout, reader, largest error, effect) for every reader, with float32 files."""
    pipe = make()
    me, style = random_lora(pipe, 1), random_lora(pipe, 2)
    plain = draw(pipe)
    files = {}
    for layout in ("diffusers", "kohya"):
        about = formats.base_metadata(pipe, "tiny", 64)
        for name, loras in (("me", me), ("style", style)):
            path = folder / f"{name}-{layout}.safetensors"
            files[name, layout] = formats.save_lora(path, loras, about, layout=layout, dtype=torch.float32, overwrite=True)
    with applied(components(pipe), me):
        expected = draw(pipe)
    with applied(components(pipe), me + style.scaled(0.7)):
        both = draw(pipe)
    for layout, reader, open_file in READERS:
        other = make()
        open_file(other, files["me", layout])
        yield layout, reader, (draw(other) - expected).abs().max().item(), (expected - plain).abs().max().item()
    for layout in ("diffusers", "kohya"):
        other = make()
        for name in ("me", "style"):
            other.load_lora_weights(str(files[name, layout]), adapter_name=name)
        other.set_adapters(["me", "style"], [1.0, 0.7])
        reader = 'diffusers, `set_adapters(["me", "style"], [1, 0.7])`'
        yield layout, reader, (draw(other) - both).abs().max().item(), (both - plain).abs().max().item()


def table() -> str:
    """Markdown: a row for each family, layout and reader."""
    lines = ["| base | layout | reader | largest error | effect of the LoRA |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about a second adapter
        for family, make in FAMILIES.items():
            for layout, reader, error, effect in measure(make, Path(folder)):
                lines.append(f"| {family} | {layout} | {reader} | {error:.1e} | {effect:.2f} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = DOCS.read_text(encoding="utf-8")
    block = f"<!-- readers -->\n{table()}\n<!-- /readers -->"
    changed = re.sub(r"<!-- readers -->\n.*?<!-- /readers -->", lambda _: block, text, flags=re.S)
    DOCS.write_text(changed, encoding="utf-8")
    print(block)


if __name__ == "__main__":
    main()
