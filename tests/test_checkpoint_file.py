"""runtime/checkpoint.py: the file format, the writer of a run's checkpoints, and damaged files."""
import io
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from conftest import assert_same
from runtime.checkpoint import (
    FORMAT,
    CheckpointWriter,
    clone_to_cpu,
    explain_damage,
    load_checkpoint,
    load_resumable,
    owning_checkpoint,
    run_folder,
    save_checkpoint,
)
from runtime.config import BadInput
from runtime.device import rng_state
from runtime.memory import peak_resident_bytes

# -- the file ---------------------------------------------------------------------------------------------------------

def test_a_checkpoint_round_trips(tmp_path):
    weights = {"w": torch.randn(3, dtype=torch.bfloat16)}
    checkpoint = {"model": weights, "n": 3, "text": "é", "rng": rng_state(), "none": None}
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded["model"]["w"], weights["w"])
    assert loaded["rng"]["numpy"] == checkpoint["rng"]["numpy"]
    assert loaded["format"] == FORMAT and loaded["text"] == "é" and loaded["none"] is None


def test_a_flipped_bit_is_detected(tmp_path):
    """torch.load would return the checkpoint with other weights."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(10_000)}})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["model"]["w"].count_nonzero() == 1
    with pytest.raises(BadInput, match="a.pt: damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[:-50],
                                    lambda data: data[:len(data) // 2], lambda data: b"\0" * 100],
                         ids=["empty", "text", "without its end", "half", "zeros"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match="a.pt: damaged, or not a checkpoint"):
        load_checkpoint(path)


@pytest.fixture
def small(tmp_path) -> Path:
    """A checkpoint of a few hundred bytes of tensors, two of which share their memory."""
    w = torch.arange(40.0).view(4, 10)
    model = {"w": w, "tied": w, "rows": w[1:3], "bf16": w.bfloat16(), "empty": w[:0]}
    save_checkpoint(tmp_path / "small.pt", {"model": model, "step": 3, "rng": torch.arange(5, dtype=torch.uint8)})
    return tmp_path / "small.pt"


@pytest.mark.integration
def test_every_flipped_bit_is_refused_or_harmless(small):
    """Also those of the zip directory: 0x10 among the attributes of a tensor's entry makes a folder of it, which torch then
    leaves unfilled without a word."""
    original, data = load_checkpoint(small), small.read_bytes()
    directory = data.index(b"PK\x01\x02")
    torch.full((1000,), 7.0)  # memory that is not zero, to be found by a tensor that is left unfilled
    n_refused = 0
    for i in [*range(0, directory, 23), *range(directory, len(data))]:
        for bit in range(8):
            damaged = bytearray(data)
            damaged[i] ^= 1 << bit
            small.write_bytes(damaged)
            try:
                assert_same(load_checkpoint(small), original)
            except BadInput as error:
                n_refused += 1
                assert "\n" not in str(error)
    assert n_refused > 3000


def test_tensors_go_on_sharing_their_memory_and_leave_the_file(small):
    model = load_checkpoint(small)["model"]
    small.write_bytes(bytes(small.stat().st_size))
    assert model["w"].data_ptr() == model["tied"].data_ptr() and model["w"].sum() == 780
    model["w"][1] = -1
    assert (model["rows"][0] == -1).all() and (model["bf16"][1] >= 10).all()


def rezip(path: Path, change):
    """Rewrites a checkpoint's zip: change(name, content) -> (content, how it is compressed)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, *change(name, content))


