"""Local files of text and of rows: which of a folder are data, and opening them.

    found = find_data_files(Path("my_texts"))
    with open_file(found.files[0]) as opened: ...

A folder is read with everything below it, in the order of the names. Links are followed. What is left out is named.
"""
import errno
import gzip
import io
import os
import re
import stat
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.config import BadInput
from runtime.files import require_regular_file

# Formats whose rows have columns, and those that are text from start to end: prose, and source code. Each but parquet may be
# compressed.
ROW_FORMATS = ".parquet", ".jsonl", ".json", ".csv", ".tsv"
PROSE = ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".htm"
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt",
        ".scala", ".cs", ".swift", ".m", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".php", ".rb", ".pl", ".lua", ".r",
        ".jl", ".hs", ".ml", ".ex", ".exs", ".erl", ".clj", ".lisp", ".el", ".f90", ".sql", ".sh", ".bash", ".zig", ".nim",
        ".dart", ".asm", ".s", ".vim", ".cmake", ".proto")
TEXT_FORMATS = PROSE + CODE
FORMATS = ROW_FORMATS + TEXT_FORMATS
FORMAT_WORDS = "parquet, jsonl, json, csv, tsv, txt, md or other text, or source code"  # for messages
COMPRESSIONS = ".gz", ".zst"
# JSON that is no data but describes some: of this program, and of `datasets`, which passes over the same ones.
METADATA_FILES = {"manifest.json", "tokenizer.json", "config.json", "dataset_info.json", "dataset_infos.json",
                  "dataset_dict.json", "state.json", "tokenizer_config.json", "special_tokens_map.json"}
# Words in the name of a file or folder that say which split it is, as in `datasets`.
SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
               "test": ("test", "testing", "eval", "evaluation")}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}


