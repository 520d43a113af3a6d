"""Bases whose linear layers are quantized to 8 bits a weight or fewer: while they are opened, or already when they were saved.

A LoRA is never merged into quantized weights: its update is added by hooks (`lora.mergeable`), and gradients flow through the layers.
"""

import importlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from ..errors import InputError, refusing
from ..lora import can_be_added_to
from ..progress import say


def library(name: str, what: object) -> Any:
    """Imports a quantization package, which `what` needs. Raises InputError where it isn't installed."""
    # bitsandbytes' int8 layers would warn in every call that activations are cast to float16, which is intended
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{what} needs {name} ({error}): pip install 'hyperdreambooth[quantized]', or {name} alone.") from error


def check_library(folder: Path) -> None:
    """Raises InputError where a component in diffusers' layout is quantized by a library that isn't installed."""
    for file in folder.glob("*/config.json"):
        found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
        if found.get("quant_method") in ("bitsandbytes", "torchao"):
            library(found["quant_method"], f"{file.parent}, which is quantized,")


def quantized(pipe: Any, kind: str | None, device: str | torch.device) -> Any:
    """Quantizes a pipeline's denoiser and T5 in place by bitsandbytes, moving each layer to the device, and returns the pipeline.

    Layers that transformers keeps in float32 (T5's `wo`) and models that were saved quantized aren't touched.

    Args:
        kind: "nf4", 4 bits a weight in blocks of 64 (Dettmers et al., arXiv 2305.14314), "int8" (LLM.int8, arXiv 2208.07339), or None.

    Raises InputError where bitsandbytes is missing.
    """
    layers = library("bitsandbytes", f"--quantize {kind}").nn if kind else None
    for name, model in pipe.components.items() if kind else ():
        if not (name in ("unet", "transformer") or isinstance(model, T5EncoderModel)):
            continue
        if not all(can_be_added_to(parameter) for parameter in model.parameters()):
            say(f"this base's {name} is quantized already and stays what it is.")
            continue
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        for parent in list(model.modules()):
            for child, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and child not in kept:
                    setattr(parent, child, _quantized_layer(layers, layer, kind).to(device))
    return pipe


def _quantized_layer(layers: Any, layer: nn.Linear, kind: str | None) -> nn.Module:
    """A bitsandbytes layer with the weights of `layer`, which it quantizes when it is moved to a device. `layers`: `bitsandbytes.nn`."""
    sizes, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data.cpu()
    if kind == "nf4":
        new = layers.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        new.weight = layers.Params4bit(weight, quant_type="nf4", module=new)
    else:
        new = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = layers.Int8Params(weight, requires_grad=False)
    new.bias = layer.bias
    return new.requires_grad_(False).eval()


def read_gguf(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors in a GGUF file's header: name -> (shape, type). Raises InputError where the file isn't a whole GGUF file."""
    reader = library("gguf", path).GGUFReader
    kinds = ValueError, KeyError, IndexError, OSError, OverflowError
    with refusing(f"{path} is not a whole GGUF file", *kinds, advice="Was it cut off while copying?"):
        opened = reader(path)
        found = {}
        for tensor in opened.tensors:
            # a row must be whole blocks, so converters store some tensors in another shape and note the original one
            own = opened.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
            shape = own.contents() if own else reversed(tensor.shape.tolist())
            found[tensor.name] = (tuple(map(int, shape)), tensor.tensor_type.name)
        return found


def load_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A GGUF file's tensors, still quantized; those stored in another shape than in `shapes` are dequantized to `dtype` and reshaped."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    with refusing(str(path), ValueError, advice="Take a file of another type, such as Q4_K, Q5_K or Q8_0."):
        tensors = load_gguf_checkpoint(str(path))
    for name, shape in shapes.items():
        if tuple(getattr(tensors[name], "quant_shape", tensors[name].shape)) != shape:
            tensors[name] = dequantize_gguf_tensor(tensors[name]).to(dtype).reshape(shape)
    return tensors


def gguf_model(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A denoiser like `model` (on the meta device) with `tensors` by diffusers' names. Linear layers dequantize theirs in every call."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    linear = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    held = {name: tensor if name in linear else dequantize_gguf_tensor(tensor).to(dtype) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_config(folder)
        config = GGUFQuantizationConfig(compute_dtype=dtype)
        return type(model).from_single_file(held, config=folder, quantization_config=config, torch_dtype=dtype)
