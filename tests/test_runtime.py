"""flags, files, checkpoint, device and metrics: what several commands share."""
import io
import json
import math
import random
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime import device as device_script
from runtime.checkpoint import FORMAT, load_checkpoint, reading, save_checkpoint
from runtime.device import (
    DeviceConfig,
    Machine,
    compile_in_place,
    explain_out_of_memory,
    open_machine,
    rng_state,
    seed_everything,
    set_rng_state,
)
from runtime.files import require_writable, sole_writer, whole_file
from runtime.flags import BadInput, check_flags, flag, parse_flags, parse_int
from runtime.metrics import LossSums, MetricsLog, read_rows
from runtime.texts import join, joined, pack
from runtime.threads import map_ahead


@dataclass(frozen=True)
class Example:
    """Things to set."""
    size: int = flag(3, "a size", at_least=1)
    rate: float = flag(None, "a rate, 100 % at most", above=0, at_most=1)
    kind: str = flag("a", "a kind", choices=("a", "b"))
    path: Path = flag(Path("x"), "a path")
    fast: bool = flag(False, "be fast")
    resume: str = flag(None, "a file, or alone", bare="1")
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


@pytest.mark.parametrize("argv, words", [
    (["--size=0"], "--size=0: must be at least 1"), (["--size=1.5"], "'1.5' is not a whole number"),
    (["--rate=0"], "--rate=0.0: must be above 0"), (["--rate=2"], "at most 1"), (["--rate=nan"], "--rate=nan"),
    (["--rate=x"], "'x' is not a number"), (["--kind=c"], "--kind=c: choose one of a, b"), (["--size"], "give it a value"),
    (["--fast=perhaps"], "neither 1 nor 0"), (["--sise=3"], "no such flag, did you mean --size?"),
    (["--path="], "--path: is empty, give a path"), (["--path=" + "x" * 300], "--path: is longer than"),
    (["--size=1e19"], "'1e19' is too large"), (["--size=inf"], "'inf' is not a whole number"),
    (["--siz=3"], "no such flag"), (["stray"], "stray: no such flag")])
def test_flags_are_refused(argv, words):
    with pytest.raises(BadInput) as error:
        parse_flags("d", argv, Example)
    assert words in str(error.value)


def test_help_tells_flag_meaning_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_flags("d", ["--help"], Example)
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Things to set", "--size N a size (default: 3)", "100 % at most", "a, b (default: a)", "(default: 0)"):
        assert words in text


# -- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path, "w") as file:
        file.write("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path, "w") as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_require_writable(tmp_path):
    require_writable(tmp_path / "new" / "deep" / "a.pt", "--x=new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "new").mkdir()
    for path in (tmp_path / "file" / "a.pt", tmp_path / "new", Path("."), Path("/"), Path("/dev/null")):
        with pytest.raises(BadInput, match="--x=it: cannot be written"):
            require_writable(path, "--x=it")
    (tmp_path / "mine.tmp").write_text("the user's")
    require_writable(tmp_path / "mine", "--x=mine")
    assert (tmp_path / "mine.tmp").read_text() == "the user's"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest.pt").symlink_to(tmp_path / "disk" / "real.pt")
    with whole_file(tmp_path / "latest.pt", "w") as file:
        file.write("new")
    assert (tmp_path / "latest.pt").is_symlink() and (tmp_path / "disk" / "real.pt").read_text() == "new"


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="a.txt: cannot be written .No space left on device"), \
            whole_file(tmp_path / "a.txt", "w"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# -- checkpoint -------------------------------------------------------------------------------------------------------

# -- texts and threads ------------------------------------------------------------------------------------------------

def test_texts_are_taken_apart():
    texts = pack(["one", "", "zwei ä", b"b\xffad", "\ud83d\ude42 \ud800"])
    expected = ["one", "", "zwei ä", "b\ufffdad", "🙂 \ufffd"]
    assert list(texts.strings()) == expected and len(texts) == 5
    assert list(texts.part(1, 4).strings()) == expected[1:4] and texts.part(1, 4).offsets[0] == 0
    assert list(texts.chosen(np.array([True, False, True, False, True])).strings()) == expected[::2]
    assert texts.chosen(np.ones(5, bool)) is texts and len(texts.part(2, 2)) == 0
    assert list(join([b"a", np.frombuffer(b"bc", np.uint8)]).strings()) == ["a", "bc"] and len(join([])) == 0
    assert list(joined([texts, join([]), texts.part(0, 1)]).strings()) == [*expected, "one"]


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
    with sole_writer(tmp_path / "a" / "b", "--data_path=x"):
        with pytest.raises(BadInput, match="--data_path=x: another process"), sole_writer(tmp_path / "a" / "b",
                                                                                         "--data_path=x"):
            raise AssertionError("two")
        assert (tmp_path / "a" / "b").is_dir()  # the one refused has not removed it
    assert not list(tmp_path.iterdir())  # nothing was written
    with sole_writer(tmp_path / "a", ""):
        (tmp_path / "a" / "file").touch()
    with sole_writer(tmp_path / "a", ""):
        assert (tmp_path / "a" / "file").exists()
    with pytest.raises(BadInput, match="cannot be written"), sole_writer(tmp_path / "a" / "file" / "c", "--data_path=y"):
        raise AssertionError("a folder in a file")


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


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 0), "fp16")])
def test_dtype_by_what_the_gpu_computes(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a P100 says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine = open_machine(DeviceConfig())
    assert (machine.device.type, machine.dtype) == ("cuda", dtype)
    assert open_machine(DeviceConfig(dtype="fp32")).dtype == "fp32"


def test_cpu_is_fp32_and_only_fp16_scales():
    machine = open_machine(DeviceConfig(device="cpu"))
    assert machine.dtype == "fp32" and not machine.grad_scaler().is_enabled() and machine.peak_flops() is None
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
        assert Machine(torch.device("cuda"), "fp16").peak_flops() is None


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried …"), RuntimeError("MPS backend out of memory (MPS allocated …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …")])
def test_too_little_memory_says_what_to_do(error):
    with pytest.raises(MemoryError, match="too little memory: halve it"), explain_out_of_memory("halve it"):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("halve it"):
        raise RuntimeError("another\nerror")


def test_where_nothing_compiles_one_warning_and_no_more(monkeypatch):
    model = torch.nn.Linear(2, 2)
    expected = model(torch.ones(2))
    model.weight.grad = torch.ones(2, 2)  # what a first half of the trial step may leave

    def fail(*args):
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(model, "compile", lambda: setattr(model, "_compiled_call_impl", fail))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not compile_in_place(model, lambda: model(torch.ones(2)))
    assert len(caught) == 1 and "no compiler" in str(caught[0].message) and "\n" not in str(caught[0].message)
    assert torch.equal(model(torch.ones(2)), expected) and model.weight.grad is None


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
