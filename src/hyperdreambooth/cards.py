"""Model cards: README.md of what is uploaded or shared, as `huggingface_hub.ModelCard` fills templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent / "assets" / "cards"
"""Jinja's, with the metadata in front as `card_data`."""


def lora_card(metadata: Mapping[str, str], file: str, picture: str | None = None, *, kohya: bool = False) -> str:
    """The card of a LoRA file, from its header. `picture`: the name of a picture beside it."""
    base = metadata.get("hyperdreambooth.base") or metadata.get("ss_sd_model_name") or "unknown"
    trigger, terms = metadata.get("modelspec.trigger_phrase", ""), metadata.get("modelspec.license")
    data = ModelCardData(
        base_model=base if base.count("/") == 1 else None,
        instance_prompt=trigger or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image", "hyperdreambooth"],
        **_license(terms),
    )
    values: dict[str, Any] = {
        "base": base,
        "trigger": trigger,
        "terms": terms,
        "file": file,
        "picture": picture,
        "kohya": kohya,
        "title": metadata.get("modelspec.title", Path(file).stem),
        "rank": metadata.get("ss_network_dim", "?"),
        "version": metadata.get("hyperdreambooth.version", ""),
        "date": metadata.get("modelspec.date", "an unknown day"),
        "author": metadata.get("modelspec.author"),
    }
    return f"{ModelCard.from_template(data, template_path=str(TEMPLATES / 'lora.md'), **values)}\n"


def hypernetwork_card(config: Mapping[str, Any]) -> str:
    """The card of a hypernetwork, from its config.json: what, base, data, metrics, license, and how to use it in three lines."""
    base = Path(config["base"]).name if Path(config["base"]).exists() else config["base"]  # no paths of this machine
    data = ModelCardData(
        base_model=base if base.count("/") == 1 else None,
        tags=["hyperdreambooth", "hypernetwork", "lora", "text-to-image"],
        **_license(config["license"]),
    )
    sizes, layers, trained = config["lightweight"], len(config["targets"]), dict(config["trained"])
    rank, width = sizes.get("rank", 1), sizes.get("down_dim", 100) + sizes.get("up_dim", 50)
    values: dict[str, Any] = {
        "base": base,
        "rank": rank,
        "layers": layers,
        "numbers": layers * rank * width,
        "mode": config["mode"],
        "data": config["data"],
        "metrics": (trained.pop("validation", None) or [{}])[-1],
        "trained": trained,
        "terms": config["license"],
    }
    return f"{ModelCard.from_template(data, template_path=str(TEMPLATES / 'hypernetwork.md'), **values)}\n"


def _license(name: str | None) -> dict[str, Any]:
    """The hub knows a list of lower-case ids; anything else is `other`, with a name."""
    if not name:
        return {}
    return {"license": name.lower()} if " " not in name and "/" not in name else {"license": "other", "license_name": name}
