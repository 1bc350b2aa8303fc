"""Print the MB of a data set's training bytes, and by how many MB loading it raised the peak.

A program of its own: the high-water mark starts anew with each (ru_maxrss would be the parent's).
"""

import sys

from pico_tg.data import DataSpec, load_data


def peak() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024


before = peak()
total = len(load_data(DataSpec(sys.argv[1]), progress=False).train.bytes)
print(total / 2**20, peak() - before)
