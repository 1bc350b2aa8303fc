"""Config, the sizes of a model (model.json), and TrainSettings, how a run trains it.

The metadata of a field holds help, limits and choices: `check_fields` enforces the limits, the
command line derives flags from the metadata, and the class docstrings list the help.
"""

import dataclasses
import json
import math
import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

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
RULES = ("space", "stride", "all", "none")  # fixed rules for comparison
ROUTERS = ("learned", *RULES)
POSITIONS = ("alibi", "rope")
OPTIMIZERS = ("soap", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
MAX_PARAMETERS = 10**11  # a larger model is rejected as a mistake


def setting(
    help: str,
    default: Any = MISSING,
    minimum: int | None = 1,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field whose metadata holds `help`, `minimum` and `choices`."""
    metadata = {"help": help, "minimum": minimum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(instance: Any) -> None:
    """Raise PicoError, naming the field, unless every field has its type and is within its limits.

    NumPy scalars become Python numbers, which JSON can represent.
    """
    for field in dataclasses.fields(instance):
        value, name = getattr(instance, field.name), field.name
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(instance, name, value)  # the dataclass is frozen
        choices, minimum = field.metadata["choices"], field.metadata["minimum"]
        number = not isinstance(value, bool) and isinstance(
            value, int if field.type is int else int | float
        )
        if choices is not None:
            if value not in choices:
                raise PicoError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        elif field.type is bool:
            if not isinstance(value, bool):
                raise PicoError(f"{name} must be True or False, not {value!r}")
        elif not number or (minimum is not None and not value >= minimum):
            kind = "a whole number" if field.type is int else "a number"
            limit = "" if minimum is None else f" of at least {minimum}"
            raise PicoError(f"{name} must be {kind}{limit}, not {value!r}")
        elif not math.isfinite(value):
            raise PicoError(f"{name} must be finite, not {value!r}")


def field_help(cls: type) -> dict[str, str]:
    """The help of each field of Config or TrainSettings, by name."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}


def documented(cls: type) -> type:
    """Class decorator: append the help of each field to the docstring."""
    lines = [f"    - {name}: {text}" for name, text in field_help(cls).items()]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip() + "\n", *lines])
    return cls


