"""Which layers carry a LoRA: named glob patterns for each family.

    paper          attention, the feed-forward's first layer, and the attention of the CLIP text encoders (Ruiz et al., supplement)
    attention      attention of the denoiser
    attention+ff   the same and its feed-forward: the default

In SD 3 and Flux the text has projections of its own in every joint block (`add_*`, `ff_context`), and a single block of Flux
has one output layer for attention and feed-forward together (`proj_out`).
"""

Patterns = tuple[str, ...]
CLIP = ("text_encoder*.[qkv]_proj", "text_encoder*.out_proj")
JOINT = (
    "transformer.*.attn*.to_[qkv]",
    "transformer.*.attn*.to_out.0",
    "transformer.*.attn.add_[qkv]_proj",
    "transformer.*.attn.to_add_out",
)
JOINT_IN, JOINT_OUT = "transformer.*.ff*.net.0.proj", "transformer.*.ff*.net.2"


def presets(attention: Patterns, first: Patterns, second: Patterns) -> dict[str, Patterns]:
    """The presets of a denoiser with these layers: attention, the first ones of its feed-forwards, the second ones."""
    return {"paper": (*attention, *first, *CLIP), "attention": attention, "attention+ff": (*attention, *first, *second)}


UNETS = presets(("unet.*attn?.to_[qkv]", "unet.*attn?.to_out.0"), ("unet.*ff.net.0.proj",), ("unet.*ff.net.2",))
PRESETS = {
    "sd": UNETS,
    "sdxl": UNETS,
    "sd3": presets(JOINT, (JOINT_IN,), (JOINT_OUT,)),
    "flux": presets(JOINT, (JOINT_IN, "transformer.single*.proj_mlp", "transformer.single*.proj_out"), (JOINT_OUT,)),
}
"""Family (`Backbone.family`) -> preset -> patterns."""
