"""The token file against its specification, docs/token-file.md, with a reader that was written from that page alone."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from hyperdreambooth import formats
from hyperdreambooth.lora import Shape
from hyperdreambooth.trainable_lora import LightweightLora
from hyperdreambooth.training_settings import LightweightConfig

TARGETS = {"unet.b.to_q": Shape(16, 24), "text_encoder.text_model.a": Shape(20, 12)}


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__")
    vectors = {}
    for layer, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        vectors[layer] = np.frombuffer(content[begin:end], "<f4").reshape(entry["shape"])
    return vectors, metadata


def frozen(rows: int, columns: int, key: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    draw = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    q, r = np.linalg.qr(draw)
    return (q * np.sign(np.diag(r))).T.astype("<f4")


@pytest.mark.parametrize("learnable", [False, True])
def test_a_reader_written_from_the_specification_gets_the_same_lora(tmp_path, learnable):
    light = LightweightLora(TARGETS, LightweightConfig(rank=2, down_dim=6, up_dim=5, learnable=learnable, seed=3))
    if learnable:
        with torch.no_grad():
            for parameter in light.parameters():
                parameter.add_(torch.randn(parameter.shape))
    tokens = torch.randn(2, 22)
    path = formats.save_tokens(tmp_path / "me.tokens", tokens, light, {"base": "toon"})
    vectors, metadata = read(path)
    assert metadata["hyperdreambooth.tokens"] == "1"
    recipe = json.loads(metadata["hyperdreambooth.recipe"])
    rank, a, b = recipe["rank"], recipe["down_dim"], recipe["up_dim"]
    digest = hashlib.sha256(
        json.dumps({**recipe, "targets": {path: list(shape) for path, shape in TARGETS.items()}}, sort_keys=True).encode()
    )
    expected = light(tokens[None]).detach().select(0)
    assert set(vectors) == set(TARGETS)
    for layer, shape in TARGETS.items():
        if recipe["learnable"]:
            state, name = light.state_dict(), layer.replace(".", "/")
            down_aux, up_aux = state[f"{name}/down"].numpy(), state[f"{name}/up"].numpy()
            digest.update(down_aux.astype("<f2").tobytes() + np.ascontiguousarray(up_aux).astype("<f2").tobytes())
        else:
            down_aux = frozen(a, shape.inputs, f"{recipe['seed']}/{layer}/down")
            up_aux = frozen(b, shape.outputs, f"{recipe['seed']}/{layer}/up").T
        down = vectors[layer][: rank * a].reshape(rank, a) @ down_aux
        up = up_aux @ vectors[layer][rank * a :].reshape(b, rank)
        np.testing.assert_allclose(up @ down, expected[layer].delta().numpy(), atol=1e-4)
    assert digest.hexdigest()[:16] == metadata["hyperdreambooth.fingerprint"]
