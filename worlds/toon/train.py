"""Trains the toon world, stage by stage, each resumable: the recipe of what is shipped.

python -m worlds.toon.train base            one stage
python -m worlds.toon.train all --minutes 170   whatever is unfinished first, until the time is up
python -m worlds.toon.train adopt           takes what is shipped as finished: a stage that is trained again goes on from it

A stage without a checkpoint begins with the weights in its `model` folder, where there are any.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as F

from hyperdreambooth.backbones import StableDiffusion, load_backbone
from hyperdreambooth.checkpoint import read_tensors, save_tensors
from hyperdreambooth.data import IdentityData
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.lightweight import LightweightLora
from hyperdreambooth.lora import find_targets
from hyperdreambooth.pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork
from hyperdreambooth.stages.describe import familiar
from hyperdreambooth.stages.preoptimize import preoptimize
from hyperdreambooth.stages.train_hypernetwork import train_hypernetwork
from hyperdreambooth.tables import read_table
from hyperdreambooth.trainable_lora import PredictedLora
from hyperdreambooth.training import Run, TrainingReport, fit
from hyperdreambooth.training_settings import TrainHypernetworkConfig, TrainingConfig

from . import autoencoder, base, hypernetworks, judges, pictures

RUNS = Path("runs/toon")
ASSETS = Path("src/hyperdreambooth/assets/toon")


def components(runs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoder's matrix and offset, computed once from every fifth of the decoder's pictures."""
    file = runs / "components.safetensors"
    if not file.is_file():
        data = pictures.training_pictures(runs / "data")
        matrix, offset = autoencoder.principal_components(pictures.to_tensor(data.pixels[::5]))
        save_tensors(file, {"matrix": matrix, "offset": offset})
    tensors, _ = read_tensors(file)
    return tensors["matrix"], tensors["offset"]


def latents_of(runs: Path, data: pictures.Pictures) -> torch.Tensor:
    """All latents, fp16."""
    matrix, offset = components(runs)
    return torch.cat(
        [autoencoder.encode(matrix, offset, pictures.to_tensor(data.pixels[i : i + 1000])).half() for i in range(0, len(data.pixels), 1000)]
    )


def train_base(runs: Path, minutes: float | None, steps: int = 1935) -> bool:
    """Batches of 2,048, which ask for a GPU; validated by the loss of strangers' pictures."""
    matrix, offset = components(runs)
    vae = autoencoder.build()
    autoencoder.write_encoder(vae, matrix, offset)
    torch.manual_seed(0)
    backbone = StableDiffusion(base.build(vae))
    if (runs / "base" / "model" / "model_index.json").is_file():
        backbone.components.load_state_dict(trained_backbone(runs).components.state_dict())
    data = pictures.base_pictures(runs / "data")
    training = base.BaseTraining(backbone, latents_of(runs, data), data.rows, batch=2048, seed=31)
    held = validation_pictures(runs)
    latents = autoencoder.encode(matrix, offset, pictures.to_tensor(held.pixels[:384]))
    config = TrainingConfig(
        steps=steps,
        optimizer="muon",
        learning_rate=1.5e-3,
        weight_decay=0.01,
        warmup=30,
        cooldown=0.7,
        average=0.995,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        seed=31,
        log_every=50,
        validate_every=300,
    )
    report = fit(
        training.losses,
        backbone.components,
        training.draw,
        config,
        Run(directory=runs / "base", validate=base.HeldOutLoss(backbone, latents, held.rows[:384]), minutes=minutes, name="base"),
    )
    if report.finished:
        backbone.components.cpu()
        backbone.pipe.save_pretrained(str(runs / "base" / "model"))
    return report.finished


