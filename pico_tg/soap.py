"""SOAP: Adam, run in the slowly turning eigenbasis of Shampoo's preconditioner.

Source: "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321.

For a matrix with gradient G [m, n], two running averages GG of G Gᵀ [m, m] and Gᵀ G [n, n] are
kept, and for each an orthonormal basis Q of (nearly) its eigenvectors. Adam's moments live in that
basis: G is turned into it, the update is turned back. The bases follow by one step of orthogonal
iteration, Q = qr(GG Q), every few steps.

Shape letters: Z parameters of one shape, [m, n, …] that shape, s one of its sides.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from . import linalg
from .ops import bmm
from .runtime import in_host_memory, is_capturing, read, write_all, write_into


class SOAP(Optimizer):
    """SOAP (arXiv 2409.11321) as a tinygrad optimizer, for parameters of any number of dimensions.

    - params: float32 tensors; those of equal shape are stacked and share kernels
    - lr: learning rate; `self.lr` is a Tensor [1] that may be assigned between steps
    - betas: decay of the first and the second moment
    - shampoo_beta: decay of GG; None: betas[1]
    - eps: added to the root of the second moment
    - weight_decay: decoupled, p -= lr * weight_decay * p after the update; only of parameters of
      two or more dimensions unless `decay_vectors`
    - precondition_frequency: updates between two refreshes of the bases
    - max_precond_dim: a longer side is not rotated
    - precondition_1d: rotate vectors too; otherwise they get plain Adam
    - normalize_grads: scale each parameter's update to a root mean square of 1 before lr
    - correct_bias: Adam's bias correction

    The first gradient only initialises GG and Q; parameters move from the second on. A gradient
    that is not finite changes nothing: `self.finite` (a bool Tensor [1]) says so after each step.

    `step()` does everything. Under TinyJit, call `schedule_step()` and realize what it returns
    inside the compiled function, and `refresh()` after each call of it:

        @TinyJit
        def train_step(x, y):
            loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            return loss.realize(*optimizer.schedule_step())

        loss = train_step(x, y)
        optimizer.refresh()

    Cost of a step for a matrix [m, n]: 6 m n (m + n) operations on the device. `refresh()` reads
    two numbers, and every precondition_frequency steps moves GG, Q and both moments to the host and
    the latter three back (on a CPU it works where they are). There NumPy does a product and a QR,
    2 s^3 and 8/3 s^3 operations a side of s, and 4 m n (m + n) to turn the momentum.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        decay_vectors: bool = False,
    ) -> None:
        super().__init__(params, lr, fused=False)
        self.betas = betas
        self.shampoo_beta = betas[1] if shampoo_beta is None else shampoo_beta
        for name, beta in (
            ("betas", betas[0]),
            ("betas", betas[1]),
            ("shampoo_beta", shampoo_beta),
        ):
            if beta is not None and not 0 <= beta < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {beta}")
        for name, value, least in (
            ("precondition_frequency", precondition_frequency, 1),
            ("max_precond_dim", max_precond_dim, 0),
            ("weight_decay", weight_decay, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, not {eps}")
        self.eps, self.weight_decay, self.decay_vectors = eps, weight_decay, decay_vectors
        self.precondition_frequency = precondition_frequency
        self.normalize_grads, self.correct_bias = normalize_grads, correct_bias
        # gradients averaged in; how many of them the last refresh had seen
        self.count = self._zeros(1, dtype=np.int32)
        self.refreshed = self._zeros(1, dtype=np.int32)
        self.finite = self._zeros(1, dtype=np.bool_)
        shapes = dict.fromkeys(p.shape for p in self.params)
        self.stacks = [
            Stack(
                self,
                [i for i, p in enumerate(self.params) if p.shape == shape],
                shape,
                [
                    side
                    for side, size in enumerate(shape)
                    if 1 < size <= max_precond_dim and (len(shape) > 1 or precondition_1d)
                ],
            )
            for shape in shapes
        ]
        most = max(len(stack.members) for stack in self.stacks)
        self.numbers = [self._place(np.array([z], np.int32)) for z in range(most)]

    def _zeros(self, *shape: int, dtype: type = np.float32) -> Tensor:
        return self._place(np.zeros(shape, dtype))

    def _place(self, values: np.ndarray) -> Tensor:
        """A realised tensor on the parameters' device or devices."""
        if isinstance(self.device, tuple):
            return Tensor(values).shard(self.device).contiguous().realize().is_param_(False)
        return Tensor(values, device=self.device).clone().realize().is_param_(False)

    def _step(self, params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Called by `schedule_step`: what to subtract from each parameter, and the state."""
        stacked = [
            Tensor.stack(*[grads[i].cast(dtypes.float32) for i in stack.members]).contiguous()
            for stack in self.stacks
        ]
        finite = all_finite(stacked).reshape(1)
        self.finite.assign(finite)
        moves = finite & (self.count > 0)  # the first gradient moves nothing
        t = self.count.maximum(1).cast(dtypes.float32)
        rate = self.lr
        if self.correct_bias:
            corrections = [1 - (t * math.log(beta)).exp() if beta else 1 for beta in self.betas]
            rate = rate * (corrections[1] ** 0.5) / corrections[0]
        moves, rate = moves.contiguous(), rate.contiguous()
        differences: list[Tensor] = [None] * len(params)
        state = [self.finite]
        for stack, gradient in zip(self.stacks, stacked, strict=True):
            update = stack.step(gradient, finite, moves)
            decays = self.weight_decay and (len(stack.shape) > 1 or self.decay_vectors)
            for z, i in enumerate(stack.members):
                # by a number in memory, not in the code: all members then share one kernel
                number = self.numbers[z].reshape(*[1] * update.ndim).expand(1, *stack.shape)
                difference = rate * update.gather(0, number).reshape(*(stack.shape or (1,)))
                if decays:
                    left = params[i].detach() - difference
                    difference = difference + self.lr * self.weight_decay * left
                difference = moves.where(difference, 0).reshape(stack.shape)
                differences[i] = difference.cast(params[i].dtype)
            state += stack.tensors().values()
        self.count.assign(self.count + finite.cast(dtypes.int32))
        return differences, [*state, self.count]

    def step(self) -> None:
        """One optimization step from the parameters' `.grad`, refresh included."""
        super().step()
        self.refresh()

    def refresh(self) -> bool:
        """Renew the bases if that is due; whether it was. To be called after each step.

        Raises RuntimeError inside a function that TinyJit captures, where it would be lost.
        """
        if is_capturing():
            raise RuntimeError(
                "SOAP.refresh() runs on the host: inside a TinyJit use schedule_step(), "
                "and call refresh() after the compiled function"
            )
        count, refreshed = int(read(self.count)[0]), int(read(self.refreshed)[0])
        updates = count - 1
        due = refreshed == 0 or updates % self.precondition_frequency == 0
        if count == 0 or count == refreshed or not due:
            return False
        # the longest first: what is left at the end should be short
        stacks = sorted(self.stacks, key=lambda stack: -max(stack.shape, default=0))
        linalg.parallel(task for s in stacks for task in s.refresh(first=refreshed == 0))
        for stack in stacks:
            stack.finish_refresh()
        write_into(self.refreshed, np.array([count], np.int32))
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """All state by name: counts, moments, GG and Q, stacked over parameters of one shape."""
        state = {"count": self.count, "refreshed": self.refreshed}
        for stack in self.stacks:
            shape = "x".join(map(str, stack.shape)) or "scalar"
            state |= {f"{shape}.{name}": tensor for name, tensor in stack.tensors().items()}
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Overwrite the state. Raises ValueError on a name, shape or dtype that does not fit."""
        write_all(self.state_dict(), state)


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Whether all are finite, and their squares: one bool."""
    # contiguous: else one thread of a GPU adds the parts of all sums up, in a kernel whose name
    # tells all their lengths (pocl takes it for a file's, and no file's may be that long)
    sums = [g.square().sum().contiguous() for g in gradients]
    return Tensor.stack(*sums).sum().isfinite().contiguous()


class Stack:
    """The state of all parameters of one shape: moments [Z, *shape]; GG and Q [Z, s, s] a side."""

    def __init__(
        self, optimizer: SOAP, members: list[int], shape: tuple[int, ...], sides: list[int]
    ) -> None:
        self.optimizer, self.members, self.shape, self.sides = optimizer, members, shape, sides
        Z = len(members)
        self.exp_avg = optimizer._zeros(Z, *shape)
        self.exp_avg_sq = optimizer._zeros(Z, *shape)
        self.GG = [optimizer._zeros(Z, shape[side], shape[side]) for side in sides]
        # until the first refresh: no rotation
        self.Q = [
            optimizer._place(np.tile(np.eye(shape[side], dtype=np.float32), (Z, 1, 1)))
            for side in sides
        ]

    def tensors(self) -> dict[str, Tensor]:
        bases = {f"GG{side}": GG for side, GG in zip(self.sides, self.GG, strict=True)}
        bases |= {f"Q{side}": Q for side, Q in zip(self.sides, self.Q, strict=True)}
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq} | bases

    def step(self, gradient: Tensor, finite: Tensor, moves: Tensor) -> Tensor:
        """Gradients [Z, *shape] -> updates [Z, *shape] before the learning rate."""
        optimizer = self.optimizer
        beta1, beta2 = optimizer.betas
        rotated = gradient
        for side, Q in zip(self.sides, self.Q, strict=True):
            rotated = _turn(rotated, side, Q, back=False)
        _lerp(self.exp_avg, rotated, 1 - beta1, moves)
        _lerp(self.exp_avg_sq, rotated.square(), 1 - beta2, moves)
        update = (self.exp_avg / (self.exp_avg_sq.sqrt() + optimizer.eps)).contiguous()
        for side, Q in zip(self.sides, self.Q, strict=True):
            update = _turn(update, side, Q, back=True)
        for side, GG in zip(self.sides, self.GG, strict=True):
            _lerp(GG, _outer(gradient, side), 1 - optimizer.shampoo_beta, finite)
        if optimizer.normalize_grads:
            axes = tuple(range(1, update.ndim))
            size = update.square().mean(axis=axes, keepdim=True).sqrt() if axes else update.abs()
            update = update / (size + 1e-30)
        return update.contiguous()

    def refresh(self, first: bool) -> list[Callable[[], None]]:
        """Tasks, one a parameter, that renew its bases from GG and turn its moments into them."""
        if not self.sides:
            return []
        turned = (self.exp_avg, self.exp_avg_sq, *self.Q)
        # where the host sees the device's memory, the tasks work right there
        self.host = [read(x) if in_host_memory(x) else read(x).copy() for x in turned]
        GGs = [read(GG) for GG in self.GG]
        return [
            partial(_refresh, self.sides, [GG[z] for GG in GGs], [x[z] for x in self.host], first)
            for z in range(len(self.members))
        ]

    def finish_refresh(self) -> None:
        """Write back what the tasks have computed."""
        if self.sides:
            for tensor, values in zip(
                (self.exp_avg, self.exp_avg_sq, *self.Q), self.host, strict=True
            ):
                if not in_host_memory(tensor):
                    write_into(tensor, values)
            del self.host


def _refresh(sides: list[int], GGs: list[np.ndarray], host: list[np.ndarray], first: bool) -> None:
    """The refresh of one parameter, in place: `host` is exp_avg, exp_avg_sq and a Q for each GG."""
    exp_avg, exp_avg_sq, *Qs = host
    for side, GG, Q in zip(sides, GGs, Qs, strict=True):
        scale = np.abs(GG).max()
        if scale == 0:  # no gradient yet
            continue
        if first:  # the moments are zero
            Q[:] = linalg.eigenvectors(GG / scale)
            continue
        image = (GG / scale) @ Q
        # by the estimated eigenvalues, diag(Qᵀ GG Q), descending
        order = np.argsort(-np.einsum("ij,ij->j", Q, image), kind="stable")
        new = linalg.qr(image[:, order])
        exp_avg_sq[:] = np.take(exp_avg_sq, order, axis=side)
        moment = np.moveaxis(exp_avg, side, 0)
        turned = new.T @ (Q @ moment.reshape(len(Q), -1))
        exp_avg[:] = np.moveaxis(turned.reshape(moment.shape), 0, side)
        Q[:] = new


def _lerp(average: Tensor, value: Tensor, weight: float, when: Tensor) -> None:
    """average += (value - average) * weight, where the one bool `when` holds."""
    when = when.reshape(*[1] * average.ndim)
    average.assign(when.where(average + (value - average) * weight, average))


def _front(x: Tensor, side: int) -> tuple[Tensor, list[int]]:
    """x [Z, *shape] with `side` first and the rest flattened, [Z, s, rest]; and the axes' order."""
    axes = [0, side + 1, *[a for a in range(1, x.ndim) if a != side + 1]]
    return x.permute(axes).reshape(x.shape[0], x.shape[side + 1], -1), axes


def _turn(x: Tensor, side: int, Q: Tensor, back: bool) -> Tensor:
    """x [Z, *shape] times Q [Z, s, s] along `side`: into the basis, or `back` from it."""
    if side == x.ndim - 2:  # the last: rows of x times Q
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return bmm(rows, Q, trans_b=back).reshape(x.shape)
    columns, axes = _front(x, side)
    turned = bmm(Q, columns, trans_a=not back)
    return turned.reshape([x.shape[a] for a in axes]).permute(
        [axes.index(a) for a in range(x.ndim)]
    )


def _outer(x: Tensor, side: int) -> Tensor:
    """The products of x [Z, *shape] with itself over all axes but `side`: [Z, s, s]."""
    if side == x.ndim - 2:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return bmm(rows, rows, trans_a=True)
    columns, _ = _front(x, side)
    return bmm(columns, columns, trans_b=True)
