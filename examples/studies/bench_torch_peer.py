"""Compare pico_tg with PyTorch: milliseconds of training the same model.

    pip install -e '.[bench]'
    python examples/studies/bench_torch_peer.py --quick     (minutes, most of them compiling)
    python examples/studies/bench_torch_peer.py             (half an hour, 7 GB of memory)

PyTorch runs eagerly and compiled (torch.compile needs a C++ compiler), in fp32 and, if the
processor multiplies bf16, with autocast. A round measures each of these and pico_tg in turn, in one
process, and the table shows the medians of the rounds: of forward and backward, and of the train
step with SOAP (the mean of ten steps, one of which refreshes the eigenbases). A ratio is the time
of PyTorch's fastest variant of a precision divided by the time of pico_tg, which computes in fp32.
Before that, the script checks that both compute the same loss and the same updates with SOAP, and
exits if not. CPU_COUNT is the number of threads of both; `--busy` measures beside a process that
keeps one core busy.
"""

import argparse
import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tinygrad import Tensor
from tinygrad.helpers import CPU_COUNT
from tinygrad.nn.state import get_state_dict
from torch import nn

import pico_tg
from pico_tg import SOAP, Config, TrainSettings
from pico_tg.costs import gemm_rate
from pico_tg.tools.bench import ForwardBackward
from pico_tg.training import TrainStep

EPS = 2.0**-23
PHI = 1.618
PUBLISHED = {"dim": 372, "latent_num_blocks": 8, "fb_att_window_size": 32}
SMALL = {
    "dim": 96, "att_q_heads": 6, "att_kv_heads": 2, "latent_num_blocks": 2, "next_tokens": 4,
}  # fmt: skip
CASES = {  # sizes of the model (otherwise the defaults of Config), context, windows
    "published-1024": (PUBLISHED, 1024, 1),
    "published-6144": (PUBLISHED, 6144, 1),
    "quickstart-4x512": (SMALL, 512, 4),
}
LR = 1e-5  # small: there is nothing to learn in random bytes


def blocks_of(N: int, window: int) -> tuple[int, int, int]:
    """Queries of a block, keys before them that it sees, and number of blocks."""
    window = min(window, N - 1)
    step = min(window, max(16, math.ceil(window / 4)))
    return step, math.ceil(window / step) * step, math.ceil(N / step)


@functools.cache
def band(N: int, window: int, heads: int, kv_heads: int) -> torch.Tensor:
    """ALiBi's term where a key is visible, -inf elsewhere: [K, b, G*q, s] for `banded`."""
    step, lookback, blocks = blocks_of(N, window)
    i = torch.arange(blocks * step).view(blocks, 1, step, 1)
    j = torch.arange(-lookback, step) + step * torch.arange(blocks).view(blocks, 1, 1, 1)
    distance = i - j
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1)).view(-1, 1, 1)
    visible = (distance >= 0) & (distance <= window) & (j >= 0)
    mask = torch.where(visible, -slopes * distance, -math.inf)  # (b, H, q, s)
    return mask.view(blocks, kv_heads, -1, lookback + step).transpose(0, 1).contiguous()


