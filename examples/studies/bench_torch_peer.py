"""Compare pico_tg with PyTorch: milliseconds of training and decoding the same model, and ratios.

    pip install -e '.[bench]'
    python examples/studies/bench_torch_peer.py --quick     (a minute on two CPU cores)
    python examples/studies/bench_torch_peer.py             (ten minutes, 7 GB of memory)

One process measures both implementations in turn: pico_tg, PyTorch, pico_tg, PyTorch, …; then once
more while another process keeps one core busy. Measured are forward and backward, the train step
with SOAP (the mean of ten steps, one of which refreshes the eigenbases) and the decoding of one
byte without drafts. Before that, the script checks that both compute the same loss, the same logits
in decoding and the same updates with SOAP, and exits if not.

The PyTorch model is written for speed without compiling: `banded` attention cuts the sequence into
blocks, each of which sees its own keys and those of a window before the block. `--attention dense`
is scaled_dot_product_attention with an N x N mask, `--compile` adds torch.compile, and on a GPU
(`--cuda`, untested) `--attention flex` is flex_attention.

PyTorch is measured with one thread and with all, and the better time counts: for small matrices,
and beside a busy process, one thread is often faster. A ratio above 1 means that pico_tg is faster.
`without kernels` is the share of pico_tg's time that remains when no kernel is called: handing
kernels out to threads, sampling, and other Python.
"""

import argparse
import contextlib
import copy
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tinygrad import Device, Tensor
from tinygrad.nn.state import get_state_dict
from torch import nn
from tqdm import tqdm

import pico_tg
from pico_tg import SOAP, Config, Decoder, TrainSettings, generate
from pico_tg.backend.precision import graph_context
from pico_tg.costs import gemm_rate
from pico_tg.cpu.launcher import NativeGraph, without_kernels
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
WARM_UP = 1
DECODED = 32  # bytes of one measurement
LR = 1e-5  # small: there is nothing to learn in random bytes


def slopes(heads, device):
    return 2.0 ** (-8.0 / heads * (torch.arange(heads, device=device) + 1))


def bias(distance, window, heads):
    """ALiBi's term where a key is visible, -inf elsewhere: [H, *distance.shape]."""
    visible = (distance >= 0) & (distance <= window)
    by_head = slopes(heads, distance.device).view(-1, *[1] * distance.ndim)
    return torch.where(visible, -by_head * distance, -math.inf)


def dense(q, k, v, window):
    """q [B, H, N, C], k and v [B, K, N, C]."""
    N, H = q.shape[2], q.shape[1]
    i = torch.arange(N, device=q.device)
    mask = bias(i[:, None] - i[None], window, H).to(q.dtype)
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def banded(q, k, v, window):
    """As `dense`, in O(N * window). The G query heads that share keys are rows of one matrix."""
    B, H, N, C = q.shape
    K = k.shape[1]
    if window >= N - 1:
        return dense(q, k, v, window)
    step = min(window, max(16, math.ceil(window / 4)))
    lookback, blocks = math.ceil(window / step) * step, math.ceil(N / step)
    pad = blocks * step - N
    q = F.pad(q, (0, 0, 0, pad)).view(B, K, H // K, blocks, step, C)
    q = q.transpose(2, 3).reshape(B, K, blocks, -1, C)  # (B, K, b, G*q, C)
    k, v = (F.pad(x, (0, 0, lookback, pad)).unfold(2, lookback + step, step) for x in (k, v))
    i = torch.arange(blocks * step, device=q.device).view(blocks, step, 1)
    j = torch.arange(blocks, device=q.device).view(blocks, 1, 1) * step - lookback
    j = j + torch.arange(lookback + step, device=q.device)
    mask = bias(torch.where(j >= 0, i - j, -1), window, H).to(q.dtype)  # (H, b, q, s)
    mask = mask.view(K, H // K, blocks, step, -1).transpose(1, 2).reshape(K, blocks, -1, j.shape[2])
    weights = (q @ k / math.sqrt(C) + mask).softmax(-1)  # unfold left k as (…, C, s)
    out = weights @ v.transpose(-1, -2)
    out = out.view(B, K, blocks, H // K, step, C).transpose(2, 3)
    return out.reshape(B, H, blocks * step, C)[:, :, :N]


def flex(q, k, v, window):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    N, by_head = q.shape[2], slopes(q.shape[1], q.device)

    def visible(b, h, i, j):
        return (i >= j) & (i - j <= window)

    mask = create_block_mask(visible, None, None, N, N, device=q.device)
    return flex_attention(
        q, k, v, lambda s, b, h, i, j: s - by_head[h] * (i - j), mask, enable_gqa=True
    )


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight


class Attention(nn.Module):
    def __init__(self, c, window, attention):
        super().__init__()
        self.c, self.window, self.attention = c, window, attention
        heads = c.att_q_heads + 2 * c.att_kv_heads
        self.fused_qkv = nn.Linear(c.dim, heads * c.head_dim, bias=False)
        self.proj = nn.Linear(c.att_q_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x):
        c, (B, N, _) = self.c, x.shape
        heads = self.fused_qkv(x).view(B, N, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.att_q_heads, c.att_kv_heads, c.att_kv_heads], 1)
        return self.proj(self.attention(q, k, v, self.window).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(dim, n * dim, bias=False) for n in (2, 1))

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, c, window, attention):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.dim), RMSNorm(c.dim)
        self.att, self.glu = Attention(c, window, attention), SwiGLU(c.dim)

    def forward(self, h):
        h = h + self.att(self.norm1(h))
        return h + self.glu(self.norm2(h))


