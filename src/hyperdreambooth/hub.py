"""The model hub: where hypernetworks and LoRAs are fetched from and uploaded to, and the cards that describe them.

Nothing is uploaded but what is listed here: a hypernetwork's weights and config, or a LoRA and its preview. Training folders
also hold caches of people's photos and paths of this machine; those stay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whatever HTTP library it uses

from .checkpoint import write_atomically
from .errors import InputError
from .photos import is_generated, preview_path

if TYPE_CHECKING:
    from .pretrained import HyperNetworkInfo

HYPERNETWORK_FILES = ["README.md", "config.json", "model.safetensors", "encoder/*.json", "encoder/*.safetensors"]
CONSENT = "A LoRA of a face is biometric data: whoever has the file can draw this person. Upload it only if the person agrees."
REFUSALS = (HTTPError, OSError, ValueError)
"""What huggingface_hub raises for an unreachable hub, a refused token, a name that is none, and a card that it doesn't take."""


def download(name: str) -> Path:
    """A model of the hub by its id, such as `user/name`: the folder that it was fetched to. Raises InputError."""
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except REFUSALS as error:
        raise InputError(f"{name} is neither a folder nor a model on the hub that can be reached: {_first_line(error)}") from error


def push(path: str | Path, name: str, *, public: bool = False) -> str:
    """Uploads a hypernetwork's folder, or a LoRA file with its preview and a card: the repository's address.

    The repository is made if it isn't there, private unless `public`. Who asked the person is the caller's business.
    Raises InputError where `path` is neither, or the hub can't be reached or refuses.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = path if path.is_dir() else _lora_folder(path, Path(scratch))
        if path.is_dir() and not ((path / "config.json").is_file() and (path / "model.safetensors").is_file()):
            raise InputError(f"{path} isn't a hypernetwork: it has no config.json or no model.safetensors. `train-hypernetwork` makes one.")
        api = HfApi()
        try:
            address = str(api.create_repo(name, private=not public, exist_ok=True))
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                allow_patterns=HYPERNETWORK_FILES if path.is_dir() else None,
                commit_message="Upload by hyperdreambooth",
            )
        except REFUSALS as error:
            raise InputError(
                f"{path} can't be uploaded to {name}: {_first_line(error)} Check the network, the name (user/name), and your token (`hf auth login`)."
            ) from error
    return address


def _lora_folder(path: Path, folder: Path) -> Path:
    """A LoRA file, its preview and its card, side by side in an empty folder. Raises InputError where it is no LoRA."""
    from .formats import read_lora

    lora = read_lora(path)
    preview = preview_path(path)
    shown = is_generated(preview)  # a photo of the person is never uploaded
    for file in (path, *([preview] if shown else [])):
        (folder / file.name).write_bytes(file.read_bytes())
    text = lora_card(lora.metadata, path.name, preview.name if shown else None, kohya=lora.layout == "kohya")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def lora_card(metadata: Mapping[str, str], file: str, picture: str | None = None, *, kohya: bool = False) -> str:
    """The model card of a LoRA file, from its header."""
    base = metadata.get("hyperdreambooth.base") or metadata.get("ss_sd_model_name") or "unknown"
    trigger = metadata.get("modelspec.trigger_phrase", "")
    license = metadata.get("modelspec.license")
    data = ModelCardData(
        base_model=base if base.count("/") == 1 else None,
        instance_prompt=trigger or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image", "hyperdreambooth"],
        **_license(license),
    )
    lines = [
        f"# {metadata.get('modelspec.title', Path(file).stem)}",
        f"A LoRA of rank {metadata.get('ss_network_dim', '?')} for `{base}`, made by hyperdreambooth {metadata.get('hyperdreambooth.version', '')} "
        f"on {metadata.get('modelspec.date', 'an unknown day')}.",
        f"![Drawn with it]({picture})" if picture else "",
        f"## How to use it\n\nWrite `{trigger}` into the prompt. In diffusers, with `pipe` a pipeline of the base:\n\n```python\n"
        f'pipe.load_lora_weights("{file}")\nimage = pipe("{trigger}").images[0]\n```\n\n'
        + (
            "It is in kohya's layout: ComfyUI, A1111 and Forge find it in their folder for LoRAs."
            if kohya
            else f"For ComfyUI and A1111, unless the base is SD 3 or Flux: `hyperdreambooth export {file} --format kohya -o kohya-{file}`."
        ),
        "## A person\n\nThis LoRA draws one real or invented person. A LoRA of a real face is biometric data: use it only with that person's "
        "consent, and say that pictures made with it are generated.",
        f"## License\n\n{license or 'Not stated.'}" + (f" By {metadata['modelspec.author']}." if "modelspec.author" in metadata else ""),
    ]
    return _card(data, lines)


def hypernetwork_card(info: HyperNetworkInfo) -> str:
    """The model card of a hypernetwork: what, base, data, metrics, license, and how to use it in three lines."""
    base = Path(info.base).name if Path(info.base).exists() else info.base
    data = ModelCardData(
        base_model=base if base.count("/") == 1 else None,
        tags=["hyperdreambooth", "hypernetwork", "lora", "text-to-image"],
        **_license(info.license),
    )
    trained = {key: value for key, value in info.trained.items() if key != "validation"}
    last = (info.trained.get("validation") or [{}])[-1]
    rank, width = info.lightweight.get("rank", 1), info.lightweight.get("down_dim", 100) + info.lightweight.get("up_dim", 50)
    lines = [
        f"# A hypernetwork for {base}",
        f"It looks at one photo of a face and predicts a LoRA of rank {rank} for `{base}` ({len(info.targets)} layers, "
        f"{len(info.targets) * rank * width} numbers), which a few steps of fine-tuning make fit (HyperDreamBooth, arXiv 2307.06949; mode {info.mode}).",
        "## How to use it\n\n```python\nfrom hyperdreambooth import HyperDreamBooth\n\n"
        f'hdb = HyperDreamBooth.from_pretrained("{base}", hypernetwork="user/name")  # or this folder\n'
        'hdb.personalize("me.jpg").save("me.safetensors")\n```',
        f"## Data\n\n{info.data or 'Not stated.'}\n" + "".join(f"\n- {key}: {value}" for key, value in trained.items()),
        "## Metrics\n\n"
        + (
            "On people who weren't trained on:\n" + "".join(f"\n- {key.replace('_', ' ')}: {value:.4g}" for key, value in last.items())
            if last
            else "None were measured."
        ),
        "## Limits\n\nIt knows the kind of faces that it was trained on, and that base alone. Personalize people only with their consent: what it makes is "
        "biometric data.",
        f"## License\n\n{info.license or 'Not stated.'}",
    ]
    return _card(data, lines)


def _license(license: str | None) -> dict[str, Any]:
    """The hub knows a list of lower-case ids; anything else is `other`, with a name."""
    if not license:
        return {}
    return {"license": license.lower()} if " " not in license and "/" not in license else {"license": "other", "license_name": license}


def _card(data: ModelCardData, paragraphs: list[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def write_card(folder: Path, info: HyperNetworkInfo) -> Path:
    """README.md of a hypernetwork's folder."""
    return write_atomically(folder / "README.md", lambda file: file.write_text(hypernetwork_card(info), encoding="utf-8"))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0].rstrip('.')}."