@documented
@dataclass(frozen=True)
class Config:
    """The sizes of a Pico. Raises PicoError on an impossible size and says how to correct it.

    router and position are written to model.json only if they differ from the default, so that
    the file otherwise holds exactly the keys of the published implementation.
    """

    dim: int = setting("width of the residual stream")
    next_tokens: int = setting("number of next bytes that one position predicts, one head each")
    att_q_heads: int = setting("query heads of each attention")
    att_kv_heads: int = setting("key/value heads, each shared by equally many query heads")
    fb_num_blocks: int = setting(
        "full-bandwidth blocks before the latent ones, and again after them"
    )
    fb_att_window_size: int = setting("bytes before its own that a full-bandwidth block attends to")
    latent_capacity_factor: float = setting(
        "fraction of the bytes that training sends to the latent blocks", minimum=None
    )
    latent_num_blocks: int = setting("latent blocks, which run on the selected bytes only")
    latent_att_window_size: int = setting(
        "selected bytes before its own that a latent block attends to"
    )
    router: str = setting(
        "how bytes are selected: learned, by top-k in training; or a rule (space, stride, all, "
        "none) to compare with; all and none ignore latent_capacity_factor",
        "learned",
        choices=ROUTERS,
    )
    position: str = setting(
        "position encoding of attention: alibi (arXiv 2108.12409) or rope (arXiv 2104.09864)",
        "alibi",
        choices=POSITIONS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
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
        if self.parameters > MAX_PARAMETERS:
            raise PicoError(
                f"these sizes make {self.parameters:,} parameters, more than the limit of "
                f"{MAX_PARAMETERS:,}; take a smaller dim or fewer blocks"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head; att_q_heads * head_dim may be less than dim."""
        return self.dim // self.att_q_heads

    @property
    def block_weights(self) -> int:
        """Weights in the matrices of one block: attention's two and SwiGLU's two."""
        heads = 2 * (self.att_q_heads + self.att_kv_heads)  # queries, keys, values, output
        return self.dim * heads * self.head_dim + 3 * self.dim**2

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """Number of weights of each part; `heads` are the last norm and the unembedding."""
        block = self.block_weights + 2 * self.dim  # two norms
        outputs = self.next_tokens * 256
        return {
            "embedding": 256 * self.dim,
            "byte_blocks": 2 * self.fb_num_blocks * block,
            "router": self.dim,
            "latent_blocks": self.latent_num_blocks * block,
            "heads": self.dim + outputs * self.dim + outputs,
        }

    @property
    def parameters(self) -> int:
        """Number of weights of a model of these sizes."""
        return sum(self.parameters_by_part.values())

    def capacity(self, length: int) -> int:
        """The number of bytes that training selects in a sequence of `length` bytes.

        A rule may select more of them or fewer; the latent blocks process at most this many.
        """
        return int(length * self.capacity_share)

    @property
    def capacity_share(self) -> float:
        """The share of the bytes that training selects."""
        return {"all": 1.0, "none": 0.0}.get(self.router, self.latent_capacity_factor)

    @property
    def stride(self) -> int:
        """n, for the router `stride`, which selects every n-th byte: 1 / capacity, rounded up."""
        return math.ceil(1 / self.latent_capacity_factor - 1e-9)

    @classmethod
    def preset(cls, name: str, **changes: int | float | str) -> "Config":
        """A named configuration with some keys changed: `Config.preset("xs", dim=372)`."""
        if name not in PRESETS:
            raise PicoError(f"no preset named {name!r}; there is: {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes, f"preset {name!r}")

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
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "Config":
        """The inverse of `to_dict`. Raises PicoError with a message that starts with `where`."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for key in values:
            if key not in defaults:
                known = ", ".join(defaults)
                raise PicoError(f"{where}: unknown key {key!r}; the keys are {known}")
        for key, default in defaults.items():
            if key not in values and default is MISSING:
                raise PicoError(f"{where}: the key {key!r} is missing")
        try:
            return cls(**values)
        except PicoError as error:
            raise PicoError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, int | float | str]:
        """The content of model.json: see `Config`."""
        pairs = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {field.name: value for field, value in pairs if value != field.default}

    def to_json(self, path: str | os.PathLike) -> None:
        """Write a model.json, atomically."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())


@documented
@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises PicoError on an impossible value.

    The defaults are those of the published implementation, which trains on a GPU.
    """

    context_len: int = setting("bytes of one training window", 6144)
    batch_size: int = setting("windows of one micro-batch", 32)
    learning_rate: float = setting(
        "peak of the learning rate: linear warm-up, then cosine decay to a tenth of the peak",
        1e-3,
        minimum=0,
    )
    weight_decay: float = setting("decoupled weight decay, on matrices only", 0.1, minimum=0)
    epochs: int = setting("passes over the data; training ends earlier if max_steps is reached", 1)
    max_steps: int = setting("number of steps after which training ends", 3600)
    max_minutes: float = setting(
        "end training after this many minutes, without compiling and validations, and let the "
        "learning rate follow that time; 0: no limit",
        0.0,
        minimum=0,
    )
    warmup_steps: int = setting("steps until the learning rate reaches its peak", 150, minimum=0)
    grad_accumulation_steps: int = setting(
        "micro-batches whose gradients are averaged for one step", 1
    )
    validation_interval: int = setting(
        "steps between measurements on the held-out data; the last step always measures", 100
    )
    checkpoint_interval: int = setting(
        "steps between checkpoints; the last step always writes one", 500
    )
    validation_bytes: int = setting(
        "maximum number of held-out bytes per validation, the same bytes every time", 1 << 18
    )
    optimizer: str = setting("soap or adamw", "soap", choices=OPTIMIZERS)
    extra_heads_weight: float = setting(
        "weight of the mean loss of the extra heads, where that of head 0 is 1; 0: the published "
        "weights, each 1.618 times smaller than that of the head before it",
        0.0,
        minimum=0,
    )
    router_warmup_steps: int = setting(
        "number of first steps in which the router is trained to select the bytes with the highest "
        "entropy of head 0's prediction; later, as published, it is trained on its own decisions; "
        "only for the router learned",
        0,
        minimum=0,
    )
    precision: str = setting(
        "number format of matmul factors: fp32, or bf16 (sums, weights, softmax, norms, router, "
        "loss and optimizer stay float32); auto: bf16 if the device has bf16 tensor cores",
        "auto",
        choices=PRECISIONS,
    )
    checkpoint_activations: bool = setting(
        "recompute the activations inside each block in the backward pass instead of keeping them: "
        "less memory, more operations",
        False,
    )
    keep_checkpoints: int = setting(
        "number of newest checkpoints to keep; older ones are deleted; 0 keeps all",
        0,
        minimum=0,
    )
    keep_best: bool = setting(
        "write a checkpoint after each best validation so far, and never delete the best one", False
    )
    seed: int = setting("seed of the order of the windows, and of fresh weights", 0, minimum=0)

    def __post_init__(self) -> None:
        check_fields(self)
