"""Bases whose linear layers hold a byte or half of one a weight: quantized while they are opened, or already when they were saved.

Nothing is ever merged into such weights: an update is added by hooks (`lora.mergeable`), and gradients flow through the layers.
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

from ..errors import InputError
from ..lora import can_be_added_to

LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "gguf": "gguf", "quanto": "optimum.quanto"}
"""Method in a component's config -> the package that opens it."""


def library(method: str, what: object) -> Any:
    """The package of a method of quantization. Raises InputError where it isn't installed."""
    # its int8 layers would say of every call that activations are cast to float16, which is how they work
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        return importlib.import_module(LIBRARIES.get(method, method))
    except ImportError as error:
        raise InputError(f"{what} needs {LIBRARIES.get(method, method)} ({error}): pip install 'hyperdreambooth[quantized]'.") from error


def check_library(folder: Path) -> None:
    """Raises InputError where a component in diffusers' layout is quantized by a library that isn't installed."""
    for file in folder.glob("*/config.json"):
        if found := json.loads(file.read_text(encoding="utf-8")).get("quantization_config"):
            library(str(found.get("quant_method")), f"{file.parent}, which is quantized,")


def quantize_component(name: str, model: nn.Module, kind: str | None, device: str | torch.device) -> None:
    """Quantizes a component of a pipeline in place where that pays: the denoiser and T5. A layer goes to the device as soon as it is done.

    What the models' own library keeps in a higher precision (T5's `wo`) isn't touched.

    Args:
        kind: "nf4", 4 bits a weight and blocks of 64 (Dettmers et al., arXiv 2305.14314), or "int8" (LLM.int8, arXiv 2208.07339).

    Raises InputError where bitsandbytes is missing, or the model is quantized already.
    """
    if kind is None or not (name in ("unet", "transformer") or isinstance(model, T5EncoderModel)):
        return
    layers = library("bitsandbytes", f"--quantize {kind}").nn
    if not all(can_be_added_to(parameter) for parameter in model.parameters()):
        raise InputError(f"this base's {name} is quantized already: leave out --quantize.")
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or child in kept:
                continue
            sizes, made = (layer.in_features, layer.out_features, layer.bias is not None), {"device": "meta"}
            if kind == "nf4":
                new = layers.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4", **made)
                new.weight = layers.Params4bit(layer.weight.data, quant_type="nf4", module=new)
            else:
                new = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, **made)
                new.weight = layers.Int8Params(layer.weight.data, requires_grad=False)
            new.bias = layer.bias
            setattr(parent, child, new.requires_grad_(False).eval().to(device))


def read_gguf(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """What a GGUF file's header says of its tensors: name -> (shape, type). Raises InputError where it isn't a whole one."""
    reader = library("gguf", path).GGUFReader
    try:
        opened = reader(path)
        found = {}
        for tensor in opened.tensors:
            # a row has to be whole blocks of 256, so converters store some tensors in another shape and note their own
            own = opened.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
            shape = own.contents() if own else reversed(tensor.shape.tolist())
            found[tensor.name] = (tuple(map(int, shape)), tensor.tensor_type.name)
        return found
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        raise InputError(f"{path} is not a whole GGUF file ({error}). Was it cut off while copying?") from error


def load_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A GGUF file's tensors, quantized as they are; those that are stored in another shape than their own are expanded to `dtype`."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    try:
        tensors = load_gguf_checkpoint(str(path))
    except ValueError as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]} Take a file of another type, such as Q4_K, Q5_K or Q8_0.") from error
    for name, shape in shapes.items():
        if tuple(getattr(tensors[name], "quant_shape", tensors[name].shape)) != shape:
            tensors[name] = dequantize_gguf_tensor(tensors[name]).to(dtype).reshape(shape)
    return tensors


def gguf_model(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A denoiser like `model` (on the meta device) that holds `tensors` by diffusers' names, and expands what is quantized in every call."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    linear = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    held = {name: tensor if name in linear else dequantize_gguf_tensor(tensor).to(dtype) for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_config(folder)
        config = GGUFQuantizationConfig(compute_dtype=dtype)
        return type(model).from_single_file(held, config=folder, quantization_config=config, torch_dtype=dtype)
