"""DreamBooth on people's photos: `train-light`, `preoptimize` and `personalize`. They differ in what is trained, and in who shares a batch.

Pre-optimization (paper, section 4.2): a chunk of identities shares a batch, each sample with its own tokens; it is trained to the end and
its rows are written before the next chunk begins. All identities get the same noise and time steps and start from the same tokens, so that
their rows can be compared. The rounding of a batch's sums depends on its size and on its other samples. Chunks therefore follow from the
names of all identities alone, never from which rows exist already: shards, machines and interruptions change no bit of a row.
"""

import fnmatch
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import replay
from ..backbones import Backbone
from ..checkpoint import path_at, stamp_of
from ..data import FolderOfPeople, IdentityData, PromptCache, conditioning_in
from ..errors import InputError
from ..lora import Hooks, LoraSet, Shape, compress, find_targets
from ..objectives import denoising_loss
from ..progress import Progress, say
from ..sampling import Prompts, is_text, sample
from ..settings import GenerateConfig, PersonalizeConfig, resolve
from ..tables import Table, save_row
from ..trainable_lora import IdentityTable, LightweightLora, RelaxedLora
from ..training import Draw, Run, TrainingReport, fit
from ..training_settings import NoiseLevels, PreoptimizeConfig, TrainingConfig, TrainLightConfig, identifying


@dataclass
class Subject:
    """The photos of P people, as latents (P, photos, C, h, w), and the prompts that describe them: one for all, or (P, photos) of them.

    prior: latents (n, C, h, w) of pictures of the class, for prior preservation: the loss on them keeps the base's other faces as they are.
    """

    latents: Tensor
    prompt: str | list[list[str]]
    prior: Tensor | None = None
    prior_prompt: str = "a face"
    prior_weight: float = 1.0

    def texts(self, photo: int) -> list[str]:
        """The prompts of each person's photo of this number: P of them."""
        return [self.prompt] * len(self.latents) if isinstance(self.prompt, str) else [mine[photo] for mine in self.prompt]


@dataclass(frozen=True, eq=False)
class PhotoLosses:
    """The losses of fine-tuning on photos: `denoising_loss` of the photos, plus that of the class's pictures times `prior_weight`."""

    backbone: Backbone
    prior_weight: float
    hooks: Hooks

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the computation, see `fit`. The hooks aren't part of it: they only bring an update into the base."""
        # text encoders that aren't trained aren't part of it either: they may move between devices
        used = self.backbone.components if trains_text(self.hooks.layers, self.backbone) else self.backbone.denoiser
        return replay.token(self.backbone), replay.fingerprint(used), self.prior_weight

    def __call__(self, source: nn.Module, batch: dict[str, Any]) -> Tensor:
        self.hooks.set(source(batch["people"]))

        def denoising(of: str) -> Tensor:
            latents, noise, timesteps = (batch[f"{of}.{name}"] for name in ("latents", "noise", "timesteps"))
            conditioning = conditioning_in(batch, f"{of}.prompt.", self.backbone)
            return denoising_loss(self.backbone, latents, conditioning, noise, timesteps)

        losses = denoising("photo")
        return losses + self.prior_weight * denoising("prior") if "prior.latents" in batch else losses


def draw_photos(backbone: Backbone, subject: Subject, levels: NoiseLevels, copies: int, *, trains_text: bool, seed: int) -> Draw:
    """Batches for `PhotoLosses`: every step has `copies` noised copies of each person's photos; people don't affect one another.

    A person's photos take turns. The noise depends on the seed, the step and the copy, not on the number of people, so that a
    person gets the same noise alone as in a batch.

    Args:
        trains_text: whether a text encoder carries the update, so that prompts must be encoded in every step.
    """
    people, count = subject.latents.shape[:2]
    prompts = PromptCache(backbone, trains_text=trains_text)
    numbers = torch.arange(people, device=subject.latents.device)

    def part(of: str, latents: Tensor, texts: list[str], levels: Tensor, generator: torch.Generator) -> dict[str, Any]:
        return {
            f"{of}.latents": latents,
            f"{of}.noise": torch.randn(copies, *latents.shape[1:], generator=generator).repeat_interleave(people, 0).to(latents),
            f"{of}.timesteps": backbone.steps_for(levels.repeat_interleave(people)),
            **prompts.inputs(texts, f"{of}.prompt."),
        }

    def draw(index: int, generator: torch.Generator) -> dict[str, Any]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + index // count)).tolist()
        chosen = [order[(index * copies + copy) % count] for copy in range(copies)]
        latents = torch.cat([subject.latents[:, photo] for photo in chosen])  # copy-major: a batch of LoRAs tiles over it
        texts = [text for photo in chosen for text in subject.texts(photo)]
        batch = {"people": numbers, **part("photo", latents, texts, levels.draw(copies, generator), generator)}
        if subject.prior is not None:
            prior = subject.prior[torch.randint(len(subject.prior), (copies,), generator=generator)].repeat_interleave(people, 0)
            drawn = NoiseLevels(mean=0.0, uniform=1.0).draw(copies, generator)
            batch |= part("prior", prior, [subject.prior_prompt] * len(prior), drawn, generator)
        return batch

    return draw


