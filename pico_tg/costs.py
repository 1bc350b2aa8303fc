"""What training and decoding cost, and the settings that follow from it.

The defaults of `TrainSettings` are the published ones, for a GPU and hundreds of megabytes of text.
`train` and the command line use `choose` instead.

Model FLOPs are the floating-point operations that the mathematics of a Pico requires. A
multiplication and an addition are two FLOPs. Only matmuls count, as is customary: for each weight
one multiply-add per byte that passes its layer, and for each pair of a query and a key head_dim
multiply-adds for the score and head_dim for the weighted value. Norms, activations, softmax, the
loss, the embedding lookup and the optimizer are left out.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes

from .backend import machine
from .backend.precision import choose_precision
from .config import Config, TrainSettings
from .files import PicoError
from .progress import Status, duration
from .routing import RULES

CHOSEN = {  # the settings that `choose` chooses, and the line in which each is shown
    "context_len": "windows", "batch_size": "windows", "epochs": "length", "max_steps": "length",
    "learning_rate": "learning", "warmup_steps": "learning", "router_warmup_steps": "learning",
    "validation_interval": "measuring", "validation_bytes": "measuring",
    "checkpoint_interval": "measuring",
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The largest step, the duration of a run and the size of a validation on a kind of device.

    least_rate: SOAP's lowest learning rate for such steps, however many (examples/studies, Settings
    for a small run; the published settings)
    """

    context_len: int
    batch_size: int
    minutes: float
    validation_bytes: int
    least_rate: float


CPU = Scale(512, batch_size=4, minutes=4, validation_bytes=1 << 16, least_rate=0.006)
GPU = Scale(6144, batch_size=32, minutes=60, validation_bytes=1 << 18, least_rate=0.001)
STEPS = (300, 3600)  # fewest and most steps of a run; with fewer a model learns little
MIN_WINDOWS = 32  # least number of windows in the training data
WARMUP = 0.1  # fraction of the steps
ROUTER_WARMUP = 0.2  # fraction of the steps
PEAK = (500, 0.012)  # number of steps up to which SOAP's learning rate is constant, and that rate
PUBLISHED = (3600, 0.001)  # number of steps of the published settings, and their learning rate
ADAMW_FACTOR = 0.25  # AdamW's learning rate as a fraction of SOAP's
# learning rate of trained weights as a fraction of random ones': with the whole rate the model that
# comes with the package first gets worse on another text (1.28 bits per byte after 2 minutes, 1.21
# with a quarter of the rate)
TRAINED_FACTOR = 0.25

VALIDATIONS = 10  # of a run, about, if they take at most VALIDATION_SHARE of the training time
VALIDATION_SHARE = 0.1
CLOSE = 0.25  # of an interval before the last step, in which no other validation is made

EFFICIENCY = 0.7  # rate of a train step as a fraction of a plain matmul's
SECONDS_PER_BLOCK = 0.004  # time to launch the kernels of a block on a CPU
LEAST_READ = 2  # bytes per parameter; a model that reads fewer is said to be too large
FLOATS_PER_BLOCK = 18  # saved for the backward, per block, byte and channel


def forward_flops(config: Config, length: int) -> int:
    """FLOPs of one forward pass over a sequence of `length` bytes, as in training.

    The number of selected bytes is the capacity. A learned router computes the weight of every
    byte, a rule only the weights of the selected bytes.
    """
    selected = config.capacity(length)
    pairs = visible_pairs(length, config.fb_att_window_size)
    latent_pairs = visible_pairs(selected, config.latent_att_window_size)
    return round(_flops(config, length, selected, pairs, latent_pairs))


def training_flops(config: Config, length: int, batch_size: int = 1) -> int:
    """FLOPs of a forward and a backward pass: the gradients of a matmul are two matmuls."""
    return 3 * batch_size * forward_flops(config, length)


