"""Config, the sizes of a model (model.json), and TrainSettings, how a run trains it.

A field of these dataclasses is the one place of a setting: its metadata holds help, limits and
choices. `check_fields` enforces the limits, the command line derives flags from the fields, and the
class docstrings list the help. SampleSettings (generation.py), EvalSettings (evaluation.py) and
DataSpec (data/spec.py) are made of the same fields.
"""

import dataclasses
import functools
import json
import math
import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .files import PicoError, atomic_write, did_you_mean, differences
from .routing import RULES

ROUTERS = ("learned", *RULES)
POSITIONS = ("alibi", "rope")
OPTIMIZERS = ("soap", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
MAX_PARAMETERS = 10**11  # a larger model is rejected as a mistake

PRESETS: dict[str, dict[str, int | float | str]] = {  # sizes that differ from Config's defaults
    "minutes": {  # the best of five shapes after five minutes on one core (examples/studies)
        "dim": 144, "next_tokens": 1, "att_q_heads": 4, "att_kv_heads": 1, "fb_num_blocks": 1,
        "latent_num_blocks": 6,
        "latent_att_window_size": 128,  # what training routes of 512 bytes
        "position": "rope",
    },
    "published": {"dim": 372, "latent_num_blocks": 8, "fb_att_window_size": 32},
    "xs": {},
}  # fmt: skip
PURPOSES = {
    "minutes": "for minutes to an hour on a CPU",
    "published": "the original README's, for an hour on a GPU",
    "xs": "the default sizes of the original code",
}


def setting(
    help: str,
    default: Any = MISSING,
    minimum: float | None = 1,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    **more: Any,
) -> Any:
    """A dataclass field whose metadata holds `help`, limits, and `more`.

    - help: what the setting does
    - minimum, maximum: least and greatest number; above, in place of minimum: a number that the
      value must exceed
    - choices: the only values
    - more: see who reads it: `flag`, `off` and `metavar` (tools/options.py), `filter`
      (generation.py), `optional` (`Config.to_dict`)
    """
    minimum = minimum if above is None else None
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "above": above}
    return dataclasses.field(default=default, metadata=metadata | {"choices": choices} | more)


def types_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a value may have: (int, NoneType) for a field annotated `int | None`."""
    return get_args(field.type) or (field.type,)


def check_fields(instance: Any) -> None:
    """Raise PicoError, naming the field, unless every field has its type and is within its limits.

    NumPy scalars become Python numbers, which JSON can represent; paths become str.
    """
    for field in dataclasses.fields(instance):
        name, value = field.name, getattr(instance, field.name)
        if isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not _allows(field, value):
            raise PicoError(f"{name} must be {_allowed(field)}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise PicoError(f"{name} must be finite, not {value!r}")
        object.__setattr__(instance, name, value)  # the dataclass is frozen


def _allows(field: dataclasses.Field, value: Any) -> bool:
    types, limits = types_of(field), field.metadata
    if limits["choices"] is not None:
        return value in limits["choices"]
    if type(value) not in ((*types, int) if float in types else types):
        return False
    if value is None or isinstance(value, bool | str):
        return True
    minimum, maximum, above = limits["minimum"], limits["maximum"], limits["above"]
    return (  # all False for NaN
        (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
    )


def _allowed(field: dataclasses.Field) -> str:
    """What `_allows` allows, in words."""
    types, limits = types_of(field), field.metadata
    if limits["choices"] is not None:
        return f"one of {', '.join(limits['choices'])}"
    if bool in types:
        return "True or False"
    if str in types:
        return "a str or a path"
    words = {"minimum": "of at least", "above": "above", "maximum": "at most"}
    bounds = [f"{text} {limits[key]}" for key, text in words.items() if limits[key] is not None]
    return f"{'a number' if float in types else 'a whole number'} {' and '.join(bounds)}".rstrip()


def field_help(cls: type) -> dict[str, str]:
    """The help of each field, by name."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}


def settings_class(cls: type) -> type:
    """Class decorator: refuse unknown keywords; append the help of each field to the docstring."""
    init, known = cls.__init__, sorted(field_help(cls))

    @functools.wraps(init)
    def checked(self: Any, /, *values: Any, **keywords: Any) -> None:
        for name in sorted(keywords.keys() - known):
            hint = did_you_mean(name, known)
            raise PicoError(f"unknown setting {name}{hint}; there are: {', '.join(known)}")
        init(self, *values, **keywords)

    cls.__init__ = checked
    lines = [f"    - {name}: {text}" for name, text in field_help(cls).items()]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip() + "\n", *lines])
    return cls