def train_on_photos(
    backbone: Backbone,
    subject: Subject,
    source: nn.Module,
    carried: Mapping[str, Any],
    levels: NoiseLevels,
    copies: int,
    training: TrainingConfig,
    run: Run,
) -> TrainingReport:
    """Trains `source`, a module that maps rows (P,) to updates of the layers `carried`, on the photos of P people."""
    draw = draw_photos(backbone, subject, levels, copies, trains_text=trains_text(carried, backbone), seed=training.seed)
    with Hooks(backbone.components, carried) as hooks:

        def after_step(done: int) -> bool:
            hooks.set({})  # the callback may generate images, with an update of its own
            return bool(run.on_step and run.on_step(done))

        stamp = run.stamp
        if run.directory and not stamp:
            # of the latents only rounded means of each channel: their last bits depend on the device and the number of threads
            photos = (8 * subject.latents.float().mean((-2, -1))).round().tolist()
            what = [backbone.name, subject.prompt, subject.prior_prompt, subject.prior_weight, dict(carried), photos]
            stamp = stamp_of(*what, copies, identifying(levels), identifying(training))
        hooked = replace(run, device=subject.latents.device, on_step=after_step, stamp=stamp)
        return fit(PhotoLosses(backbone, subject.prior_weight, hooks), source, draw, training, hooked)


def within_memory(backbone: Backbone, model: nn.Module, train: Callable[[], TrainingReport]) -> TrainingReport:
    """Trains `model`; if memory runs out, again or from its checkpoint with gradient checkpointing, to the same weights.

    Raises torch.OutOfMemoryError if gradient checkpointing is on already or unsupported, and under a launcher, where the other processes
    would wait for one that starts over.
    """
    before = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    denoiser = backbone.denoiser
    try:
        return train()
    except torch.OutOfMemoryError:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if not alone or denoiser.is_gradient_checkpointing or not denoiser._supports_gradient_checkpointing:
            raise
    say("memory is short: activations are computed again in the backward pass, as with --gradient-checkpointing, which is slower.")
    denoiser.enable_gradient_checkpointing()
    replay.forget()  # frees memory too
    model.load_state_dict(before)
    return train()


def train_light(
    backbone: Backbone, subject: Subject, config: TrainLightConfig, *, directory: str | Path | None = None, quiet: bool = False
) -> tuple[IdentityTable, TrainingReport]:
    """Lightweight DreamBooth on one subject's photos (paper, section 4.1): a table with one row of tokens. Resumes from `directory`."""
    targets = find_targets(backbone.components, config.targets or backbone.default_targets)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, config.prior_prompt, config.prior_pictures, config.training.seed)
        subject.prior_prompt, subject.prior_weight = config.prior_prompt, config.prior_weight
    source = IdentityTable(1, LightweightLora(targets, config.lightweight)).to(subject.latents.device)
    run = Run(directory=directory, name="train-light", quiet=quiet)
    train = partial(train_on_photos, backbone, subject, source, targets, config.levels, config.copies, config.training, run)
    return source, within_memory(backbone, source, train)