def train_decoder(runs: Path, minutes: float | None, steps: int = 2200) -> bool:
    """Batches of 16."""
    data = pictures.training_pictures(runs / "data")
    matrix, offset = components(runs)
    torch.manual_seed(0)
    decoder = autoencoder.build().decoder
    if (runs / "decoder" / "model.safetensors").is_file():
        decoder.load_state_dict(read_tensors(runs / "decoder" / "model.safetensors")[0])
    decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    held = torch.arange(0, len(data.pixels), 500)

    def draw(index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(data.pixels), (16,), generator=torch.Generator().manual_seed(index))
        images = pictures.to_tensor(data.pixels[chosen.numpy()])
        latents = autoencoder.encode(matrix, offset, images)
        return latents + 0.03 * torch.randn(latents.shape, generator=generator), images  # a little noise, as generated ones have

    def validate(done, model):  # type: ignore[no-untyped-def]
        images = pictures.to_tensor(data.pixels[held.numpy()])
        rebuilt = model(autoencoder.encode(matrix, offset, images)).clamp(-1, 1)
        mse = (rebuilt - images).square().mean((1, 2, 3)) / 4
        return {"psnr": (-10 * mse.log10()).mean(), "psnr_of_mean": -10 * mse.mean().log10()}

    config = TrainingConfig(
        steps=steps, learning_rate=2e-3, warmup=100, cooldown=0.3, average=0.998, seed=2, log_every=50, validate_every=500
    )
    report = fit(
        autoencoder.reconstruction_losses,
        decoder,
        draw,
        config,
        Run(directory=runs / "decoder", validate=validate, minutes=minutes, device="cpu", name="decoder"),
    )
    if report.finished:
        save_tensors(runs / "decoder" / "model.safetensors", decoder.state_dict())
    return report.finished


def validation_pictures(runs: Path, people: int = 300) -> pictures.Pictures:
    """Two pictures of each of some validation people, in random contexts."""
    render = runs / "data" / "validation"
    pictures.render(render, ["--first", str(pictures.FIRST["validation"]), "--people", str(people), "--contexts", "2"])
    return pictures.Pictures.load(render)


def validation_pairs(runs: Path) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, str]]]:
    """The first and the second picture of validation people, (N, 3, 64, 64) twice, and all contexts."""
    data = validation_pictures(runs)
    images = pictures.to_tensor(data.pixels)
    return images[::2], images[1::2], [row["context"] for row in data.rows]


def train_embedder(
    runs: Path, name: str, model: torch.nn.Module, data: pictures.Pictures, people: int, config: TrainingConfig, minutes: float | None
) -> bool:
    """Contrastive training, `people` a batch; validated by rank-1 among 300 strangers."""
    linear = judges.linear_round_trip(*components(runs))
    first, second, _ = validation_pairs(runs)

    def validate(done, model):  # type: ignore[no-untyped-def]
        model.eval()
        device = next(model.parameters()).device
        a, b = (F.normalize(model(images.to(device))["identity"], dim=-1).cpu() for images in (first, linear(second)))
        model.train()
        return {"rank1": ((a @ b.mT).argmax(1) == torch.arange(len(a))).float().mean()}

    batches = judges.pairs(data, people, config.seed)

    def draw(index: int, generator: torch.Generator) -> torch.Tensor:
        return judges.augmented(torch.cat(batches(index)), generator, linear)

    return fit(
        judges.contrastive_losses, model, draw, config, Run(directory=runs / name, validate=validate, minutes=minutes, name=name)
    ).finished


def embedder_config(steps: int, seed: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, learning_rate=1e-3, weight_decay=0.05, warmup=30, cooldown=0.4, seed=seed, log_every=20, validate_every=100
    )


def train_encoder(runs: Path, minutes: float | None, steps: int = 800) -> bool:
    """Batches of 64 people."""
    torch.manual_seed(3)
    folder = runs / "encoder" / "model"
    last = FaceEncoder.from_pretrained(folder, trained=True) if (folder / "config.json").is_file() else judges.build_encoder()
    model = judges.Embedder(last)
    data = pictures.training_pictures(runs / "data")
    done = train_embedder(runs, "encoder", model, data, 64, embedder_config(steps, 3), minutes)
    if done:
        model.cpu().encoder.save_pretrained(folder)
    return done


def train_recogniser(runs: Path, minutes: float | None, steps: int = 928) -> bool:
    """Batches of 512 people of the base's, which ask for a GPU."""
    torch.manual_seed(4)
    model = judges.go_on(judges.build_recogniser(), runs / "recogniser" / "model")
    config = embedder_config(steps, 4)
    config.cooldown, config.average = 0.7, 0.995
    config.mixed_precision = "bf16" if torch.cuda.is_available() else "no"
    done = train_embedder(runs, "recogniser", model, pictures.base_pictures(runs / "data"), 512, config, minutes)
    if done:
        model.cpu().save_pretrained(runs / "recogniser" / "model")
    return done


