"""runtime/files.py: atomic writes, links, and the lock of a folder."""
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.config import BadInput
from runtime.files import atomic_write, check_writable, folder_lock, replace_with_link, require_regular_file

REPO = Path(__file__).parent.parent


# -- writing ----------------------------------------------------------------------------------------------------------

def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_write_through_a_symbolic_link_keeps_the_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "disk" / "real.pt")
    with atomic_write(tmp_path / "latest.pt", "w") as file:
        file.write("new")
    assert (tmp_path / "latest.pt").is_symlink() and (tmp_path / "disk" / "real.pt").read_text() == "new"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="a.txt: cannot be written .No space left on device"), \
            atomic_write(tmp_path / "a.txt", "w"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_read_only_disk_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch):
    """Such a disk refuses to delete a file even where there is none."""
    def read_only(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    (tmp_path / "a").touch()
    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    for write in (lambda: atomic_write(tmp_path / "a.png").__enter__(),
                  lambda: replace_with_link(tmp_path / "a", tmp_path / "b")):
        with pytest.raises(OSError, match=r"(a.png|b): cannot be written \(Read-only file system\)$"):
            write()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_link_is_replaced_or_copied_where_there_are_no_links(tmp_path, monkeypatch, has_links):
    def no_links(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    first, second = tmp_path / "a.pt", tmp_path / "deep" / "b.pt"
    first.write_text("one")
    replace_with_link(first, second)
    assert second.read_text() == "one" and first.samefile(second) == has_links
    replace_with_link(first, second)  # of two names of one file
    with atomic_write(first, "w") as file:
        file.write("two")
    assert second.read_text() == "one"  # a new file under the first name leaves the second alone
    (tmp_path / "deep" / "b.pt.tmp").write_text("left by a crash")
    replace_with_link(first, second)
    assert second.read_text() == "two" and len(list(tmp_path.rglob("*"))) == 3


def test_a_check_of_a_writable_path_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "a.pt", "--x=new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.tmp").write_text("the user's")
    check_writable(tmp_path / "a", "--x=a")
    assert (tmp_path / "a.tmp").read_text() == "the user's"


@pytest.mark.parametrize("path, reason", [("file/a.pt", "Not a directory"), ("folder", "a folder"), (".", "a folder"),
                                          ("/", "a folder"), ("/dev/null", "not a file")])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch, path, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=rf"^--x=it: cannot be written \({reason}\): choose another path"):
        check_writable(Path(path), "--x=it")


def test_a_file_to_read_is_a_file_with_an_end(tmp_path):
    (tmp_path / "file").touch()
    require_regular_file(tmp_path / "file", "")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, words in {"pipe": "is a pipe or a device: give a file", "link": "is a pipe or a device",
                        ".": "is a folder: give a file", "none": "cannot be read .No such file",
                        "a\0b": "cannot be read .embedded null", "x" * 300: "cannot be read .File name too long"}.items():
        with pytest.raises(BadInput, match=f"^--x=it: {words}"):
            require_regular_file(tmp_path / name, "--x=it")


# -- locks ------------------------------------------------------------------------------------------------------------

def assert_locked(folder: Path, given: str = "--data_path=x"):
    with pytest.raises(BadInput, match=f"^{given}: another process is writing there"), folder_lock(folder, given):
        raise AssertionError("two writers")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "a" / "b"
    with folder_lock(folder, "--data_path=x"):
        assert_locked(folder)
        assert_locked(folder)  # the first refused one has not released it
    with folder_lock(folder, "--data_path=x"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_has_one_writer_whatever_its_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folder_lock(tmp_path / "real" / "a", ""):
        assert_locked(tmp_path / "link" / "a")


def test_a_created_folder_that_stays_empty_is_removed(tmp_path):
    (tmp_path / "existed").mkdir()
    for name in ("existed", "empty", "filled"):
        with folder_lock(tmp_path / name / "deep", ""):
            if name == "filled":
                (tmp_path / name / "deep" / "file").touch()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "existed", "filled", "filled/deep", "filled/deep/file"]


def test_a_lock_ends_with_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path / "a", ""):
        raise ZeroDivisionError
    with folder_lock(tmp_path / "a", ""):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_inside_a_file_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="^--data_path=y: cannot be written"), folder_lock(tmp_path / "file" / "a",
                                                                                        "--data_path=y"):
        raise AssertionError("a folder in a file")


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_two_processes_may_check_the_same_path(tmp_path, monkeypatch):
    """The other one has deleted the probe first."""
    unlink = Path.unlink

    def delete_twice(path, **options):
        unlink(path)
        unlink(path, **options)
    monkeypatch.setattr(Path, "unlink", delete_twice)
    check_writable(tmp_path / "a.pt", "--x=a")
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = ("import sys, time; from pathlib import Path; from runtime.files import folder_lock\n"
               "with folder_lock(Path(sys.argv[1]), ''): print('locked', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=REPO, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        assert_locked(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]  # a left-over file, which is not a lock
    with folder_lock(tmp_path, ""):
        assert_locked(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """Data workers outlive a killed training process by seconds."""
    with folder_lock(tmp_path / "a", ""):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert_locked(tmp_path / "a")
    with folder_lock(tmp_path / "a", ""):
        assert child.is_alive()
    child.kill()
    child.join()


@pytest.mark.skipif(os.name != "posix", reason="fcntl")
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, error):
    def no_locks(descriptor, operation):
        raise OSError(error, os.strerror(error))
    monkeypatch.setattr("fcntl.flock", no_locks)
    with folder_lock(tmp_path / "a", ""), folder_lock(tmp_path / "a", ""):
        (tmp_path / "a" / "file").touch()
    assert (tmp_path / "a" / "file").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_keeps_nobody_out(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with folder_lock(tmp_path, ""), folder_lock(tmp_path, ""):
            pass
    finally:
        tmp_path.chmod(0o700)
