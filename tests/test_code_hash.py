"""experiments/code_hash.py: which files a script's numbers come from, and what changes their hash."""
import itertools
import shutil

import pytest

from conftest import REPO
from experiments.code_hash import code_hash, imported_files, read_module


@pytest.fixture
def package(tmp_path):
    """a.py imports pack.b in a function; pack/b.py imports pack.c; nothing imports other.py."""
    (tmp_path / "pack").mkdir()
    for name, text in {"a.py": "import json\ndef f():\n    from pack import b\n", "other.py": "x = 1\n",
                       "pack/__init__.py": "", "pack/b.py": "import pack.c\n",
                       "pack/c.py": '"""Doc."""\nx = 1  # why\n'}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_imports_are_found_transitively_and_inside_functions(package):
    assert [path.relative_to(package).as_posix() for path in imported_files(package / "a.py")] == [
        "a.py", "pack/__init__.py", "pack/b.py", "pack/c.py"]


def test_hash_ignores_comments_docstrings_and_unused_files(package):
    before = code_hash(package / "a.py")
    (package / "pack/c.py").write_text('"""Another."""\nx = 1\n')
    (package / "other.py").write_text("x = 2\n")
    assert code_hash(package / "a.py") == before
    (package / "pack/c.py").write_text("x = 2\n")
    assert code_hash(package / "a.py") != before


def test_imports_for_type_checkers_do_not_count(package):
    before = code_hash(package / "a.py")
    source = (package / "a.py").read_text()
    (package / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import other\n" + source)
    assert package / "other.py" not in imported_files(package / "a.py")
    guarded = code_hash(package / "a.py")
    (package / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import json\n" + source)
    assert code_hash(package / "a.py") == guarded != before


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "probes.py"])
def test_all_that_numbers_come_from_is_found(script):
    """Also runtime/, where bits per byte and autocast are, the tokenizer, and kernels that are imported when used."""
    found = {path.relative_to(REPO).as_posix() for path in imported_files(REPO / script)}
    assert {script, "model.py", "trainer.py", "optimizer.py", "dataloader.py", "tokenizer.py", "runtime/metrics.py",
            "runtime/device.py", "layers/loss.py", "layers/__init__.py", "kernels/rational.py",
            "kernels/rational_triton.py", "kernels/cross_entropy_triton.py"} <= found
    assert not any(path.startswith(("tests/", "bench/", "convert/", "experiments/")) for path in found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code of the repository."""
    folder = tmp_path_factory.mktemp("copy")
    for path in itertools.chain((REPO / "experiments").glob("*.py"), *(
            imported_files(REPO / script) for script in ("train.py", "finetune.py", "probes.py"))):
        (folder / path.relative_to(REPO)).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, folder / path.relative_to(REPO))
    return folder


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "probes.py"])
def test_a_changed_line_in_any_imported_file_changes_the_hash(copy, script):
    before = code_hash(copy / script)
    assert before == code_hash(REPO / script)
    for path in imported_files(copy / script):
        source = path.read_text(encoding="utf-8")
        path.write_text(source + "\nCHANGED = 1\n", encoding="utf-8")
        assert code_hash(copy / script) != before, path
        path.write_text(source, encoding="utf-8")
    assert code_hash(copy / script) == before
    read_module.cache_clear()


@pytest.mark.parametrize("changed, counts", [
    ("experiments/plots.py", False), ("experiments/runner.py", False), ("runtime/metrics.py", True), ("tokenizer.py", True),
    ("runtime/device.py", True)])
@pytest.mark.parametrize("script", ["train.py", "finetune.py", "probes.py"])
def test_what_makes_numbers_counts_and_reporting_does_not(copy, script, changed, counts):
    """Bits per byte are runtime/metrics.py's, autocast is runtime/device.py's."""
    before, source = code_hash(copy / script), (copy / changed).read_text(encoding="utf-8")
    (copy / changed).write_text(source + "\nCHANGED = 1\n", encoding="utf-8")
    try:
        assert (code_hash(copy / script) != before) == counts
    finally:
        (copy / changed).write_text(source, encoding="utf-8")
