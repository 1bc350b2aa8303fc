"""The processor, what the system grants this process (memory, limits of its cgroup, v2), and the
code generators of its devices.
"""

import functools
import hashlib
import math
import os
import platform
from pathlib import Path

from tinygrad import Context, Device
from tinygrad.renderer import Renderer


def available_memory() -> float:
    """Bytes: the machine's memory, or the limit of this process's control group; inf if unknown."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return math.inf
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), cgroup_limit("memory.max"))


def cgroup_limit(
    name: str,
    root: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> float:
    """The smallest `name` of this process's group and of all groups above it; inf if there is none.

    `memory.max` holds a number of bytes; `cpu.max` holds microseconds and the period in which a
    group may use them, which is a number of cores. Each may be `max`.
    """
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return math.inf
    limit, folder = math.inf, root / group.strip("/")
    for place in (folder, *folder.parents):
        try:
            first, *period = (place / name).read_text().split()
            if first != "max":
                limit = min(limit, int(first) / int(*period or [1]))
        except (OSError, ValueError):  # the root has no limits
            pass
        if place == root:
            break
    return limit


@functools.cache
def processor() -> str:
    """A key of this machine's processor: a hash of its name and instruction sets."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        lines = set()
    return hashlib.sha256(repr((platform.uname()[4:], sorted(lines))).encode()).hexdigest()


def renderer_of(device: str | tuple[str, ...]) -> Renderer:
    """The code generator of a device, or of the first of several.

    Also inside a tinygrad function, where tinygrad 0.13 opens no device
    (test_launcher.test_found_inside_a_tinygrad_function).
    """
    with Context(ALLOW_DEVICE_USAGE=1):
        return Device[device if isinstance(device, str) else device[0]].renderer
