"""Imported by Python at its start: presses Ctrl-C when the module PRESS_CTRL_C_AT is imported."""

import os
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)


class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["PRESS_CTRL_C_AT"]:
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Finder)
