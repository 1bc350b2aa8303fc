"""References in NumPy, and checks of pico_tg's matmuls, attention and models against them."""

import math
from functools import partial

import numpy as np
import oracle
from tinygrad import Tensor, dtypes, nn

from pico_tg.attention import banded_attention
from pico_tg.config import Config
from pico_tg.matmul import linear, matmul
from pico_tg.model import Pico

TEXT = "Ça va?  'Tis 3.5 °C — née in 東京, (e.g.) <b>x_1</b>; and, a \t b\n\nend. ".encode()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float, name: str = "") -> None:
    """Within `tolerance`, relative to the largest entry."""
    assert found.shape == expected.shape, name
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)
    assert error <= tolerance, f"{name}: {error}"


def build(config: Config, seed: int = 0) -> tuple[Pico, oracle.Weights]:
    """A model and the same weights for the oracle, norms away from 1 as well."""
    rng = np.random.default_rng(seed)
    weights = {
        name: (value + 0.1 * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in oracle.random_weights(config, rng).items()
    }
    model = Pico(config)
    state = nn.state.get_state_dict(model)
    assert {name: t.shape for name, t in state.items()} == oracle.shapes(config)
    for name, tensor in state.items():
        tensor.assign(Tensor(weights[name])).realize()
    return model, weights


# (leading, M, L, N) of matmuls: sizes that fill whole tiles and sizes that do not
PRODUCTS = [
    ((), 64, 32, 48),
    ((), 37, 41, 29),
    ((2,), 24, 20, 16),  # as many matrices as threads
    ((2, 3), 19, 13, 23),
    ((5,), 8, 50, 1),
    ((1,), 100, 1, 7),
]
FORMS = {"linear": linear, "matmul": matmul, "transposed": partial(matmul, trans_b=True)}


def factors(form: str, shape: tuple, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random a and b for `FORMS[form](a, b)`."""
    lead, M, L, N = shape
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*lead, M, L)).astype(np.float32)
    sizes = {"matmul": (*lead, L, N), "transposed": (*lead, N, L), "linear": (N, L)}
    return a, rng.standard_normal(sizes[form]).astype(np.float32)


def product_and_gradients(form: str, a: Tensor, b: Tensor) -> list[Tensor]:
    """`FORMS[form](a, b)`, and the gradients of a weighted sum of it."""
    out = FORMS[form](a, b)
    weights = (Tensor.arange(out.numel()).reshape(out.shape) % 7 - 3).float()
    found = [out, *(out * weights).sum().gradient(a, b)]
    Tensor.realize(*found)
    return found


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def expected_product(form: str, a: np.ndarray, b: np.ndarray, rounded=np.float64) -> tuple:
    """`product_and_gradients` in float64, with the factors of each product `rounded`."""
    a, b = rounded(a), rounded(b)
    right = b if form == "matmul" else b.swapaxes(-1, -2)
    out = a @ right
    g = rounded(np.arange(out.size).reshape(out.shape) % 7 - 3)
    d_right = a.swapaxes(-1, -2) @ g
    if form == "linear":
        d_right = d_right.reshape(-1, *d_right.shape[-2:]).sum(0)
    d_b = d_right if form == "matmul" else d_right.swapaxes(-1, -2)
    return out, g @ right.swapaxes(-1, -2), d_b


def check_product(form: str, shape: tuple, rounded=np.float64, tolerance: float = 1e-4) -> None:
    """One matmul and its gradients against NumPy, relative to the largest entry."""
    a, b = factors(form, shape)
    found = product_and_gradients(form, *(Tensor(x).clone().realize() for x in (a, b)))
    for ours, theirs in zip(found, expected_product(form, a, b, rounded), strict=True):
        assert ours.dtype == dtypes.float32
        np.testing.assert_allclose(
            ours.numpy(), theirs, rtol=0, atol=tolerance * np.abs(theirs).max()
        )


def dense_attention(q, k, v, window, upstream):
    """Output and the gradients of q, k, v, from the full N x N matrix in float64."""
    q, k, v, upstream = (x.astype(np.float64) for x in (q, k, v, upstream))
    B, H, N, C = q.shape
    K = k.shape[1]
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    distance = np.arange(N)[:, None] - np.arange(N)[None]
    slopes = 2.0 ** (-8 * (np.arange(H) + 1) / H)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(C) - slopes[:, None, None] * distance
    p = oracle.softmax(np.where((distance >= 0) & (distance <= window), scores, -np.inf))
    dp = upstream @ v.swapaxes(2, 3)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(C)
    dk, dv = (
        x.reshape(B, K, H // K, N, C).sum(2)
        for x in (ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ upstream)
    )
    return p @ v, ds @ k, dk, dv


def check_attention(shape: tuple) -> None:
    """Banded attention of (B, H, K, N, C, window) and its gradients against `dense_attention`."""
    B, H, K, N, C, window = shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, heads, N, C)).astype(np.float32) for heads in (H, K, K, H)]
    q, k, v, upstream = (Tensor(a).clone().realize() for a in arrays)
    out = banded_attention(q, k, v, window)
    found = [out, *(out * upstream).sum().gradient(q, k, v)]
    Tensor.realize(*found)
    expected = dense_attention(*arrays[:3], window, arrays[3])
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=2e-5, err_msg=name)
