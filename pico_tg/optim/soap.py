"""SOAP: Adam in the slowly changing eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

For a weight W [m, n] with gradient G, SOAP keeps moving averages of the Gram matrices G Gᵀ [m, m]
and Gᵀ G [n, n] (the paper's L and R; here GG of side 0 and 1), and for each an orthonormal basis Q
that approximates its eigenvectors. Adam's moments M and V live in these bases (`Stack.update`). A
power iteration follows the eigenvectors every few steps (`_refresh`). Two details come from the
authors' code, not from the paper: the first gradient only initializes GG and Q, and a refresh sorts
the columns of Q by their estimated eigenvalues.

Shape letters: Z parameters of one shape [m, n], which are stacked; s the size of one side.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.optim import Optimizer

from ..backend.runtime import (
    in_host_memory,
    is_capturing,
    read,
    without_views,
    write_all,
    write_into,
)
from ..matmul import bmm
from . import linalg


class SOAP(Optimizer):
    """SOAP (arXiv 2409.11321) as a tinygrad optimizer. Plain Adam updates all but matrices.

    - params: float32 tensors; those of equal shape are stacked and share kernels
    - lr: learning rate; `self.lr` is a Tensor [1] that may be assigned between steps
    - betas: decay of the first and the second moment; GG decays as the second
    - eps: added to the root of the second moment
    - weight_decay: decoupled, p -= lr * weight_decay * p after the update; only for parameters of
      two or more dimensions
    - precondition_frequency: updates between two refreshes of the bases
    - max_precond_dim: sides longer than this are not projected

    The first gradient only initializes GG and Q; parameters change from the second step on. A step
    whose gradients are not all finite changes nothing: after each step, `self.finite` (a bool
    Tensor [1]) tells whether the gradients were finite. Raises ValueError on a bad option.

    `step()` includes the refresh. Under TinyJit, call `schedule_step()` and realize its result
    inside the compiled function, and call `refresh()` after each call of that function:

        @TinyJit
        def train_step(x, y):
            loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            return loss.realize(*optimizer.schedule_step())

        loss = train_step(x, y)
        optimizer.refresh()

    Cost of a step for a matrix [m, n]: 6 m n (m + n) FLOPs on the device; 5 m n (m + n) with the
    kernels of cpu/, which compute half of each Gram matrix. `refresh()` reads two numbers from the
    device; every precondition_frequency steps it also copies GG, Q and both moments to the host,
    and Q and the moments back (on a CPU it works in place). NumPy then spends 2 s³ FLOPs on a
    product and 8/3 s³ on a QR for each side, and 4 m n (m + n) on the momentum.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
    ) -> None:
        super().__init__(params, lr, fused=False)
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be at least 0 and below 1, not {beta}")
        for name, value, minimum in (
            ("precondition_frequency", precondition_frequency, 1),
            ("max_precond_dim", max_precond_dim, 0),
            ("weight_decay", weight_decay, 0),
        ):
            if not value >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {value}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, not {eps}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.precondition_frequency = precondition_frequency
        self.count = self._zeros(1, dtype=np.int32)  # gradients averaged into GG
        self.refreshed = self._zeros(1, dtype=np.int32)  # `count` at the last refresh
        self.finite = self._zeros(1, dtype=np.bool_)
        self.stacks = []
        for shape in dict.fromkeys(p.shape for p in self.params):
            members = [i for i, p in enumerate(self.params) if p.shape == shape]
            matrix = len(shape) == 2
            sides = [i for i, s in enumerate(shape) if matrix and 1 < s <= max_precond_dim]
            self.stacks.append(Stack(self, members, shape, sides))
        largest = max(len(stack.members) for stack in self.stacks)
        self.indices = [self._tensor(np.array([z], np.int32)) for z in range(largest)]

    def _zeros(self, *shape: int, dtype: type = np.float32) -> Tensor:
        return self._tensor(np.zeros(shape, dtype))

    def _tensor(self, values: np.ndarray) -> Tensor:
        """A realized tensor on the device, or whole on each of the devices, of the parameters."""
        if isinstance(self.device, tuple):
            return Tensor(values).shard(self.device).contiguous().realize().is_param_(False)
        return Tensor(values, device=self.device).clone().realize().is_param_(False)

    def _step(self, params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Called by `schedule_step`: the deltas to subtract from the parameters, and the state."""
        stacked = [stack.stacked(grads) for stack in self.stacks]
        finite = all_finite(stacked).reshape(1)
        self.finite.assign(finite)
        # the first gradient updates nothing
        updating = (finite & (self.count > 0)).contiguous()
        rate = self._corrected_rate().contiguous()
        deltas: list[Tensor] = [None] * len(params)
        state = [self.finite]
        for stack, gradient in zip(self.stacks, stacked, strict=True):
            update = stack.update(gradient, finite, updating)
            for z, i in enumerate(stack.members):
                delta = rate * stack.member(update, z)
                if self.weight_decay and len(stack.shape) > 1:
                    delta = delta + self.lr * self.weight_decay * (params[i].detach() - delta)
                delta = updating.where(delta, 0).reshape(stack.shape)
                deltas[i] = delta.cast(params[i].dtype)
            state += stack.tensors().values()
        self.count.assign(self.count + finite.cast(dtypes.int32))
        return deltas, [*state, self.count]

    def _corrected_rate(self) -> Tensor:
        """The learning rate [1] with Adam's correction of its moments' start from zero."""
        t = self.count.maximum(1).cast(dtypes.float32)
        corrections = [1 - (t * math.log(beta)).exp() if beta else 1 for beta in self.betas]
        return self.lr * (corrections[1] ** 0.5) / corrections[0]

    def step(self) -> None:
        """One optimization step from the parameters' `.grad`, refresh included."""
        super().step()
        self.refresh()

    def refresh(self) -> bool:
        """Refresh the bases if a refresh is due; returns whether it was. To be called each step.

        Raises RuntimeError while TinyJit captures, since replays would not repeat work on the host.
        """
        if is_capturing():
            raise RuntimeError(
                "SOAP.refresh() runs on the host: inside a TinyJit use schedule_step(), "
                "and call refresh() after the compiled function"
            )
        count, refreshed = int(read(self.count)[0]), int(read(self.refreshed)[0])
        first = refreshed == 0
        due = first or (count - 1) % self.precondition_frequency == 0
        if count == refreshed or not due:
            return False
        # the longest tasks first, so that the threads end at nearly the same time
        stacks = sorted(self.stacks, key=lambda stack: -max(stack.shape, default=0))
        linalg.parallel(task for stack in stacks for task in stack.refresh(first))
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
    """Whether all gradients, and the sums of their squares, are finite: one bool."""
    # In stages of many short sums: a GPU would compute one long sum, or one kernel of several sums,
    # in a single thread. The first stage sums the rows.
    squares = [g.square() for g in gradients]
    sums = [(x.sum(axis=-1) if x.ndim > 1 else x).flatten().contiguous() for x in squares]
    sums = Tensor.cat(*sums)
    width = math.isqrt(len(sums)) + 1
    sums = sums.pad((0, width * width - len(sums))).contiguous().reshape(width, width)
    return sums.sum(axis=0).contiguous().sum().isfinite().contiguous()


class Stack:
    """State of the parameters of one shape: moments [Z, *shape]; GG and Q [Z, s, s] by side."""

    def __init__(
        self, optimizer: SOAP, members: list[int], shape: tuple[int, ...], sides: list[int]
    ) -> None:
        self.optimizer, self.members, self.shape, self.sides = optimizer, members, shape, sides
        Z = len(members)
        self.exp_avg = optimizer._zeros(Z, *shape)
        self.exp_avg_sq = optimizer._zeros(Z, *shape)
        self.GG = [optimizer._zeros(Z, shape[side], shape[side]) for side in sides]
        # the identity until the first refresh
        self.Q = [
            optimizer._tensor(np.tile(np.eye(shape[side], dtype=np.float32), (Z, 1, 1)))
            for side in sides
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        bases = {f"GG{side}": GG for side, GG in zip(self.sides, self.GG, strict=True)}
        bases |= {f"Q{side}": Q for side, Q in zip(self.sides, self.Q, strict=True)}
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq} | bases

    def update(self, gradient: Tensor, finite: Tensor, updating: Tensor) -> Tensor:
        """Gradients [Z, *shape] -> updates [Z, *shape], which the learning rate will multiply.

        GG changes if `finite`, the moments if `updating`; both are bool [1].
        """
        beta1, beta2 = self.optimizer.betas
        projected = gradient  # Q0ᵀ G Q1
        for side, Q in zip(self.sides, self.Q, strict=True):
            projected = _project(projected, side, Q)
        grams = [_gram(gradient, side) for side in self.sides]
        # M and V: moving averages of projected and projected²
        _lerp(self.exp_avg, projected, 1 - beta1, updating)
        _lerp(self.exp_avg_sq, projected.square(), 1 - beta2, updating)
        # Q0 (M / (sqrt(V) + eps)) Q1ᵀ
        update = (self.exp_avg / (self.exp_avg_sq.sqrt() + self.optimizer.eps)).contiguous()
        for side, Q in zip(self.sides, self.Q, strict=True):
            update = _project(update, side, Q, back=True)
        # GG: moving averages of G Gᵀ and Gᵀ G
        for GG, gram in zip(self.GG, grams, strict=True):
            _lerp(GG, gram, 1 - beta2, finite)
        return update.contiguous()

    def stacked(self, grads: list[Tensor]) -> Tensor:
        """The members' gradients among those of all parameters: float32 [Z, *shape]."""
        stacked = Tensor.stack(*[grads[i].cast(dtypes.float32) for i in self.members])
        # for one realized gradient, `contiguous` makes a view of its buffer, and the planner of
        # TinyJit in tinygrad 0.13, which does not see views, gives the buffer to others (GPUs
        # trained on wrong gradients; test_training.test_steps_without_cpu_kernels)
        whole = without_views(stacked)
        return stacked.contiguous() if whole is stacked else whole

    def member(self, stacked: Tensor, z: int) -> Tensor:
        """Member z of stacked [Z, *shape] -> [*shape], or [1] for a scalar."""
        # an index in memory, unlike a constant, lets all members share one kernel
        member = Tensor.arange(len(stacked), device=stacked.device) == self.optimizer.indices[z]
        member = member.reshape(-1, *[1] * len(self.shape))
        return member.where(stacked, 0).sum(axis=0).reshape(*(self.shape or (1,)))

    def refresh(self, first: bool) -> list[Callable[[], None]]:
        """Tasks, one for each parameter, that refresh its bases and project its moments again."""
        if not self.sides:
            return []
        changed = (self.exp_avg, self.exp_avg_sq, *self.Q)
        # where the host can read the device's memory, the tasks work in place
        self.host = [read(x) if in_host_memory(x) else read(x).copy() for x in changed]
        GGs = [read(GG) for GG in self.GG]
        return [
            partial(_refresh, self.sides, [GG[z] for GG in GGs], [x[z] for x in self.host], first)
            for z in range(len(self.members))
        ]

    def finish_refresh(self) -> None:
        """Copy the results of the tasks to the device."""
        if self.sides:
            changed = (self.exp_avg, self.exp_avg_sq, *self.Q)
            for tensor, values in zip(changed, self.host, strict=True):
                if not in_host_memory(tensor):
                    write_into(tensor, values)
            del self.host


def _refresh(sides: list[int], GGs: list[np.ndarray], host: list[np.ndarray], first: bool) -> None:
    """Refresh one parameter in place; `host` holds exp_avg, exp_avg_sq and a Q for each GG."""
    exp_avg, exp_avg_sq, *Qs = host
    for side, GG, Q in zip(sides, GGs, Qs, strict=True):
        scale = np.abs(GG).max()
        if scale == 0:  # all gradients were zero
            continue
        if first:  # the moments are zero
            Q[:] = linalg.eigenvectors(GG / scale)
            continue
        product = (GG / scale) @ Q  # the new basis is qr(GG Q)
        # by the estimated eigenvalues, diag(Qᵀ GG Q), descending
        order = np.argsort(-np.einsum("ij,ij->j", Q, product), kind="stable")
        new_Q = linalg.qr(product[:, order])
        exp_avg_sq[:] = np.take(exp_avg_sq, order, axis=side)
        moment = exp_avg if side == 0 else exp_avg.T
        projected = new_Q.T @ (Q @ moment)
        exp_avg[:] = projected if side == 0 else projected.T
        Q[:] = new_Q


def _lerp(average: Tensor, value: Tensor, weight: float, condition: Tensor) -> None:
    """average += (value - average) * weight, if `condition` (bool [1])."""
    condition = condition.reshape(*[1] * average.ndim)
    average.assign(condition.where(average + (value - average) * weight, average))


def _project(x: Tensor, side: int, Q: Tensor, back: bool = False) -> Tensor:
    """x [Z, m, n] in the basis Q [Z, s, s] of a side: Qᵀ x or x Q; `back`: Q x or x Qᵀ."""
    return bmm(Q, x, trans_a=not back) if side == 0 else bmm(x, Q, trans_b=back)


def _gram(x: Tensor, side: int) -> Tensor:
    """x [Z, m, n] -> x xᵀ [Z, m, m] for side 0, xᵀ x [Z, n, n] for side 1."""
    return bmm(x, x, trans_b=True) if side == 0 else bmm(x, x, trans_a=True)
