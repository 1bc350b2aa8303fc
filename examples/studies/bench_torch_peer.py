"""Compare with PyTorch: seconds of forward and backward of the same model, and their ratio.

    pip install -e '.[bench]'
    python examples/studies/bench_torch_peer.py --dim 372 --fb-att-window-size 32

Two implementations of attention in PyTorch: `dense` is scaled_dot_product_attention with an N x N
mask; `banded` cuts the sequence into blocks, each of which sees its own keys and those of a window
before the block. The PyTorch model loads weights that pico_tg wrote, and the program exits unless
both models have the same loss on the same bytes. With --cuda both run on the GPU in both
precisions, the PyTorch model is compiled, and `flex` (flex_attention) is added. The `bench` command
of pico_tg measures pico_tg in a separate process.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from pico_tg import Config

EPS = 2.0**-23
PHI = 1.618


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


LOSS_OF_PICO_TG = """
import sys
import numpy as np
import pico_tg
from pico_tg.tools.bench import ForwardBackward
from tinygrad import Tensor
config = pico_tg.Config.from_json(sys.argv[1] + "/model.json")
model = pico_tg.Pico(config, seed=0)
pico_tg.save_weights(model, sys.argv[1] + "/weights.safetensors")
print(ForwardBackward(model)(Tensor(np.load(sys.argv[1] + "/windows.npy")).realize()))
"""


def our_loss(config, folder, windows):
    config.to_json(folder / "model.json")
    np.save(folder / "windows.npy", windows)
    command = [sys.executable, "-c", LOSS_OF_PICO_TG, str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def our_bench(folder, context, batch_size, precision):
    command = [sys.executable, "-m", "pico_tg", "bench", "train", "--model", str(folder), "--json"]
    command += ["--context-len", str(context), "--batch-size", str(batch_size)]
    done = subprocess.run(
        [*command, "--precision", precision], check=True, stdout=subprocess.PIPE, text=True
    )
    records = map(json.loads, done.stdout.splitlines())
    return {record["measured"]: record for record in records}["forward and backward"]["seconds"]


def torch_seconds(model, windows, device, precision, repeats):
    def step():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(windows)
        loss.backward()
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 6144])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="on the GPU, compiled; bf16 and fp32")
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Config)]
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = Config.preset("xs", **sizes)
    device = "cuda" if args.cuda else "cpu"
    attentions = {"dense": dense, "banded": banded} | ({"flex": flex} if args.cuda else {})
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = rng.integers(0, 256, (1, 96 + config.next_tokens)).astype(np.uint8)
        expected = our_loss(config, folder, windows)
        weights = load_file(folder / "weights.safetensors")
        models = {}
        for way, attention in attentions.items():
            models[way] = Pico(config, attention).to(device)
            models[way].load_state_dict(weights)
            found = models[way](torch.tensor(windows, device=device).long()).item()
            print(f"loss: pico_tg {expected:.6f}, torch {way} {found:.6f}", file=sys.stderr)
            if abs(found - expected) > (1e-2 if args.cuda else 1e-4) * expected:
                sys.exit(f"torch {way} computes another loss")
            if args.cuda:
                models[way] = torch.compile(models[way])
        print("| context | precision | pico_tg | " + " | ".join(
            f"torch {way} | ratio" for way in attentions) + " |")  # fmt: skip
        print("|---" * (3 + 2 * len(attentions)) + "|")
        for context in args.contexts:
            data = rng.integers(0, 256, (args.batch_size, context + config.next_tokens))
            windows = torch.tensor(data, device=device)
            for precision in ("bf16", "fp32") if args.cuda else ("fp32",):
                ours = our_bench(folder, context, args.batch_size, precision)
                cells = [f"{context}", precision, f"{ours:.3f} s"]
                for model in models.values():
                    theirs = torch_seconds(model, windows, device, precision, args.repeats)
                    cells += [f"{theirs:.3f} s", f"{ours / theirs:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
