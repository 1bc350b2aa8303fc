"""The one model that most tests train, evaluate or decode with, and the windows it is trained on.

Compiling is most of what tests do. What one of them compiled for these sizes is on disk for all
others, so another size should be there for a reason.
"""

from pico_tg.config import Config

TINY = Config(
    dim=24,
    next_tokens=3,
    att_q_heads=4,
    att_kv_heads=2,
    fb_num_blocks=1,
    fb_att_window_size=6,
    latent_capacity_factor=0.25,
    latent_num_blocks=1,
    latent_att_window_size=9,
)
WINDOWS = {"context_len": 40, "batch_size": 2}


def flags(values: dict) -> list[str]:
    """As options of the command line."""
    return [part for k, v in values.items() for part in ("--" + k.replace("_", "-"), str(v))]
