"""Hand-scheduled CPU kernels; with this folder deleted, pico_tg runs on tinygrad's own schedules.

loops: the loop nest builder and its constants; matmul: tiled matrix products; band_attention:
attention in a band with its gradient; decoding: the kernels of a decoding pass.
"""

import os

from tinygrad.helpers import DEV


def enabled(device: str | tuple[str, ...]) -> bool:
    """Whether hand-scheduled kernels run on this device.

    They run on a single CPU device, except with PICO_KERNELS=0 and with tinygrad's X86 assembler,
    which has no vectors.
    """
    wanted = os.environ.get("PICO_KERNELS", "1") != "0" and DEV.renderer != "X86"
    return wanted and isinstance(device, str) and device.split(":")[0] == "CPU"
