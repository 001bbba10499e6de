"""flags, files, checkpoint, device and metrics: what several commands share."""
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.plots import draw_curves
from runtime import device as device_script
from runtime.checkpoint import FORMAT, CheckpointWriter, clone_to_cpu, load_checkpoint, load_last, reading, save_checkpoint
from runtime.cli import parse_flags, parse_int
from runtime.config import BadInput, check_flags, flag
from runtime.device import (
    DeviceConfig,
    Machine,
    compile_in_place,
    explain_device_errors,
    faster_machine,
    open_machine,
    rng_state,
    seed_everything,
    set_rng_state,
)
from runtime.files import atomic_write, check_writable, folder_lock, replace_with_link
from runtime.memory import disable_malloc_trim, free_memory, peak_memory
from runtime.metrics import LossSums, MetricsLog, NonFiniteGuard, read_rows
from runtime.signals import StopSignals, without_garbage_collection
from runtime.threads import map_ahead
from text.documents import concat, from_strings, from_utf8


@dataclass(frozen=True)
class Example:
    """Things to set."""
    size: int = flag(3, "a size", at_least=1)
    rate: float = flag(None, "a rate, 100 % at most", above=0, at_most=1)
    kind: str = flag("a", "a kind", choices=("a", "b"))
    path: Path = flag(Path("x"), "a path")
    fast: bool = flag(False, "be fast")
    resume: str = flag(None, "a file, or alone", bare="1")
    many: int = flag(4, "how many", at_least=1, auto=True)
    quick: bool = flag("auto", "be quick", auto=True)
    steps: tuple[float, ...] = flag((0.5, 1.0), "some steps", above=0)
    __post_init__ = check_flags


# -- flags ------------------------------------------------------------------------------------------------------------

def test_flags_are_read():
    given = parse_flags("d", ["--size=1_000", "--rate", "0.5", "--kind=b", "--path=y/z", "--fast", "--resume"], Example)
    assert given == [Example(1000, 0.5, "b", Path("y/z"), True, "1")]
    assert parse_flags("d", [], Example) == [Example()]
    assert parse_flags("d", ["--fast=0", "--resume=a.pt"], Example) == [Example(resume="a.pt")]
    assert parse_flags("d", ["--fast=1"], Example) == [Example(fast=True)]
    assert parse_int("1e9") == 10**9 and parse_int(str(2**63 - 1)) == 2**63 - 1
    assert parse_flags("d", ["--path=~/x"], Example) == [Example(path=Path.home() / "x")]


def test_a_flag_may_take_several_values():
    assert parse_flags("d", ["--steps", "3", "0.25", "--size=2"], Example) == [Example(2, steps=(3.0, 0.25))]
    assert parse_flags("d", ["--steps=4"], Example) == [Example(steps=(4.0,))]


def test_auto_is_a_value_where_it_may_be():
    assert parse_flags("d", ["--many=auto", "--quick=auto"], Example) == [Example(many="auto", quick="auto")]
    assert parse_flags("d", ["--many=7", "--quick=0"], Example) == [Example(many=7, quick=False)]
    assert parse_flags("d", ["--quick"], Example) == parse_flags("d", ["--quick=1"], Example) == [Example(quick=True)]
    assert parse_flags("d", [], Example)[0].quick == "auto"


@pytest.mark.parametrize("argv, words", [
    (["--size=auto"], "'auto' is not a whole number"), (["--many=0"], "--many=0: must be at least 1"),
    (["--many=all"], "'all' is not a whole number"), (["--quick=never"], "neither 1 nor 0"),
    (["--size=0"], "--size=0: must be at least 1"), (["--size=1.5"], "'1.5' is not a whole number"),
    (["--rate=0"], "--rate=0.0: must be above 0"), (["--rate=2"], "at most 1"), (["--rate=nan"], "--rate=nan"),
    (["--rate=inf"], "--rate=inf: must be a number that ends"), (["--rate=x"], "'x' is not a number"),
    (["--kind=c"], "--kind=c: choose one of a, b"), (["--size"], "give it a value"),
    (["--fast=perhaps"], "neither 1 nor 0"), (["--sise=3"], "no such flag, did you mean --size?"),
    (["--path="], "--path: is empty, give a path"), (["--path=" + "x" * 300], "--path: is longer than"),
    (["--size=1e19"], "'1e19' is too large"), (["--size=inf"], "'inf' is not a whole number"),
    (["--siz=3"], "no such flag"), (["stray"], "stray: is no flag"),
    (["--steps", "1", "0"], "--steps=0.0: must be above 0"), (["--steps", "1", "b"], "'b' is not a number"),
    (["--steps"], "--steps: expected at least one")])
