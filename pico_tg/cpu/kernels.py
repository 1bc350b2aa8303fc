"""The kernels by which the rest of the package knows this folder: see `backend.runtime`."""

from .band_attention import band_attention
from .decoding import attend, packed_matmul
from .matmul import gemm

__all__ = ["attend", "band_attention", "gemm", "packed_matmul"]
