"""SOAP against the recorded numbers, a plain NumPy rendering, and awkward gradients."""

from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit

from pico_tg import SOAP
from pico_tg.kernels import write_into

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("jit", [False, True])
def test_recorded_trajectories(jit):
    """35 steps of five parameters; (12, 20) from its recorded first bases."""
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
        for step in range(35):
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
