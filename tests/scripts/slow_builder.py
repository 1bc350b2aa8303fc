"""Build the cache of a .txt; reports once half is written, and goes on after a line on stdin."""

import sys

from pico_tg.data import DataSpec, formats, load_data

read = formats.READERS[".txt"]


def slow(*arguments):
    for i, piece in enumerate(read(*arguments)):
        yield piece
        if i == 500:
            print("building", flush=True)
            sys.stdin.readline()


formats.READERS[".txt"] = slow
print(load_data(DataSpec(sys.argv[1])).train.fingerprint)