@pytest.mark.parametrize("content", [
    torch.zeros(1).expand(2**31), [torch.zeros(1000).expand(2**20, 1000)] * 2, torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")], ids=["expanded", "twice", "complex", "sparse", "meta"])
def test_a_small_file_does_not_become_large_and_all_tensors_are_plain(small, content):
    torch.save({"format": FORMAT, "model": content}, small)
    before = peak_resident_bytes()
    with pytest.raises(BadInput, match="small.pt: damaged, or not a checkpoint"):
        load_checkpoint(small)
    assert peak_resident_bytes() - before < 2**28


def test_a_compressed_file_is_refused_before_it_is_unpacked(small, tmp_path):
    rezip(small, lambda name, content: (content if "data.pkl" not in name else content + bytes(2**28), zipfile.ZIP_DEFLATED))
    assert small.stat().st_size < 2**20
    before = peak_resident_bytes()
    with pytest.raises(BadInput, match="small.pt: damaged, or not a checkpoint"):
        load_checkpoint(small)
    assert peak_resident_bytes() - before < 2**27


def test_a_storage_ends_where_its_entry_ends(small):
    """torch would read what lies behind it in memory."""
    rezip(small, lambda name, content: (content,))
    load_checkpoint(small)
    rezip(small, lambda name, content: (content[:-8] if name.endswith("data/0") else content,))
    with pytest.raises(BadInput, match="small.pt: damaged, or not a checkpoint"):
        load_checkpoint(small)


def test_containers_that_hold_themselves_or_many_copies_are_read(small):
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    nested.append(nested)
    torch.save({"format": FORMAT, "nested": nested}, small)
    loaded = load_checkpoint(small)["nested"]
    assert loaded[2] is loaded and loaded[0] is loaded[1]


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize("content, message", [
    (None, "a.pt: no checkpoint to read"), ({"weights": torch.zeros(3)}, "not a checkpoint of this program"),
    ([1, 2], "not a checkpoint of this program"),
    ({"format": "gpt-workbench checkpoint 9"}, "checkpoint 9.*this version reads"),
    ({"format": FORMAT, "evil": Evil()}, "damaged, or not a checkpoint")],
    ids=["missing", "of another program", "a list", "a later format", "code"])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "a.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(BadInput, match=message):
        load_checkpoint(path)
    assert "this code ran" not in capsys.readouterr().out


def test_the_training_state_of_format_2_gets_its_present_names(tmp_path):
    path, w = tmp_path / "a.pt", torch.ones(2)
    torch.save({"format": "gpt-workbench checkpoint 2", "config": {}, "model": {}, "tokenizer": "{}",
                "training": {"settings": {"embed_shortcut": True, "seed": 1}, "watch": w, "machine": "cuda:0, bf16",
                             "step": 7}}, path)
    upgraded = load_checkpoint(path)
    assert upgraded["format"] == FORMAT
    training = upgraded["training"]
    assert training["settings"] == {"x0_residual": True, "seed": 1} and torch.equal(training["guard"], w)
    assert training["dtype"] == "bf16" and training["step"] == 7 and "watch" not in training


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_save_keeps_the_old_file_and_raises_its_cause(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path / "a.pt", {"n": 1})

    class Full(io.FileIO):
        def write(self, data):
            raise error
    with monkeypatch.context() as patch, pytest.raises(type(error), match="cannot be written|^$"):
        patch.setattr("builtins.open", lambda path, mode: Full(path, mode))
        save_checkpoint(tmp_path / "a.pt", {"w": torch.zeros(100_000)})
    assert load_checkpoint(tmp_path / "a.pt")["n"] == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyError("model"), RuntimeError("size mismatch\nfor w"), TypeError("x")], ids=repr)
def test_a_malformed_part_is_reported_with_the_file(error):
    with pytest.raises(BadInput, match="^a.pt: a part of it is missing or damaged") as caught, explain_damage(Path("a.pt")):
        raise error
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_not_a_damaged_file():
    with pytest.raises(RuntimeError, match="can't allocate memory"), explain_damage(Path("a.pt")):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")


@pytest.mark.parametrize("checkpoint, folder", [("runs/gpt.pt", "runs/gpt"), ("runs/a", "runs/a.run"), (".pt", ".pt.run"),
                                                ("a.b.pt", "a.b")])
def test_the_run_folder_is_beside_the_checkpoint_and_knows_it(tmp_path, checkpoint, folder):
    path = tmp_path / checkpoint
    assert run_folder(path) == tmp_path / folder
    run_folder(path).mkdir(parents=True)
    best = run_folder(path) / "best.pt"
    assert owning_checkpoint(best) is None  # some folder with a best.pt
    (run_folder(path) / "metrics.jsonl").touch()
    assert owning_checkpoint(best) == path and run_folder(best) == run_folder(path) and owning_checkpoint(path) is None


# -- the writer -------------------------------------------------------------------------------------------------------

@pytest.fixture
def writer(tmp_path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path / "gpt.pt", tmp_path / "gpt")


def write(writer, *steps, best=()):
    for step in steps:
        writer.save({"n": step}, step, step in best, blocking=True)


def saved_steps(writer) -> list[int | None]:
    """The steps of gpt.pt, previous.pt and best.pt."""
    return [load_checkpoint(path)["n"] if path.exists() else None for path in (writer.path, writer.previous, writer.best)]


def test_the_latest_the_previous_and_the_best_checkpoint_are_kept(writer):
    for step, expected in ((1, [1, None, 1]), (2, [2, 1, 2]), (3, [3, 2, 2]), (4, [4, 3, 2])):
        write(writer, step, best=(1, 2))
        assert saved_steps(writer) == expected
    assert len(list(writer.path.parent.rglob("*"))) == 4  # three files and their folder


def test_a_new_run_does_not_inherit_checkpoints_of_another(writer):
    write(writer, 1, 2, 3, best=(1,))
    other = CheckpointWriter(writer.path, writer.best.parent)
    assert saved_steps(other) == [3, 2, 1]  # until it writes
    write(other, 10)
    assert saved_steps(other) == [10, None, None]