def decoding_flops(config: Config, position: int, router_rate: float) -> float:
    """FLOPs of decoding one byte after `position` bytes, where the share `router_rate` is routed.

    Rejected drafts are not counted: the mathematics does not require them.
    """
    keys = 1 + min(config.fb_att_window_size, position)
    latent_keys = 1 + min(config.latent_att_window_size, router_rate * position)
    return _flops(config, 1, router_rate, keys, router_rate * latent_keys)


def _flops(
    config: Config, bytes_: float, selected: float, pairs: float, latent_pairs: float
) -> float:
    """FLOPs of a pass over `bytes_` bytes, `selected` of which pass through the deep blocks.

    pairs, latent_pairs: pairs of a query and a visible key in a narrow or a deep block.
    """
    byte_blocks, latent_blocks = 2 * config.fb_num_blocks, config.latent_num_blocks
    weights = byte_blocks * config.block_weights * bytes_
    weights += latent_blocks * config.block_weights * selected
    weights += config.dim * config.next_tokens * 256 * bytes_
    weights += config.dim * (selected if config.router in RULES else bytes_)
    width = config.att_q_heads * config.head_dim
    return 2 * weights + 4 * width * (byte_blocks * pairs + latent_blocks * latent_pairs)


def visible_pairs(length: int, window: int) -> int:
    """Pairs of a query and a visible key: the query's position or one of `window` before."""
    full = max(0, length - window)  # queries that see a whole window
    return full * (window + 1) + (length - full) * (length - full + 1) // 2


