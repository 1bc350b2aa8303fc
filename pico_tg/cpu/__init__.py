"""Hand-scheduled CPU kernels; without this folder, pico_tg runs on tinygrad's own schedules.

- loops: the builder of loop nests and its constants
- matmul: tiled matmul
- band_attention: banded attention and its gradient
- decoding: the kernels of a decoding pass
- launcher: captured graphs in one native call
"""
