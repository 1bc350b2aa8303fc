"""Counting: how many operations the mathematics of a Pico asks for, at the least.

A multiplication and an addition are two operations. Only matrix products are counted: a weight is
used once for every byte that reaches it, a pair of a query and a key that it may see costs two
products of head_dim. Norms, activations, softmax, the loss and looking up the embedding are left
out, as is customary; so is the optimizer.
"""

from .config import Config
from .decoder import PREFILL_CHUNK
from .kv_cache import cache_shape


def forward_operations(config: Config, length: int, batch_size: int = 1) -> int:
    """Operations of one forward pass over `batch_size` sequences of `length` bytes, as in training.

    2 * (P_byte * N + P_latent * S) + 4 * H * C * (pairs(N, W_byte) * 2 * blocks_byte
    + pairs(S, W_latent) * blocks_latent) for each sequence, where N is the length, S its capacity,
    P the weights of the matrices that see a byte (or a selected byte), and H * C the width of all
    query heads. A learned router reads every byte, a rule's gate only the selected ones.
    """
    selected = config.capacity(length)
    block = _block_weights(config)
    byte_blocks = 2 * config.fb_num_blocks
    outputs = config.next_tokens * 256
    weights = (byte_blocks * block + config.dim * outputs) * length
    weights += config.latent_num_blocks * block * selected
    weights += config.dim * (length if config.router == "learned" else selected)
    pairs = byte_blocks * visible_pairs(length, config.fb_att_window_size)
    pairs += config.latent_num_blocks * visible_pairs(selected, config.latent_att_window_size)
    width = config.att_q_heads * config.head_dim
    return batch_size * (2 * weights + 4 * width * pairs)


def training_operations(config: Config, length: int, batch_size: int = 1) -> int:
    """Operations of a forward and a backward pass: each product has two more as its gradients."""
    return 3 * forward_operations(config, length, batch_size)


def decoding_operations(config: Config, position: int, router_rate: float) -> float:
    """Operations of one byte more after `position` of them, of which router_rate were routed.

    2 * (P_byte + rate * P_latent) + 4 * H * C * (keys_byte * 2 * blocks_byte
    + rate * keys_latent * blocks_latent), where a byte sees itself and as many before it as there
    are, or as fit the window: keys_byte = 1 + min(W_byte, position), keys_latent = 1 +
    min(W_latent, rate * position). Drafts that are not accepted are work that nobody asked for.
    """
    block = _block_weights(config)
    byte_blocks = 2 * config.fb_num_blocks
    weights = byte_blocks * block + config.dim * config.next_tokens * 256
    weights += config.dim * (1 if config.router == "learned" else router_rate)
    weights += router_rate * config.latent_num_blocks * block
    keys = byte_blocks * (1 + min(config.fb_att_window_size, position))
    deep = 1 + min(config.latent_att_window_size, router_rate * position)
    keys += router_rate * config.latent_num_blocks * deep
    return 2 * weights + 4 * config.att_q_heads * config.head_dim * keys


def visible_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key that it sees, `window` positions before it and its own."""
    full = max(0, length - window)  # queries that see a whole window
    return full * (window + 1) + (length - full) * (length - full + 1) // 2


def _block_weights(config: Config) -> int:
    """Weights in the matrices of one block."""
    heads = config.att_q_heads + 2 * config.att_kv_heads
    attention = config.dim * (heads + config.att_q_heads) * config.head_dim
    return attention + 3 * config.dim**2


def parameters_by_part(config: Config) -> dict[str, int]:
    """Weights of the embedding, the byte blocks, the router, the latent blocks, and the heads.

    The heads are the last norm, and the unembedding with its bias.
    """
    outputs = config.next_tokens * 256
    ends = 256 * config.dim + outputs * config.dim + outputs + 2 * config.dim
    blocks = 2 * config.fb_num_blocks + config.latent_num_blocks
    block = (config.parameters - ends) // blocks
    return {
        "embedding": 256 * config.dim,
        "byte_blocks": 2 * config.fb_num_blocks * block,
        "router": config.dim,
        "latent_blocks": config.latent_num_blocks * block,
        "heads": config.dim + outputs * config.dim + outputs,
    }


def cache_bytes(config: Config) -> int:
    """Memory of the keys and values that a `Decoder` of this model keeps, in bytes."""

    def ring(window: int) -> int:
        slots, columns = cache_shape(config.head_dim, window, PREFILL_CHUNK)
        return 4 * config.att_kv_heads * slots * (config.head_dim + columns)

    byte_blocks = 2 * config.fb_num_blocks * ring(config.fb_att_window_size)
    return byte_blocks + config.latent_num_blocks * ring(config.latent_att_window_size)
