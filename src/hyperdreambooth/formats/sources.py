"""Where a LoRA is: a file, a folder, or a repository on the model hub, as diffusers takes them."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whatever HTTP library it uses

from ..errors import InputError


def find_lora(name: str | Path) -> Path:
    """The file that is meant by a file, a folder, `user/repo` or `user/repo/file` on the hub.

    Raises InputError where there is none, several, or the hub can't be reached.
    """
    path, repository = Path(name), re.fullmatch(r"([\w.-]*\w/[\w.-]+)(?:/(.+))?", str(name))
    if path.is_dir():
        return path / _only([file.name for file in path.iterdir()], str(name))
    if path.exists() or not repository or repository[1].endswith((".safetensors", ".tokens")):
        return path
    try:
        if repository[2]:
            return Path(hf_hub_download(repository[1], repository[2]))
        about = HfApi().model_info(repository[1])
        return Path(hf_hub_download(repository[1], _only([file.rfilename for file in about.siblings or []], str(name)), revision=about.sha))
    except InputError:
        raise
    except (HTTPError, OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{name} is no file or folder here, and no LoRA on the hub that can be reached: {why}.") from error


def _only(files: list[str], where: str) -> str:
    """The LoRA of a folder: by its usual name, or the only file that may be one. Raises InputError where there are several or none."""
    usual = [file for file in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors") if file in files]
    loras = sorted(file for file in files if file.endswith(".safetensors") and not re.search("scheduler|optimizer|checkpoint", file))
    if not usual and len(loras) != 1:
        found = f"several LoRAs: {', '.join(loras)}. Name one, such as {where}/{loras[0]}" if loras else "no .safetensors file. Name a LoRA"
        raise InputError(f"{where} has {found}.")
    return (usual or loras)[0]