@dataclass(frozen=True)
class DataFiles:
    """The files of a dataset that is a local file or folder. splits: for each file "train", "validation" or "test", if its
    name says so. left_out: why -> names of the files and folders that are no data."""
    root: Path
    files: tuple[Path, ...]
    splits: tuple[str | None, ...]
    left_out: dict[str, list[str]]

    def named_splits(self) -> set[str]:
        """The splits there are, if any name says one; files whose names say none belong to "train"."""
        return {split or "train" for split in self.splits} if any(self.splits) else set()

    def of_split(self, split: str) -> list[Path]:
        """Its files; all if no name says a split."""
        return [file for file, own in zip(self.files, self.splits) if (own or "train") == split or not any(self.splits)]

    def describe_left_out(self, other_splits: set[str] = frozenset()) -> str | None:
        """A line with what is not read, `other_splits` included; None if everything is."""
        left_out = dict(sorted(self.left_out.items(), key=lambda item: -len(item[1])))
        for split in sorted(other_splits):
            left_out[f"of the split {split}"] = [self.relative(file) for file in self.of_split(split)]
        if not any(left_out.values()):
            return None
        return printable(f"left out of {self.root}: " + ", ".join(
            f"{count_files(names, why)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for why, names in left_out.items() if names))

    def relative(self, file: Path) -> str:
        return printable(str(file.relative_to(self.root)))


def count_files(names: list[str], what: str) -> str:
    """"2 .pdf files", "1 .pdf file"."""
    return f"{len(names)} {what if len(names) > 1 else what.replace('files', 'file', 1)}"


def printable(line: str) -> str:
    """`line` for a message, if names in it hold line ends, or bytes that are not Unicode."""
    return " ".join(line.split()).encode("utf-8", "replace").decode()


def file_format(name: str) -> str:
    """The ending that says the format, in lower case and without that of a compression: "A.jsonl.GZ" -> ".jsonl"."""
    return file_endings(name)[0]


def file_endings(name: str) -> tuple[str, str]:
    """The endings of the format and of the compression: "a.jsonl.gz" -> (".jsonl", ".gz"), "a.txt" -> (".txt", "")."""
    stem, ending = os.path.splitext(name.lower())
    if ending in COMPRESSIONS:
        inner = os.path.splitext(stem)[1]
        return ("" if inner == ".parquet" else inner), ending
    return ending, ""


def local_path(dataset: str) -> Path | None:
    """The file or folder that `dataset` names; None if there is none. Raises BadInput for the home of no user."""
    try:
        path = Path(dataset).expanduser()
    except RuntimeError:
        raise BadInput(f"--dataset={dataset}: is in the home of a user that does not exist") from None
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # names that no file can have
        return None


def find_data_files(path: Path) -> DataFiles:
    """`path` itself, or the files of data below it. Names that begin with a dot, and what is below such folders, are no
    data; nor are files of text beside files of rows, which they describe: LICENSE.txt. Raises BadInput if there are none, or
    for what looks like data and cannot be read."""
    if not path.is_dir():
        require_regular_file(path, f"--dataset={path}")
        if file_format(path.name) not in FORMATS:
            raise BadInput(f"--dataset={path}: cannot read {path.suffix or 'a file without an extension'}: "
                           f"give {FORMAT_WORDS}, {' or '.join(COMPRESSIONS)} of these, or a folder of such files")
        return DataFiles(path, (path,), (None,), {})
    if is_prepared(path):
        raise BadInput(f"--dataset={path}: holds the shards of a prepared text, which download_data.py alone reads, and "
                       f"only by itself: give the text that its manifest.json names")
    left_out: dict[str, list[str]] = defaultdict(list)
    aliases: dict[Path, list[Path]] = {}
    files = sorted(walk(path, left_out, aliases))
    if any(file_format(file.name) in ROW_FORMATS for file in files):
        text = [file for file in files if file_format(file.name) in TEXT_FORMATS]
        files = [file for file in files if file_format(file.name) in ROW_FORMATS]
        for file in text:
            left_out[f"{file_format(file.name)} files beside files of rows"].append(str(file.relative_to(path)))
    if not files:
        found = [count_files(names, why) for why, names in left_out.items() if why != "hidden"]
        raise BadInput(f"--dataset={path}: no file of {FORMAT_WORDS} in this folder"
                       + (f", but {', '.join(found[:5])}" if found else "")
                       + (f", hidden ones aside: {', '.join(left_out['hidden'][:3])}" if left_out["hidden"] else ""))
    return DataFiles(path, tuple(files), tuple(split_of(file, path, aliases[file]) for file in files), dict(left_out))


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds shards that download_data.py wrote."""
    return all((folder / name).exists() for name in ("manifest.json", "tokenizer.json", "val_000000.npy"))


def walk(root: Path, left_out: dict[str, list[str]], aliases: dict[Path, list[Path]]) -> Iterator[Path]:
    """Yields the files below `root` whose ending is that of a format; adds what it passes over to `left_out`. Each file and
    folder once, under its own name rather than that of a link; `aliases` gets the other names of each file."""
    seen: dict[tuple, Path] = {real_id(root.stat(), root): root}
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else None
        paths = sorted(read_folder(folder)) if folder else [links.pop(0)]
        if folder and folder != root and {"manifest.json", "tokenizer.json"} <= {path.name for path in paths}:
            left_out["folders of prepared shards"].append(str(folder.relative_to(root)))
            continue
        inner = []
        for path in paths:
            name = str(path.relative_to(root))
            if path.name.startswith("."):
                left_out["hidden"].append(name)
                continue
            if folder and path.is_symlink():
                links.append(path)
                continue
            status = follow(path)
            is_data = file_format(path.name) in FORMATS and path.name not in METADATA_FILES
            if not stat.S_ISDIR(status.st_mode) and not is_data:
                left_out[describe_other(path.name)].append(name)
            elif real_id(status, path) in seen:
                left_out["read already under another name"].append(name)
                aliases.setdefault(seen[real_id(status, path)], []).append(path)
            elif stat.S_ISDIR(status.st_mode):
                seen[real_id(status, path)] = path
                inner.append(path)
            else:
                require_regular_file(path, str(path))
                seen[real_id(status, path)] = path
                aliases[path] = []
                yield path
        folders += reversed(inner)


def describe_other(name: str) -> str:
    """What to call a file that is no data, to count it with its like."""
    if name in METADATA_FILES:
        return "that describe data"
    ending = os.path.splitext(name.lower())[1]
    return f"{ending} files" if ending else "files without an ending"


def read_folder(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({error.strerror})") from None


def follow(path: Path) -> os.stat_result:
    """The status of what `path` leads to. Raises BadInput for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise BadInput(f"{path}: a link to {os.readlink(path)}, which is not there: restore that, or remove the "
                           f"link") from None
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def real_id(status: os.stat_result, path: Path) -> tuple:
    """The same for all names of a file or folder."""
    return (status.st_dev, status.st_ino) if status.st_ino else (os.path.realpath(path),)


def split_of(file: Path, root: Path, aliases: list[Path]) -> str | None:
    """The split that the name of a file says, or else that of a link to it."""
    return next((split for path in (file, *aliases) if (split := split_in_name(path.relative_to(root)))), None)


def split_in_name(path: Path) -> str | None:
    """The split that the name of a file says, or else that of a folder it is in. "data/test-00000.jsonl" -> "test".

    Names of source code say none, as test_x.py does not, nor those of prose other than txt, such as train.md, themselves.
    """
    ending = file_format(path.name)
    if ending in CODE:
        return None
    for part in reversed(path.parent.parts if ending in PROSE and ending != ".txt" else path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_OF_WORD:
                return SPLIT_OF_WORD[word]
    return None


# -- opening ----------------------------------------------------------------------------------------------------------

class Damaged(BadInput):
    """What is compressed cannot be unpacked."""


def open_file(path: Path) -> io.BufferedIOBase:
    """Opens a file to read its bytes, unpacked. Raises BadInput naming it when it cannot be opened."""
    try:
        opened = open(path, "rb")  # noqa: SIM115 (closed by the caller)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    compression = file_endings(path.name)[1]
    return io.BufferedReader(Unpacked(opened, compression, str(path)), 1 << 17) if compression else opened


class Unpacked(io.RawIOBase):
    """The bytes of a file that gzip or Zstandard compressed. Reading raises Damaged naming the file."""

    def __init__(self, opened: io.IOBase, compression: str, name: str):
        self.opened, self.name = opened, name
        if compression == ".gz":
            self.stream = gzip.GzipFile(fileobj=opened)
        else:
            import pyarrow
            self.stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(opened, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self.stream.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise Damaged(f"{self.name}: cannot be unpacked ({' '.join(str(error).split())[:200]})") from None

    def close(self):
        self.opened.close()
        super().close()


def skip_to(opened: io.IOBase, byte: int):
    """Moves on to `byte` of a file that has just been opened, which a compressed one cannot do without reading it."""
    if opened.seekable():
        opened.seek(byte)
        return
    while byte > 0 and (block := opened.read(min(byte, 1 << 20))):
        byte -= len(block)
