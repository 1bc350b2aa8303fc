"""Compiled kernels, kept between processes.

tinygrad remembers on disk what the compiler made of a kernel's source, but writes that source anew
in each process, which takes five times as long. Here the whole way from a kernel's graph to its
binary is remembered, in the same file (CACHEDB) and under the same switch (CACHELEVEL).
"""

import hashlib
import importlib.metadata
import pickle

import tinygrad.engine.realize
from tinygrad.codegen import to_program
from tinygrad.helpers import ContextVar, diskcache_get, diskcache_put
from tinygrad.renderer import Renderer
from tinygrad.uop.ops import Ops, UOp

TABLE = "pico_programs"
# they decide what is printed or recorded, not what is made
IRRELEVANT = {"ALLOW_DEVICE_USAGE", "CAPTURING", "DEBUG", "JIT", "PROFILE", "TRACK_MATCH_STATS"}
# these run the list of operations itself, which is not kept
INTERPRETERS = ("PYTHON", "NULL", "DSP")
VERSION = importlib.metadata.version("tinygrad")

_known: dict[tuple, UOp] = {}


def install() -> None:
    """From now on tinygrad finds its programs here first."""
    tinygrad.engine.realize.to_program = remembered_program


def remembered_program(ast: UOp, renderer: Renderer) -> UOp:
    """What `to_program` returns, less the list of operations, which nothing needs once compiled."""
    if renderer.target.device in INTERPRETERS:
        return to_program(ast, renderer)
    options = sorted((k, v.value) for k, v in ContextVar._cache.items() if k not in IRRELEVANT)
    within = (ast.key, type(renderer).__name__, str(renderer.target), str(options))
    if within not in _known:
        key = hashlib.sha256(repr((VERSION, *within)).encode()).hexdigest()
        program = diskcache_get(TABLE, key)
        if program is None:
            program = _light(to_program(ast, renderer))
            diskcache_put(TABLE, key, pickle.dumps(program), prepickled=True)
        _known[within] = program
    return _known[within]


def _light(program: UOp) -> UOp:
    sink, device, _, source, binary = program.src
    return program.replace(src=(sink.replace(src=()), device, UOp(Ops.LINEAR), source, binary))
