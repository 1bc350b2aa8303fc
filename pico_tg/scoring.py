"""Scoring: how well the model predicts a given text, byte by byte."""

import math

import numpy as np

from .backend.runtime import exclusive
from .data import SEQ_START
from .decoder import Decoder, check_decoder
from .files import PicoError
from .generation import GeneratedByte, as_bytes, check_finite, log_softmax, sigmoid
from .model import Pico


class Score(list[GeneratedByte]):
    """The bytes of a text in order, each with its logprob, router weight and router decision."""

    @property
    def bits(self) -> float:
        """-log2 of the probability of the whole text."""
        return -math.fsum(record.logprob for record in self) / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.bits / len(self)


@exclusive
def score(model: Pico, text: str | bytes, *, decoder: Decoder | None = None) -> Score:
    """Predict each byte of `text` from the bytes before it, as in decoding.

    - text: bytes, or a str, which means its UTF-8; the text begins a document, so `<pico:seq>`,
      which is not scored, precedes it
    - decoder: a `Decoder(model)` to reuse, since making one takes seconds

    A text may be longer than a window of training: the decoder's memory is fixed. Raises PicoError
    if there is no text, and on logits that are not finite.
    """
    data = as_bytes(text, "the text")
    if not data:
        raise PicoError("the text is empty: there is nothing to score")
    check_decoder(model, decoder)
    decoder = decoder or Decoder(model)
    decoder.reset(use_latent=True)
    scored = Score()
    before = np.zeros(256)  # log-probabilities of the byte after the newest one
    for piece, logits, router_logits in decoder.passes(SEQ_START + data):
        check_finite(logits[:, 0])
        decisions = decoder.last_decisions
        for i, (byte, after) in enumerate(zip(piece, log_softmax(logits[:, 0]), strict=True)):
            weight = sigmoid(float(router_logits[i]))
            scored.append(GeneratedByte(byte, weight, bool(decisions[i]), float(before[byte])))
            before = after
    return Score(scored[len(SEQ_START) :])