@settings_class
@dataclass(frozen=True)
class Config:
    """The sizes of a Pico. Raises PicoError on an impossible size and says how to correct it.

    router and position are written to model.json only if they differ from the default, so that
    the file otherwise holds exactly the keys of the published implementation.
    """

    dim: int = setting("width of the residual stream", 128)
    next_tokens: int = setting("number of next bytes that one position predicts, one head each", 8)
    att_q_heads: int = setting("query heads of each attention", 9)
    att_kv_heads: int = setting("key/value heads, each shared by equally many query heads", 3)
    fb_num_blocks: int = setting(
        "narrow blocks before the deep ones, and again after them; they run on every byte", 2
    )
    fb_att_window_size: int = setting(
        "number of preceding bytes that each byte attends to in a narrow block", 16
    )
    latent_capacity_factor: float = setting(
        "share of bytes routed in training",
        0.25,
        above=0,
        maximum=1,
    )
    latent_num_blocks: int = setting("deep blocks, which run on the routed bytes only", 12)
    latent_att_window_size: int = setting(
        "number of preceding routed bytes that each routed byte attends to in a deep block", 512
    )
    router: str = setting(
        "which bytes are routed: learned, by top-k in training; or a rule "
        f"({', '.join(RULES)}) to compare with; all and none ignore latent_capacity_factor",
        "learned",
        choices=ROUTERS,
        optional=True,
    )
    position: str = setting(
        "position encoding of attention: alibi (arXiv 2108.12409) or rope (arXiv 2104.09864)",
        "alibi",
        choices=POSITIONS,
        optional=True,
    )

    def __post_init__(self) -> None:
        check_fields(self)
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
            "narrow_blocks": 2 * self.fb_num_blocks * block,
            "router": self.dim,
            "deep_blocks": self.latent_num_blocks * block,
            "heads": self.dim + outputs * self.dim + outputs,
        }

    @property
    def parameters(self) -> int:
        """Number of weights of a model of these sizes."""
        return sum(self.parameters_by_part.values())

    def capacity(self, length: int) -> int:
        """The number of bytes that training selects in a sequence of `length` bytes.

        A rule may select more of them or fewer; the deep blocks process at most this many.
        """
        return int(length * self.capacity_share)

    @property
    def capacity_share(self) -> float:
        """The share of the bytes that training selects."""
        return {"all": 1.0, "none": 0.0}.get(self.router, self.latent_capacity_factor)

    @classmethod
    def preset(cls, name: str, **changes: int | float | str) -> "Config":
        """The sizes of PRESETS, with changes. Raises PicoError if there is no such preset."""
        if name not in PRESETS:
            raise PicoError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)

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
        try:
            config = cls(**values)
            for field in dataclasses.fields(cls):
                if field.name not in values and "optional" not in field.metadata:
                    raise PicoError(f"the key {field.name!r} is missing")
            return config
        except PicoError as error:
            raise PicoError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, int | float | str]:
        """The content of model.json: see `Config`."""
        pairs = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {
            field.name: value
            for field, value in pairs
            if "optional" not in field.metadata or value != field.default
        }

    def exists(self, path: str | os.PathLike) -> bool:
        """Whether the model.json `path` exists. Raises PicoError if it is of other sizes."""
        if not os.path.exists(path):
            return False
        there, here = (dataclasses.asdict(config) for config in (self.from_json(path), self))
        if changed := differences(there, here):
            raise PicoError(f"{path} describes another model: {changed}; choose another folder")
        return True

    def to_json(self, path: str | os.PathLike) -> None:
        """Write a model.json, atomically."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())


@settings_class
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
        "end training after this many minutes, not counting compilation and validation, unless "
        "max_steps or the epochs end it before; the learning-rate schedule follows the steps or "
        "the time, whichever is further; 0: no limit",
        0.0,
        minimum=0,
    )
    warmup_steps: int = setting("steps until the learning rate reaches its peak", 150, minimum=0)
    grad_accumulation_steps: int = setting(
        "micro-batches whose gradients are averaged for one step", 1
    )
    validation_interval: int = setting(
        "steps between measurements on the held-out data; the last step always measures, and "
        "no other step in the last quarter of an interval before it",
        100,
    )
    checkpoint_interval: int = setting(
        "steps between checkpoints; the last step always writes one", 500
    )
    validation_bytes: int = setting(
        "maximum number of held-out bytes per validation, the same bytes every time", 1 << 18
    )
    optimizer: str = setting("soap or adamw", "soap", choices=OPTIMIZERS)
    extra_heads_weight: float = setting(
        "total loss weight of the extra prediction heads; the first head has weight 1; 0: the "
        "original's weights, each the one before divided by 1.618",
        0.0,
        minimum=0,
    )
    router_warmup_steps: int = setting(
        "number of first steps in which the router is trained to select the bytes whose next byte "
        "is hardest to predict (highest entropy); afterwards it is trained on its own selection, "
        "as in the original; only with --router learned",
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
    seed: int = setting(
        "seed of the order of the windows and, on the command line, of fresh weights", 0, minimum=0
    )

    def __post_init__(self) -> None:
        check_fields(self)
