"""Decoding: sliding KV caches of fixed size, and a generator that yields one record a byte."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, TinyJit

from .attention import alibi_slopes
from .data import SEQ_END, SEQ_START
from .files import PicoError
from .kernels import compiled, write_into
from .model import Block, Pico
from .routing import gather, scatter

CHUNK = 64  # bytes of a prompt that one pass takes in


class Cache:
    """Keys and values of one block for the last positions, a ring: position p is in slot p % L.

    L = window + CHUNK, so that a pass may write up to CHUNK rows and still see a whole window
    before the first of them; rows that turn out unwanted are undone by moving the position back,
    since what they overwrote was already out of every window.
    """

    def __init__(self, block: Block) -> None:
        attention = block.att
        self.window, self.slots = attention.window, attention.window + CHUNK
        shape = (1, attention.kv_heads, self.slots, attention.head_dim)
        self.keys, self.values = (Tensor.zeros(*shape).contiguous().realize() for _ in range(2))

    def write(self, keys: Tensor, values: Tensor, start: Tensor, valid: Tensor) -> None:
        """Store the first `valid` of the rows [1, K, R, C], at positions `start`, start + 1, …"""
        row = valid - 1 - self.age(start, valid)  # the newest row that lands in each slot
        fresh = (row >= 0).reshape(1, 1, -1, 1)
        where = row.maximum(0).reshape(1, 1, -1, 1).expand(self.keys.shape)
        for ring, new in ((self.keys, keys), (self.values, values)):
            ring.assign(fresh.where(new.contiguous().gather(2, where), ring))

    def age(self, start: Tensor, valid: Tensor) -> Tensor:
        """How many positions before the newest, start + valid - 1, each slot's is: int [L]."""
        newest = start + valid - 1
        return (newest + self.slots - Tensor.arange(self.slots)) % self.slots


