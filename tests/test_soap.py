"""SOAP against recorded numbers and plain NumPy; state, devices, extreme gradients, its cost."""

from pathlib import Path

import numpy as np
import pytest
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, nn

from pico_tg import SOAP
from pico_tg.backend.runtime import has_cpu_kernels, write_into
from pico_tg.tools.bench import count_kernels

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recorded_trajectories(jit):
    """35 steps of five parameters. Without TinyJit only 12, the last of them after a refresh.

    The parameter of shape (12, 20) starts from the recorded first bases.
    """
    golden = np.load(GOLDEN / "soap.npz")
    params = [Tensor(golden[f"init/{i}"]).clone().realize() for i in range(5)]
    optimizers = [
        SOAP([p], lr=3e-3, weight_decay=0.1, max_precond_dim=int(golden[f"max_precond_dim/{i}"]))
        for i, p in enumerate(params)
    ]

    def update(*grads: Tensor) -> None:
        for optimizer, p, g in zip(optimizers, params, grads, strict=True):
            p.grad = g
            Tensor.realize(*optimizer.schedule_step())

    run = TinyJit(update) if jit else update
    worst = np.zeros(5)
    with Tensor.train():
        for step in range(35 if jit else 12):
            run(*[Tensor(golden[f"grad/{step}/{i}"]).clone().realize() for i in range(5)])
            for i, optimizer in enumerate(optimizers):
                refreshed = optimizer.refresh()
                assert refreshed == (step % 10 == 0)
                if step == 0 and i == 4:
                    for Q, side in zip(optimizer.stacks[0].Q, (0, 1), strict=True):
                        write_into(Q, golden[f"q0/4/{side}"][None])
            errors = [
                np.abs(p.numpy() - golden[f"param/{step}/{i}"]).max() for i, p in enumerate(params)
            ]
            worst = np.maximum(worst, errors)
    assert (worst <= 5e-5).all(), worst


def stepper(optimizer, params):
    """A function of gradients (arrays): one step, compiled, and the refresh."""

    @TinyJit
    def update(*grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        Tensor.realize(*optimizer.schedule_step())

    def step(grads):
        with Tensor.train():
            update(*[Tensor(g.reshape(-1)).reshape(g.shape).realize() for g in grads])
            optimizer.refresh()

    return step


class PlainSOAP:
    """SOAP of one parameter in plain float64 NumPy, which receives the first bases."""

    def __init__(self, p, sides, lr, decay, beta=(0.95, 0.95)):
        self.p, self.sides, self.lr, self.decay = p.astype(np.float64), sides, lr, decay
        self.beta = beta
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)
        self.GG = [np.zeros((p.shape[side],) * 2) for side in sides]
        self.Q: list[np.ndarray] = []
        self.steps = -1

    def project(self, x, back=False):
        for side, Q in zip(self.sides, self.Q, strict=True):
            x = np.moveaxis(np.tensordot(Q if back else Q.T, x, axes=(1, side)), 0, side)
        return x

    def step(self, g, first_Q=None):
        g = g.astype(np.float64)
        self.steps += 1
        t, (b1, b2) = self.steps, self.beta
        if t > 0:
            projected = self.project(g)
            self.m = b1 * self.m + (1 - b1) * projected
            self.v = b2 * self.v + (1 - b2) * projected**2
            update = self.project(self.m / (np.sqrt(self.v) + 1e-8), back=True)
            rate = self.lr * np.sqrt(1 - b2**t) / (1 - b1**t)
            self.p = self.p - rate * update
            self.p = self.p - self.lr * self.decay * self.p
        for n, side in enumerate(self.sides):
            rows = np.moveaxis(g, side, 0).reshape(g.shape[side], -1)  # (s, rest)
            self.GG[n] = b2 * self.GG[n] + (1 - b2) * rows @ rows.T
        if t == 0:
            self.Q = [Q.astype(np.float64) for Q in first_Q]
        elif t % 10 == 0:
            m = self.project(self.m, back=True)
            for n, side in enumerate(self.sides):
                order = np.argsort(-np.diag(self.Q[n].T @ self.GG[n] @ self.Q[n]), kind="stable")
                self.v = np.take(self.v, order, axis=side)
                self.Q[n] = np.linalg.qr(self.GG[n] @ self.Q[n][:, order])[0]
            self.m = self.project(m)


