"""Features -> tokens, refined over several passes (paper, section 4.2). Needs torch alone.

    tokens = start;  repeat: tokens = tokens + head(decoder(layer_embedding + embed(tokens), features))

Every target layer is one query of a transformer decoder that attends to the features. The head of the up part starts
at zero, so an untrained hypernetwork predicts no update at all, yet has gradients (the down part starts random).
"""

import torch
from torch import Tensor, nn

from .training_settings import HyperNetworkConfig


class HyperNetwork(nn.Module):
    """Features (B, positions, feature_dim) -> tokens (B, layers, width).

    `start` are the tokens (layers, width) before the first pass; they are learnt, and shared by all identities.
    """

    def __init__(self, start: Tensor, down_width: int, feature_dim: int, config: HyperNetworkConfig):
        super().__init__()
        layers, width = start.shape
        self.config = config
        self.start = nn.Parameter(start.clone())
        with torch.random.fork_rng(devices=[]):  # initializing a module must not change the state of the global generator
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, config.dim))
            self.layers = nn.Parameter(torch.randn(layers, config.dim) * 0.02)
            self.embed = nn.Linear(width, config.dim)
            block = nn.TransformerDecoderLayer(
                config.dim, config.heads, 2 * config.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.decoder = nn.TransformerDecoder(block, config.blocks, norm=nn.LayerNorm(config.dim))
            # a head for each layer: the same token means another update in every layer
            self.head = nn.Parameter(torch.randn(layers, config.dim, width) * 0.02 / config.dim**0.5)
        with torch.no_grad():
            self.head[:, :, down_width:] = 0

    def forward(self, features: Tensor) -> Tensor:
        memory = self.features(features)
        tokens = self.start.expand(len(features), -1, -1)
        for _ in range(self.config.passes):
            hidden = self.decoder(self.layers + self.embed(tokens), memory)
            tokens = tokens + torch.einsum("bld,ldw->blw", hidden, self.head)
        return tokens
