"""The chain of trainings that makes a world's weights, stage by stage, each resumable; each world is a subclass of `Chain`.

A stage without a checkpoint starts from the weights in its `model` folder, if there are any.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn

from hyperdreambooth import checkpoint
from hyperdreambooth.backbones import StableDiffusion
from hyperdreambooth.checkpoint import read_tensors, save_tensors
from hyperdreambooth.data import IdentityData
from hyperdreambooth.encoder import FaceEncoder
from hyperdreambooth.evaluation.judges import Judge
from hyperdreambooth.lora import find_targets
from hyperdreambooth.pretrained import HyperNetworkInfo, load_hypernetwork, save_hypernetwork
from hyperdreambooth.stages.describe import familiar
from hyperdreambooth.stages.dreambooth import preoptimize
from hyperdreambooth.stages.train_hypernetwork import train_hypernetwork
from hyperdreambooth.tables import read_table
from hyperdreambooth.trainable_lora import LightweightLora, PredictedLora
from hyperdreambooth.training import Run, TrainingReport, fit
from hyperdreambooth.training_settings import TrainHypernetworkConfig, TrainingConfig

from . import base, hypernetworks, judges
from .autoencoder import Autoencoder, Components, reconstruction_losses
from .hypernetworks import Album
from .pixels import Pictures, every, psnr, to_tensor


class Chain:
    """The trainings of one world, kept in the folder `runs`."""

    name: ClassVar[str]
    autoencoder: ClassVar[Autoencoder]
    unet_widths: ClassVar[tuple[int, ...]]
    judge_widths: ClassVar[tuple[int, ...]]
    each: ClassVar[int]
    """Number of consecutive pictures of each person."""
    batches: ClassVar[dict[str, int]]
    """Batch size of each stage: in people for the encoder and the recognizer, in pictures for all others."""
    configs: ClassVar[dict[str, TrainingConfig]]
    """Training settings of each stage except the hypernetworks'."""
    steps: ClassVar[dict[str, int]]
    """Training steps of the hypernetworks' stages."""
    table_people: ClassVar[int] = 512
    faithful_people: ClassVar[int] = 4000
    assets: Path
    """Where `export` puts finished weights; `faithful` is the folder of the faithful hypernetwork."""
    faithful: Path

    def __init__(self, runs: Path):
        self.runs = runs

    # to be defined by each world

    def training_pictures(self) -> Pictures:
        """Training pictures of the decoder, the encoder and the classifier."""
        raise NotImplementedError

    def base_pictures(self) -> Pictures:
        """Training pictures of the base and the recognizer."""
        raise NotImplementedError

    def validation_pictures(self) -> Pictures:
        """Pictures of held-out people."""
        raise NotImplementedError

    def tokenizer(self) -> Any:
        raise NotImplementedError

    def training_caption(self, data: Pictures, index: int, draw: random.Random) -> str:
        """A caption for the base: sometimes empty, sometimes with [V], sometimes with a description of the person."""
        raise NotImplementedError

    def held_out_caption(self, data: Pictures, index: int, draw: random.Random) -> str:
        """A caption of a validation picture."""
        raise NotImplementedError

    def classes(self) -> dict[str, list[str]]:
        """The kinds of context that the classifier predicts, with the names of their values."""
        raise NotImplementedError

    def labels(self, data: Pictures) -> dict[str, Tensor]:
        """The contexts of pictures, as indices into `classes`."""
        raise NotImplementedError

    def validation_pairs(self) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        """Two pictures of each validation person, (N, 3, H, W) each, and the 2 N contexts: first, second, first, second ..."""
        raise NotImplementedError

    def build_encoder(self) -> FaceEncoder:
        """The untrained face encoder of the hypernetworks."""
        raise NotImplementedError

    def album(self, split: str, people: int | None = None) -> Album:
        """Pictures of "train" or "validation" people for hypernetworks: of the first `people`, or of all."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """This world's part of a hypernetwork's config: data, license, phrases, defaults."""
        raise NotImplementedError

    def build_autoencoder(self) -> AutoencoderKL:
        """The autoencoder with the written encoder and the decoder's initial weights."""
        vae = self.autoencoder.build()
        self.autoencoder.write_encoder(vae, self.components)
        return vae

    def trainable_decoder(self, vae: AutoencoderKL) -> nn.Module:
        """The decoder, with `requires_grad` of the parameters that are trained."""
        return vae.decoder

    # shared by all worlds

    def config(self, stage: str, steps: int | None) -> TrainingConfig:
        return replace(self.configs[stage], steps=steps) if steps else self.configs[stage]

    @cached_property
    def components(self) -> Components:
        """The encoder's matrix and offset, computed once from every fifth training picture of the decoder."""
        file = self.runs / "components.safetensors"
        if not file.is_file():
            data = self.training_pictures()
            self.autoencoder.principal_components(lambda: every(data, 5)).save(file)
        return Components.load(file)

    def latents_of(self, data: Pictures) -> Tensor:
        """Latents of all pictures, fp16."""
        return torch.cat([self.components.encode(images).half() for images in every(data, 1)])

    def train_decoder(self, minutes: float | None, steps: int | None = None) -> bool:
        data, components = self.training_pictures(), self.components
        strangers = self.validation_pictures()
        torch.manual_seed(0)
        decoder = self.trainable_decoder(self.build_autoencoder())
        model = self.runs / "decoder" / "model.safetensors"
        if model.is_file():
            decoder.load_state_dict(read_tensors(model)[0])
        decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        held = to_tensor(strangers[np.arange(0, len(strangers), max(len(strangers) // 64, 1))])

        def draw(index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            chosen = torch.randint(len(data), (self.batches["decoder"],), generator=torch.Generator().manual_seed(index))
            images = to_tensor(data[chosen.numpy()])
            latents = components.encode(images)
            return latents + 0.03 * torch.randn(latents.shape, generator=generator), images  # a little noise, as generated latents have

        def validate(done: int, model: nn.Module) -> dict[str, Any]:
            device = next(model.parameters()).device
            return psnr(torch.cat([model(part.to(device)).cpu() for part in components.encode(held).split(16)]), held)

        run = Run(directory=self.runs / "decoder", validate=validate, minutes=minutes, name="decoder")
        report = fit(reconstruction_losses, decoder, draw, self.config("decoder", steps), run)
        if report.finished:
            save_tensors(model, decoder.state_dict())
        return report.finished

    def untrained_backbone(self) -> StableDiffusion:
        torch.manual_seed(0)
        return StableDiffusion(base.build(self.build_autoencoder(), self.tokenizer(), self.unet_widths))

    def train_base(self, minutes: float | None, steps: int | None = None) -> bool:
        """Validated by the loss of held-out people's pictures."""
        backbone = self.untrained_backbone()
        if (self.runs / "base" / "model" / "model_index.json").is_file():
            backbone.components.load_state_dict(self.trained_backbone().components.state_dict())
        data, strangers = self.base_pictures(), self.validation_pictures()
        training = base.BaseTraining(
            backbone, self.latents_of(data), lambda index, draw: self.training_caption(data, index, draw), self.batches["base"], seed=31
        )
        shown, draw = np.arange(min(384, len(strangers))), random.Random(5)
        captions = [self.held_out_caption(strangers, index, draw) if draw.random() > 0.1 else "" for index in shown.tolist()]
        held = base.HeldOutLoss(backbone, self.components.encode(to_tensor(strangers[shown])), captions)
        run = Run(directory=self.runs / "base", validate=held, minutes=minutes, name="base")
        report = fit(training.losses, backbone.components, training.draw, self.config("base", steps), run)
        if report.finished:
            backbone.components.cpu()
            backbone.pipe.save_pretrained(str(self.runs / "base" / "model"))
        return report.finished

    def trained_backbone(self, unfinished: bool = False) -> StableDiffusion:
        """The finished base (averaged weights) with the latest decoder; with `unfinished`, the checkpoint's weights if it isn't finished.

        Raises SystemExit if there are no such weights.
        """
        folder = self.runs / "base"
        if (folder / "model" / "model_index.json").is_file():
            backbone = StableDiffusion(StableDiffusionPipeline.from_pretrained(str(folder / "model")))
        elif unfinished and (folder / "state.safetensors").is_file():
            backbone = self.untrained_backbone()
            model, _, average, _ = checkpoint.load(folder / "state.safetensors")
            backbone.components.load_state_dict({**model, **average}, strict=False)
        else:
            raise SystemExit(f"the base isn't trained yet: python -m worlds.{self.name}.train base")
        decoder = self.decoder_weights(unfinished)
        backbone.pipe.vae.decoder.load_state_dict({name: value.float() for name, value in decoder.items()}, strict=False)
        return backbone

    def trained_autoencoder(self) -> AutoencoderKL:
        """The autoencoder with the latest decoder weights, finished or not."""
        vae = self.build_autoencoder()
        vae.decoder.load_state_dict(self.decoder_weights(unfinished=True), strict=False)
        return vae.eval()

    def decoder_weights(self, unfinished: bool = False) -> dict[str, Tensor]:
        """The latest decoder weights (from a checkpoint only if `unfinished`); empty if there are none."""
        folder = self.runs / "decoder"
        if (folder / "model.safetensors").is_file():
            return read_tensors(folder / "model.safetensors")[0]
        if unfinished and (folder / "state.safetensors").is_file():
            model, _, average, _ = checkpoint.load(folder / "state.safetensors")
            return {**model, **average}
        return {}

    def train_embedder(self, name: str, model: nn.Module, data: Pictures, minutes: float | None, steps: int | None) -> bool:
        """Contrastive training; validated by rank-1 of held-out people's second pictures after the linear round trip."""
        linear, config = self.components.linear_round_trip(), self.config(name, steps)
        first, second, _ = self.validation_pairs()
        second = linear(second)
        batches = judges.pairs(data, self.each, self.batches[name], config.seed)

        def draw(index: int, generator: torch.Generator) -> Tensor:
            return judges.augmented(torch.cat(batches(index)), generator, linear)

        def validate(done: int, model: nn.Module) -> dict[str, Tensor]:
            return judges.rank_one(model, first, second)

        run = Run(directory=self.runs / name, validate=validate, minutes=minutes, name=name)
        return fit(judges.contrastive_losses, model, draw, config, run).finished

    def train_encoder(self, minutes: float | None, steps: int | None = None) -> bool:
        torch.manual_seed(3)
        folder = self.runs / "encoder" / "model"
        last = FaceEncoder.from_pretrained(folder, trained=True) if (folder / "config.json").is_file() else self.build_encoder()
        model = judges.Embedder(last)
        done = self.train_embedder("encoder", model, self.training_pictures(), minutes, steps)
        if done:
            model.cpu().encoder.save_pretrained(folder)
        return done

    def train_recogniser(self, minutes: float | None, steps: int | None = None) -> bool:
        torch.manual_seed(4)
        folder = self.runs / "recogniser" / "model"
        model = judges.with_stored_weights(judges.build_judge(self.judge_widths, {"identity": [""] * 128}), folder)
        done = self.train_embedder("recogniser", model, self.base_pictures(), minutes, steps)
        if done:
            model.cpu().save_pretrained(folder)
        return done

    def train_classifier(self, minutes: float | None, steps: int | None = None) -> bool:
        data, linear, config = self.training_pictures(), self.components.linear_round_trip(), self.config("classifier", steps)
        first, second, contexts = self.validation_pairs()
        images = torch.stack([first, linear(second)], 1).flatten(0, 1)
        torch.manual_seed(5)
        folder = self.runs / "classifier" / "model"
        model = judges.with_stored_weights(judges.build_judge(self.judge_widths, self.classes()), folder)
        batches = judges.labelled(data, self.labels(data), self.batches["classifier"], config.seed)

        def draw(index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            images, labels = batches(index)
            return judges.augmented(images, generator, linear), labels

        def validate(done: int, model: nn.Module) -> dict[str, float]:
            return judges.all_right(model.classify(images.to(next(model.parameters()).device)), contexts)  # type: ignore[operator]

        run = Run(directory=self.runs / "classifier", validate=validate, minutes=minutes, name="classifier")
        done = fit(judges.classification_losses, model, draw, config, run).finished
        if done:
            model.cpu().save_pretrained(folder)
        return done

    def identity_data(self, encoder: FaceEncoder, split: str, people: int | None = None) -> IdentityData:
        """An album as training data of hypernetworks, with latents and features in memory."""
        return hypernetworks.identity_data(self.album(split, people), encoder, self.components)

    def train_pro(self, minutes: float | None, steps: int | None = None) -> bool:
        backbone = self.trained_backbone()
        if torch.cuda.is_available():
            backbone.components.cuda()
        config = hypernetworks.pro_config(steps or self.steps["pro"], self.batches["pro"])
        folder = self.runs / "pro" / "model"
        start = load_hypernetwork(folder, backbone)[0] if (folder / "config.json").is_file() else None
        encoder = FaceEncoder.from_pretrained(self.runs / "encoder" / "model", trained=config.train_encoder)
        data, validation = self.identity_data(encoder, "train"), self.identity_data(encoder, "validation")
        source, report = train_hypernetwork(
            backbone, encoder, data, config, run=Run(self.runs / "pro", minutes=minutes), validation=validation, start=start
        )
        if report.finished:
            known = familiar(backbone, validation.latents.to(backbone.device).float(), config.prompt)
            save_hypernetwork(folder, source.cpu(), self.describe(source, config, report, len(data.names), known))
        return report.finished

    def train_table(self, minutes: float | None, steps: int | None = None) -> bool:
        """Pre-optimizes tokens of the first `table_people` training people."""
        backbone, encoder = self.trained_backbone(), FaceEncoder.from_pretrained(self.runs / "encoder" / "model")
        photos = hypernetworks.photos_of(self.identity_data(encoder, "train", self.table_people))
        table = preoptimize(
            backbone, photos, hypernetworks.table_config(steps or self.steps["table"]), self.runs / "table", minutes=minutes
        )
        return len(table) == len(photos.names)

    def train_faithful(self, minutes: float | None, steps: int | None = None) -> bool:
        """Trains the faithful hypernetwork, with a weight loss towards the table's tokens."""
        backbone = self.trained_backbone()
        encoder = FaceEncoder.from_pretrained(self.runs / "pro" / "model" / "encoder")  # both hypernetworks ship with the same encoder
        data, validation = self.identity_data(encoder, "train", self.faithful_people), self.identity_data(encoder, "validation")
        config = hypernetworks.faithful_config(steps or self.steps["faithful"], self.batches["faithful"])
        targets = find_targets(backbone.components, config.targets)
        table = read_table(self.runs / "table", LightweightLora(targets, config.lightweight).fingerprint())
        source, report = train_hypernetwork(
            backbone, encoder, data, config, run=Run(self.runs / "faithful", minutes=minutes), validation=validation, table=table
        )
        if report.finished:
            save_hypernetwork(self.runs / "faithful" / "model", source, self.describe(source, config, report, len(data.names)))
        return report.finished

    def describe(
        self, source: PredictedLora, config: TrainHypernetworkConfig, report: TrainingReport, people: int, known: float | None = None
    ) -> HyperNetworkInfo:
        """The config that is saved with a hypernetwork."""
        return HyperNetworkInfo(
            base=self.name,
            targets={path: list(shape) for path, shape in source.lightweight.targets.items()},
            lightweight=asdict(config.lightweight),
            hypernetwork=asdict(config.hypernetwork),
            mode=config.mode,
            familiar=known,
            trained={"steps": report.steps, "batch": config.batch, "people": people, "validation": report.validations[-1:]},
            **self.about(),
        )

    def export(self, minutes: float | None = None) -> bool:
        """Copies the finished weights to `assets` and `faithful`, in fp16."""
        base.save(self.trained_backbone().pipe, self.assets / "base")
        for name in ("recogniser", "classifier"):
            Judge.from_pretrained(self.runs / name / "model").save_pretrained(self.assets / name)
        for name, folder in (("pro", self.assets / "hypernetwork"), ("faithful", self.faithful)):
            if (self.runs / name / "model" / "config.json").is_file():
                source, info = load_hypernetwork(self.runs / name / "model")
                source.encoder.model.half()
                if name == "faithful":  # both hypernetworks share pro's encoder
                    info.encoder = Path(os.path.relpath(self.assets / "hypernetwork" / "encoder", folder)).as_posix()
                save_hypernetwork(folder, source, info)
        return True


def interrupt(number: int, frame: object) -> None:
    """Signal handler that makes SIGTERM act as Ctrl-C does: a training then writes a checkpoint before it ends."""
    raise KeyboardInterrupt


def main(world: Callable[[Path], Chain], stages: Sequence[str], others: Sequence[str], argv: Sequence[str], doc: str) -> int:
    """The command line of a world. "all" runs `stages` in order, `others` run by name only; a stage's method is `train_NAME` or `NAME`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *stages, *others])
    parser.add_argument("--runs", type=Path, help="the folder of checkpoints and pictures")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args(argv)
    chain = world(args.runs) if args.runs else world()  # type: ignore[call-arg]
    run = {name: getattr(chain, f"train_{name}", None) or getattr(chain, name) for name in (*stages, *others)}
    trainings = {name for name in run if hasattr(chain, f"train_{name}")}
    if args.steps and args.stage not in trainings:
        parser.error(f"--steps goes with one training: {', '.join(sorted(trainings))}")
    signal.signal(signal.SIGTERM, interrupt)
    extra = {"steps": args.steps} if args.steps else {}
    started = time.monotonic()
    for name in stages if args.stage == "all" else [args.stage]:
        left = args.minutes - (time.monotonic() - started) / 60 if args.minutes else None
        if not run[name](left, **extra):
            print(f"{name} isn't finished; the same command resumes it")
            return 1
    return 0