def parse_shard(text: str) -> tuple[int, int]:
    """ "i/n" -> (i, n): the i-th of n shards, counted from 0."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"a shard is i/n with i from 0 to n-1, such as 0/4, not {text!r}.")
    return int(index), int(count)


def chunks_of(names: Sequence[str], size: int, shard: tuple[int, int] = (0, 1)) -> list[list[str]]:
    """All identities in their order, cut into chunks of `size`; for the shard (i, n), every n-th chunk from the i-th on."""
    return [list(names[start : start + size]) for start in range(0, len(names), size)][shard[0] :: shard[1]]


def preoptimize(
    backbone: Backbone,
    data: IdentityData | FolderOfPeople,
    config: PreoptimizeConfig,
    output: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    minutes: float | None = None,
) -> Table:
    """Makes the rows of a shard's identities: tokens (layers, width), one file each in `output`/rows. Rows that exist are kept.

    It may be killed at any moment: a row is whole or absent, and an unfinished chunk resumes from its checkpoint. Any number of
    processes may work on one table, even on the same shard. After `minutes`, no further chunk is begun.
    """
    chunks = chunks_of(data.names, config.chunk, shard)
    make, begun = Rows(backbone, data, config, output), time.monotonic()
    with Progress("chunks", len(chunks)) as progress:
        for done, chunk in enumerate(chunks, 1):
            if minutes is not None and time.monotonic() - begun > 60 * minutes:
                break
            make(chunk)
            progress.update(done)
    return make.table


class Rows:
    """A function that makes the rows of a chunk of identities, as far as they don't exist yet."""

    def __init__(self, backbone: Backbone, data: IdentityData | FolderOfPeople, config: PreoptimizeConfig, output: str | Path):
        self.backbone, self.data, self.config, self.output = backbone, data, config, path_at(output)
        targets = find_targets(backbone.components, config.targets or backbone.default_targets)
        self.lightweight = LightweightLora(targets, config.lightweight)
        self.table = Table(output, self.lightweight.fingerprint())

    def __call__(self, chunk: Sequence[str]) -> None:
        if all(map(self.table.has, chunk)):
            return
        latents = self.data.latents_of(chunk)
        if all(map(self.table.has, latents)):
            return
        # any process that trains the same people finds the chunk's checkpoint by its name; for a table at a remote address there is none
        name, here = hashlib.sha256(os.fsencode("/".join(latents))).hexdigest()[:16], isinstance(self.output, Path)
        state = self.output / "chunk" / name if here else None
        try:
            tokens = self._train(list(latents.values()), state)
        except InputError:
            if not all(map(self.table.has, latents)):
                raise
            return  # another process finished the chunk meanwhile, and removed the checkpoint
        for name, row in zip(latents, tokens, strict=True):
            if not self.table.has(name):  # else it was written before an interruption, or by another process
                save_row(self.output, name, row, self.table.fingerprint)
        # the folder stays until tables are merged: another process may be about to write its own checkpoint there
        if state:
            (state / "state.safetensors").unlink(missing_ok=True)

    def _train(self, photos: list[Tensor], state: Path | None) -> Tensor:
        most = max(map(len, photos))  # photos of people with fewer of them are repeated
        latents = torch.stack([mine[torch.arange(most) % len(mine)] for mine in photos])
        subject = Subject(latents.to(self.backbone.device).float(), self.config.prompt)
        source = IdentityTable(len(photos), self.lightweight).to(self.backbone.device)
        what, config = (subject, source, self.lightweight.targets), self.config
        # not by latents: other machines may go on with the chunk, and round them differently
        stamp = stamp_of(self.table.fingerprint, identifying(config))
        run = Run(state, name="chunk", quiet=True, stamp=stamp)
        train = partial(train_on_photos, self.backbone, *what, config.levels, config.copies, config.training, run)
        within_memory(self.backbone, source, train)
        return source.tokens.detach().cpu()


