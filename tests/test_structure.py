"""The package's structure: what imports what, what is optional, how long the model's files are."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "pico_tg"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# what `tinygrad` exports itself; its other modules may change with every version
PUBLIC = {"Context", "Device", "GlobalCounters", "Tensor", "TinyJit", "UOp", "Variable"}
PUBLIC |= {"dtypes", "fetch", "function", "getenv", "nn"}


def imports(name: str) -> list[tuple[str, str]]:
    """(module, name) of each import of a module, those inside functions included.

    Names of this package are relative to it; imports for the type checker only are left out.
    """
    path = FILES[name]
    tree = ast.parse(path.read_text())
    unread = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                folder = path.parents[node.level - 1].relative_to(PACKAGE)
                module = ".".join([*folder.parts, *filter(None, [module])])
            found += [(module, alias.name) for alias in node.names]
    return found


def imported_files(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for module, member in imports(name):
        inner = f"{module}.{member}".strip(".")
        found |= {inner if inner in FILES else module} & FILES.keys()
    return found - {"", "__init__"}


def test_other_rooms_import_public_tinygrad_only():
    private = [
        f"{name}: {module}.{member}"
        for name in FILES
        if name.split(".")[0] not in ("backend", "cpu")
        for module, member in imports(name)
        if module.split(".")[0] == "tinygrad" and not module.startswith("tinygrad.nn")
        if module != "tinygrad" or member not in {"", *PUBLIC}
    ]
    assert not private, "import these through pico_tg.backend"


def test_no_import_circle():
    above: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            above.append(name)
            for other in sorted(imported_files(name)):
                visit(other)
            done.add(above.pop())

    for name in FILES:
        visit(name)


def test_tools_are_imported_by_nothing_else():
    """Besides the command line's entry."""
    importing = {
        (name, other)
        for name in FILES
        for other in imported_files(name)
        if other.startswith("tools") and not name.startswith("tools")
    }
    assert importing == {("__main__", "tools.cli")}


def test_cpu_kernels_are_imported_at_the_seams_only():
    importing = {
        name
        for name in FILES
        if not name.startswith("cpu") and any(o.startswith("cpu") for o in imported_files(name))
    }
    assert importing == {"backend.runtime", "matmul", "ops", "attention", "kv_cache"}


def test_the_model_is_read_in_one_sitting():
    names = ("model", "attention", "routing")
    assert sum(len(FILES[name].read_text().splitlines()) for name in names) <= 520


def run_python(*args: str, hide_cpu: Path | None = None) -> str:
    """Standard output of Python; with a folder `hide_cpu`, as if pico_tg/cpu did not exist.

    For the processes that it starts as well: each imports the folder's sitecustomize at its start.
    """
    path = [str(TESTS.parent), str(TESTS)]
    if hide_cpu:
        (hide_cpu / "sitecustomize.py").write_text("import sys; sys.modules['pico_tg.cpu'] = None")
        path.insert(0, str(hide_cpu))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_without_cpu_kernels(tmp_path):
    """Every module imports; a matmul is computed."""
    script = str(TESTS / "scripts" / "import_all.py")
    assert run_python(script, hide_cpu=tmp_path) == "False 64.0\n"


@pytest.mark.slow
def test_a_pass_without_cpu_kernels(tmp_path):
    """A model decodes the same with the folder cpu/ and without."""
    script = str(TESTS / "scripts" / "without_cpu.py")
    none, *plain = run_python(script, hide_cpu=tmp_path).split()
    _, *ours = run_python(script).split()
    assert none == "False"
    assert [float(x) for x in plain] == pytest.approx([float(x) for x in ours], abs=1e-4)


@pytest.mark.slow(minutes=1)
def test_the_tests_pass_without_cpu_kernels(tmp_path):
    """The golden numbers, odd sizes, training with SOAP and validation, generation with drafts."""
    tests = [
        "test_golden.py::test_training_step[False]",
        "test_golden.py::test_one_causal_pass",
        "test_golden.py::test_decoding",
        "test_golden.py::test_changing_a_byte_changes_no_causal_logits_before_it",
        "test_model.py::test_causal_when_the_router_is_extreme",
        "test_training.py::test_records_and_learning",
        "test_generation.py::test_speculation_changes_no_byte",
    ]
    paths = [str(TESTS / test) for test in tests]
    # -m "": also those that are marked slow
    options = ["-n", "0", "-v", "-x", "-p", "no:cacheprovider", "-m", ""]
    out = run_python("-m", "pytest", *options, *paths, hide_cpu=tmp_path)
    for test in tests:
        assert re.search(re.escape(test) + r"(\[.*\])? PASSED", out), out
    assert "SKIPPED" not in out
