"""Dense linear algebra on the host, for many middle-sized matrices at once.

NumPy's own `qr` computes float32 matrices in float64, one after another, with more than one thread
each, which is three times slower than what its LAPACK can do. Where NumPy brings OpenBLAS (its
wheels for Linux and Windows), `qr` calls the float32 routines in there; elsewhere it is NumPy's.
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
    """The orthonormal factor of a float32 [s, s], float32 [s, s]; in float64 if float32 fails."""
    lapack = openblas()
    if lapack is not None:
        basis = _householder(lapack, a)
        if basis is not None and np.isfinite(basis).all():
            return basis
    basis = np.linalg.qr(a.astype(np.float64))[0].astype(np.float32)
    if not np.isfinite(basis).all():
        raise np.linalg.LinAlgError("no orthonormal basis: the matrix is not finite")
    return basis


def eigenvectors(a: np.ndarray) -> np.ndarray:
    """Orthonormal eigenvectors of a symmetric float32 [s, s] as columns, largest first."""
    for dtype in (np.float32, np.float64):
        with contextlib.suppress(np.linalg.LinAlgError):
            vectors = np.linalg.eigh(a.astype(dtype))[1][:, ::-1]
            if np.isfinite(vectors).all():
                return vectors.astype(np.float32)
    raise np.linalg.LinAlgError("no eigenvectors: the matrix is not finite")


def parallel(tasks: Iterable[Callable[[], None]]) -> None:
    """Run tasks that spend their time in NumPy, each on one core, as many at once as there are."""
    tasks = list(tasks)
    lapack = openblas()
    if lapack is None:
        for task in tasks:
            task()
        return
    # threads inside each call would fight with ours
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
    """The OpenBLAS inside NumPy's wheel, with 64-bit integers, if it is there."""
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
    """LAPACK's sgeqrf, then sorgqr; None if one of them complains."""
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