def test_flags_are_refused(argv, words):
    with pytest.raises(BadInput) as error:
        parse_flags("d", argv, Example)
    assert words in str(error.value)


def test_help_tells_flag_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_flags("d", ["--help"], Example)
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Things to set", "--size N a size (default: 3)", "100 % at most", "a, b (default: a)", "(default: 0)",
                  "some steps (default: 0.5 1.0)"):
        assert words in text


# -- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_require_writable(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "a.pt", "--x=new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "new").mkdir()
    for path in (tmp_path / "file" / "a.pt", tmp_path / "new", Path("."), Path("/"), Path("/dev/null")):
        with pytest.raises(BadInput, match="--x=it: cannot be written"):
            check_writable(path, "--x=it")
    (tmp_path / "mine.tmp").write_text("the user's")
    check_writable(tmp_path / "mine", "--x=mine")
    assert (tmp_path / "mine.tmp").read_text() == "the user's"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "disk" / "real.pt")
    with atomic_write(tmp_path / "latest.pt", "w") as file:
        file.write("new")
    assert (tmp_path / "latest.pt").is_symlink() and (tmp_path / "disk" / "real.pt").read_text() == "new"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="a.txt: cannot be written .No space left on device"), \
            atomic_write(tmp_path / "a.txt", "w"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# -- texts and threads ------------------------------------------------------------------------------------------------

def test_texts_are_taken_apart():
    texts = from_strings(["one", "", "zwei ä", b"b\xffad", "\ud83d\ude42 \ud800"])
    expected = ["one", "", "zwei ä", "b\ufffdad", "🙂 \ufffd"]
    assert list(texts.strings()) == expected and len(texts) == 5
    assert list(texts.part(1, 4).strings()) == expected[1:4] and texts.part(1, 4).offsets[0] == 0
    assert list(texts.chosen(np.array([True, False, True, False, True])).strings()) == expected[::2]
    assert texts.chosen(np.ones(5, bool)) is texts and len(texts.part(2, 2)) == 0
    assert list(from_utf8([b"a", np.frombuffer(b"bc", np.uint8)]).strings()) == ["a", "bc"] and len(from_utf8([])) == 0
    assert list(concat([texts, from_utf8([]), texts.part(0, 1)]).strings()) == [*expected, "one"]


@pytest.mark.parametrize("threads", [1, 3])
def test_items_before_a_failure_are_worked_on(threads):
    def items():
        yield from range(20)
        raise OSError("away")

    mapped, got = map_ahead(lambda item: item * item, items(), threads, lambda item: 1, 4), []
    with pytest.raises(OSError, match="away"):
        for value in mapped:
            got.append(value)
    assert got == [item * item for item in range(20)]
    assert list(map_ahead(str, [], threads, len, 4)) == [] and list(map_ahead(str, [7], threads, lambda item: 9, 4)) == ["7"]


def test_failures_of_the_work_are_raised():
    mapped = map_ahead(lambda item: 1 // item, [1, 1, 0, 1], 2, lambda item: 1, 4)
    assert [next(mapped), next(mapped)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(mapped)


def test_threads_hold_a_few_items_by_their_size():
    made = []

    def items():
        for size in (1, 1, 50, 1, 1, 1):
            made.append(size)
            yield size
    mapped = map_ahead(lambda size: size, items(), 2, size=lambda size: size, ahead=4)
    assert next(mapped) == 1 and next(mapped) == 1 and next(mapped) == 50
    time.sleep(0.05)
    assert made == [1, 1, 50]  # nothing is read beside the large one
    assert list(mapped) == [1, 1, 1]


def test_what_is_done_is_handed_on_while_the_next_is_waited_for():
    """And closing does not wait for it: it may be a network that is waited for."""
    released = threading.Event()

    def items():
        yield 1
        yield 2
        released.wait(30)

    start = time.monotonic()
    mapped = map_ahead(lambda item: item, items(), 2, lambda item: 1, 4)
    assert next(mapped) == 1 and next(mapped) == 2
    mapped.close()
    assert time.monotonic() - start < 10
    released.set()


def test_a_folder_has_one_writer(tmp_path):
    with folder_lock(tmp_path / "a" / "b", "--data_path=x"):
        with pytest.raises(BadInput, match="--data_path=x: another process"), folder_lock(tmp_path / "a" / "b",
                                                                                         "--data_path=x"):
            raise AssertionError("two")
        assert (tmp_path / "a" / "b").is_dir()  # the one refused has not removed it
    assert not list(tmp_path.iterdir())  # nothing was written
    with folder_lock(tmp_path / "a", ""):
        (tmp_path / "a" / "file").touch()
    with folder_lock(tmp_path / "a", ""):
        assert (tmp_path / "a" / "file").exists()
    with pytest.raises(BadInput, match="cannot be written"), folder_lock(tmp_path / "a" / "file" / "c", "--data_path=y"):
        raise AssertionError("a folder in a file")


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_forked_process_does_not_go_on_holding_a_folder(tmp_path):
    """Processes that load data outlive a killed training process by seconds."""
    with folder_lock(tmp_path / "a", ""):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        with pytest.raises(BadInput), folder_lock(tmp_path / "a", "--x=y"):
            raise AssertionError("two")
    with folder_lock(tmp_path / "a", ""):
        assert child.is_alive()
    child.kill()
    child.join()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_name_is_a_link_where_there_are_links(tmp_path, monkeypatch, has_links):
    def no_links(*args):
        raise OSError(95, "Operation not supported")
    if not has_links:
        monkeypatch.setattr("os.link", no_links)
    first, second = tmp_path / "a.pt", tmp_path / "deep" / "b.pt"
    first.write_text("one")
    replace_with_link(first, second)
    assert second.read_text() == "one" and first.samefile(second) == has_links
    with atomic_write(first, "w") as file:
        file.write("two")
    assert second.read_text() == "one"  # a new file under the first name leaves the other alone
    (tmp_path / "deep" / "b.pt.tmp").write_text("of a crash")
    replace_with_link(first, second)
    assert second.read_text() == "two" and len(list(tmp_path.rglob("*"))) == 3


# -- checkpoint -------------------------------------------------------------------------------------------------------

def test_checkpoint_round_trip(tmp_path):
    blob = {"model": {"w": torch.randn(3, dtype=torch.bfloat16)}, "n": 3, "text": "é", "rng": rng_state(), "none": None}
    save_checkpoint(tmp_path / "a.pt", blob)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["w"], blob["model"]["w"]) and loaded["rng"]["numpy"] == blob["rng"]["numpy"]
    assert loaded["format"] == FORMAT and loaded["text"] == "é" and loaded["none"] is None


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_a_checkpoint_with_a_wrong_bit_is_refused(tmp_path):
    """torch.load would return it with other weights."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(10_000)}})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["w"].count_nonzero() == 1
    with pytest.raises(BadInput, match="a.pt: damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_the_writing_of_a_checkpoint_is_told(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path / "a.pt", {"n": 1})

    class Full(io.FileIO):
        def write(self, data):
            raise error
    with monkeypatch.context() as patch, pytest.raises(type(error), match="cannot be written|^$"):
        patch.setattr("builtins.open", lambda path, mode: Full(path, mode))
        save_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(100_000)})
    assert load_checkpoint(tmp_path / "a.pt")["n"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_checkpoints_that_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "a.pt"
    with pytest.raises(BadInput, match="a.pt: no checkpoint to read"):
        load_checkpoint(path)
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:-50], whole[:len(whole) // 2], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="a.pt: damaged, or not a checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="not a checkpoint of ours"):
        load_checkpoint(path)
    torch.save({"format": "gpt-workbench checkpoint 9"}, path)
    with pytest.raises(BadInput, match="checkpoint 9.*this version reads"):
        load_checkpoint(path)
    torch.save({"format": FORMAT, "evil": Evil()}, path)
    with pytest.raises(BadInput, match="damaged, or not a checkpoint"):
        load_checkpoint(path)
    assert "this code ran" not in capsys.readouterr().out


@pytest.fixture
def writer(tmp_path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path / "gpt.pt", tmp_path / "gpt")


def write(writer, *numbers, best=()):
    for n in numbers:
        writer.save({"n": n}, n in best, True, lambda: None)


def numbers_in(writer) -> list:
    return [load_checkpoint(path)["n"] if path.exists() else None for path in (writer.path, writer.previous, writer.best)]


def test_the_last_the_previous_and_the_best(writer):
    for n, expected in ((1, [1, None, 1]), (2, [2, 1, 2]), (3, [3, 2, 2]), (4, [4, 3, 2])):
        write(writer, n, best=(1, 2))
        assert numbers_in(writer) == expected
    assert len(list(writer.path.parent.rglob("*"))) == 4  # three names and a folder: nothing is left over


def test_a_new_run_leaves_no_name_to_the_run_before(writer):
    write(writer, 1, 2, 3, best=(1,))
    other = CheckpointWriter(writer.path, writer.best.parent)
    assert numbers_in(other) == [3, 2, 1]
    write(other, 10)
    assert numbers_in(other) == [10, None, None]
    resumed = CheckpointWriter(writer.path, writer.best.parent, came_from=writer.path)
    write(resumed, 11)
    assert numbers_in(resumed) == [11, 10, None]


def test_what_is_written_aside_is_what_it_was_when_it_was_saved(writer, monkeypatch):
    """The thread waits until training has changed every tensor."""
    monkeypatch.setattr(CheckpointWriter, "PAUSE", -1)
    weight, go = torch.zeros(1000), threading.Event()
    monkeypatch.setattr(CheckpointWriter, "write", lambda *args, write=CheckpointWriter.write: (go.wait(30), write(*args)))
    done = []
    writer.save({"w": weight, "nested": [{"w": weight}], "n": 1}, True, False, lambda: done.append(1))
    weight += 1
    assert not writer.path.exists() and not done
    go.set()
    writer.wait()
    blob = load_checkpoint(writer.path)
    assert (blob["w"] == 0).all() and (blob["nested"][0]["w"] == 0).all() and done == [1]


def test_a_copy_keeps_what_is_shared_and_changes_with_nothing():
    embed = torch.arange(4.0)
    blob = {"embed": embed, "head": embed, "other": embed.clone(), "rest": (1, [torch.ones(2)], None, "x")}
    copy = clone_to_cpu(blob)
    assert copy["embed"] is copy["head"] and copy["embed"] is not embed and copy["other"] is not copy["embed"]
    assert copy["rest"][0] == 1 and copy["rest"][2:] == (None, "x") and type(copy["rest"]) is tuple
    embed += 1
    assert copy["embed"].tolist() == [0, 1, 2, 3]
    shared, views = torch.arange(4.0), {}
    views["all"], views["half"] = shared, shared[:2]
    assert clone_to_cpu(views)["half"].tolist() == [0, 1] and clone_to_cpu(views)["all"].tolist() == [0, 1, 2, 3]


def test_a_write_that_fails_aside_is_told_at_the_next_look(writer, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "PAUSE", -1)
    write(writer, 1)

    def full(*args):
        raise OSError("gpt.pt: cannot be written (No space left on device)")
    with monkeypatch.context() as patch:
        patch.setattr("runtime.checkpoint.save_checkpoint", full)
        writer.save({"n": 2}, False, False, lambda: None)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    writer.check()  # told once
    assert numbers_in(writer)[:2] == [1, 1]
    write(writer, 3)
    assert numbers_in(writer)[0] == 3


def test_short_writes_are_not_done_aside(writer):
    for _ in range(2):
        writer.save({"n": 1}, False, False, lambda: None)
        assert writer.thread is None and writer.path.exists()
    writer.seconds = 2 * writer.PAUSE
    writer.save({"n": 2}, False, True, lambda: None)
    assert writer.thread is None
    writer.seconds = 2 * writer.PAUSE
    writer.save({"n": 3}, False, False, lambda: None)
    assert writer.thread is not None
    writer.wait()
    assert numbers_in(writer)[0] == 3


def test_a_damaged_checkpoint_names_the_one_before(writer):
    write(writer, 1)
    writer.path.write_bytes(b"damaged")
    with pytest.raises(BadInput, match="damaged") as caught:
        load_last(writer.path)
    assert "previous" not in str(caught.value)  # there is none
    write(writer, 2)
    writer.resumes_in_place = True
    write(writer, 2, 3)
    writer.path.write_bytes(b"damaged")
    with pytest.raises(BadInput, match=f"damaged.*--resume_checkpoint={writer.previous} --checkpoint_path={writer.path} "):
        load_last(writer.path)
    writer.path.unlink()
    with pytest.raises(BadInput, match="no checkpoint to read"):
        load_last(writer.path)


@pytest.mark.parametrize("error", [KeyError("model"), RuntimeError("size mismatch\nfor w"), TypeError("x")])
def test_a_part_that_cannot_be_read_is_named_with_its_file(error):
    with pytest.raises(BadInput, match="^a.pt: a part of it is missing or damaged") as caught, reading(Path("a.pt")):
        raise error
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_no_damaged_checkpoint():
    with pytest.raises(RuntimeError, match="can't allocate memory"), reading(Path("a.pt")):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")


# -- device -----------------------------------------------------------------------------------------------------------

def test_random_generators_come_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    draw()
    state = rng_state()
    expected = draw()
    seed_everything(4)
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected


@pytest.mark.parametrize("name", ["cuda:77", "tpu", "cpu:1", "mps:3", "", "gpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(BadInput, match=f"--device={name}: not on this machine, which has cpu"):
        open_machine(DeviceConfig(device=name))


def gpu(monkeypatch, capability, built="sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", name="NVIDIA Example"):
    """torch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a P100 says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built.split())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def products_run_at(monkeypatch, **flops):
    monkeypatch.setattr(device_script, "measured_flops", lambda device, dtype, n: flops[dtype])


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")])
def test_dtype_by_what_the_gpu_computes(monkeypatch, capability, dtype):
    gpu(monkeypatch, capability)
    products_run_at(monkeypatch)  # nothing needs to be measured
    machine = open_machine(DeviceConfig())
    assert (machine.device.type, machine.dtype) == ("cuda", dtype)
    assert open_machine(DeviceConfig(dtype="fp32")).dtype == "fp32"


@pytest.mark.parametrize("device, half, half_flops, expected", [
    ("cuda", "fp16", 1.9e13, "fp16"), ("cuda", "fp16", 1.1e13, "fp32"), ("cuda", "fp16", 1.6e11, "fp32"),
    ("cpu", "bf16", 3e13, "bf16"), ("cpu", "bf16", 1.1e13, "fp32"), ("cpu", "bf16", 1.4e12, "fp32")])
def test_where_no_table_says_it_timed_products_choose_the_dtype(monkeypatch, device, half, half_flops, expected):
    """A P100 has fast fp16, a GTX 1080 a 64th of it; CPUs have bf16 units or imitate them."""
    monkeypatch.setattr(device_script, "x86_dtype", lambda: None)
    if device == "cuda":
        gpu(monkeypatch, (6, 1))
    products_run_at(monkeypatch, **{"fp32": 1e13, half: half_flops})
    assert open_machine(DeviceConfig(device=device)).dtype == expected
    assert open_machine(DeviceConfig(device=device, dtype=half)).dtype == half


@pytest.mark.parametrize("cpuinfo, expected", [
    ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", "bf16"), ("flags : fpu amx_bf16 amx_tile", "bf16"),
    ("flags : fpu avx2 avx512f", "fp32"), ("processor : 0\nFeatures : fp asimd bf16\n", None), (None, None)])
def test_x86_processors_say_what_they_compute(monkeypatch, tmp_path, cpuinfo, expected):
    """So that a busy machine is not misread. Whatever --dtype says, Muon takes bf16 where it is fast."""
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    has = device_script.x86_dtype(path)
    assert has == expected
    monkeypatch.setattr(device_script, "x86_dtype", lambda: has)
    products_run_at(monkeypatch, fp32=1e13, bf16=9e13)
    assert open_machine(DeviceConfig(device="cpu")).dtype == (expected or "bf16")
    for dtype in ("fp32", "bf16"):
        rough = open_machine(DeviceConfig(device="cpu", dtype=dtype)).newton_schulz_dtype()
        assert rough == (torch.bfloat16 if "bf16" in (expected, dtype) else torch.float32)


def test_hardware_is_named(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One\n")
    monkeypatch.setattr(device_script, "CPUINFO", tmp_path / "cpuinfo")
    assert re.fullmatch(r"A Fast One, \d+ cores, Python 3[.\d]+, torch 2\S+", device_script.hardware(torch.device("cpu")))
    monkeypatch.setattr(device_script, "CPUINFO", tmp_path / "none")  # not Linux
    assert platform.machine() in device_script.hardware(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    assert device_script.hardware(torch.device("cuda")).startswith("A Card, ")


def test_products_are_timed_once(monkeypatch):
    cpu = torch.device("cpu")
    flops = {dtype: device_script.measured_flops(cpu, dtype, 64) for dtype in ("fp32", "bf16")}
    assert all(1e8 < value < 1e15 for value in flops.values())
    monkeypatch.setattr(device_script, "time", None)
    assert flops == {dtype: device_script.measured_flops(cpu, dtype, 64) for dtype in flops}


@pytest.mark.parametrize("capability, built, runs", [
    ((6, 0), "sm_70 sm_75 sm_80 sm_86 sm_90 compute_90", False),  # torch's cu128 wheels on a P100
    ((6, 0), "sm_70 compute_50", True),                           # intermediate code is compiled for any later card
    ((6, 0), "sm_61", False), ((6, 1), "sm_60", True), ((8, 6), "sm_80", True), ((8, 0), "sm_86", False),
    ((12, 0), "sm_80 sm_90", False), ((12, 0), "sm_80 compute_90", True), ((9, 0), "sm_90a", True),
    ((10, 0), "sm_100", True), ((10, 3), "sm_100a", False), ((10, 3), "sm_100f", True), ((7, 5), "", False),
    ((9, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", True)])
def test_a_gpu_that_the_installed_torch_was_not_built_for(monkeypatch, capability, built, runs):
    gpu(monkeypatch, capability, built, "Tesla Old")
    if runs:
        assert open_machine(DeviceConfig(dtype="fp32")).device.type == "cuda"
        return
    with pytest.raises(BadInput, match="^--device=auto: Tesla Old computes sm_.*has no kernels.*pip install.*--device=cpu"
                       ) as caught:
        open_machine(DeviceConfig(dtype="fp32"))
    wheel = "whl/cu126" if capability < (7, 5) else "whl/cu128"
    assert "\n" not in str(caught.value) and wheel in str(caught.value)


@pytest.mark.parametrize("slow, fast", [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_few_steps_choose_the_dtype_of_an_old_gpu(monkeypatch, slow, fast):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    machine = faster_machine(lambda machine, batch_size: time.sleep(0.02 if machine.dtype == slow else 0.0),
                             Machine(torch.device("cpu"), "fp32"))
    assert machine.dtype == fast


def test_amds_cards_have_names_of_their_own(monkeypatch):
    gpu(monkeypatch, (9, 0), "gfx90a gfx942")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert open_machine(DeviceConfig(dtype="fp32")).device.type == "cuda"


@pytest.mark.parametrize("capability, had, expected", [
    ((6, 0), "bf16", "fp16"), ((6, 0), "fp32", "fp32"), ((6, 0), "", "fp16"), ((8, 0), "fp16", "bf16"),
    ((7, 5), "fp32", "fp16")])
def test_a_run_that_moves_keeps_its_dtype_only_where_timing_chose_it(monkeypatch, capability, had, expected):
    """From a laptop's RTX to a P100: bf16 would be emulated there."""
    gpu(monkeypatch, capability)
    products_run_at(monkeypatch, fp32=1e13, fp16=2e13)
    assert open_machine(DeviceConfig(), resume_dtype=had).dtype == expected


def test_pages_are_kept_without_a_word(monkeypatch, capfd):
    disable_malloc_trim()
    assert torch.zeros(3 << 20).add(1).sum() == 3 << 20

    def other_library(*args):
        raise OSError("no such library")
    monkeypatch.setattr(device_script.ctypes, "CDLL", other_library)
    disable_malloc_trim()
    monkeypatch.setattr(device_script.ctypes, "CDLL", lambda name: object())  # has no mallopt
    disable_malloc_trim()
    assert capfd.readouterr() == ("", "")


def test_memory_is_known():
    machine = Machine(torch.device("cpu"), "fp32")
    assert 2**20 < free_memory(machine.device) < 2**50 and 2**20 < peak_memory(machine.device) < 2**50


def test_only_fp16_scales_and_autocasts(monkeypatch):
    monkeypatch.setattr(device_script, "x86_dtype", lambda: None)
    products_run_at(monkeypatch, fp32=2e9, bf16=1e9)
    machine = open_machine(DeviceConfig(device="cpu"))
    assert machine.dtype == "fp32" and not machine.grad_scaler().is_enabled() and machine.peak_flops() == 2e9
    assert Machine(machine.device, "fp16").grad_scaler().is_enabled()
    a = torch.ones(2, 2)
    for dtype in ("fp32", "bf16", "fp16"):
        with Machine(machine.device, dtype).autocast():
            assert (a @ a).dtype == device_script.DTYPES[dtype]


def test_peak_by_name(monkeypatch):
    for name, dtype, peak in (("NVIDIA H100 PCIe", "bf16", 756e12), ("Tesla P100-PCIE-16GB", "fp32", 9.3e12),
                              ("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("Tesla V100-SXM2-16GB", "fp16", 125e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)  # noqa: B023
        assert Machine(torch.device("cuda"), dtype).peak_flops() == peak
    for unknown in ("NVIDIA GeForce GTX 480", "NVIDIA L40S", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: unknown)  # noqa: B023
        assert Machine(torch.device("cuda"), "fp16").known_peak() is None
    products_run_at(monkeypatch, fp16=7e12)
    assert Machine(torch.device("cuda"), "fp16").peak_flops() == 7e12


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried …"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …")])
def test_too_little_memory_says_what_to_do(error):
    words = "^too little memory, .* GiB at most so far: halve it"
    with pytest.raises(MemoryError, match=words), explain_device_errors("halve it"):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_device_errors("halve it"):
        raise RuntimeError("another\nerror")


def test_what_deterministic_forbids_is_named():
    """torch's own message for what has no such kernel, on a GPU; it cannot be had on a CPU otherwise."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(BadInput, match="^--deterministic: .* for put_, .*leave the flag"), explain_device_errors(""):
            torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)


def test_where_nothing_compiles_one_warning_and_no_more(monkeypatch):
    model = torch.nn.Linear(2, 2)
    expected = model(torch.ones(2))

    def fail(*args):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(model, "compile", lambda: setattr(model, "_compiled_call_impl", fail))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not compile_in_place(model, lambda: model(torch.ones(2)))
    assert len(caught) == 1 and "no compiler" in str(caught[0].message) and "\n" not in str(caught[0].message)
    assert torch.equal(model(torch.ones(2)), expected)


# -- metrics ----------------------------------------------------------------------------------------------------------

def test_bits_per_byte_by_hand():
    """Ids 0 (special), 1 (one byte), 2 (three bytes): 2 + 4 bits of text over 1 + 3 bytes, and 8 bits left out."""
    sums = LossSums()
    bits = torch.tensor([[8.0, 2.0], [4.0, 99.0]])
    sums.add(bits * math.log(2), torch.tensor([[0, 1], [2, -100]]), torch.tensor([0, 1, 3]))
    assert sums.bits_per_byte == pytest.approx(6 / 4)
    assert sums.loss == pytest.approx((8 + 2 + 4) / 3 * math.log(2)) and sums.tokens == 3


def test_sums_are_float64():
    sums, token_bytes = LossSums(), torch.tensor([1])
    for _ in range(3):
        sums.add(torch.full((1000,), 1e8), torch.zeros(1000, dtype=torch.int64), token_bytes)
        sums.add(torch.full((1,), 1e-4), torch.zeros(1, dtype=torch.int64), token_bytes)
    assert sums.nats == pytest.approx(3e11 + 3e-4, abs=1e-4)


def test_rows_come_back_and_the_last_of_a_step_wins(tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("of an earlier run")
    log = MetricsLog(tmp_path / "run", [{"step": 0, "val_loss": 9.0}])
    assert path.read_text() == "of an earlier run"  # until there is something to replace it by
    log.write({"step": 1, "train_loss": 5.0, "mfu": None})
    log.write({"step": 2, "train_loss": 4.0})
    log.close()
    with open(path, "ab") as file:  # a second run of step 1, what is no row, and a crash
        file.write(b'{"step": 1, "train_loss": 3.0}\n\xff\xfe\n{}\n[1]\n{"step": "x"}\n{"step": 7, "trai')
    assert read_rows(path) == [{"step": 0, "val_loss": 9.0}, {"step": 1, "train_loss": 3.0}, {"step": 2, "train_loss": 4.0}]
    assert read_rows(tmp_path / "none.jsonl") == []
    assert all(json.loads(line) for line in path.read_bytes().splitlines()[:3])


def test_tensorboard_shows_the_rows_once(tmp_path):
    log = MetricsLog(tmp_path, [])
    for step in (1, 2, 3):
        log.write({"step": step, "train_loss": float(step), "mfu": None})
    log.close()
    log = MetricsLog(tmp_path, read_rows(tmp_path / "metrics.jsonl")[:2])
    log.write({"step": 3, "train_loss": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 1), (2, 2), (3, 30)]
    assert events.Tags()["scalars"] == ["train_loss"]


def test_without_tensorboard_the_rows_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    first, *rows = [{"step": step, "train_loss": 5.0 - step} for step in range(3)]
    log = MetricsLog(tmp_path, [first])
    for row in rows:
        log.write(row)
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [first, *rows]
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1


def look_of(guard: NonFiniteGuard, *steps) -> dict:
    for step, (loss, norm) in enumerate(steps, 1):
        guard.update(torch.tensor(loss), torch.tensor(norm), step)
    return guard.read()


def test_steps_that_are_not_finite_are_counted():
    nan, inf, cpu = math.nan, math.inf, torch.device("cpu")
    guard = NonFiniteGuard(cpu, limit=2)
    seen = [bool(guard.update(torch.tensor(loss), torch.tensor(norm), step))
            for step, (loss, norm) in enumerate([(1.0, 2.0), (nan, 1.0), (3.0, 1.0), (1.0, inf), (2.0, 1.0)], 1)]
    assert seen == [False, True, False, True, False]
    assert guard.read() == {"skipped": 2, "failed_at": 0, "largest_loss": 3.0, "largest_norm": 2.0}
    guard.start_row()
    assert guard.read() == {"skipped": 2, "failed_at": 0, "largest_loss": 0.0, "largest_norm": 0.0}
    bad, good = (nan, 1.0), (1.0, 1.0)
    for steps, failed_at in (([bad, good, bad, good], 0), ([good, bad, bad, good, bad, bad], 3), ([bad] * 5, 2)):
        assert look_of(NonFiniteGuard(cpu, limit=2), *steps)["failed_at"] == failed_at
    assert look_of(NonFiniteGuard(cpu, limit=4), *[bad] * 3, good, *[bad] * 3)["failed_at"] == 0


def test_curves_are_drawn(tmp_path):
    from PIL import Image
    rows = [{"step": i, "tokens": i * 1000, "seconds": i, "train_loss": 6 - i / 10} | (
        {"val_loss": 6 - i / 11, "val_bpb": 2 - i / 30} if i % 5 == 0 else {}) for i in range(1, 21)]
    begun = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 6.0, "val_bpb": 2.0}]
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    inks = []
    for runs in ({"a": rows}, {"a": rows, "b": rows[:7]}, {"begun": begun}):
        draw_curves(runs, tmp_path / "curves.png")
        image = Image.open(tmp_path / "curves.png")
        image.load()
        assert image.format == "PNG" and image.width > 800 and image.height > 500
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
        inks.append([counts.get(color, 0) for color in (blue, orange)])
    assert inks[0][0] > 500 and inks[0][1] == 0
    assert inks[1][0] > 500 and inks[1][1] > 200  # a second run has a colour of its own
    assert 0 < inks[2][0] < inks[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


# -- stop -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", StopSignals.NUMBERS)
def test_a_signal_is_kept_until_it_is_asked_for(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # at once: the same one, passed on twice
        assert stop.signal == number
        stop.AT_ONCE = 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_collection_in_the_middle_of_a_step():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    with without_garbage_collection():
        pass
    assert not gc.isenabled()
    gc.enable()
