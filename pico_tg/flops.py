"""Model FLOPs: the floating-point operations that the mathematics of a Pico requires.

A multiplication and an addition are two FLOPs. Only matmuls count, as is customary: for each weight
one multiply-add per byte that passes its layer, and for each pair of a query and a key head_dim
multiply-adds for the score and head_dim for the weighted value. Norms, activations, softmax, the
loss, the embedding lookup and the optimizer are left out.
"""

from .config import RULES, Config
from .decoder import PREFILL_CHUNK
from .kv_cache import cache_shape


def forward_flops(config: Config, length: int, batch_size: int = 1) -> int:
    """FLOPs of one forward pass over `batch_size` sequences of `length` bytes, as in training.

    The number of selected bytes is the capacity, at which `threshold` and `ratio` aim. A learned
    router computes the weight of every byte, a rule only the weights of the selected bytes.
    """
    selected = config.capacity(length)
    pairs = visible_pairs(length, config.fb_att_window_size)
    latent_pairs = visible_pairs(selected, config.latent_att_window_size)
    return batch_size * round(_flops(config, length, selected, pairs, latent_pairs))


def training_flops(config: Config, length: int, batch_size: int = 1) -> int:
    """FLOPs of a forward and a backward pass: the gradients of a matmul are two matmuls."""
    return 3 * forward_flops(config, length, batch_size)


def decoding_flops(config: Config, position: int, router_rate: float) -> float:
    """FLOPs of decoding one byte after `position` bytes, at the router rate `router_rate`.

    Rejected drafts are not counted: the mathematics does not require them.
    """
    keys = 1 + min(config.fb_att_window_size, position)
    latent_keys = 1 + min(config.latent_att_window_size, router_rate * position)
    return _flops(config, 1, router_rate, keys, router_rate * latent_keys)


def _flops(
    config: Config, bytes_: float, selected: float, pairs: float, latent_pairs: float
) -> float:
    """FLOPs of a pass over `bytes_` bytes, `selected` of which pass through the latent blocks.

    pairs, latent_pairs: pairs of a query and a visible key in a full-bandwidth or a latent block.
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


def cache_bytes(config: Config) -> int:
    """Bytes of the KV caches of a `Decoder` of this model."""

    def size(window: int) -> int:
        slots, columns = cache_shape(config.head_dim, window, PREFILL_CHUNK)
        return 4 * config.att_kv_heads * slots * (config.head_dim + columns)

    byte_blocks = 2 * config.fb_num_blocks * size(config.fb_att_window_size)
    return byte_blocks + config.latent_num_blocks * size(config.latent_att_window_size)
