"""The seams between the package's rings, the list of tinygrad's defects, and what is optional."""

import ast
import re

from helpers import TESTS, run_script

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


def importing(folder: str) -> set[tuple[str, str]]:
    """(module, imported module) for each import of a module of `folder` outside it."""
    return {
        (name, other)
        for name in FILES
        for other in imported_files(name)
        if other.split(".")[0] == folder != name.split(".")[0]
    }


def test_only_backend_and_cpu_import_non_public_tinygrad():
    private = [
        f"{name}: {module}.{member}"
        for name in FILES
        if name.split(".")[0] not in ("backend", "cpu")
        for module, member in imports(name)
        if module.split(".")[0] == "tinygrad" and not module.startswith("tinygrad.nn")
        if module != "tinygrad" or member not in {"", *PUBLIC}
    ]
    assert not private, "import these through pico_tg.backend"


def test_tools_are_imported_by_the_entry_only():
    assert importing("tools") == {("__main__", "tools.cli")}


def test_cpu_is_imported_at_two_seams():
    """The kernels by backend.cpu_kernels, the launcher by backend.runtime."""
    assert {name for name, _ in importing("cpu")} == {"backend.cpu_kernels", "backend.runtime"}


def test_backend_needs_nothing_of_the_model():
    outer = {
        other for name in FILES if name.startswith("backend") for other in imported_files(name)
    }
    outer = {name for name in outer if not name.startswith("backend")}
    assert outer == {"files", "progress", "cpu", "cpu.kernels", "cpu.launcher"}


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


DEFECTS = PACKAGE / "backend" / "README.md"


def test_tests_that_the_package_names_exist():
    """In comments, and in the list of tinygrad's defects."""
    texts = [path.read_text() for path in (*FILES.values(), DEFECTS)]
    named = {pair for text in texts for pair in re.findall(r"\b(test_\w+)\.(test_\w+)", text)}
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (TESTS / f"{file}.py").read_text(), (file, test)


def test_files_that_work_around_a_defect_are_listed():
    listed = {*re.findall(r"`([\w/]+\.py)`", DEFECTS.read_text())}
    naming = {
        str(path.relative_to(PACKAGE)) for path in FILES.values() if "0.13" in path.read_text()
    }
    assert naming - {"backend/__init__.py"} <= listed
    assert all((PACKAGE / name).exists() for name in listed)


def test_import_without_cpu_kernels():
    """Every module imports; a matmul is computed. More with PICO_WITHOUT_CPU=1 (.ci/run)."""
    assert run_script("import_without_cpu.py").stdout == "False 64.0\n"
