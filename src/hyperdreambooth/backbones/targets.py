"""Which layers carry a LoRA: named glob patterns for each family.

    paper          attention, the feed-forward's first layer, and the attention of the CLIP text encoders (Ruiz et al., supplement)
    attention      attention of the denoiser
    attention+ff   the same and its feed-forward: the default

In SD 3 and Flux the text has projections of its own in every joint block (`add_*`, `ff_context`), and a single block of Flux
has one output layer for attention and feed-forward together (`proj_out`).
"""

from __future__ import annotations

UNET = ("unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0")
JOINT = (
    "transformer.*.attn*.to_[qkv]",
    "transformer.*.attn*.to_out.0",
    "transformer.*.attn.add_[qkv]_proj",
    "transformer.*.attn.to_add_out",
)
JOINT_FF_IN = ("transformer.*.ff*.net.0.proj",)
JOINT_FF_OUT = ("transformer.*.ff*.net.2",)
SINGLE_IN = ("transformer.single*.proj_mlp",)
SINGLE_OUT = ("transformer.single*.proj_out",)
CLIP = ("text_encoder*.[qkv]_proj", "text_encoder*.out_proj")

UNETS: dict[str, tuple[str, ...]] = {
    "paper": (*UNET, "unet.*ff.net.0.proj", *CLIP),
    "attention": UNET,
    "attention+ff": (*UNET, "unet.*ff.net.0.proj", "unet.*ff.net.2"),
}
PRESETS = {
    "sd": UNETS,
    "sdxl": UNETS,
    "sd3": {
        "paper": (*JOINT, *JOINT_FF_IN, *CLIP),
        "attention": JOINT,
        "attention+ff": (*JOINT, *JOINT_FF_IN, *JOINT_FF_OUT),
    },
    "flux": {
        "paper": (*JOINT, *SINGLE_OUT, *JOINT_FF_IN, *SINGLE_IN, *CLIP),
        "attention": JOINT,
        "attention+ff": (*JOINT, *JOINT_FF_IN, *JOINT_FF_OUT, *SINGLE_IN, *SINGLE_OUT),
    },
}
"""Family (`Backbone.family`) -> preset -> patterns."""
