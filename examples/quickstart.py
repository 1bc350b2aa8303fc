"""Train a small Pico on the documentation that comes with Python, then generate text with it.

python examples/quickstart.py        (two to four minutes on two CPU cores, compiling included)
"""

import time

import pico_tg
from pico_tg.progress import Bar, visible

START = time.perf_counter()
pico_tg.enable_compile_cache()
config = pico_tg.Config(dim=96, att_q_heads=6, att_kv_heads=2, latent_num_blocks=2, next_tokens=4)
model = pico_tg.Pico(config, seed=0)
settings = {"context_len": 512, "batch_size": 4, "learning_rate": 1.2e-2, "warmup_steps": 50}
records = pico_tg.train(
    model, "python-docs", max_steps=500, epochs=10, settings="published", **settings
)
bar = Bar("compiling", iterable=records, total=500, unit="steps")
for record in bar:
    bar.set_description_str("training", refresh=False)
    bar.set_postfix_str(f"{record['bits_per_byte']:.2f} bits/byte with tags", refresh=False)
    if "validation_bits_per_byte" in record:
        bits = record["validation_bits_per_byte"]
        bar.write(f"step {record['step']}: {bits:.2f} bits per byte of held-out text")

prompt = "The class statement"
text = prompt + pico_tg.complete(model, prompt, max_bytes=400, seed=1)
print(f"\n{visible(text)}\n")
print(f"{time.perf_counter() - START:.0f} seconds in all")