def choose(
    config: Config,
    train_bytes: int,
    device: str,
    gflops: float,
    given: dict[str, object],
    trained: bool = False,
    held_out: int = TrainSettings.validation_bytes,
) -> TrainSettings:
    """The settings of a run: those `given`, and a value for each other one of CHOSEN.

    - context_len: the Scale's; smaller if the data would otherwise make fewer than MIN_WINDOWS
      windows
    - batch_size: the Scale's; smaller if so many epochs would otherwise make fewer than the fewest
      STEPS: those given, else `most_passes`
    - max_steps: the steps that fit in the Scale's minutes according to `step_seconds`, at least the
      fewest and at most the most STEPS. If max_minutes or epochs are given, these end the run, and
      max_steps is four times the steps that they are estimated to take
    - epochs: as many as max_steps needs; if that is not given, at most `most_passes`
    - warmup_steps: WARMUP of the steps
    - router_warmup_steps, for the router learned: ROUTER_WARMUP of the steps, with max_minutes of
      the steps that are estimated to fit; 0 for `trained` weights, whose router is trained
    - learning_rate: PEAK's up to PEAK's steps, then a power law of the steps through PUBLISHED, but
      at least the Scale's; times ADAMW_FACTOR for adamw, times TRAINED_FACTOR for `trained` weights
    - validation_bytes: the Scale's
    - validation_interval: for VALIDATIONS in a run, or as many as take VALIDATION_SHARE of the
      training time
    - checkpoint_interval: the chosen validation_interval

    held_out: number of held-out bytes. gflops: `gemm_rate` of the device. Raises PicoError if a
    given setting is out of its bounds.
    """
    scale = CPU if device.split(":")[0] == "CPU" else GPU
    values: dict[str, object] = dict(given)

    def pick(name: str, value: int | float) -> TrainSettings:
        values.setdefault(name, value)
        return TrainSettings(**values)

    shortest = math.ceil(1 / config.latent_capacity_factor)
    length = max(shortest, min(scale.context_len, train_bytes // MIN_WINDOWS))
    settings = pick("context_len", length)
    windows = _windows(config, settings, train_bytes)
    passes = given.get("epochs") or most_passes(config, train_bytes, trained)
    most = passes * windows // (STEPS[0] * settings.grad_accumulation_steps)
    settings = pick("batch_size", max(1, min(scale.batch_size, most)))
    batch = settings.batch_size * settings.grad_accumulation_steps
    minutes = settings.max_minutes or scale.minutes
    affordable = int(minutes * 60 / step_seconds(config, settings, device, gflops))
    few, many = STEPS
    if settings.max_minutes:
        steps = 4 * affordable + 1
    elif "epochs" in given:
        steps = 4 * math.ceil(passes * windows / batch) + 1
    else:
        steps = max(few, min(many, affordable))
    settings = pick("max_steps", steps)
    needed = math.ceil(settings.max_steps * batch / windows)
    settings = pick("epochs", needed if "max_steps" in given else min(passes, needed))
    steps = total_steps(config, settings, train_bytes)
    expected = expected_steps(config, settings, train_bytes, device, gflops)
    pick("warmup_steps", round(WARMUP * steps))
    if config.router == "learned":
        pick("router_warmup_steps", 0 if trained else round(ROUTER_WARMUP * expected))
    settings = pick("validation_bytes", scale.validation_bytes)
    most = VALIDATION_SHARE * expected  # steps that take as long as all validations may
    count = min(VALIDATIONS, int(most / validation_steps(settings, held_out)))
    interval = max(1, math.ceil(expected / max(1, count)))
    pick("validation_interval", interval)
    pick("checkpoint_interval", interval)
    power = math.log(PEAK[1] / PUBLISHED[1]) / math.log(PUBLISHED[0] / PEAK[0])
    peak = PEAK[1] * (PEAK[0] / max(expected, PEAK[0])) ** power
    peak = max(peak, scale.least_rate)
    factor = ADAMW_FACTOR if settings.optimizer == "adamw" else 1
    factor *= TRAINED_FACTOR if trained else 1
    return pick("learning_rate", float(f"{peak * factor:.2g}"))


def most_passes(config: Config, train_bytes: int, trained: bool) -> int:
    """The passes over the data after which more of them usually predict other text worse.

    A rule of thumb from texts of 30 to 300 kB (examples/studies, Short texts), untested beyond.
    `trained` weights take half as many; at least 2.
    """
    most = 6 * (train_bytes / config.parameters) ** 0.2
    return max(2, round(most / 2 if trained else most))


def plan(
    config: Config,
    train_bytes: int,
    device: str,
    given: dict[str, object],
    trained: bool = False,
    held_out: int = TrainSettings.validation_bytes,
    progress: bool = False,
) -> tuple[TrainSettings, list[str]]:
    """What `choose` chooses, and lines about the choice and the cost.

    progress: say on stderr that the machine is measured. Raises PicoError if a given setting is out
    of its bounds.
    """
    precision, lines = TrainSettings(**given).precision, []
    with Status(lambda: "measuring this machine", leave=False, disable=not progress):
        machine = (device, gemm_rate(precision, device))
    settings = choose(config, train_bytes, *machine, given, trained, held_out)
    shown = CHOSEN.keys() - given.keys()
    if settings.max_minutes:  # unless the text is short, the others are only guards
        shown -= {"max_steps", "epochs", "warmup_steps"}
    if "epochs" in given:
        shown -= {"max_steps"}
    for kind in dict.fromkeys(CHOSEN.values()):
        names = [name for name in CHOSEN if name in shown and CHOSEN[name] == kind]
        values = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
        lines += [f"chosen {kind}: {values}"] if values else []
    steps = expected_steps(config, settings, train_bytes, *machine)
    lines += describe_cost(config, settings, steps, *machine, held_out)
    read, most = steps * _step_bytes(settings), most_passes(config, train_bytes, trained)
    if (passes := round(read / train_bytes)) > most:
        lines.append(
            f"warning: the run reads the text {passes:,} times; after {most} times other text is "
            "usually predicted worse; take more text, or fewer epochs"
        )
    elif "epochs" not in given and settings.max_steps > total_steps(config, settings, train_bytes):
        lines.append(
            f"epochs {settings.epochs}: the run ends there at the latest; with more passes over so "
            "short a text, other text is usually predicted worse"
        )
    if not trained and read < LEAST_READ * config.parameters:
        way = "train longer" if passes < most else "take more text"
        way += ", choose smaller sizes"
        if Config.preset("minutes").parameters < config.parameters:
            way += " (init PATH --preset minutes)"
        way += ", or fine-tune in a new folder (train NEW RUN DATASET --from stories first)"
        lines.append(
            f"warning: the run trains on {read / config.parameters:.2g} bytes per parameter "
            f"({read:,} bytes, {config.parameters:,} parameters); below {LEAST_READ}, a "
            f"smaller model usually learns more; {way}"
        )
    seen = config.capacity(settings.context_len)
    if config.position == "rope" and 0 < seen < config.latent_att_window_size and not trained:
        lines.append(
            f"warning: the deep blocks attend to {config.latent_att_window_size} routed bytes, but "
            f"context_len {settings.context_len} routes {seen}, and rope does not extrapolate; in "
            "longer texts the model predicts badly; take more context, or add "
            f"--latent-att-window-size {seen} to the flags of init"
        )
    return settings, lines


def total_steps(config: Config, settings: TrainSettings, train_bytes: int) -> int:
    """The steps of a run without max_minutes: max_steps, or fewer if the epochs end before."""
    batch = settings.batch_size * settings.grad_accumulation_steps
    windows = _windows(config, settings, train_bytes)
    return min(settings.max_steps, math.ceil(settings.epochs * windows / batch))


def expected_steps(
    config: Config, settings: TrainSettings, train_bytes: int, device: str, gflops: float
) -> int:
    """`total_steps`, or fewer if by `step_seconds` fewer fit in max_minutes."""
    limit = 60 * settings.max_minutes or math.inf
    fit = limit / step_seconds(config, settings, device, gflops)
    return int(min(total_steps(config, settings, train_bytes), fit))


def validation_steps(settings: TrainSettings, held_out: int) -> float:
    """An estimate of the number of train steps that take as long as a validation.

    A validation is a forward pass, a third of the FLOPs of a step.
    """
    return min(settings.validation_bytes, held_out) / (3 * _step_bytes(settings))


def validations_left(settings: TrainSettings, step: int, last: float) -> int:
    """The number of validations after `step`, of a run whose last step is `last`."""
    interval = settings.validation_interval
    return 1 + max(0, int(last / interval - CLOSE) - step // interval)


def _step_bytes(settings: TrainSettings) -> int:
    return settings.batch_size * settings.grad_accumulation_steps * settings.context_len


def _windows(config: Config, settings: TrainSettings, train_bytes: int) -> int:
    return max(1, (train_bytes - config.next_tokens) // settings.context_len)


def gemm_rate(precision: str, device: str) -> float:
    """The measured rate of a plain matmul on `device`, in GFLOPS.

    On a CPU it is NumPy's for 1536 x 1536 matrices in float32; elsewhere tinygrad's best over
    several sizes, in a precision of `TrainSettings`.
    """
    if device.split(":")[0] == "CPU":
        size = 1536
        a, b = np.random.default_rng(0).standard_normal((2, size, size)).astype(np.float32)
        return 2 * size**3 / _fastest(lambda: a @ b) / 1e9
    best = 0.0
    bf16 = choose_precision(precision, (device,)) == "bf16"
    dtype = dtypes.bfloat16 if bf16 else dtypes.float32
    for size in (64, 256, 1024, 4096):
        a, b = (Tensor.rand(size, size, device=device).cast(dtype).realize() for _ in range(2))
        matmul = TinyJit(lambda a, b: a.matmul(b, dtype=dtypes.float32).realize())

        def call(matmul: TinyJit = matmul, a: Tensor = a, b: Tensor = b) -> None:
            matmul(a, b)
            Device[device].synchronize()

        seconds = _fastest(call)  # the first three calls compile and capture
        best = max(best, 2 * size**3 / seconds / 1e9)
        if seconds > 0.01:  # the next size takes 64 times as long
            break
    return best


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of eight calls."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def step_seconds(config: Config, settings: TrainSettings, device: str, gflops: float) -> float:
    """An estimate of the seconds of a train step, from its FLOPs and the device's rate."""
    windows = settings.batch_size * settings.grad_accumulation_steps
    flops = training_flops(config, settings.context_len, windows)
    if settings.optimizer == "soap":
        flops += sum(_soap_flops(m, n) for m, n in _matrices(config))
    seconds = flops / (EFFICIENCY * gflops * 1e9)
    if device.split(":")[0] == "CPU":
        blocks = 2 * config.fb_num_blocks + config.latent_num_blocks
        seconds += SECONDS_PER_BLOCK * blocks * settings.grad_accumulation_steps
    return seconds


def describe_cost(
    config: Config, settings: TrainSettings, steps: int, device: str, gflops: float, held_out: int
) -> list[str]:
    """Lines: the time and the memory that `steps` train steps will take, all estimates."""
    step = step_seconds(config, settings, device, gflops)
    count, validation = validations_left(settings, 0, steps), validation_steps(settings, held_out)
    parts = {name: size / 1e6 for name, size in memory_bytes(config, settings).items()}
    named = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())
    validations = f"{count} validations" if count > 1 else "1 validation"
    # the last validation measures top-k routing, too
    total = duration(step * (steps + (count + 1) * validation))
    return [
        f"training will take about {total}, plus compiling the first time: {steps:,} steps "
        f"of {step:.2g} s, {validations} of {step * validation:.2g} s",
        f"memory: about {sum(parts.values()):,.0f} MB ({named})",
    ]


def memory_bytes(config: Config, settings: TrainSettings) -> dict[str, int]:
    """An estimate of the memory of training, in bytes: parameters, optimizer, activations.

    parameters: the weights and their gradients. activations: those that one micro-batch saves for
    the backward.
    """
    moments = 2 * config.parameters
    if settings.optimizer == "soap":
        moments += sum(2 * (m * m + n * n) for m, n in _matrices(config))
    latent_share = config.capacity(settings.context_len) / settings.context_len
    blocks = 2 * config.fb_num_blocks + config.latent_num_blocks * latent_share
    kept = 2 if settings.checkpoint_activations else FLOATS_PER_BLOCK
    floats = kept * config.dim * blocks + 3 * 256 * config.next_tokens  # logits, their gradient
    copies = 2 + (settings.grad_accumulation_steps > 1)
    return {
        "parameters": 4 * copies * config.parameters,
        "optimizer": 4 * moments,
        "activations": int(4 * floats * settings.batch_size * settings.context_len),
    }


def check_memory(config: Config, settings: TrainSettings, device: str) -> None:
    """On a CPU, raise PicoError if training needs, by estimate, over twice the memory."""
    if device.split(":")[0] != "CPU":
        return
    needed, present = sum(memory_bytes(config, settings).values()), machine.available_memory()
    if needed > 2 * present:
        raise PicoError(
            f"training would take about {needed / 1e9:,.0f} GB of memory, and there are "
            f"{present / 1e9:,.1f} GB; take a smaller context_len, batch_size or model"
        )


def _matrices(config: Config) -> list[tuple[int, int]]:
    """The shapes of the weight matrices."""
    dim, width = config.dim, config.head_dim
    heads = config.att_q_heads + 2 * config.att_kv_heads
    block = [(heads * width, dim), (dim, config.att_q_heads * width), (2 * dim, dim), (dim, dim)]
    blocks = 2 * config.fb_num_blocks + config.latent_num_blocks
    return [(256, dim), (256 * config.next_tokens, dim), *(block * blocks)]


def _soap_flops(m: int, n: int) -> float:
    """FLOPs of SOAP for an [m, n] matrix: a step, and a tenth of a refresh of the bases."""
    refresh = sum(2 * s**3 + 8 / 3 * s**3 + 4 * s * m * n for s in (m, n))  # product, QR, moments
    return 6 * m * n * (m + n) + refresh / 10
