"""Kernels for a CPU with schedules of their own. Without this folder everything still runs."""

import os

from tinygrad.helpers import DEV


def enabled(device: str | tuple[str, ...]) -> bool:
    """Whether this device gets kernels with schedules of their own."""
    wanted = os.environ.get("PICO_KERNELS", "1") != "0" and DEV.renderer != "X86"
    return wanted and isinstance(device, str) and device.split(":")[0] == "CPU"