class Blocks(nn.Module):
    def __init__(self, c, count, window, attention, router=False):
        super().__init__()
        if router:
            self.router = nn.Linear(c.dim, 1, bias=False)
        self.blocks = nn.ModuleList(Block(c, window, attention) for _ in range(count))

    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return h


class Pico(nn.Module):
    def __init__(self, c, attention):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(256, c.dim)
        self.fb_in, self.fb_out = (
            Blocks(c, c.fb_num_blocks, c.fb_att_window_size, attention) for _ in range(2)
        )
        self.latent = Blocks(c, c.latent_num_blocks, c.latent_att_window_size, attention, True)
        self.norm = RMSNorm(c.dim)
        self.unembedding = nn.Linear(c.dim, c.next_tokens * 256)

    def forward(self, windows):
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
        logits = logits.view(*logits.shape[:2], c.next_tokens, 256)
        targets = windows[:, 1:].unfold(1, c.next_tokens, 1)  # (B, N, T)
        each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        each = each.view(-1, c.next_tokens).mean(0)
        share = PHI ** torch.arange(c.next_tokens - 1, -1, -1, device=z.device)
        wanted = torch.zeros_like(z).scatter(1, chosen, 1.0)
        aux = F.binary_cross_entropy_with_logits(z.float(), wanted.float())
        return 0.9 * (each * share / share.sum()).sum() + 0.1 * aux


class TorchDecoder:
    """Logits of one byte after the other, with a ring buffer of keys and values in each block."""

    def __init__(self, model: Pico) -> None:
        self.model, c = model, model.c
        device = model.norm.weight.device
        self.parts = [model.fb_in, model.latent, model.fb_out]
        self.counts = [0, 0, 0]  # the bytes that each part has read
        self.biases, self.caches = [], []
        for part in self.parts:
            n = part.blocks[0].att.window + 1
            # the key in slot j is (position - j) % n bytes old: a slice of the doubled table
            age = torch.arange(2 * n, 0, -1, device=device) % n
            table = -slopes(c.att_q_heads, device)[:, None] * age
            self.biases.append(table.view(c.att_kv_heads, -1, 2 * n))  # (K, G, 2 n)
            shape = len(part.blocks), 2, c.att_kv_heads, n, c.head_dim
            self.caches.append(torch.zeros(shape, device=device))

    def run(self, index: int, h: torch.Tensor) -> torch.Tensor:
        """h [D] through the blocks of one part."""
        position, cache, c = self.counts[index], self.caches[index], self.model.c
        self.counts[index] += 1
        n = cache.shape[3]
        slot, used = position % n, min(position + 1, n)
        bias = self.biases[index][:, :, n - slot : n - slot + used]
        for block, (keys, values) in zip(self.parts[index].blocks, cache, strict=True):
            heads = block.att.fused_qkv(block.norm1(h)).view(-1, c.head_dim)
            q, k, v = heads.split([c.att_q_heads, c.att_kv_heads, c.att_kv_heads])
            keys[:, slot], values[:, slot] = k, v
            q = q.view(c.att_kv_heads, -1, c.head_dim)  # (K, G, C)
            keys, values = keys[:, :used], values[:, :used]
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=c.head_dim**-0.5)
            h = h + block.att.proj((scores.softmax(-1) @ values).flatten())
            h = h + block.glu(block.norm2(h))
        return h

    @torch.inference_mode()
    def forward(self, byte: int) -> torch.Tensor:
        """The logits [T, 256] after `byte`."""
        model = self.model
        h = self.run(0, model.embedding.weight[byte])
        z = model.latent.router(h)
        if z.item() > 0:
            h = h + (self.run(1, h) - h) * z.sigmoid()
        return model.unembedding(model.norm(self.run(2, h))).view(-1, 256)


