# SPDX-License-Identifier: MIT
"""Layers of the package: no module imports from a higher layer, and there are no circular imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import fastdiff

#: From bottom to top. A part is a package, or the modules beside the packages that are named here, or all others there.
LAYERS = (
    ("modules",),
    ("ops",),
    ("kernels",),
    ("schedules",),
    ("solvers",),
    ("noise",),
    ("guidance",),
    ("sampling",),
    ("loops",),
    ("graphs",),
    ("samplers",),
    ("rl",),
    ("editing",),
    ("analysis",),
    ("sharding",),
    ("classroom",),
    ("digits",),
    ("diffusers",),
    ("training",),
    ("compression",),
    ("cli", "__main__", "__init__"),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

PACKAGE = Path(fastdiff.__file__).parent
#: The kernels lie beside the package in a checkout, inside it where it is installed.
KERNELS = next(
    folder for folder in (PACKAGE / "kernels", PACKAGE.parent / "kernels" / "triton") if (folder / "step.py").is_file()
)


def _modules() -> dict[str, Path]:
    found = {}
    for root, name in ((PACKAGE, "fastdiff"), (KERNELS, "fastdiff.kernels")):
        for path in sorted(root.rglob("*.py")):
            found[".".join([name, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _part(module: str) -> str:
    """Return the part of the package that a module belongs to."""
    if module == "fastdiff":
        return "__init__"
    part = module.split(".")[1]
    return part if part in RANK else "modules"


def _imports(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and module of each import of a fastdiff module, also inside functions, except for type checkers."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):  # breadth first: a condition comes before what it holds
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
            case ast.Import() if id(node) not in skipped:
                yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)
            case ast.ImportFrom() if id(node) not in skipped:
                base = node.module or ""
                if node.level:
                    above = module.split(".")[: -node.level + is_package or None]
                    base = ".".join([*above, *filter(None, [node.module])])
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    # A package's name of the same spelling counts as what stands in the package.
                    if name in MODULES and not _is_defined(base, alias.name):
                        yield node.lineno, name
                    elif base in MODULES:
                        yield node.lineno, base


def _is_defined(package: str, name: str) -> bool:
    """Return True if a package defines a name that is also one of its modules, such as the function ``ops.step``."""
    if package not in MODULES:
        return False
    body = ast.parse(MODULES[package].read_text(encoding="utf-8")).body
    return any(
        isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names)
        for node in body
    )


def _graph() -> dict[tuple[str, str], int]:
    """Return the line of each import of a fastdiff module by another."""
    return {
        (module, imported): line
        for module, path in MODULES.items()
        for line, imported in _imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        if imported != module
    }


GRAPH = _graph()


def _climbs(module: str, imported: str) -> bool:
    ours, theirs = _part(module), _part(imported)
    return ours != theirs and RANK[theirs] >= RANK[ours] and RANK[ours] < len(LAYERS) - 1


def test_every_module_has_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {"kernels"}
    assert folders == set(RANK) - {"modules", "__main__", "__init__"}
    assert {_part(module) for module in MODULES} == set(RANK)
    assert len(GRAPH) > len(MODULES), "the imports were found"


def test_no_module_imports_from_higher_layer() -> None:
    found = [
        f"{MODULES[module]}:{line}: {module} imports {imported}, which is above it"
        for (module, imported), line in GRAPH.items()
        if _climbs(module, imported)
    ]
    assert found == []


def test_import_from_higher_layer_is_detected() -> None:
    cases = {
        "from ..sampling.stepper import Stepper": "fastdiff.sampling.stepper",
        "def f():\n    from .. import samplers": "fastdiff.samplers",
        "import fastdiff.cli": "fastdiff.cli",
        "from .. import __version__": "fastdiff",
        "from fastdiff.diffusers import patch": "fastdiff.diffusers",
        "from .call import StepCall": None,
        "from ..errors import error_message": None,
        "from . import backends": None,
        "if TYPE_CHECKING:\n    from ..samplers import create_sampler": None,
    }
    for source, above in cases.items():
        found = [name for _, name in _imports("fastdiff.ops.layout", source, False)]
        assert [name for name in found if _climbs("fastdiff.ops.layout", name)] == ([above] if above else []), source
    (name,) = (name for _, name in _imports("fastdiff.sampling", "from .stepper import Stepper", True))
    assert name == "fastdiff.sampling.stepper"


def test_no_circular_imports() -> None:
    imports: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, imported in GRAPH:
        imports[module].add(imported)
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None