def train_classifier(runs: Path, minutes: float | None, steps: int = 650) -> bool:
    data = pictures.training_pictures(runs / "data")
    linear = judges.linear_round_trip(*components(runs))
    first, second, contexts = validation_pairs(runs)
    images = torch.stack([first, linear(second)], 1).flatten(0, 1)
    torch.manual_seed(5)
    model = judges.go_on(judges.build_classifier(), runs / "classifier" / "model")

    batches = judges.labelled(data, 96, 5)

    def draw(index, generator):  # type: ignore[no-untyped-def]
        images, labels = batches(index)
        return judges.augmented(images, generator, linear), labels

    def validate(done, model):  # type: ignore[no-untyped-def]
        found = model.classify(images)
        return {
            "all_right": sum(a == b for a, b in zip(found, contexts, strict=True)) / len(found),
            **{kind: sum(a[kind] == b[kind] for a, b in zip(found, contexts, strict=True)) / len(found) for kind in pictures.KINDS},
        }

    config = TrainingConfig(
        steps=steps, learning_rate=2e-3, weight_decay=0.02, warmup=30, cooldown=0.4, seed=5, log_every=20, validate_every=100
    )
    done = fit(
        judges.classification_losses,
        model,
        draw,
        config,
        Run(directory=runs / "classifier", validate=validate, minutes=minutes, device="cpu", name="classifier"),
    ).finished
    if done:
        model.save_pretrained(runs / "classifier" / "model")
    return done


def trained_backbone(runs: Path) -> StableDiffusion:
    """The finished base (averaged weights) with the best decoder so far."""
    folder = runs / "base" / "model"
    if not (folder / "model_index.json").is_file():
        raise SystemExit("the base isn't trained yet: python -m worlds.toon.train base")
    pipe = StableDiffusionPipeline.from_pretrained(str(folder))
    decoder = runs / "decoder" / "model.safetensors"
    if decoder.is_file():
        pipe.vae.decoder.load_state_dict({name: value.float() for name, value in read_tensors(decoder)[0].items()})
    return StableDiffusion(pipe)


def hypernetwork_data(runs: Path, encoder: FaceEncoder, split: str, people: int) -> IdentityData:
    """The first people of a split ("hyper" or "hyper-validation"); latents and features are kept in memory."""
    first = pictures.FIRST["validation"] if split == "hyper-validation" else 0
    whole = 150 if split == "hyper-validation" else pictures.HYPER_PEOPLE
    shown = hypernetworks.load_pictures(runs / "data" / split, first, whole)
    few = pictures.Pictures(shown.pixels[: 4 * people], shown.rows[: 4 * people])
    return hypernetworks.identity_data(few, encoder, *components(runs))


def train_pro(runs: Path, minutes: float | None, steps: int = 1085) -> bool:
    """Batches of 768, which ask for a GPU."""
    backbone = trained_backbone(runs)
    if torch.cuda.is_available():
        backbone.components.cuda()
    config = hypernetworks.pro_config(steps)
    start = load_hypernetwork(runs / "pro" / "model", backbone)[0] if (runs / "pro" / "model" / "config.json").is_file() else None
    encoder = FaceEncoder.from_pretrained(runs / "encoder" / "model", trained=config.train_encoder)
    data = hypernetwork_data(runs, encoder, "hyper", pictures.HYPER_PEOPLE)
    validation = hypernetwork_data(runs, encoder, "hyper-validation", 150)
    source, report = train_hypernetwork(
        backbone, encoder, data, config, directory=runs / "pro", validation=validation, start=start, minutes=minutes
    )
    if report.finished:
        known = familiar(backbone, validation.latents.to(backbone.device).float(), config.prompt)
        save_hypernetwork(runs / "pro" / "model", source.cpu(), describe(source, config, report, len(data.names), known))
    return report.finished


def train_table(runs: Path, minutes: float | None, steps: int = 50, people: int = 512) -> bool:
    """Pre-optimized tokens of the first training people."""
    backbone = trained_backbone(runs)
    encoder = FaceEncoder.from_pretrained(runs / "encoder" / "model")
    photos = hypernetworks.photos_of(hypernetwork_data(runs, encoder, "hyper", people))
    table = preoptimize(backbone, photos, hypernetworks.table_config(steps), runs / "table", minutes=minutes)
    return len(table) == people


