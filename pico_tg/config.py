"""The shape of a model: one frozen dataclass, written as model.json beside the weights."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import PicoError, atomic_write

PRESETS: dict[str, dict[str, int | float]] = {
    "xs": {
        "dim": 128,
        "next_tokens": 8,
        "att_q_heads": 9,
        "att_kv_heads": 3,
        "fb_num_blocks": 2,
        "fb_att_window_size": 16,
        "latent_capacity_factor": 0.25,
        "latent_num_blocks": 12,
        "latent_att_window_size": 512,
    },
}


MOST_PARAMETERS = 10**11

MODEL_CHOICES = {
    "router": ("learned", "space", "stride", "all", "none"),
    "position": ("alibi", "rope"),
}


@dataclass(frozen=True)
class Config:
    """The shape of a Pico. Raises PicoError on an impossible size, with the way out.

    - dim: width of the residual stream
    - next_tokens: how many next bytes are predicted at once, one head each
    - att_q_heads, att_kv_heads: query heads, and the key/value heads that they share
    - fb_num_blocks: full-bandwidth blocks, before *and* after the latent ones, on every byte
    - fb_att_window_size: they see this many bytes back, and their own
    - latent_capacity_factor: the fraction of the bytes that training sends to the latent blocks
    - latent_num_blocks: latent blocks, on the selected bytes only
    - latent_att_window_size: they see this many *selected* bytes back, and their own
    - router: which bytes are selected, see `pico_tg.routing`: learned, or by a rule: space, stride,
      all or none; the last two have no use for latent_capacity_factor
    - position: alibi (arXiv 2108.12409) or rope (arXiv 2104.09864), in every block

    router and position are written to a file only where they are not the default, so that it holds
    the published keys otherwise.
    """

    dim: int
    next_tokens: int
    att_q_heads: int
    att_kv_heads: int
    fb_num_blocks: int
    fb_att_window_size: int
    latent_capacity_factor: float
    latent_num_blocks: int
    latent_att_window_size: int
    router: str = "learned"
    position: str = "alibi"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in MODEL_CHOICES:
                if value not in MODEL_CHOICES[field.name]:
                    allowed = ", ".join(MODEL_CHOICES[field.name])
                    raise PicoError(f"{field.name} must be one of {allowed}, not {value!r}")
            elif field.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise PicoError(f"{field.name} must be a number, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PicoError(f"{field.name} must be a whole number of at least 1, not {value!r}")
        if not 0 < self.latent_capacity_factor <= 1:
            raise PicoError(
                "latent_capacity_factor must be above 0 and at most 1, "
                f"not {self.latent_capacity_factor}"
            )
        if self.dim < self.att_q_heads:
            raise PicoError(
                f"dim ({self.dim}) is smaller than att_q_heads ({self.att_q_heads}): "
                "a head would have no width; take a larger dim or fewer heads"
            )
        if self.att_q_heads % self.att_kv_heads:
            raise PicoError(
                f"att_q_heads ({self.att_q_heads}) is not a multiple of att_kv_heads "
                f"({self.att_kv_heads}): every key/value head must serve equally many query heads"
            )

        if self.parameters > MOST_PARAMETERS:
            raise PicoError(
                f"these sizes make {self.parameters:,} parameters, more than the "
                f"{MOST_PARAMETERS:,} that are taken for a mistake; take a smaller dim or fewer "
                "blocks"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head; q_heads * head_dim may be less than dim."""
        return self.dim // self.att_q_heads

    @property
    def parameters(self) -> int:
        """How many weights a model of these sizes has."""
        heads = self.att_q_heads + 2 * self.att_kv_heads
        attention = self.dim * (heads + self.att_q_heads) * self.head_dim
        block = attention + 3 * self.dim**2 + 2 * self.dim  # SwiGLU, two norms
        outputs = self.next_tokens * 256
        embeddings = 256 * self.dim + outputs * self.dim + outputs
        blocks = 2 * self.fb_num_blocks + self.latent_num_blocks
        return embeddings + blocks * block + 2 * self.dim  # the router, the last norm

    def capacity(self, length: int) -> int:
        """How many bytes of a sequence of `length` bytes training selects, at the most."""
        return int(length * self.capacity_share)

    @property
    def capacity_share(self) -> float:
        """The share of the bytes that training selects, at the most."""
        return {"all": 1.0, "none": 0.0}.get(self.router, self.latent_capacity_factor)

    @property
    def stride(self) -> int:
        """The router `stride` selects every so manyth byte: 1 / capacity, rounded up."""
        return math.ceil(1 / self.latent_capacity_factor - 1e-9)

    @classmethod
    def preset(cls, name: str, **changes: int | float | str) -> "Config":
        """A named configuration with some keys changed: `Config.preset("xs", dim=372)`."""
        if name not in PRESETS:
            raise PicoError(f"no preset named {name!r}; there is: {', '.join(PRESETS)}")
        return cls._from_dict(PRESETS[name] | changes, f"preset {name!r}")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> "Config":
        """Read a model.json. Raises PicoError on a missing file, broken JSON or a wrong key."""
        try:
            values = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise PicoError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise PicoError(f"{path} is not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise PicoError(f"{path} must hold a JSON object of the model's sizes")
        return cls._from_dict(values, str(path))

    @classmethod
    def _from_dict(cls, values: dict, where: str) -> "Config":
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise PicoError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
        for key in known:
            if key not in values and key not in MODEL_CHOICES:
                raise PicoError(f"{where}: the key {key!r} is missing")
        try:
            return cls(**values)
        except PicoError as error:
            raise PicoError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, int | float | str]:
        """What a file holds: all sizes, and the choices that are not the default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in MODEL_CHOICES or v != defaults[k]}

    def to_json(self, path: str | os.PathLike) -> None:
        """Write a model.json, atomically."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())


