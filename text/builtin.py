"""The text that every machine has: the documentation inside Python's standard library, numpy and torch.

    documents = builtin_texts()      # about 1,700 documents, 9 MB
"""
import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Neither is documentation of a public interface; torch/_*.py are compiler internals, except for these three.
SKIPPED_FOLDERS = {"site-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "testing"}
DOCUMENTED_PRIVATE = {"_torch_docs.py", "_tensor_docs.py", "_storage_docs.py"}
# Calls that attach a docstring to a function written in C.
DOC_CALLS = {"add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc"}


def builtin_revision() -> str:
    """The versions that the text depends on."""
    return f"python {platform.python_version()}, " + ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("numpy", "torch"))


@functools.cache
def builtin_texts() -> list[str]:
    """All built-in documents."""
    return list(builtin_documents())


def builtin_documents() -> Iterator[str]:
    """The reference topics of Python's `help()`, and for each source file of Python, numpy and torch a document
    of its docstrings. Nothing is imported or run; a docstring that occurs in several files is used once.

    The order is that of a hash of the names, so that the first documents are a fair sample of all.
    """
    from pydoc_data.topics import topics
    files = {f"help({topic!r})": None for topic in topics}
    for package, root in package_roots():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            private = package == "torch" and parts[0].startswith("_") and parts[0] not in DOCUMENTED_PRIVATE
            if not private and not SKIPPED_FOLDERS.intersection(parts) and not any("test" in part for part in parts):
                files[".".join((package, *parts)).removesuffix(".py").removesuffix(".__init__")] = path
    seen: set[str] = set()
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if files[name] is None:
            text = topics[name.removeprefix("help('").removesuffix("')")]
        else:
            described = [(title, text) for title, text in docstrings(files[name]) if text not in seen]
            seen.update(text for _, text in described)
            text = "\n\n".join(f"{title}\n\n{text}" if title else text for title, text in described)
        if text.strip():
            yield f"{name}\n\n{text.strip()}\n"


def package_roots() -> list[tuple[str, Path]]:
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in ("numpy", "torch"):  # located, not imported
        roots.append((package, Path(importlib.util.find_spec(package).origin).parent))
    return roots


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (signature, docstring) in the order of a source file; signature is "" for the module and for docstrings of
    functions written in C."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files for other Python versions
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield signature(node), text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in DOC_CALLS:
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)
                     and isinstance(part.value, str) and len(part.value) > 100]
            lines = "\n".join(texts).strip().splitlines()
            # `{input}` alone on a line is a placeholder for a paragraph that torch inserts
            yield "", "\n".join(line for line in lines if not (line.strip().startswith("{") and line.endswith("}")))
            continue
        if not isinstance(node, ast.expr) or isinstance(node, ast.Call):
            pending += reversed(list(ast.iter_child_nodes(node)))


def signature(node: ast.AST) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"