class TorchSOAP:
    """SOAP (arXiv 2409.11321) with the defaults of pico_tg.SOAP, for matrices and vectors."""

    BETA, EPS = 0.95, 1e-8  # both moments and GG have the same decay

    def __init__(self, params: list[nn.Parameter], weight_decay: float) -> None:
        self.params, self.weight_decay = params, weight_decay
        self.precondition_frequency = 10
        self.count = 0  # the gradients averaged into GG
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.GG = [[torch.zeros(s, s, device=p.device) for s in p.shape] for p in params]
        self.Q: list[list[torch.Tensor]] = [[] for _ in params]
        for i, p in enumerate(params):
            if p.ndim == 1:  # plain Adam
                self.GG[i] = []

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
    """What is measured of PyTorch."""

    def __init__(
        self, config: Config, weights: dict, data: np.ndarray, args: argparse.Namespace
    ) -> None:
        self.device = "cuda" if args.cuda else "cpu"
        self.bf16 = args.precision == "bf16"
        attention = {"dense": dense, "banded": banded, "flex": flex}[args.attention]
        self.model = Pico(config, attention).to(self.device)
        self.model.load_state_dict({name: torch.tensor(a) for name, a in weights.items()})
        self.decoder = TorchDecoder(copy.deepcopy(self.model))
        self.loss = torch.compile(self.model) if args.compile else self.model
        self.optimizer = TorchSOAP(list(self.model.parameters()), TrainSettings().weight_decay)
        self.windows = torch.tensor(data, device=self.device).long()

    def forward_backward(self) -> float:
        self.model.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.windows)
        loss.backward()
        self.wait()
        return loss.item()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step(LR)
        self.wait()

    def read(self, prompt: bytes) -> np.ndarray:
        """The logits [T, 256] after the prompt."""
        for byte in prompt:
            self.logits = self.decoder.forward(byte)
        return self.logits.cpu().numpy()

    def decode(self) -> None:
        for _ in range(DECODED):
            byte = torch.multinomial(self.logits[0].softmax(-1), 1).item()
            self.logits = self.decoder.forward(byte)


class PicoSide:
    """What is measured of pico_tg."""

    def __init__(self, config: Config, data: np.ndarray, args: argparse.Namespace) -> None:
        sizes = {"context_len": data.shape[1] - config.next_tokens, "batch_size": len(data)}
        self.settings = TrainSettings(**sizes, precision=args.precision)
        self.data, model = data, pico_tg.Pico(config, seed=0)
        self.weights = {name: t.numpy() for name, t in get_state_dict(model).items()}
        self.windows = Tensor(data).realize()
        self.decoder = Decoder(model)
        self.loss_and_gradients = ForwardBackward(model)
        self.train_step = TrainStep(model, self.settings)
        self.optimizer = self.train_step.optimizer

    def forward_backward(self) -> float:
        with Tensor.train(), graph_context(self.settings, ()):
            return self.loss_and_gradients(self.windows)

    def step(self) -> None:
        self.train_step(self.data[None], LR)

    def read(self, prompt: bytes) -> np.ndarray:
        logits = self.decoder.forward(prompt)[0][-1]
        options = {"max_bytes": 2**40, "speculative": False, "ignore_end": True}
        self.text = generate(
            self.decoder.model, prompt, raw_prompt=True, seed=0, decoder=self.decoder, **options
        )
        return logits

    def decode(self) -> None:
        for _ in range(DECODED):
            next(self.text)


def check(
    name: str, ours: np.ndarray | float, theirs: np.ndarray | float, tolerance: float
) -> None:
    error = np.abs(ours - theirs).max() / np.abs(ours).max()
    tqdm.write(f"{name}: relative difference {error:.0e}", file=sys.stderr)
    if not error < tolerance:
        sys.exit(f"{name}: the results of PyTorch and pico_tg differ")


