"""Linear algebra on the host: QR and eigenvectors of many float32 matrices in parallel.

NumPy's `qr` computes float32 matrices in float64, sequentially with several threads for each, which
takes three times as long as float32 LAPACK with one matrix per core. If NumPy ships with OpenBLAS
(as in its wheels for Linux and Windows), `qr` here calls the float32 routines of that library;
otherwise `qr` calls NumPy's.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def qr(a: np.ndarray) -> np.ndarray:
    """The orthonormal factor Q [s, s] of a [s, s], float32; computed in float64 if float32 fails.

    Raises LinAlgError if `a` is not finite.
    """
    lapack = openblas()
    if lapack is not None:
        Q = _householder(lapack, a)
        if Q is not None and np.isfinite(Q).all():
            return Q
    Q = np.linalg.qr(a.astype(np.float64))[0].astype(np.float32)
    if not np.isfinite(Q).all():
        raise np.linalg.LinAlgError("no orthonormal basis: the matrix is not finite")
    return Q


def eigenvectors(a: np.ndarray) -> np.ndarray:
    """Orthonormal eigenvectors of a symmetric a [s, s], float32, as columns; largest value first.

    Raises LinAlgError if `a` is not finite.
    """
    for dtype in (np.float32, np.float64):
        with contextlib.suppress(np.linalg.LinAlgError):
            vectors = np.linalg.eigh(a.astype(dtype))[1][:, ::-1]
            if np.isfinite(vectors).all():
                return vectors.astype(np.float32)
    raise np.linalg.LinAlgError("no eigenvectors: the matrix is not finite")


def parallel(tasks: Iterable[Callable[[], None]]) -> None:
    """Run tasks that spend their time in NumPy, one on each core."""
    tasks = list(tasks)
    lapack = openblas()
    if lapack is None:
        for task in tasks:
            task()
        return
    # one OpenBLAS thread per call: more would compete with the threads of the pool
    threads = lapack.scipy_openblas_get_num_threads64_()
    lapack.scipy_openblas_set_num_threads64_(1)
    try:
        with ThreadPoolExecutor(max(1, min(threads, len(tasks)))) as pool:
            for result in [pool.submit(task) for task in tasks]:
                result.result()
    finally:
        lapack.scipy_openblas_set_num_threads64_(threads)


@functools.cache
def openblas() -> ctypes.CDLL | None:
    """The OpenBLAS with 64-bit integers in NumPy's wheel, or None."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("libscipy_openblas64_*")):
            with contextlib.suppress(OSError, AttributeError):
                library = ctypes.CDLL(os.fspath(path))
                for name in ("sgeqrf_64_", "sorgqr_64_", "openblas_set_num_threads64_"):
                    getattr(library, "scipy_" + name)
                library.scipy_openblas_get_num_threads64_.restype = ctypes.c_int
                return library
    return None


def _householder(lapack: ctypes.CDLL, a: np.ndarray) -> np.ndarray | None:
    """LAPACK's sgeqrf, then sorgqr: Q [s, s] of a [s, s]; None if either reports an error."""
    size = len(a)
    n, info = ctypes.byref(ctypes.c_int64(size)), ctypes.c_int64(0)
    columns = np.array(a, np.float32, order="F")
    tau, work = np.empty(size, np.float32), np.empty(64 * size, np.float32)
    matrix, scales, space = (x.ctypes.data_as(ctypes.c_void_p) for x in (columns, tau, work))
    rest = (scales, space, ctypes.byref(ctypes.c_int64(work.size)), ctypes.byref(info))
    lapack.scipy_sgeqrf_64_(n, n, matrix, n, *rest)
    if info.value == 0:
        lapack.scipy_sorgqr_64_(n, n, n, matrix, n, *rest)
    return columns if info.value == 0 else None
