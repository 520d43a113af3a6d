"""Foreign models behind one small interface: one class a family, chosen from what the loaded pipeline is."""

from .base import Backbone as Backbone
from .base import Conditioning as Conditioning
from .discrete import StableDiffusion as StableDiffusion
from .discrete import StableDiffusionXL as StableDiffusionXL
from .flow import Flux as Flux
from .flow import StableDiffusion3 as StableDiffusion3
from .loading import best_for as best_for
from .loading import load_backbone as load_backbone
from .loading import trained_by_flow as trained_by_flow
from .loading import wrap as wrap
