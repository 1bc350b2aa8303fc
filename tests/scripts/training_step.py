"""Print the loss of a small model and the size of each gradient; then the loss of n steps of SOAP.

Argument: n, if any. The weights are the same on every device.
"""

import dataclasses
import sys

import numpy as np
from helpers import TINY
from tinygrad import Tensor, nn

from pico_tg import Pico, TrainSettings, loss_fn
from pico_tg.model import inputs_and_targets
from pico_tg.training import TrainStep

rng = np.random.default_rng(0)
model = Pico(dataclasses.replace(TINY, dim=16), fresh=False)
for _, weight in sorted(nn.state.get_state_dict(model).items()):
    weight.assign(Tensor((rng.standard_normal(weight.shape) * 0.3).astype(np.float32))).realize()
windows = Tensor(rng.integers(0, 256, (1, 32 + model.config.next_tokens), np.uint8)).realize()
x, targets = inputs_and_targets(windows, model.config.next_tokens)
loss = loss_fn(*model(x), targets)[0]
gradients = loss.gradient(*nn.state.get_parameters(model))
Tensor.realize(loss, *gradients)
print(loss.item(), *[float(np.abs(g.numpy()).sum()) for g in gradients])
if sys.argv[1:]:
    settings = TrainSettings(context_len=32, batch_size=1, precision="fp32")
    step, batches = TrainStep(model, settings), windows.numpy()[None]
    print(*[float(step(batches, 1e-2)[0]) for _ in range(int(sys.argv[1]))])
