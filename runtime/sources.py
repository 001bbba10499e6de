"""Where text comes from: a dataset of the Hugging Face hub, local files, or the text built into this machine's Python.

A source is opened once and gives its documents in a fixed order, each a non-empty str. `documents(skip)` starts after
the first `skip` of them, which is how an interrupted preparation goes on.
"""
import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.flags import BadInput, check_flags, flag

FINEWEB = "HuggingFaceFW/fineweb-edu"
# A .txt file gives several documents: it is cut at the first blank line after so many characters, or, where there are
# no blank lines, at the first line end after LINES_LENGTH.
TXT_LENGTH, LINES_LENGTH = 16_384, 1 << 20


@dataclass(frozen=True)
class SourceConfig:
    """Where text comes from."""
    dataset: str = flag(FINEWEB, "a dataset of the hub by its id, a local file or folder (parquet, jsonl, txt), or "
                                 "`builtin`:\nthe documentation inside Python, numpy and torch, several MB, no network")
    dataset_config: str = flag(None, "configuration of a hub dataset (default: sample-10BT for fineweb-edu, else none)")
    text_column: str = flag("text", "column or JSON key that holds the text")
    streaming: bool = flag(True, "1 reads a hub dataset over the network as it goes, 0 downloads all of it first")
    __post_init__ = check_flags


@dataclass(frozen=True)
class Source:
    """An opened source: what it is, for the manifest, and its documents."""
    name: dict
    documents_from: Callable[[int], Iterator[str]]

    def documents(self, skip: int = 0) -> Iterator[str]:
        """Documents in order, without the first `skip`. Empty ones are left out and not counted."""
        return self.documents_from(skip)


def source_flags(config: SourceConfig) -> dict:
    """The flags that decide which text this is, as `Source.name` holds them."""
    if config.dataset == "builtin":
        return {"dataset": "builtin"}
    if path := local_path(config.dataset):
        return {"dataset": str(path), "text_column": config.text_column}
    dataset_config = config.dataset_config or ("sample-10BT" if config.dataset == FINEWEB else None)
    return {"dataset": config.dataset, "dataset_config": dataset_config, "text_column": config.text_column}


def local_path(dataset: str) -> Path | None:
    """The file or folder `dataset` names, if there is one."""
    try:
        path = Path(dataset).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # names that no file can have
        return None


def local_revision(dataset: str) -> str | None:
    """Of the text files `dataset` names, if they are local."""
    path = local_path(dataset)
    return files_revision(find_text_files(path)) if path else None


def open_source(config: SourceConfig, revision: str | None = None) -> Source:
    """revision: of the hub, where a preparation goes on; by default what it has now. Raises BadInput when there is no such
    dataset, file or column, or nothing in it."""
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
    path = local_path(config.dataset)
    if config.dataset_config and (path or config.dataset == "builtin"):
        raise BadInput(f"--dataset_config={config.dataset_config}: only datasets of the hub have configurations: drop it")
    if config.dataset == "builtin":
        name, everything = {"revision": builtin_revision()}, builtin_documents
    elif path:
        files = find_text_files(path)
        name = {"revision": files_revision(files)}
        everything = lambda: itertools.chain.from_iterable(read_file(file, config.text_column) for file in files)
        if not any(everything()):
            raise BadInput(f"--dataset={path}: no text in it")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", config.dataset) or config.dataset.endswith(tuple(READERS)):
        raise BadInput(f"--dataset={config.dataset}: no such file or folder")
    else:
        return open_hub(config, revision)
    return Source(source_flags(config) | name, lambda skip: itertools.islice(filter(None, everything()), skip, None))


def take_text(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first of `texts`, up to and including the one with which they reach `n_bytes` of UTF-8."""
    texts = iter(texts)
    while n_bytes > 0 and (text := next(texts, None)) is not None:
        yield text
        n_bytes -= len(text.encode("utf-8", "surrogatepass"))


# -- local files ------------------------------------------------------------------------------------------------------

def find_text_files(path: Path) -> list[Path]:
    """`path` itself, or the parquet, jsonl and txt files below it in order of name. Raises BadInput if there are none."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise BadInput(f"--dataset={path}: cannot read {path.suffix or 'a file without ending'}: "
                           f"give {', '.join(READERS)} or a folder of such")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise BadInput(f"--dataset={path}: no {', '.join(READERS)} file in this folder")
    return files


def files_revision(files: list[Path]) -> str:
    """Changes when a file is added, renamed or changes its size; reading gigabytes to be surer would cost minutes."""
    listed = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def read_file(path: Path, text_column: str) -> Iterator[str]:
    """Documents of one local file. Raises BadInput naming the file and what in it cannot be read."""
    try:
        yield from READERS[path.suffix.lower()](path, text_column)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (it holds byte 0x{error.object[error.start]:02x}): convert it") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None


