"""Fetches models and data sets from the Hugging Face hub, and uploads hypernetworks and LoRAs with model cards.

Only the files listed here are uploaded: a hypernetwork's weights and config, or a LoRA and its preview. Training folders
also hold caches of people's photos and paths of this machine, which aren't uploaded: these files name a base or a LoRA without its
folders.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from .errors import InputError, refusing
from .formats import HUB_ERRORS, public_name, read_lora
from .photos import SUFFIXES, is_generated, preview_path

HYPERNETWORK_FILES = ["README.md", "config.json", "model.safetensors", "encoder/*.json", "encoder/*.safetensors"]
CONSENT = "A LoRA of a face is biometric data: whoever has the file can draw this person. Upload it only if the person agrees."
CARDS = Path(__file__).parent / "assets" / "cards"  # Jinja templates of model cards; `card_data` is the card's metadata.


def download(name: str) -> Path:
    """Downloads a model by its id on the hub, `user/name`, and returns its local folder. Raises InputError where that fails."""
    with refusing(f"{name} is neither a folder nor a model on the hub that can be reached", *HUB_ERRORS):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def download_pictures(name: str) -> Path:
    """Downloads the pictures of a data set, `user/name` or `user/name/folder`, that aren't cached yet, and returns the local folder.

    Without picture files it downloads parquet files. Raises InputError where there are neither (only archives, say), or no connection.
    """
    repository, folder = "/".join(name.split("/")[:2]), "".join(f"{part}/" for part in name.split("/")[2:])
    kinds = [f"{folder}*{end}" for suffix in SUFFIXES for end in (suffix, suffix.upper())]
    with refusing(f"{name} can't be fetched from the hub", *HUB_ERRORS, advice="Check the name, or run the same line again."):
        for wanted in (kinds, [f"{folder}*.parquet"]):
            place = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted)) / folder
            if place.is_dir() and any(place.iterdir()):
                return place
    raise InputError(f"{name} holds neither picture files nor parquet files. Save its pictures in a folder, and name that.")


def push(path: str | Path, name: str, *, public: bool = False) -> str:
    """Uploads a hypernetwork's folder, or a LoRA file with its preview and a card, and returns the repository's address.

    The repository is created if there is none, private unless `public`. The caller must have asked for the person's consent.
    Raises InputError where `path` is neither, or the hub can't be reached or refuses.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = path if path.is_dir() else _lora_folder(path, Path(scratch))
        if path.is_dir() and not ((path / "config.json").is_file() and (path / "model.safetensors").is_file()):
            raise InputError(f"{path} isn't a hypernetwork: it has no config.json or no model.safetensors. `train-hypernetwork` makes one.")
        api, check = HfApi(), "Check the network, the name (user/name), and your token (`hf auth login`)."
        with refusing(f"{path} can't be uploaded to {name}", *HUB_ERRORS, advice=check):
            address = str(api.create_repo(name, private=not public, exist_ok=True))
            only = HYPERNETWORK_FILES if path.is_dir() else None
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=only, commit_message="Upload by hyperdreambooth")
    return address


def _lora_folder(path: Path, folder: Path) -> Path:
    """Copies a LoRA file, its preview and its card into `folder`, and returns that. Raises InputError where the file is no LoRA."""
    lora, preview = read_lora(path), preview_path(path)
    shown = is_generated(preview)  # a picture that isn't may be a photo of the person, which is never uploaded
    for file in (path, preview) if shown else (path,):
        shutil.copy(file, folder)
    text = lora_card(lora.metadata, path.name, preview.name if shown else None, kohya=lora.layout == "kohya")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def lora_card(metadata: Mapping[str, str], file: str, picture: str | None = None, *, kohya: bool = False) -> str:
    """The model card of a LoRA file, from its header. `picture`: the name of its preview in the same folder."""
    base = metadata.get("hyperdreambooth.base") or metadata.get("ss_sd_model_name") or "unknown"
    trigger, title = metadata.get("modelspec.trigger_phrase", ""), metadata.get("modelspec.title", Path(file).stem)
    about: dict[str, Any] = {"instance_prompt": trigger or None, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    about["tags"] = ["lora", "text-to-image", "hyperdreambooth"]
    values = {"metadata": metadata, "trigger": trigger, "title": title, "file": file, "picture": picture, "kohya": kohya}
    return _card("lora.md", base, metadata.get("modelspec.license"), about, values)


def hypernetwork_card(config: Mapping[str, Any]) -> str:
    """The model card of a hypernetwork, from its config.json: base, sizes, data, metrics, license, and how to use it in three lines."""
    base = public_name(config["base"])
    sizes, layers, trained = config["lightweight"], len(config["targets"]), dict(config["trained"])
    rank, width = sizes.get("rank", 1), sizes.get("down_dim", 100) + sizes.get("up_dim", 50)
    metrics = (trained.pop("validation", None) or [{}])[-1]
    values = {**config, "rank": rank, "layers": layers, "numbers": layers * rank * width, "metrics": metrics, "trained": trained}
    return _card("hypernetwork.md", base, config["license"], {"tags": ["hyperdreambooth", "hypernetwork", "lora", "text-to-image"]}, values)


def _card(template: str, base: str, terms: str | None, about: dict[str, Any], values: dict[str, Any]) -> str:
    """Fills a template. The hub has ids of known licenses in lower case; a license that doesn't look like an id is `other`, with a name."""
    if terms:
        about |= {"license": terms.lower()} if " " not in terms and "/" not in terms else {"license": "other", "license_name": terms}
    data = ModelCardData(base_model=base if base.count("/") == 1 else None, **about)
    card = ModelCard.from_template(data, template_path=str(CARDS / template), **{**values, "base": base, "terms": terms})
    return f"{card}\n"