@pytest.mark.parametrize("resume_from, expected", [("path", [11, 3, 1]), ("best", [11, 2, 1])])
def test_a_resumed_run_keeps_its_checkpoints(writer, resume_from, expected):
    """Resumed from its best.pt, whose steps come again, the checkpoint at its path is replaced."""
    write(writer, 1, 2, 3, best=(1,))
    (writer.best.parent / "metrics.jsonl").touch()  # by which a run folder is known
    write(CheckpointWriter(writer.path, writer.best.parent, resumed=getattr(writer, resume_from)), 11)
    assert saved_steps(writer) == expected


def test_a_run_killed_before_its_best_was_linked_links_it_on_resuming(writer):
    write(writer, 1, 2)
    write(CheckpointWriter(writer.path, writer.best.parent, resumed=writer.path, is_best=True), 3)
    assert saved_steps(writer) == [3, 2, 2]


def test_an_asynchronous_write_holds_the_tensors_of_its_step(writer, monkeypatch):
    """The thread waits until training has changed every tensor."""
    monkeypatch.setattr(CheckpointWriter, "MAX_PAUSE_SECONDS", -1)
    weight, changed = torch.zeros(1000), threading.Event()
    monkeypatch.setattr(CheckpointWriter, "write",
                        lambda *args, write=CheckpointWriter.write: (changed.wait(30), write(*args)))
    writer.save({"w": weight, "nested": [{"w": weight}]}, 1, True, blocking=False)
    weight += 1
    assert not writer.path.exists() and writer.saved_step == -1
    changed.set()
    writer.wait()
    checkpoint = load_checkpoint(writer.path)
    assert (checkpoint["w"] == 0).all() and (checkpoint["nested"][0]["w"] == 0).all() and writer.saved_step == 1


def test_only_writes_that_took_long_are_asynchronous(writer):
    long = 2 * writer.MAX_PAUSE_SECONDS
    for seconds, blocking, is_async in ((0.0, False, False), (0.0, False, False), (long, True, False), (long, False, True)):
        writer.seconds = seconds
        writer.save({"n": 1}, 1, False, blocking)
        assert (writer.thread is not None) == is_async
    writer.wait()
    assert writer.thread is None and saved_steps(writer)[0] == 1


def test_an_error_of_an_asynchronous_write_is_raised_once(writer, monkeypatch):
    monkeypatch.setattr(CheckpointWriter, "MAX_PAUSE_SECONDS", -1)
    write(writer, 1)

    def full(*args, **options):
        raise OSError("gpt.pt: cannot be written (No space left on device)")
    with monkeypatch.context() as patch:
        patch.setattr("runtime.checkpoint.save_checkpoint", full)
        writer.save({"n": 2}, 2, False, blocking=False)
        with pytest.raises(OSError, match="No space"):
            writer.wait()
    writer.check()
    assert saved_steps(writer)[:2] == [1, 1]
    write(writer, 3)
    assert saved_steps(writer)[0] == 3


def test_the_status_names_what_a_failed_run_leaves(writer):
    assert writer.checkpoint_status() == f"{writer.path} was not written"
    writer.path.touch()
    assert writer.checkpoint_status() == f"{writer.path} is unchanged"
    write(writer, 5)
    assert writer.checkpoint_status() == f"{writer.path} holds step 5, from which --resume_checkpoint continues"


def test_a_clone_shares_what_was_shared_and_nothing_with_the_original():
    embed = torch.arange(4.0)
    original = {"embed": embed, "head": embed, "other": embed.clone(), "rest": (1, [torch.ones(2)], None, "x")}
    clone = clone_to_cpu(original)
    assert clone["embed"] is clone["head"] and clone["embed"] is not embed and clone["other"] is not clone["embed"]
    assert clone["rest"][0] == 1 and clone["rest"][2:] == (None, "x") and type(clone["rest"]) is tuple
    embed += 1
    assert clone["embed"].tolist() == [0, 1, 2, 3]
    views = clone_to_cpu({"all": embed, "half": embed[:2]})
    assert views["half"].tolist() == [1, 2] and views["all"].tolist() == [1, 2, 3, 4]


def test_the_refusal_of_a_damaged_checkpoint_names_the_previous_one(writer):
    write(writer, 1)
    writer.path.write_bytes(b"damaged")
    with pytest.raises(BadInput, match="damaged") as caught:
        load_resumable(writer.path)
    assert "previous" not in str(caught.value)  # there is none
    write(writer, 2, 3)
    writer.path.write_bytes(b"damaged")
    with pytest.raises(BadInput, match=f"damaged.*--resume_checkpoint={writer.previous} --checkpoint_path={writer.path} "):
        load_resumable(writer.path)
    writer.path.unlink()
    with pytest.raises(BadInput, match="no checkpoint to read"):
        load_resumable(writer.path)
