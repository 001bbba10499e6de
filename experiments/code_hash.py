"""A hash of all code that a script's numbers come from, so that cached results of other code are not reused.

    code_hash(Path("train.py"))     16 hex digits

The files are found, not listed: the script and every module of this repository that it imports, directly or through
others, inside functions too. Modules of experiments/ do not count, because running and reporting make no numbers, nor do
imports under `if TYPE_CHECKING:`.
"""
import ast
import functools
import hashlib
from pathlib import Path

WITHOUT_NUMBERS = "experiments"  # a folder whose code no number comes from


def code_hash(script: Path) -> str:
    """16 hex digits that change with the code of any of `imported_files`, but not with its comments and docstrings."""
    root = script.parent
    digests = [f"{path.relative_to(root).as_posix()} {read_module(path.read_text(encoding='utf-8'))[1]}"
               for path in imported_files(script)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def imported_files(script: Path) -> list[Path]:
    """`script` and the files beside or below it that its numbers come from, sorted."""
    found, pending = set(), [script]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        for name in read_module(path.read_text(encoding="utf-8"))[0]:
            pending += find_module(script.parent, name)
    return sorted(found)


@functools.cache
def find_module(root: Path, name: str) -> tuple[Path, ...]:
    """The files that `import name` runs: "runtime.cli" -> (runtime/__init__.py, runtime/cli.py); none for installed
    packages and for WITHOUT_NUMBERS."""
    parts = name.split(".")
    if parts[0] == WITHOUT_NUMBERS:
        return ()
    candidates = [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    files = [file for path in candidates for file in (path / "__init__.py", path.with_suffix(".py"))]
    return tuple(file for file in files if file.is_file())


@functools.cache
def read_module(source: str) -> tuple[frozenset[str], str]:
    """The names of the modules that it imports, and a digest of its code, both without what is for type checkers; the digest
    also without comments and docstrings."""
    tree, names = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}  # which may be a module
    return frozenset(names), hashlib.sha256(ast.dump(tree).encode()).hexdigest()