def check_soap(device: str) -> None:
    """13 steps of a matrix and a vector, with full-rank gradients: no basis is arbitrary."""
    rng = np.random.default_rng(0)
    shapes = [(16, 16), (16,)]
    start = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ours = [Tensor(a).clone().realize() for a in start]
    theirs = [nn.Parameter(torch.tensor(a, device=device)) for a in start]
    optimizer, torch_optimizer = SOAP(ours, lr=0.01, weight_decay=0.1), TorchSOAP(theirs, 0.1)
    with Tensor.train():
        for _ in range(13):
            for p, q in zip(ours, theirs, strict=True):
                gradient = rng.standard_normal(p.shape).astype(np.float32)
                p.grad, q.grad = Tensor(gradient).realize(), torch.tensor(gradient, device=device)
            optimizer.step()
            torch_optimizer.step(0.01)
    for p, q, a in zip(ours, theirs, start, strict=True):
        check("SOAP's updates", p.numpy() - a, q.detach().cpu().numpy() - a, 1e-3)


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds_of(call: Callable[[], None], at_least: float = 0.5) -> float:
    """Mean seconds of a call, over the calls that `at_least` seconds take."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < at_least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


MEASURED = ("forward and backward", "train step", "decoding a byte")


def measure(side: PicoSide | TorchSide) -> dict[str, float]:
    """Seconds of each of MEASURED."""
    found = {"forward and backward": seconds_of(side.forward_backward)}
    found["decoding a byte"] = seconds_of(side.decode) / DECODED
    side.optimizer.precondition_frequency = 1 << 40
    plain = seconds_of(side.step)
    side.optimizer.precondition_frequency = 1
    found["train step"] = 0.9 * plain + 0.1 * seconds_of(side.step, 0)
    return found


def measure_torch(side: TorchSide) -> dict[str, float]:
    """The least seconds of each of MEASURED, with one thread and with all."""
    all_threads, found = torch.get_num_threads(), []
    for threads in (1, all_threads):
        torch.set_num_threads(threads)
        found.append(measure(side))
    return {name: min(seconds[name] for seconds in found) for name in MEASURED}


def measure_case(
    config: Config, context: int, batch: int, args: argparse.Namespace, bar: tqdm
) -> list[list[str]]:
    """Check and measure one model; the cells of a row for each of MEASURED."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (batch, context + config.next_tokens)).astype(np.uint8)
    ours = PicoSide(config, data, args)
    theirs = TorchSide(config, ours.weights, data, args)
    sides = [ours, theirs]
    exact = 1e-4 if args.precision == "fp32" and not args.cuda else 1e-2
    check("loss", *[side.forward_backward() for side in sides], exact)
    prompt = rng.bytes(1024)
    check("logits of decoding", *[side.read(prompt) for side in sides], 10 * exact)
    for side in sides:
        for _ in range(WARM_UP):
            side.forward_backward(), side.step(), side.decode()
    bar.update()
    medians = []
    for context_manager in (contextlib.nullcontext, busy_process):
        rounds = []
        with context_manager():
            for _ in range(args.rounds):
                rounds.append([measure(ours), measure_torch(theirs)])
                bar.update()
        for i in range(2):
            medians.append({x: statistics.median(pair[i][x] for pair in rounds) for x in MEASURED})
    launching = None
    if getattr(Device[Device.DEFAULT], "graph", None) is NativeGraph:
        with without_kernels():
            launching = measure(ours)
    rows = []
    for name in MEASURED:
        row = [name]
        for pair in (medians[:2], medians[2:]):
            a, b = (side[name] for side in pair)
            row += [milliseconds(a), milliseconds(b), f"{b / a:.2f}"]
        rows.append([*row, f"{launching[name] / medians[0][name]:.1%}" if launching else "-"])
    return rows


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds > 0.1 else f"{1000 * seconds:.3g}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (5)")
    parser.add_argument("--quick", action="store_true", help="the smallest model, two rounds")
    parser.add_argument("--attention", choices=("banded", "dense", "flex"), default="banded")
    parser.add_argument("--compile", action="store_true", help="torch.compile for training")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cuda", action="store_true", help="on a GPU (untested)")
    args = parser.parse_args()
    if args.quick:
        args.case, args.rounds = ["quickstart-4x512"], 2
    pico_tg.enable_compile_cache()
    gemm = gemm_rate("fp32", "CPU")
    print(
        f"{processor()}, {os.cpu_count()} cores, matmul in NumPy {gemm:.0f} GFLOPS; "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.attention}"
        f"{', compiled' * args.compile}; {args.precision}{', on the GPU' * args.cuda}"
    )
    with tqdm(total=len(args.case) * (1 + 2 * args.rounds), desc="rounds") as bar:
        check_soap("cuda" if args.cuda else "cpu")
        for case in args.case:
            sizes, context, batch = CASES[case]
            config = Config(**sizes)
            rows = measure_case(config, context, batch, args, bar)
            head = [
                f"{case}, ms",
                "pico_tg",
                "PyTorch",
                "ratio",
                "busy: pico_tg",
                "PyTorch",
                "ratio",
            ]
            for cells in ([*head, "without kernels"], ["---"] * 8, *rows):
                tqdm.write("| " + " | ".join(cells) + " |")
            gc.collect()


if __name__ == "__main__":
    main()
