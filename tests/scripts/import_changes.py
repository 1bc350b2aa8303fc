"""Print what `import pico_tg` changes in tinygrad and in this process, a name a line.

With the argument "enable": what the import and `enable_compile_cache` change.
"""

import importlib
import signal
import sys
import types

MODULES = """codegen codegen.opt.search device dtype engine.jit engine.realize function helpers nn
nn.optim nn.state renderer renderer.cstyle renderer.isa.x86 renderer.llvmir runtime.graph.hcq
runtime.ops_cpu runtime.support.c runtime.support.compiler_cpu runtime.support.hcq schedule
schedule.memory schedule.rangeify tensor uop.ops"""

forks = []
sys.addaudithook(lambda event, args: forks.append(event) if event.startswith("os.fork") else None)


def attributes() -> dict[str, object]:
    """All attributes of tinygrad's modules and of their classes, and the handlers of signals."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] == "tinygrad":
            for key, value in list(vars(module).items()):
                found[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__ == name:
                    for attribute, member in list(vars(value).items()):
                        found[f"{name}.{key}.{attribute}"] = member
    for number in sorted(signal.valid_signals()):
        found[f"handler of signal {number}"] = signal.getsignal(number)
    found["excepthook"] = sys.excepthook
    return found


for module in MODULES.split():
    importlib.import_module(f"tinygrad.{module}")
loaded = {*sys.modules}
before = attributes()
import pico_tg  # noqa: E402

after = attributes()
if "enable" in sys.argv:
    pico_tg.enable_compile_cache()
    after = attributes()
for name in sorted(before):
    if after[name] is not before[name]:
        print("changed:", name)
for name in sorted(after.keys() - before.keys()):
    # a module that was loaded since is an attribute of its package
    if name.rpartition(".")[0] in loaded and not isinstance(after[name], types.ModuleType):
        print("added:", name)
for event in forks:
    print("forked:", event)
