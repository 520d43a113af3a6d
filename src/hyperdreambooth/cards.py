"""Model cards: README.md of what is uploaded or shared, as `huggingface_hub.ModelCard` fills templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

LORA = """---
{{ card_data }}
---

# {{ title }}

A LoRA of rank {{ rank }} for `{{ base }}`, made by hyperdreambooth {{ version }} on {{ date }}.
{% if picture %}
![Drawn with it]({{ picture }})
{% endif %}
## How to use it

Write `{{ trigger }}` into the prompt. In diffusers, with `pipe` a pipeline of the base:

```python
pipe.load_lora_weights("{{ file }}")
image = pipe("{{ trigger }}").images[0]
```

{% if kohya -%}
It is in kohya's layout: ComfyUI, A1111 and Forge find it in their folder for LoRAs.
{%- else -%}
For ComfyUI and A1111, unless the base is SD 3 or Flux: `hyperdreambooth export {{ file }} --format kohya -o kohya-{{ file }}`.
{%- endif %}

## A person

This LoRA draws one real or invented person. A LoRA of a real face is biometric data: use it only with that person's consent, and say that \
pictures made with it are generated.

## License

{{ terms or "Not stated." }}{% if author %} By {{ author }}.{% endif %}
"""

HYPERNETWORK = """---
{{ card_data }}
---

# A hypernetwork for {{ base }}

It looks at one photo of a face and predicts a LoRA of rank {{ rank }} for `{{ base }}` ({{ layers }} layers, {{ numbers }} numbers), which a few \
steps of fine-tuning make fit (HyperDreamBooth, arXiv 2307.06949; mode {{ mode }}).

## How to use it

```python
from hyperdreambooth import HyperDreamBooth

hdb = HyperDreamBooth.from_pretrained("{{ base }}", hypernetwork="user/name")  # or this folder
hdb.personalize("me.jpg").save("me.safetensors")
```

## Data

{{ data or "Not stated." }}
{% for key, value in trained.items() %}
- {{ key }}: {{ value }}
{%- endfor %}

## Metrics

{% if metrics -%}
On people who weren't trained on:
{% for key, value in metrics.items() %}
- {{ key.replace("_", " ") }}: {{ "%.4g" % value if value is number else value }}
{%- endfor %}
{%- else -%}
None were measured.
{%- endif %}

## Limits

It knows the kind of faces that it was trained on, and that base alone. Personalize people only with their consent: what it makes is \
biometric data.

## License

{{ terms or "Not stated." }}
"""


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
    return f"{ModelCard.from_template(data, template_str=LORA, **values)}\n"


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
    return f"{ModelCard.from_template(data, template_str=HYPERNETWORK, **values)}\n"


def _license(name: str | None) -> dict[str, Any]:
    """The hub knows a list of lower-case ids; anything else is `other`, with a name."""
    if not name:
        return {}
    return {"license": name.lower()} if " " not in name and "/" not in name else {"license": "other", "license_name": name}
