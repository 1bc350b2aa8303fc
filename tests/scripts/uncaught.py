"""A script whose error, after three steps, leaves the generator of train() open: text, run."""

import sys

from pico_tg import Pico, train
from pico_tg.config import Config

config = Config(dim=12, att_q_heads=3, latent_num_blocks=1, next_tokens=1)
records = train(
    Pico(config),
    sys.argv[1],
    sys.argv[2],
    context_len=40,
    batch_size=2,
    optimizer="adamw",
    settings="published",
)
for record in records:
    if record["step"] == 3:
        raise SystemError("uncaught")
