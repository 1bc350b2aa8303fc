"""Hand-scheduled CPU kernels; without this folder, pico_tg runs on tinygrad's own schedules.

- loops: the builder of loop nests and its constants
- matmul: tiled matmul
- band_attention: banded attention and its gradient
- decoding: the kernels of a decoding pass
- launcher: captured graphs in one native call
"""

import os
from collections.abc import Callable
from typing import Any

from tinygrad import Device
from tinygrad.device import Buffer
from tinygrad.engine.jit import CapturedJit
from tinygrad.helpers import DEV


def enabled(device: str | tuple[str, ...]) -> bool:
    """Whether hand-scheduled kernels run on this device.

    The kernels run on a single CPU device, except with PICO_KERNELS=0 and with tinygrad's X86
    assembler, which has no vectors.
    """
    wanted = os.environ.get("PICO_KERNELS", "1") != "0" and DEV.renderer != "X86"
    return wanted and isinstance(device, str) and device.split(":")[0] == "CPU"


def use_launcher() -> None:
    """Launch all graphs captured after this call natively, if the default device is enabled."""
    if enabled(Device.DEFAULT):
        from . import launcher

        launcher.install(Device.DEFAULT)


def native_replay(captured: CapturedJit) -> Callable[[], Any] | None:
    """A function that replays `captured`, which has no inputs; None if part of it is not native."""
    if not enabled(Device.DEFAULT):
        return None
    from . import launcher

    return launcher.native_replay(captured)


def link_graphs(
    first: CapturedJit, choice: Buffer, variants: list[CapturedJit], last: CapturedJit
) -> Callable[[], None] | None:
    """See `launcher.LinkedGraphs`; None if part of it is not native."""
    if not enabled(Device.DEFAULT):
        return None
    from . import launcher

    return launcher.link_graphs(first, choice, variants, last)