def read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(text_column, file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield require_text(text, text_column, path)
    except pyarrow.ArrowException as error:
        raise BadInput(f"{path}: not a readable parquet file ({error})") from None


def read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or brackets 100,000 deep
                reason = getattr(error, "msg", error)
                raise BadInput(f"{path}: line {number} is not JSON that can be read ({reason})") from None
            if not isinstance(row, dict):
                raise BadInput(f"{path}: line {number} is not a JSON object")
            require_column(text_column, list(row), f"{path}, line {number}")
            yield require_text(row[text_column], text_column, f"{path}, line {number}")


def read_txt(path: Path, text_column: str) -> Iterator[str]:
    """The file in pieces of about TXT_LENGTH characters, cut at blank lines; joined they are the file."""
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": \r\n stays as it is
        lines, length = [], 0
        for line in file:
            lines.append(line)
            length += len(line)
            if (length >= TXT_LENGTH and not line.strip()) or length >= LINES_LENGTH:
                yield "".join(lines)
                lines, length = [], 0
        yield "".join(lines)


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def require_column(text_column: str, columns: list[str], where):
    if text_column not in columns:
        raise BadInput(f"--text_column={text_column}: no such column in {where}, which has {', '.join(columns) or 'none'}")


def require_text(text, text_column: str, where) -> str:
    """`text` if it is a str; a missing value is an empty document."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadInput(f"--text_column={text_column}: {where} holds {type(text).__name__}, not text")
    return text


# -- the hub ----------------------------------------------------------------------------------------------------------

def open_hub(config: SourceConfig, revision: str | None) -> Source:
    """The `train` split of a hub dataset. Raises BadInput when it or its column does not exist or the hub is away; its
    documents raise ConnectionError when the hub stops answering."""
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it raises as well
    huggingface_hub.utils.logging.set_verbosity_error()
    dataset_config = source_flags(config)["dataset_config"]
    given = f"--dataset={config.dataset}" + (f" --dataset_config={dataset_config}" if dataset_config else "")
    try:
        # asked first because it fails at once; pinning what it answers keeps one preparation on one state of the hub
        revision = huggingface_hub.HfApi().dataset_info(config.dataset, revision=revision or "main").sha
        rows = datasets.load_dataset(config.dataset, dataset_config, split="train", streaming=config.streaming,
                                     revision=revision)
        first = next(iter(rows), None)
    except Exception as error:
        if is_network_error(error):
            raise BadInput(f"{given}: the hub cannot be reached ({short(error)}): check the network, or give a local file "
                           f"or `builtin`") from None
        raise hub_failure(error, given) from None
    if first is None:
        raise BadInput(f"{given}: the dataset is empty")
    require_column(config.text_column, list(first), config.dataset)

    def texts() -> Iterator[str]:
        try:
            for row in rows:
                yield require_text(row[config.text_column], config.text_column, config.dataset)
        except BadInput:
            raise
        except Exception as error:
            if is_network_error(error):
                raise ConnectionError(f"{given}: the hub stopped answering ({short(error)})") from None
            raise hub_failure(error, given) from None

    return Source(source_flags(config) | {"revision": revision},
                  lambda skip: itertools.islice(filter(None, texts()), skip, None))


def is_network_error(error: Exception) -> bool:
    """The HTTP libraries below `datasets` changed over its versions, and their errors have no common base."""
    from huggingface_hub import errors
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return False  # an answer, though it comes as an HTTP error
    return isinstance(error, (ConnectionError, TimeoutError, errors.HfHubHTTPError)) or type(error).__module__.split(
        ".")[0] in {"httpx", "httpx2", "requests", "urllib3", "aiohttp", "socket", "ssl"}


def hub_failure(error: Exception, given: str) -> Exception:
    """What to raise for an error, not of the network, that comes out of `datasets` or a library below it: OSError where
    a local disk is the trouble, otherwise BadInput, for it is the dataset that cannot be read."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        reason = "is gated: accept its terms on its page and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "the hub no longer has the revision this preparation began with: choose another --data_path"
    elif isinstance(error, (DatasetNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError)):
        reason = "neither a local file or folder nor a dataset of the hub that can be read"
    elif type(error) is ValueError or isinstance(error, DatasetsError):
        reason = short(error)  # written for the user: which configurations and splits there are
    elif isinstance(error, OSError) and error.errno is not None:
        return OSError(f"{given}: the local copy of it, in the folder that HF_HOME sets: {error}")
    else:  # pyarrow's, gzip's, yaml's, codecs' …
        reason = f"cannot be read, perhaps a file of it is damaged ({short(error)})"
    return BadInput(f"{given}: {reason}")


def short(error: Exception) -> str:
    words = " ".join(str(error).split())[:200]
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"


# -- built in ---------------------------------------------------------------------------------------------------------

# Not documentation, or not public: the rest of torch/_*.py is compiler internals.
SKIPPED_FOLDERS = {"site-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "testing"}
DOCUMENTED_PRIVATE = {"_torch_docs.py", "_tensor_docs.py", "_storage_docs.py"}
# Functions written in C get their documentation from such calls.
DOC_CALLS = {"add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc"}


def builtin_revision() -> str:
    return f"python {platform.python_version()}, " + ", ".join(
        f"{package} {importlib.metadata.version(package)}" for package in ("numpy", "torch"))


def builtin_documents() -> Iterator[str]:
    """The reference topics of Python's `help()` and, a document per source file, the docstrings of the standard
    library, numpy and torch. Nothing is imported or run; a docstring that stands in several files is taken once.

    The order is fixed by a hash of the names, so that the first documents are a fair sample of all of them.
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
    for package in ("numpy", "torch"):  # found, not imported
        roots.append((package, Path(importlib.util.find_spec(package).origin).parent))
    return roots


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of a source file, in its order; signature is "" for the module itself and for text given
    to functions written in C."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files kept for other Python versions
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
            # `{input}` alone on a line stands for a paragraph that torch inserts
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