CASES = {  # shape, options, projected sides
    "matrix": ((12, 8), {}, [0, 1]),
    "three dimensions": ((4, 5, 6), {}, []),
    "a long side": ((6, 30), {"max_precond_dim": 20}, [0]),
    "a side of one": ((1, 9), {}, [1]),
    "both sides one": ((1, 1), {}, []),
    "vector": ((10,), {}, []),
    "scalar": ((), {}, []),
    "one moment": ((5, 7), {"betas": (0.0, 0.9)}, [0, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case):
    shape, options, sides = CASES[case]
    rng = np.random.default_rng(0)
    start = np.asarray(rng.standard_normal(shape), np.float32)
    p = Tensor(start.reshape(-1)).reshape(shape).clone().realize()
    optimizer = SOAP([p], lr=1e-2, weight_decay=0.1, **options)
    assert optimizer.stacks[0].sides == sides
    plain = PlainSOAP(
        start,
        sides,
        1e-2,
        0.1 if len(shape) > 1 else 0,
        options.get("betas", (0.95, 0.95)),
    )
    step = stepper(optimizer, [p])
    scales = rng.uniform(0.1, 3, shape)
    for i in range(22):
        g = np.asarray(rng.standard_normal(shape) * scales, np.float32)
        step([g])
        plain.step(g, [Q.numpy()[0] for Q in optimizer.stacks[0].Q] if i == 0 else None)
    np.testing.assert_allclose(p.numpy(), plain.p, rtol=0, atol=1e-4)


SHAPES = ((6, 4), (6, 4), (5,), (6, 4), (5,))


def parameters(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(s).astype(np.float32)).clone().realize() for s in shapes]


def gradients(step, shapes=SHAPES):
    rng = np.random.default_rng([step, 1])
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(optimizer, params, steps):
    step = stepper(optimizer, params)
    for i in steps:
        step(gradients(i))
    return [p.numpy() for p in params]


@pytest.fixture(scope="module")
def straight():
    """The parameters after 13 steps."""
    return run(SOAP(params := parameters()), params, range(13))


def test_stacked_is_the_same_as_one_by_one(straight):
    together = parameters()
    assert [stack.members for stack in SOAP(together).stacks] == [[0, 1, 3], [2, 4]]
    for i in (1, 4):
        p = parameters()[i]
        step = stepper(SOAP([p]), [p])
        for n in range(13):
            step(gradients(n)[i : i + 1])
        np.testing.assert_allclose(p.numpy(), straight[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pause", [1, 10, 11])
def test_state_saves_and_loads_exactly(pause, straight):
    first = SOAP(params := parameters())
    half = run(first, params, range(pause))
    state = {name: t.numpy().copy() for name, t in first.state_dict().items()}
    resumed = [Tensor(p).clone().realize() for p in half]
    second = SOAP(resumed)
    second.load_state_dict(state)
    for ours, theirs in zip(run(second, resumed, range(pause, 13)), straight, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_foreign_state_is_refused():
    optimizer = SOAP(parameters())
    state = {name: t.numpy() for name, t in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "count"})
    with pytest.raises(ValueError, match=r"6x4\.Q0"):
        optimizer.load_state_dict(state | {"6x4.Q0": state["6x4.Q0"][:1]})


@pytest.mark.parametrize(("poison", "when"), [(np.nan, 0), (np.inf, 1), (1e20, 10)])
def test_a_gradient_that_is_not_finite_changes_nothing(poison, when, straight):
    """1e20: its square is not finite."""
    params = parameters()
    optimizer = SOAP(params)
    step = stepper(optimizer, params)
    for i in range(when):
        step(gradients(i))
    before = [t.numpy().copy() for t in (*params, *optimizer.state_dict().values())]
    grads = gradients(when)
    grads[1][2, 1] = poison
    step(grads)
    assert not optimizer.finite.item()
    after = [t.numpy() for t in (*params, *optimizer.state_dict().values())]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    # the following steps are those of a run without that gradient
    for i in range(when, 13):
        step(gradients(i))
    for p, theirs in zip(params, straight, strict=True):
        np.testing.assert_array_equal(p.numpy(), theirs)
    assert optimizer.finite.item()


@pytest.mark.slow
@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="compares two CPU devices")
def test_on_two_devices(straight):
    """Parameters and gradients whole on each of two devices: the same as on one."""
    devices = ("CPU", "CPU:1")
    params = parameters()
    for p in params:
        p.to_(devices)
    Tensor.realize(*params)
    optimizer = SOAP(params)
    with Tensor.train():
        for step in range(13):
            for p, g in zip(params, gradients(step), strict=True):
                p.grad = Tensor(g).shard(devices)
            optimizer.step()
    for ours, theirs in zip(params, straight, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-5)


def test_zero_and_rank_deficient_gradients():
    """An unused column or parameter does not move, apart from the first bases' rounding."""
    params = parameters()
    start = [p.numpy().copy() for p in params]
    optimizer = SOAP(params, weight_decay=0)
    step = stepper(optimizer, params)
    rng = np.random.default_rng(3)
    for _ in range(25):
        grads = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        grads[0][:, 2] = 0
        grads[1][:] = 0
        grads[3] = np.outer(grads[3][:, 0], grads[3][0])
        step(grads)
    after = [p.numpy() for p in params]
    assert all(np.isfinite(p).all() for p in after)
    np.testing.assert_allclose(after[0][:, 2], start[0][:, 2], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(after[1], start[1])
    assert np.abs(after[0] - start[0]).max() > 1e-3
    for Q in (Q.numpy() for stack in optimizer.stacks for Q in stack.Q):
        identity = np.broadcast_to(np.eye(Q.shape[1]), Q.shape)
        np.testing.assert_allclose(Q.swapaxes(1, 2) @ Q, identity, atol=1e-5)


def test_refresh_inside_a_jit_is_refused():
    params = parameters()
    optimizer = SOAP(params)

    @TinyJit
    def step(x):
        for p in params:
            p.grad = x + p * 0
        optimizer.step()

    with Tensor.train():
        step(Tensor([1.0]).realize())  # the first call is not captured
        with pytest.raises(RuntimeError, match="after the compiled function"):
            step(Tensor([1.0]).realize())


@pytest.mark.skipif(not has_cpu_kernels(Device.DEFAULT), reason="counts CPU kernels")
def test_moving_averages_are_updated_in_place():
    """Both moments and both Gram matrices: copying them would take four more kernels."""
    parameter = Tensor.ones(48, 33).contiguous().realize()
    optimizer = SOAP([parameter])
    parameter.grad = Tensor.ones(48, 33).contiguous().realize()
    with Tensor.train(), count_kernels() as count:
        Tensor.realize(*optimizer.schedule_step())
    assert count[0] <= 29


@pytest.mark.slow
def test_operations_of_a_step():
    """6mn(m+n) for each matrix, and at most a fifth more for the rest of the update.

    5mn(m+n) where the CPU's kernels compute half of each Gram matrix.
    """
    shapes = [(372, 372), (744, 372), (744, 372), (372,)]
    params = [Tensor.ones(*shape).contiguous().realize() for shape in shapes]
    optimizer = SOAP(params)
    for p in params:
        p.grad = Tensor.ones(*p.shape).contiguous().realize()
    with Tensor.train():
        GlobalCounters.reset()
        Tensor.realize(*optimizer.schedule_step())
    factor = 5 if has_cpu_kernels(Device.DEFAULT) else 6
    analytic = sum(factor * s[0] * s[1] * sum(s) for s in shapes if len(s) == 2)
    assert analytic <= GlobalCounters.global_ops <= 1.2 * analytic


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (1.0, 0.9)},
        {"precondition_frequency": 0},
        {"lr": -1},
        {"eps": 0},
        {"weight_decay": -1},
        {"max_precond_dim": -1},
    ],
)
def test_bad_options(options):
    with pytest.raises(
        ValueError, match=r"betas|frequency|learning rate|eps|weight_decay|max_precond"
    ):
        SOAP(parameters(), **options)


def test_docstring_example_learns():
    """The docstring's recipe, on another model."""
    Tensor.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.Linear(16, 1)]
    params = [t for layer in layers for t in (layer.weight, layer.bias)]
    optimizer = SOAP(params, lr=3e-2)
    x = Tensor(np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)).realize()
    y = (x[:, :1] * x[:, 1:2]).realize()

    @TinyJit
    def train_step(x, y):
        loss = (layers[1](layers[0](x).tanh()) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        return loss.realize(*optimizer.schedule_step())

    losses = []
    with Tensor.train():
        for _ in range(70):
            losses.append(train_step(x, y).item())
            optimizer.refresh()
    assert losses[-1] < 0.1 * losses[0], losses