def cached_block(block: Block, cache: Cache, h: Tensor, start: Tensor, valid: Tensor) -> Tensor:
    """One block on rows h [1, R, D] at positions from `start`, `valid` of them real."""
    q, k, v = block.att.qkv(block.norm1(h))  # (1, H, R, C), (1, K, R, C)
    cache.write(k, v, start, valid)
    _, H, R, C = q.shape
    K = k.shape[1]
    # rows after the real ones stand in for the last real one, so that each sees at least itself
    position = start + Tensor.arange(R).minimum(valid - 1)
    slot_position = start + valid - 1 - cache.age(start, valid)
    distance = position.reshape(R, 1) - slot_position.reshape(1, cache.slots)
    visible = (distance >= 0) & (distance <= cache.window) & (slot_position >= 0)
    q = q.reshape(1, K, H // K * R, C)
    scores = (q @ cache.keys.transpose(2, 3)).reshape(1, K, H // K, R, cache.slots)
    slopes = alibi_slopes(H).reshape(1, K, H // K, 1, 1)
    scores = visible.where(scores / math.sqrt(C) - slopes * distance, -math.inf)
    weights = scores.softmax(axis=-1).reshape(1, K, H // K * R, cache.slots).contiguous()
    heads = (weights @ cache.values).reshape(1, H, R, C)
    h = (h + block.att.output(heads)).contiguous()
    return (h + block.glu(block.norm2(h))).contiguous()


class Decoder:
    """A model with caches: feed bytes, get the logits after each and the router's weights.

    Memory and time a pass do not depend on how much was fed. `position` counts the bytes fed and
    `selected` those that went through the latent blocks; to forget the newest bytes (at most
    CHUNK of them since the last pass), set both back.
    """

    def __init__(self, model: Pico) -> None:
        self.model = model
        self.position = self.selected = 0
        self.before, self.latent, self.after = (
            [Cache(block) for block in part.blocks]
            for part in (model.fb_in, model.latent, model.fb_out)
        )
        self.jits: dict[tuple[str, int], TinyJit] = {}
        self.controls: dict[tuple[str, int], Tensor] = {}

    def feed(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Feed at least one byte -> (logits float32 [n, T, 256], router logits float32 [n])."""
        parts = []
        while data:
            rows = 1 if len(data) == 1 else CHUNK
            parts.append(self._pass(np.frombuffer(data[:rows], np.uint8), rows))
            data = data[rows:]
        logits, router_logits = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(router_logits)

    def _pass(self, data: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(data)
        control = np.zeros(2 + rows, np.int32)  # start, valid, bytes
        control[:2], control[2 : 2 + n] = (self.position, n), data
        control = self._control("bytes", control)
        h, z = self._run("encode", rows, self._encode, control)
        router_logits = z.numpy()[0, :n]
        chosen = np.flatnonzero(router_logits > 0)
        if len(chosen):
            deeper = np.zeros(2 + 2 * rows, np.int32)  # start, valid, byte in each slot, its slot
            deeper[:2], deeper[2 : 2 + len(chosen)] = (self.selected, len(chosen)), chosen
            deeper[2 + rows :] = -1
            deeper[2 + rows + chosen] = np.arange(len(chosen))
            h = self._run("deepen", rows, self._deepen, h, z, self._control("latent", deeper))
        logits = self._run("heads", rows, self._heads, h, control)
        self.position += n
        self.selected += len(chosen)
        return logits.numpy()[0, :n], router_logits

    def _control(self, name: str, values: np.ndarray) -> Tensor:
        """The int32 vector that steers a pass: one buffer a length, written in place."""
        key = (name, len(values))
        if key not in self.controls:
            self.controls[key] = Tensor(values).clone().realize()
        else:
            write_into(self.controls[key], values)
        return self.controls[key]

    def _run(self, name: str, rows: int, function, *inputs: Tensor):
        """`function`, compiled once a name and number of rows."""
        key = (name, rows)
        if key not in self.jits:
            self.jits[key] = compiled(function)
        return self.jits[key](*inputs)

    def _encode(self, control: Tensor) -> tuple[Tensor, Tensor]:
        start, valid, data = control[0], control[1], control[2:]
        h = self.model.embedding(data.reshape(1, -1)).contiguous()
        for block, cache in zip(self.model.fb_in.blocks, self.before, strict=True):
            h = cached_block(block, cache, h, start, valid)
        z = (h * self.model.latent.router.weight[0]).sum(axis=-1)
        return h.realize(), z.realize()

    def _deepen(self, h: Tensor, z: Tensor, control: Tensor) -> Tensor:
        rows = h.shape[1]
        start, valid = control[0], control[1]
        index, slot = control[2 : 2 + rows].reshape(1, -1), control[2 + rows :].reshape(1, -1)
        selected = deep = gather(h, index, slot)
        for block, cache in zip(self.model.latent.blocks, self.latent, strict=True):
            deep = cached_block(block, cache, deep, start, valid)
        added = scatter(deep - selected, index, slot) * z.sigmoid().unsqueeze(2)
        return (h + added).realize()

    def _heads(self, h: Tensor, control: Tensor) -> Tensor:
        start, valid = control[0], control[1]
        for block, cache in zip(self.model.fb_out.blocks, self.after, strict=True):
            h = cached_block(block, cache, h, start, valid)
        return self.model.unembed(h).realize()


@dataclass(frozen=True)
class GeneratedByte:
    """One byte of a sample.

    byte: 0..255; router_weight: the router's sigmoid for it; router_decision: whether it went
    through the latent blocks (weight > 0.5); logprob: natural log of its probability under the
    distribution it was drawn from.
    """

    byte: int
    router_weight: float
    router_decision: bool
    logprob: float


def distribution(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities float64 [256] of the next byte; temperature 0 puts all on the likeliest."""
    if temperature == 0:
        return np.eye(256)[np.argmax(logits)]
    scaled = logits.astype(np.float64) / temperature
    exps = np.exp(scaled - scaled.max())
    return exps / exps.sum()


def generate(
    model: Pico,
    prompt: bytes = b"",
    *,
    max_bytes: int = 1024,
    temperature: float = 1.0,
    seed: int | None = None,
) -> Iterator[GeneratedByte]:
    """Continue `prompt`, yielding one record a byte until `</pico:seq>` or `max_bytes`.

    The prompt is put after `<pico:seq>`, the start of a document. temperature 0 is greedy. The
    same seed gives the same bytes on the same backend. Raises PicoError on a bad option.
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise PicoError(f"temperature must be a number of at least 0, not {temperature}")
    if max_bytes < 0:
        raise PicoError(f"max_bytes must be at least 0, not {max_bytes}")
    return _generate(model, prompt, max_bytes, temperature, np.random.default_rng(seed))


def _generate(model, prompt, max_bytes, temperature, rng) -> Iterator[GeneratedByte]:
    decoder = Decoder(model)
    logits = decoder.feed(SEQ_START + prompt)[0][-1, 0]
    held: list[GeneratedByte] = []  # bytes that may turn out to be the end tag
    for _ in range(max_bytes):
        probabilities = distribution(logits, temperature)
        byte = int(rng.choice(256, p=probabilities))
        fed, router_logits = decoder.feed(bytes([byte]))
        logits, z = fed[0, 0], float(router_logits[0])
        weight = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
        held.append(GeneratedByte(byte, weight, z > 0, math.log(probabilities[byte])))
        if bytes(record.byte for record in held) == SEQ_END:
            return
        while held and not SEQ_END.startswith(bytes(record.byte for record in held)):
            yield held.pop(0)
    yield from held
