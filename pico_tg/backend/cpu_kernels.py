"""The way from the model to the hand-scheduled kernels of cpu/, which may be missing."""

from types import ModuleType

from .runtime import has_cpu_kernels


def cpu_kernels(device: str | tuple[str, ...]) -> ModuleType | None:
    """The module `cpu.kernels`; None where `has_cpu_kernels` is False."""
    if not has_cpu_kernels(device):
        return None
    from ..cpu import kernels

    return kernels
