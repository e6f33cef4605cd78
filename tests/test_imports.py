"""No modules of ours import each other in a circle, not even by an import inside of a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "models", "trainer", "launch")


def module_files(root: Path) -> dict[str, Path]:
    """The modules of our packages by their dotted names."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    names = {path: path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported_names(node: ast.AST) -> Iterator[str]:
    """The dotted names of every import below `node`, wherever it stands, but for those under TYPE_CHECKING.

    `from a.b import c` is a.b.c, which may be a module or a name in one. A whole name given to import_module counts.
    """
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from imported_names(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if (
        isinstance(node, ast.Call)
        and "import_module" in ast.unparse(node.func)
        and isinstance(node.args[0], ast.Constant)
    ):
        yield str(node.args[0].value)
    for child in ast.iter_child_nodes(node):
        yield from imported_names(child)


def import_graph(root: Path) -> dict[str, set[str]]:
    """The modules of ours that each of them imports, with the packages that are imported on the way but for its own."""
    files, graph = module_files(root), {}
    for module, path in files.items():
        graph[module] = set()
        for name in imported_names(ast.parse(path.read_text())):
            parts = name.split(".")
            found = {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & files.keys()
            graph[module] |= {part for part in found if part != module and not module.startswith(f"{part}.")}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The largest sets of modules that all reach each other."""

    def reached(module: str) -> set[str]:
        found, left = set(), [module]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    reach = {module: reached(module) for module in graph}
    return {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}


def test_the_walk_sees_circles(tmp_path):
    tree = {
        "kernels/__init__.py": "",
        "launch/__init__.py": "from launch.tools import g",
        "launch/tools.py": "import kernels.a",
        "trainer/__init__.py": "from trainer.f import x",
        "trainer/f.py": "def f():\n    import models.g",
        "models/g.py": "from trainer.h import y",
        "trainer/h.py": "",
        "kernels/a.py": "import torch\ndef f():\n    from kernels import b\n",
        "kernels/b.py": "class B:\n    def f(self):\n        import kernels.sub.c\n",
        "kernels/sub/__init__.py": "from kernels.a import f",
        "kernels/sub/c.py": "from importlib import import_module\nx = import_module('kernels.a').f\n",
        "models/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models.e import E\n",
        "models/e.py": "from models.d import D\nfrom models.e import E\nimport_module(f'models.{d}')\n",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(import_graph(tmp_path)) == {
        frozenset({"kernels.a", "kernels.b", "kernels.sub", "kernels.sub.c"}),
        frozenset({"trainer", "trainer.f", "models.g"}),
    }


def test_no_circle_of_imports():
    graph = import_graph(ROOT)
    assert len(graph) > 100 and graph["kernels.moe.routing"] >= {"kernels.backend", "kernels.triton.routing"}
    found = [sorted(circle) for circle in circles(graph)]
    assert not found, f"import each other: {found}"
