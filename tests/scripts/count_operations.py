"""Print {length: [operations, kernels]} of a forward and backward pass, without running it.

Arguments: JSON of [sizes of a Config, lengths]. Compiles nothing; run with CACHELEVEL=0, so that
nothing of it is kept. Prints {} where the CPU kernels are not used.
"""

import json
import sys

from tinygrad import Device, Tensor, nn
from tinygrad.engine.realize import compile_linear, estimate_uop
from tinygrad.uop.ops import Ops

from pico_tg import Config, Pico, loss_fn
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.cpu import launcher

sizes, lengths = json.loads(sys.argv[1])
config = Config(**sizes)
model = Pico(config, fresh=False)
parameters = nn.state.get_parameters(model)
launcher.serves()  # compiles the launcher, before nothing is compiled any more
Device[Device.DEFAULT].renderer.compiler.compile_cached = lambda source: b""
found = {}
for length in lengths if has_cpu_kernels(Device.DEFAULT) else ():
    x = Tensor.empty(1, length, dtype="uint8")
    targets = Tensor.empty(1, length, config.next_tokens, dtype="uint8")
    with Tensor.train():
        loss = loss_fn(*model(x), targets)[0]
        linear, _ = Tensor.linear_with_vars(loss, *loss.gradient(*parameters))
    calls = [c for c in compile_linear(linear).src if c.src[0].op is Ops.PROGRAM]
    found[length] = sum(estimate_uop(c).ops for c in calls), len(calls)
print(json.dumps(found))
