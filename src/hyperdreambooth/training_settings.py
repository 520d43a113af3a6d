"""The settings of the trainings: a dataclass for each stage, and one for the loop. Comments and strings of fields are `--help`."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from .errors import InputError, at_least, in_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor


TRACKERS = ("tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")
LARGEST_LAYER = 1 << 17  # Most inputs or outputs of a layer; the largest known bases have a tenth of it.

NOT_DECISIVE = ("log_every", "validate_every", "checkpoint_minutes", "tracker", "give_up")  # Settings that don't change trained weights.
RESUMABLE = (*NOT_DECISIVE, "steps", "gradient_accumulation")
"""Settings that may differ when a training resumes. Batches per step are processes times `gradient_accumulation`, and both may change."""


def identifying(settings: TrainingConfig | NoiseLevels | StageConfig) -> dict[str, Any]:
    """The settings that tell one training from another, nested ones included: all but RESUMABLE."""
    return asdict(settings, dict_factory=lambda items: {name: value for name, value in items if name not in RESUMABLE})


@dataclass
class TrainingConfig:
    """How a training runs; the same for every stage."""

    steps: int = 1000  # Optimizer steps in all.
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: orthogonalized updates of matrices, which need fewer steps.
    learning_rate: float = 1e-3  # Peak learning rate.
    weight_decay: float = 0.0  # Decoupled weight decay.
    warmup: int = 0  # Steps over which the learning rate rises from zero.
    cooldown: float = 0.2
    """Last fraction of the steps, over which the learning rate falls to zero. It is constant before: to end a long training
    early with its cooldown, lower `steps` and resume."""
    max_grad_norm: float = 1.0  # Gradients are clipped to this norm; 0 turns it off.
    gradient_accumulation: int = 1  # Batches per optimizer step.
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # Autocast of the forward pass.
    average: float = 0.0  # Decay of an exponential moving average of the weights; 0 turns it off.
    seed: int = 0  # Batches, noise and timesteps depend on this number and the step alone.
    log_every: int = 50  # Steps between two log lines.
    validate_every: int = 0  # Steps between two validations; 0 validates at the end only.
    checkpoint_minutes: float = 3.0  # Minutes between two checkpoints.
    tracker: str | None = None
    """Experiment tracker for losses, learning rates, validations and preview pictures: tensorboard (files in the output's folder) or wandb,
    which are extras, or another one of accelerate's that is installed (aim, clearml, swanlab; without pictures comet_ml, dvclive, mlflow,
    trackio)."""

    def __post_init__(self) -> None:
        at_least(self, steps=0, gradient_accumulation=1, log_every=1)
        if not 0 <= self.cooldown <= 1 or not 0 <= self.average < 1:
            raise InputError(f"cooldown must lie in 0..1 and average in 0..1 (exclusive), not {self.cooldown} and {self.average}.")
        if isinstance(self.tracker, str):
            if self.tracker not in TRACKERS:
                raise InputError(f"{self.tracker} is no tracker; there are {', '.join(TRACKERS)}.")
            if importlib.util.find_spec(self.tracker) is None:  # accelerate would ignore it silently
                package = f'"hyperdreambooth[{self.tracker}]"' if self.tracker in TRACKERS[:2] else self.tracker
                raise InputError(f"the tracker {self.tracker} isn't installed: pip install {package}, or leave --training.tracker out.")


@dataclass
class NoiseLevels:
    """Distribution of noise levels u = sigma / (alpha + sigma): logit-normal, and uniform for a fraction of the samples.

    With little noise the noisy picture itself shows the identity, and the denoiser doesn't need the tokens; with much
    noise it does. Hence the mean well above zero wherever an identity is learned.
    """

    mean: float = 1.5  # Mean of logit(u).
    std: float = 1.0  # Standard deviation of logit(u).
    uniform: float = 0.0  # Fraction of the samples whose level is uniform in 0..1 instead.

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels, shape (count,), on the CPU."""
        import torch  # here, so that a command can explain its settings without loading it

        levels = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator))
        flat = torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < self.uniform, flat, levels)


@dataclass(frozen=True)
class LightweightConfig:
    """Tokens of Lightweight DreamBooth (paper, section 4.1), by default in the paper's size, and their aux matrices."""

    rank: int = 1  # Rank of the predicted update.
    down_dim: int = 100  # The paper's a: numbers per layer and rank for `down`; at most the layer's inputs.
    up_dim: int = 50  # The paper's b: numbers per layer and rank for `up`; at most the layer's outputs.
    learnable: bool = False  # Pro mode: the aux matrices are trained, shared by all identities.
    seed: int = 0  # The frozen aux matrices are generated from this number and the layer's path.

    def __post_init__(self) -> None:
        for name, high in (("rank", 1024), ("down_dim", LARGEST_LAYER), ("up_dim", LARGEST_LAYER)):
            in_range(getattr(self, name), 1, high, name)
        in_range(self.seed, 0, 2**63 - 2, "seed")

    @property
    def width(self) -> int:
        """Numbers per layer in the tokens of one person."""
        return (self.down_dim + self.up_dim) * self.rank


@dataclass(frozen=True)
class HyperNetworkConfig:
    """Size of the hypernetwork's transformer decoder."""

    dim: int = 256  # Width of the decoder.
    blocks: int = 3  # Decoder blocks, shared by all passes.
    heads: int = 4  # Attention heads.
    passes: int = 2  # Refinements of the tokens (the paper's iterative prediction, k).

    def __post_init__(self) -> None:
        for name, high in (("dim", 1 << 16), ("blocks", 256), ("heads", 1024), ("passes", 64)):
            in_range(getattr(self, name), 1, high, name)
        if self.dim % self.heads:
            raise InputError(f"dim must be a multiple of heads, not {self.dim} and {self.heads}.")


