"""What the header of a LoRA file tells UIs: Stability's model metadata standard (`modelspec.*`) and kohya's keys (`ss_*`, `sshs_*`).

A1111 and Forge group LoRAs by `ss_base_model_version` and `ss_v2`, list them as `ss_output_name`, and show
`ss_tag_frequency`; ComfyUI and SwarmUI read `modelspec.*`, with the picture in `modelspec.thumbnail`. What a
header says is in assets/loras.json, with names for what differs.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from torch import Tensor

from .. import __version__
from ..lora import LoraSet
from .keys import TABLES


def base_metadata(pipe: Any, base: str, resolution: int) -> dict[str, str]:
    """What a LoRA's header says about its base, which the user calls `base`: a pipeline of diffusers, of pictures `resolution` pixels a side."""
    architecture, version = _architecture(pipe)
    name = Path(base).name if Path(base).exists() else base  # the path on this machine doesn't belong into a file
    values = {"architecture": architecture, "version": version, "second": version.startswith("sd_v2"), "name": name, "side": resolution}
    metadata = {key: text.format(**values) for key, text in TABLES["header"]["base"].items()}
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(pipe.scheduler.config.get("prediction_type", ""))
    return metadata | ({"modelspec.prediction_type": prediction} if prediction else {})


def _architecture(pipe: Any) -> tuple[str, str]:
    """A pipeline's architecture by the standard, and kohya's name for its version."""
    kind = type(pipe).__name__
    if kind.startswith("Flux"):
        return ("flux-1-dev" if pipe.transformer.config.guidance_embeds else "flux-1-schnell"), "flux1"
    if kind.startswith("StableDiffusion3"):
        # 3 medium has 24 blocks, 3.5 medium too but with a second attention in some, 3.5 large has 38
        config = pipe.transformer.config
        size = "3.5-large" if config.num_layers > 24 else "3.5-medium" if config.dual_attention_layers else "3-medium"
        return f"stable-diffusion-{size}", "sd3"
    if kind.startswith("StableDiffusionXL"):
        return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"
    velocity = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    if pipe.unet.config.cross_attention_dim == 1024:  # OpenCLIP's width, which only the second version has
        return ("stable-diffusion-v2-768-v", "sd_v2_v") if velocity else ("stable-diffusion-v2-512", "sd_v2")
    return "stable-diffusion-v1", "sd_v1_v" if velocity else "sd_v1"


def standard_metadata(loras: LoraSet, *, title: str, trigger: str, identifier: str, **given: str | Image.Image | None) -> dict[str, str]:
    """What a LoRA's header says about the LoRA itself; `base_metadata` belongs beside it. `given`: author, license, thumbnail."""
    rank = max(lora.rank for lora in loras.values())
    values = {"title": title, "trigger": trigger, "identifier": identifier, "rank": rank, "alpha": float(rank), "version": __version__}
    frequency, date = json.dumps({"hyperdreambooth": {trigger: 1}}), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata = {key: text.format(**values, frequency=frequency, date=date) for key, text in TABLES["header"]["lora"].items()}
    for name, value in given.items():
        if isinstance(value, Image.Image):  # as a small JPEG in a data URL, of 256 pixels a side, as the standard recommends
            small, buffer = value.convert("RGB"), io.BytesIO()
            small.thumbnail((256, 256))
            small.save(buffer, "JPEG", quality=85)
            value = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        metadata |= {f"modelspec.{name}": value} if value else {}
    return metadata


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes that UIs look a LoRA up by: of the tensors' bytes, and kohya's older one.

    The older one covers 64 KB at 1 MB into a file that has no header but `ss_*` (so that editing the rest changes nothing);
    of a smaller file it is the hash of nothing.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors.torch.save(dict(tensors), training)
    start = 8 + int.from_bytes(content[:8], "little")
    whole = hashlib.sha256(content[start:]).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"modelspec.hash_sha256": f"0x{whole}", "sshs_model_hash": whole, "sshs_legacy_hash": legacy}