TRAIN_CHOICES = {"optimizer": ("soap", "adamw"), "precision": ("auto", "fp32", "bf16")}


MAY_BE_ZERO = ("learning_rate", "weight_decay", "warmup_steps", "seed", "keep_checkpoints")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises PicoError on an impossible value.

    - context_len: bytes of one training window; batch_size: windows of one micro-batch
    - learning_rate: its peak, after warmup_steps; weight_decay: on matrices only
    - epochs, max_steps: training ends with whichever comes first
    - grad_accumulation_steps: micro-batches whose gradients are averaged for one step
    - validation_interval, checkpoint_interval: in steps; both also happen at the end
    - validation_bytes: measure on at most this many held-out bytes, the same ones every time
    - optimizer: soap or adamw
    - precision: fp32; bf16 rounds the factors of matrix products to bfloat16, while weights, sums,
      softmax, norms, router, loss and optimizer stay float32; auto is bf16 where the device has
      matrix units for it, else fp32
    - checkpoint_activations: keep only what passes between blocks, and compute what is inside them
      again for the gradient: less memory, more operations
    - keep_checkpoints: delete older ones, so that so many remain; 0 keeps all
    - seed: order of the windows (and fresh weights, on the command line)
    """

    context_len: int = 6144
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 1
    max_steps: int = 3600
    warmup_steps: int = 150
    grad_accumulation_steps: int = 1
    validation_interval: int = 100
    checkpoint_interval: int = 500
    validation_bytes: int = 1 << 18
    optimizer: str = "soap"
    precision: str = "auto"
    checkpoint_activations: bool = False
    keep_checkpoints: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in TRAIN_CHOICES:
                if value not in TRAIN_CHOICES[field.name]:
                    allowed = " or ".join(TRAIN_CHOICES[field.name])
                    raise PicoError(f"{field.name} must be {allowed}, not {value!r}")
                continue
            if field.type is bool:
                if not isinstance(value, bool):
                    raise PicoError(f"{field.name} must be True or False, not {value!r}")
                continue
            if isinstance(value, np.generic):  # training.json takes Python's own numbers
                object.__setattr__(self, field.name, value := value.item())
            whole = field.type is int
            least = 0 if field.name in MAY_BE_ZERO else 1
            kinds = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                kind = "a whole number" if whole else "a number"
                raise PicoError(f"{field.name} must be {kind} of at least {least}, not {value!r}")
            if not math.isfinite(value):
                raise PicoError(f"{field.name} must be finite, not {value!r}")