@dataclass
class StageConfig:
    """The settings that all trainings of tokens share."""

    prompt: str = "a [V] face"  # The prompt that names a person.
    targets: tuple[str, ...] = ()
    """Glob patterns of layers; default: the base's own. Add "text_encoder.*" patterns to train the text encoder too."""
    lightweight: LightweightConfig = field(default_factory=LightweightConfig)  # Token size.
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    """Distribution of noise levels. At low ones the picture itself shows the identity, and tokens learn little: keep the mean high."""


@dataclass
class TrainLightConfig(StageConfig):
    """Lightweight DreamBooth: the tokens of one subject over frozen random aux matrices."""

    levels: NoiseLevels = field(default_factory=lambda: NoiseLevels(mean=1.0))
    """Distribution of noise levels."""
    copies: int = 4  # Noised photos in every step.
    prior_pictures: int = 0  # Prior preservation: how many class pictures the base generates first. 0: none.
    prior_prompt: str = "a face"  # Prompt of the class.
    prior_weight: float = 1.0  # Weight of the prior loss.
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=300, learning_rate=5e-3, log_every=20))  # Training loop.

    def __post_init__(self) -> None:
        at_least(self, copies=1, prior_pictures=0)


@dataclass
class PreoptimizeConfig(StageConfig):
    """Pre-optimization of many identities."""

    chunk: int = 16  # Identities trained side by side.
    copies: int = 4  # Noised pictures of each identity in every step.
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=300, learning_rate=5e-3, max_grad_norm=0.0))
    """Training loop of one chunk."""

    def __post_init__(self) -> None:
        at_least(self, chunk=1, copies=1)
        if self.lightweight.learnable:
            raise InputError("pre-optimization needs frozen aux matrices: rows trained one after another can't share learnable ones.")


@dataclass
class TrainHypernetworkConfig(StageConfig):
    """Training of a hypernetwork."""

    mode: Literal["pro", "faithful"] = "pro"  # pro: learnable aux, no table needed. faithful: frozen aux and a weight loss against a table.
    hypernetwork: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)  # Decoder size.
    batch: int = 16  # Pictures in every step.
    penalty: float = 1e-5  # pro: weight of the update's squared Frobenius norm, a mean over layers.
    shared: float = 1e-3
    """pro: weight of the squared Frobenius norm, a mean over layers, of the mean update of all people, as estimated from a batch.
    That part distinguishes nobody, takes up rank, and shifts the meaning of prompts that weren't trained on. 0: no such penalty."""
    weight_loss: float = 1e-2
    """faithful: weight of the squared Frobenius distance between predicted and pre-optimized updates, a mean over layers."""
    context_guidance: float = 0.0
    """Distill context guidance of this scale from the hypernetwork of --start, so that plain guidance, in any tool, draws as context
    guidance does (hats keep their color). A step takes about twice as long. 0: no distillation."""
    context_until: float = 0.3
    """Distillation: the fraction of the noise levels, 0 to 1, from pure noise down, at which context guidance is learned; below, the
    prediction of the hypernetwork of --start is kept."""
    guidance: float = 2.0  # Distillation: scale of plain guidance at generation; 7.5 is usual for Stable Diffusion.
    written: tuple[str, ...] = ("a [V] face wearing a hat", "a smiling [V] face", "a painting of a [V] face", "a [V] face on a beach")
    """Distillation: prompts as users write them; every second picture is trained with one, whatever it shows. With a prompt that names
    nobody ("a face"), the base's own prediction is learned."""
    dropout: float = 0.1
    """Fraction of the pictures, 0 to 1, that are trained with an empty prompt: plain guidance applies the LoRA to its unconditional
    branch too, and the prompt of that branch is empty."""
    prior: float = 0.0
    """Fraction of the pictures, 0 to 1, whose prompt loses its [V] ("a face" for "a [V] face"), and for which the base's own prediction
    is learned: prior preservation, so that other people don't change. It needs targets that see the prompt, such as "*attn2.to_k"."""
    aux_scale: float = 2.0  # pro: learning rate of the aux matrices, relative to the decoder's.
    train_encoder: bool = False
    """Train the encoder too, on pictures instead of features that are computed once: slower, but it can learn features that
    a pretrained encoder lacks."""
    encoder_scale: float = 0.3  # Learning rate of a trained encoder, relative to the decoder's.
    give_up: float = 0.0
    """From this fraction of the steps on, 0 to 1, stop at a validation whose identity gain isn't above 0 by its 95 % interval. 0: never."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=20_000, warmup=100, average=0.998, validate_every=500))
    """Training loop."""

    def __post_init__(self) -> None:
        if self.mode not in ("pro", "faithful"):
            raise InputError(f"mode must be pro or faithful, not {self.mode}.")
        if self.mode == "pro" and self.shared and self.batch < 2:
            raise InputError("the penalty `shared` needs a batch of 2 or more: raise batch, or set shared to 0.")
        if self.context_guidance and (not self.written or self.guidance < 1):
            raise InputError("context_guidance needs prompts in `written`, and a guidance of 1 or more.")
        for name in ("dropout", "prior", "give_up"):
            in_range(getattr(self, name), 0, 1, name)
        self.lightweight = replace(self.lightweight, learnable=self.mode == "pro")