def banded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, mask: torch.Tensor
) -> torch.Tensor:
    """Attention to `window` bytes before each in O(N * window): q [B, H, N, C], k, v [B, K, N, C].

    Blocks of queries see their own keys and those of a window before them. The G query heads that
    share keys are rows of one matrix.
    """
    B, H, N, C = q.shape
    K = k.shape[1]
    step, lookback, blocks = blocks_of(N, window)
    q = F.pad(q, (0, 0, 0, blocks * step - N)).view(B, K, H // K, blocks, step, C)
    q = q.transpose(2, 3).reshape(B, K, blocks, -1, C)  # (B, K, b, G*q, C)
    padding = (0, 0, lookback, blocks * step - N)
    k, v = (F.pad(x, padding).unfold(2, lookback + step, step) for x in (k, v))  # (…, C, s)
    weights = (q @ k / math.sqrt(C) + mask.to(q.dtype)).softmax(-1)
    out = (weights @ v.transpose(-1, -2)).view(B, K, blocks, H // K, step, C).transpose(2, 3)
    return out.reshape(B, H, blocks * step, C)[:, :, :N]


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight


class Attention(nn.Module):
    def __init__(self, c: Config, window: int, N: int) -> None:
        super().__init__()
        self.c, self.window = c, window
        self.mask = band(N, window, c.att_q_heads, c.att_kv_heads)
        heads = c.att_q_heads + 2 * c.att_kv_heads
        self.fused_qkv = nn.Linear(c.dim, heads * c.head_dim, bias=False)
        self.proj = nn.Linear(c.att_q_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, (B, N, _) = self.c, x.shape
        heads = self.fused_qkv(x).view(B, N, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.att_q_heads, c.att_kv_heads, c.att_kv_heads], 1)
        return self.proj(banded(q, k, v, self.window, self.mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(dim, n * dim, bias=False) for n in (2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, c: Config, window: int, N: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim), RMSNorm(c.dim)
        self.att, self.glu = Attention(c, window, N), SwiGLU(c.dim)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.att(self.norm1(h))
        return h + self.glu(self.norm2(h))


class Blocks(nn.Module):
    def __init__(self, c: Config, count: int, window: int, N: int, router: bool = False) -> None:
        super().__init__()
        if router:
            self.router = nn.Linear(c.dim, 1, bias=False)
        self.blocks = nn.Sequential(*[Block(c, window, N) for _ in range(count)])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.blocks(h)


class Pico(nn.Module):
    def __init__(self, c: Config, N: int) -> None:
        """N: bytes of a window, without the targets after it."""
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(256, c.dim)
        self.fb_in, self.fb_out = (
            Blocks(c, c.fb_num_blocks, c.fb_att_window_size, N) for _ in range(2)
        )
        window, slots = c.latent_att_window_size, c.capacity(N)
        self.latent = Blocks(c, c.latent_num_blocks, window, slots, router=True)
        self.norm = RMSNorm(c.dim)
        self.unembedding = nn.Linear(c.dim, c.next_tokens * 256)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """The loss of windows [B, N + T]."""
        c, N = self.c, windows.shape[1] - self.c.next_tokens
        h = self.fb_in(self.embedding(windows[:, :N]))
        z = self.latent.router(h).squeeze(-1)
        chosen = z.topk(c.capacity(N), 1).indices.sort(1).values
        index = chosen.unsqueeze(2).expand(-1, -1, c.dim)
        selected = h.gather(1, index)
        weight = z.gather(1, chosen).sigmoid().unsqueeze(2)
        h = h.scatter_add(1, index, ((self.latent(selected) - selected) * weight).to(h.dtype))
        logits = self.unembedding(self.norm(self.fb_out(h))).float()
        targets = windows[:, 1:].unfold(1, c.next_tokens, 1)  # (B, N, T)
        each = F.cross_entropy(logits.view(-1, 256), targets.flatten(), reduction="none")
        each = each.view(-1, c.next_tokens).mean(0)
        share = PHI ** torch.arange(c.next_tokens - 1, -1, -1)
        wanted = torch.zeros_like(z).scatter(1, chosen, 1.0)
        aux = F.binary_cross_entropy_with_logits(z.float(), wanted.float())
        return 0.9 * (each * share / share.sum()).sum() + 0.1 * aux


class TorchSOAP:
    """SOAP (arXiv 2409.11321) with the defaults of pico_tg.SOAP, for matrices and vectors."""

    BETA, EPS = 0.95, 1e-8  # both moments and GG have the same decay

    def __init__(self, params: list[nn.Parameter], weight_decay: float) -> None:
        self.params, self.weight_decay = params, weight_decay
        self.precondition_frequency = 10
        self.count = 0  # the gradients averaged into GG
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in params] for _ in range(2))
        # plain Adam for vectors
        self.GG = [[torch.zeros(s, s) for s in p.shape if p.ndim > 1] for p in params]
        self.Q: list[list[torch.Tensor]] = [[] for _ in params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """The first gradient only initializes GG and Q."""
        beta, t = self.BETA, self.count
        self.count += 1
        for i, (p, GG) in enumerate(zip(self.params, self.GG, strict=True)):
            if t > 0:
                m, v = self.exp_avg[i], self.exp_avg_sq[i]
                projected = self.project(i, p.grad)
                m.lerp_(projected, 1 - beta)
                v.lerp_(projected.square(), 1 - beta)
                update = self.project(i, m / (v.sqrt() + self.EPS), back=True)
                p.sub_(update, alpha=lr * (1 - beta**t) ** 0.5 / (1 - beta**t))
                if GG:
                    p.mul_(1 - lr * self.weight_decay)
            if GG:
                GG[0].lerp_(p.grad @ p.grad.T, 1 - beta)
                GG[1].lerp_(p.grad.T @ p.grad, 1 - beta)
                if t == 0:
                    self.Q[i] = [torch.linalg.eigh(S).eigenvectors.flip(1) for S in GG]
                elif t % self.precondition_frequency == 0:
                    self.refresh(i)

    def project(self, i: int, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        if not self.Q[i]:
            return x
        Q0, Q1 = self.Q[i]
        return Q0 @ x @ Q1.T if back else Q0.T @ x @ Q1

    def refresh(self, i: int) -> None:
        """A power iteration of each basis, its columns sorted by their estimated eigenvalues."""
        moment = self.project(i, self.exp_avg[i], back=True)
        for side, (GG, Q) in enumerate(zip(self.GG[i], self.Q[i], strict=True)):
            product = GG @ Q
            order = (Q * product).sum(0).argsort(descending=True)
            self.Q[i][side] = torch.linalg.qr(product[:, order]).Q
            self.exp_avg_sq[i] = self.exp_avg_sq[i].index_select(side, order)
        self.exp_avg[i] = self.project(i, moment)


class TorchSide:
    """One variant of PyTorch; all variants share the model and the optimizer."""

    def __init__(self, model: Pico, optimizer: TorchSOAP, data: np.ndarray, variant: str) -> None:
        self.model, self.optimizer = model, optimizer
        self.bf16 = "bf16" in variant
        self.loss = torch.compile(model) if "compiled" in variant else model
        self.windows = torch.tensor(data).long()

    def forward_backward(self) -> float:
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.windows)
        loss.backward()
        return loss.item()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step(LR)


class PicoSide:
    def __init__(self, config: Config, data: np.ndarray) -> None:
        sizes = {"context_len": data.shape[1] - config.next_tokens, "batch_size": len(data)}
        self.model, self.data = pico_tg.Pico(config, seed=0), data
        self.loss_and_gradients = ForwardBackward(self.model)
        self.train_step = TrainStep(self.model, TrainSettings(**sizes))
        self.optimizer = self.train_step.optimizer

    def forward_backward(self) -> float:
        with Tensor.train():
            return self.loss_and_gradients(self.data)

    def step(self) -> None:
        self.train_step(self.data[None], LR)


def check(name: str, ours: np.ndarray | float, theirs: np.ndarray | float, limit: float) -> None:
    error = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not error < limit:
        sys.exit(f"{name}: the results of PyTorch and pico_tg differ by {error:.0e}")


def check_soap() -> None:
    """13 steps of a matrix and a vector, with full-rank gradients: no basis is arbitrary."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16,))]
    ours = [Tensor(a).clone().realize() for a in start]
    theirs = [nn.Parameter(torch.tensor(a)) for a in start]
    optimizer, torch_optimizer = SOAP(ours, lr=0.01, weight_decay=0.1), TorchSOAP(theirs, 0.1)
    with Tensor.train():
        for _ in range(13):
            for p, q in zip(ours, theirs, strict=True):
                gradient = rng.standard_normal(p.shape).astype(np.float32)
                p.grad, q.grad = Tensor(gradient).realize(), torch.tensor(gradient)
            optimizer.step()
            torch_optimizer.step(0.01)
    for p, q, a in zip(ours, theirs, start, strict=True):
        check("SOAP's updates", p.numpy() - a, q.detach().numpy() - a, 1e-3)


def seconds_of(call: Callable[[], object], at_least: float = 0.5) -> float:
    """Mean seconds of a call, over the calls that `at_least` seconds take."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < at_least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(side: PicoSide | TorchSide) -> tuple[float, float]:
    """Seconds of forward and backward, and of a train step."""
    forward_backward = seconds_of(side.forward_backward)
    side.optimizer.precondition_frequency = 1 << 40
    plain = seconds_of(side.step)
    side.optimizer.precondition_frequency = 1
    return forward_backward, 0.9 * plain + 0.1 * seconds_of(side.step, 0)


def measure_case(name: str, rounds: int) -> None:
    """Check and measure one model, and print its table."""
    sizes, context, batch = CASES[name]
    config, rng = Config(**sizes), np.random.default_rng(0)
    data = rng.integers(0, 256, (batch, context + config.next_tokens)).astype(np.uint8)
    ours, model = PicoSide(config, data), Pico(config, context)
    weights = {name: t.numpy() for name, t in get_state_dict(ours.model).items()}
    model.load_state_dict({name: torch.tensor(a) for name, a in weights.items()})
    optimizer = TorchSOAP(list(model.parameters()), TrainSettings().weight_decay)
    variants = ["eager fp32", "compiled fp32", "eager bf16", "compiled bf16"]
    if "bf16" not in Path("/proc/cpuinfo").read_text():
        variants = variants[:2]
    sides = {"pico_tg": ours}
    sides |= {variant: TorchSide(model, optimizer, data, variant) for variant in variants}
    loss = ours.forward_backward()
    for variant in list(sides)[1:]:
        limit = 1e-2 if "bf16" in variant else 1e-4
        check(f"loss, {variant}", loss, sides[variant].forward_backward(), limit)
    for side in sides.values():  # compile, and make the first gradients' bases
        side.step(), side.step()
    times = [{name: measure(side) for name, side in sides.items()} for _ in range(rounds)]
    print(f"\n| {name}, ms | " + " | ".join([*sides, "ratio, fp32", "ratio, bf16"]) + " |")
    print("|---" * (len(sides) + 3) + "|")
    for i, measured in enumerate(("forward and backward", "train step")):
        medians = {name: statistics.median(round[name][i] for round in times) for name in sides}
        cells = [f"{1000 * medians[name]:.3g}" for name in sides]
        for precision in ("fp32", "bf16"):
            theirs = [medians[name] for name in sides if precision in name]
            cells.append(f"{min(theirs) / medians['pico_tg']:.2f}" if theirs else "-")
        print(f"| {measured} | " + " | ".join(cells) + " |", flush=True)


@contextlib.contextmanager
def busy_process(wanted: bool):
    """Another process keeps one core busy, if wanted."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (5)")
    parser.add_argument("--quick", action="store_true", help="the smallest model, two rounds")
    parser.add_argument("--busy", action="store_true", help="beside a process that computes")
    args = parser.parse_args()
    if args.quick:
        args.case, args.rounds = ["quickstart-4x512"], 2
    torch.set_num_threads(CPU_COUNT.value)
    pico_tg.enable_compile_cache()
    gemm = gemm_rate("fp32", "CPU")
    print(
        f"{os.cpu_count()} cores, {CPU_COUNT.value} threads, matmul in NumPy {gemm:.0f} GFLOPS; "
        f"PyTorch {torch.__version__}" + ", beside a busy process" * args.busy
    )
    check_soap()
    for case in args.case:
        with busy_process(args.busy):
            measure_case(case, args.rounds)


if __name__ == "__main__":
    main()
