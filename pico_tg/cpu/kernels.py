"""The kernels of this folder that the model calls, through `backend.cpu_kernels`."""

from .band_attention import band_attention
from .decoding import attend, packed_matmul
from .matmul import column_sums, fused_multiply_adds, gemm

__all__ = [
    "attend",
    "band_attention",
    "column_sums",
    "fused_multiply_adds",
    "gemm",
    "packed_matmul",
]