def train_faithful(runs: Path, minutes: float | None, steps: int = 200) -> bool:
    """Batches of 64, with the table's weight loss."""
    backbone = trained_backbone(runs)
    encoder = FaceEncoder.from_pretrained(runs / "pro" / "model" / "encoder")  # one encoder is shipped for both
    data = hypernetwork_data(runs, encoder, "hyper", 4000)
    validation = hypernetwork_data(runs, encoder, "hyper-validation", 150)
    config = hypernetworks.faithful_config(steps)
    targets = find_targets(backbone.components, config.targets)
    table = read_table(runs / "table", LightweightLora(targets, config.lightweight).fingerprint())
    source, report = train_hypernetwork(
        backbone, encoder, data, config, directory=runs / "faithful", validation=validation, table=table, minutes=minutes
    )
    if report.finished:
        save_hypernetwork(runs / "faithful" / "model", source, describe(source, config, report, len(data.names)))
    return report.finished


def describe(
    source: PredictedLora, config: TrainHypernetworkConfig, report: TrainingReport, people: int, known: float | None = None
) -> HyperNetworkInfo:
    """What travels with a hypernetwork; the defaults of personalize and generate were chosen on validation people."""
    return HyperNetworkInfo(
        base="toon",
        targets={path: list(shape) for path, shape in source.lightweight.targets.items()},
        lightweight=asdict(config.lightweight),
        hypernetwork=asdict(config.hypernetwork),
        mode=config.mode,
        describe=pictures.slots(),
        personalize={"steps": 25, "rank": 8, "learning_rate": 6e-3, "copies": 8}
        | {"targets": ["*up_blocks.1*"], "noise_mean": -0.5, "noise_std": 0.5},
        generate={"steps": 10, "guidance": 2.0, "identity_guidance": "off", "identity_until": 0.3}
        | {"context_guidance": 3.0, "context_until": 0.5},
        data="cartoon people drawn with facesjs (Apache-2.0): see worlds/toon/README.md",
        license="apache-2.0",
        familiar=known,
        trained={"steps": report.steps, "batch": config.batch, "people": people, "validation": report.validations[-1:]},
    )


def export(runs: Path, minutes: float | None = None) -> bool:
    """Copies what is finished to where the wheel ships it from, in fp16."""
    base.save(trained_backbone(runs).pipe, ASSETS / "base")
    for name in ("recogniser", "classifier"):
        Judge.from_pretrained(runs / name / "model").save_pretrained(ASSETS / name)
    for name, folder in (("pro", ASSETS / "hypernetwork"), ("faithful", Path("benchmarks/faithful"))):
        if (runs / name / "model" / "config.json").is_file():
            source, info = load_hypernetwork(runs / name / "model")
            source.encoder.model.half()
            if name == "faithful":  # both read faces with the same encoder
                info.encoder = "../../src/hyperdreambooth/assets/toon/hypernetwork/encoder"
            save_hypernetwork(folder, source, info)
    return True


def adopt(runs: Path, minutes: float | None = None) -> bool:
    """Takes the shipped weights as if they had been trained here."""
    backbone = load_backbone("toon")
    components(runs)  # the shipped encoder's own: they follow from the pictures alone
    backbone.pipe.save_pretrained(str(runs / "base" / "model"))
    save_tensors(runs / "decoder" / "model.safetensors", backbone.pipe.vae.decoder.state_dict())
    for name in ("recogniser", "classifier"):
        Judge.from_pretrained(ASSETS / name).save_pretrained(runs / name / "model")
    source, info = load_hypernetwork(ASSETS / "hypernetwork", backbone)
    save_hypernetwork(runs / "pro" / "model", source, info, torch.float32)
    source.encoder.save_pretrained(runs / "encoder" / "model")
    return True


STAGES: dict[str, Callable[..., bool]] = {
    "encoder": train_encoder,
    "recogniser": train_recogniser,
    "classifier": train_classifier,
    "decoder": train_decoder,
    "base": train_base,
    "pro": train_pro,
    "table": train_table,
    "faithful": train_faithful,
    "export": export,
}
OTHERS: dict[str, Callable[..., bool]] = {"adopt": adopt}


def interrupt(number: int, frame: object) -> None:
    """A terminated training checkpoints, as one stopped by Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES, *OTHERS])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(argv)
    if args.steps and args.stage in ("all", "export", "adopt"):
        parser.error("--steps goes with one training")
    signal.signal(signal.SIGTERM, interrupt)
    extra = {"steps": args.steps} if args.steps else {}
    started = time.monotonic()
    for name in STAGES if args.stage == "all" else [args.stage]:
        left = args.minutes - (time.monotonic() - started) / 60 if args.minutes else None
        if not {**STAGES, **OTHERS}[name](args.runs, left, **extra):
            print(f"{name} isn't finished; the same command goes on from here")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
