"""Pico: a byte-level language model without a tokenizer, on tinygrad."""

from .device import choose_backend

choose_backend()  # before any module can make a Tensor