def personalize(
    backbone: Backbone,
    subject: Subject,
    predicted: LoraSet | None,
    config: PersonalizeConfig,
    *,
    directory: str | Path | None = None,
    on_step: Callable[[int, LoraSet], bool] | None = None,
    quiet: bool = False,
) -> tuple[LoraSet, TrainingReport]:
    """Rank-relaxed fine-tuning (paper, section 4.3) of P people at once: (P updates, report).

    Args:
        predicted: the hypernetwork's updates of the P people, batched; None trains a LoRA from scratch.
        directory: the checkpoint's folder, from which an interrupted fine-tuning resumes; None keeps no checkpoint.
        on_step: called after every step with the number of steps done and the updates so far; if it returns True, fine-tuning ends.

    Raises InputError for 0 steps without a prediction, and for target patterns that match nothing.
    """
    targets = trained_targets(backbone, predicted, config.targets)
    if config.steps == 0:
        if predicted is None:
            raise InputError("0 steps without a hypernetwork leave nothing: give --steps, or a hypernetwork.")
        return predicted.detach(), TrainingReport(finished=True)
    if config.prior_pictures and subject.prior is None:
        subject.prior = prior_latents(backbone, subject.prior_prompt, config.prior_pictures, config.seed)
        subject.prior_weight = config.prior_weight
    source = RelaxedLora(predicted, config.rank, targets=targets, order=config.order, seed=config.seed, people=len(subject.latents))
    source.to(subject.latents.device)
    carried = {**targets, **(predicted or {})}
    levels = NoiseLevels(mean=config.noise_mean, std=config.noise_std)
    # no gradient clipping: its norm would be that of all people of a batch together
    training = TrainingConfig(steps=config.steps, learning_rate=config.learning_rate, seed=config.seed, cooldown=0.2, max_grad_norm=0.0)
    training.log_every = max(1, config.steps // 10)
    # the loss is a mean over people, which divides each one's gradient by their number, and Adam's epsilon is divided too:
    # then a person gets the same update in a batch as alone
    groups = [{"params": list(source.parameters()), "eps": 1e-8 / len(subject.latents)}]
    step = (lambda done: on_step(done, source().detach())) if on_step else None
    run = Run(directory, groups=groups, on_step=step, name="fine-tuning", quiet=quiet)
    train = partial(train_on_photos, backbone, subject, source, carried, levels, config.copies, training, run)
    # where memory is short, fewer people at once are faster than gradient checkpointing
    report = train() if len(subject.latents) > 1 else within_memory(backbone, source, train)
    return source().detach(), report


def trained_targets(backbone: Backbone, predicted: LoraSet | None, patterns: Sequence[str]) -> dict[str, Shape]:
    """The layers to fine-tune: of those that are predicted, or of the base's. Raises InputError for a pattern that matches none of them."""
    if predicted is None:
        return find_targets(backbone.components, patterns or backbone.default_targets)
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        hits = fnmatch.filter(predicted, pattern)
        if not hits:
            raise InputError(f"target pattern {pattern!r} matches none of the {len(predicted)} layers that the hypernetwork predicts.")
        chosen.update(hits)
    return {path: shape for path, shape in predicted.shapes().items() if path in chosen}


def finish(loras: LoraSet) -> LoraSet:
    """One person's update with every layer compressed, see `lora.compress`, for export. Raises InputError if it isn't finite."""
    finished = LoraSet()
    for path, lora in loras.items():
        if lora.is_finite():
            finished[path] = compress(lora)
        if path not in finished or not finished[path].is_finite():
            raise InputError(f"the update of {path} isn't finite: the hypernetwork or the tokens that it comes from are damaged.")
    return finished


def trains_text(paths: Iterable[str], backbone: Backbone) -> bool:
    """Whether any of the layers is a text encoder's: then prompts can't be cached."""
    return any(is_text(path, backbone) for path in paths)


def prior_latents(backbone: Backbone, prompt: str, count: int, seed: int) -> Tensor:
    """Pictures of the class that the base generates for prior preservation: latents (count, C, h, w)."""
    noise = torch.randn(count, *backbone.latent_shape(), generator=torch.Generator().manual_seed(seed)).to(backbone.device)
    prompts = PromptCache(backbone)
    own = {key: value for key, value in backbone.generation.items() if key in ("steps", "guidance")}
    settings = resolve(GenerateConfig, ("family", own), ("prior preservation", {"steps": 20, "guidance": 3.0}))
    wanted, without = [prompt], [settings.negative]
    both = [Prompts(prompts(wanted * len(part), without), prompts(without * len(part), wanted)) for part in noise.split(8)]
    return torch.cat([sample(backbone, mine, part, settings) for mine, part in zip(both, noise.split(8), strict=True)])
