"""Check the structure of the source: ``python -m tests.structure`` fails if a rule below is broken.

- Imports only go down, in the order of LAYERS. Lazy imports, imports for type checkers and ``import_module`` count too
  (ruff rejects relative imports).
- Imports have no cycles.
- A function has at most 50 lines (without its docstring) and 8 parameters (without self).
- A folder has more than one file, besides ``__init__.py``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf", "scaling", "slurm", "trainers")
LINES, PARAMETERS = 50, 8
# Bottom first. The folders in one tuple are on one level, and don't import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("scaling",),  # its own files, without its folders
    ("conf",),
    ("scaling.planning",),
    ("scaling.tuning",),
    ("scaling.report",),
    ("trainers.ranks",),
    ("trainers.tensors",),
    ("trainers.model",),
    ("trainers.tasks",),
    ("trainers.optim",),
    ("trainers.data",),
    ("trainers.engines",),
    ("trainers.checkpoints",),
    ("trainers.loop",),
    ("trainers.trackers",),
    ("trainers.trial",),
    ("slurm", "trainers.launch"),
    ("trainers.tuning",),
    ("trainers",),  # run.py
    ("actions",),
    ("launch",),
    ("",),  # files of isobatch/ itself: the Python API
)


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        name: dotted name, without ``isobatch.``.
        path: path relative to the root of the source.
        imports: names of Isobatch's modules that it imports, anywhere in the file.
    """

    name: str
    path: Path
    tree: ast.Module = field(repr=False)
    imports: tuple[str, ...] = ()

    @property
    def layer(self) -> int:
        """Return the index in LAYERS of the innermost folder that LAYERS names."""
        return max((len(name), level) for level, names in enumerate(LAYERS) for name in names if _within(self, name))[1]


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Return all source files below ``root``, by dotted name."""
    files = [root / "launch.py", *(file for file in sorted((root / "isobatch").glob("*.py")) if not file.is_symlink())]
    files += [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    parts = {file: file.relative_to(root).with_suffix("").parts for file in files}
    names = {file: ".".join(part for part in parts[file] if part not in ("__init__", "isobatch")) for file in files}
    trees = {file: ast.parse(file.read_text()) for file in files}
    known = set(names.values())
    return {
        name: Module(name, file.relative_to(root), trees[file], tuple(dict.fromkeys(_imports(trees[file], known))))
        for file, name in names.items()
    }


def upward(found: dict[str, Module]) -> list[str]:
    """Return the imports of a higher layer by a lower one, and the imports between folders of one level."""
    lines = []
    for module in found.values():
        for name in module.imports:
            other = found[name]
            sideways = other.layer == module.layer and _folder(other) != _folder(module)
            if other.layer > module.layer or sideways:
                lines.append(f"{module.path} imports {other.path}, which is above it")
    return lines


def cycles(found: dict[str, Module]) -> list[str]:
    """Return the import cycles: groups of files that import each other (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in found[name].imports:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in found:
        if name not in index:
            visit(name)
    return [f"{', '.join(group)} import each other" for group in groups]


def functions(found: dict[str, Module]) -> list[str]:
    """Return the functions with too many lines or parameters."""
    lines = []
    for module in found.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{module.path}:{node.lineno} {node.name}"
                if (length := _length(node)) > LINES:
                    lines.append(f"{where} has {length} lines")
                if (count := _parameters(node)) > PARAMETERS:
                    lines.append(f"{where} has {count} parameters")
    return lines


def single(found: dict[str, Module]) -> list[str]:
    """Return each file that is the only one in its folder and its sub-folders."""
    files = [module.path for module in found.values() if module.path.name != "__init__.py"]
    inside = Counter(folder for file in files for folder in file.parents)
    lonely = [file for file in files if inside[file.parent] == 1]
    return [f"{file} is the only file of its folder" for file in lonely if file.parent.name != "isobatch"]


def main(root: Path = ROOT) -> int:
    """Print the broken rules, and return the exit code."""
    found = modules(root)
    problems = {
        "imports upward": upward(found),
        "cycles": cycles(found),
        "functions": functions(found),
        "folders": single(found),
    }
    for lines in problems.values():
        for line in lines:
            print(line)
    lines_of = {name: len((root / module.path).read_text().splitlines()) for name, module in found.items()}
    arrows = sum(len(module.imports) for module in found.values())
    print(f"{len(found)} files, {sum(lines_of.values()):,} lines, {arrows} imports")
    print(", ".join(f"{len(lines)} {name}" for name, lines in problems.items()))
    return int(any(problems.values()))


def _imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        names: Sequence[str] = ()
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("isobatch.") in known else str(node.module) for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            ours = name.removeprefix("isobatch.")
            if name.startswith("isobatch.") and ours in known:
                yield ours


def _within(module: Module, name: str) -> bool:
    return name == "" or module.name == name or module.name.startswith(f"{name}.")


def _folder(module: Module) -> str:
    return next(name for name in LAYERS[module.layer] if _within(module, name))


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    lines = (node.end_lineno or 0) - node.lineno + 1
    return lines - ((docstring.end_lineno or 0) - docstring.lineno + 1 if docstring else 0)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    args = node.args
    names = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return len(names) - (names[:1] != [] and names[0].arg in ("self", "cls"))


if __name__ == "__main__":
    sys.exit(main())
