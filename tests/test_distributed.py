"""Several processes train as one does: started by torchrun, on this machine's CPU."""
import json
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_conversations import write_jsonl

import adapt
import finetune
import grpo
import selfplay
import think
import train
from conftest import REPO, TINY_MODEL, assert_same, run_rows, saved_training, stderr_lines, train_tiny
from dataloader import shard_loader
from finetune import read_answers
from runtime import distributed
from runtime.checkpoint import load_checkpoint, run_folder
from runtime.distributed import World
from shards import open_data

# Validation: 12 batches and one of fewer rows, with targets that are ignored
FLAGS = (*TINY_MODEL, "--dtype=fp32", "--batch_size=4", "--num_batch_accum=4", "--val_intervals=3", "--log_intervals=1",
         "--val_bytes=2000", "--warmup_iter=2", "--dataloader_num_workers=0", "--max_iter=6")


def command(path: Path, data_path: Path, *flags: str) -> list[str]:
    path.parent.mkdir(exist_ok=True)
    resumes = any(flag.startswith("--resume_checkpoint") for flag in flags)
    return [f"--data_path={data_path}", f"--checkpoint_path={path}", "--device=cpu", "--verbose=0",
            *(() if resumes else FLAGS), *flags]


def torchrun(event: str, argv: list[str], n: int = 2, restarts: int = 0, script: str = "train",
             machines: int = 1) -> tuple[int, list[str]]:
    """Of a command in `n` processes, see `launch`. event, script: see processes.py. argv: flags of the script."""
    return launch("processes.py", [event, script, *argv], n, restarts, machines)


def launch(program: str, argv: list[str], n: int, restarts: int = 0, machines: int = 1) -> tuple[int, list[str]]:
    """The exit code of torchrun, and the lines that the processes have printed to stderr. program: a file of tests/.
    machines: how many torchruns start the processes together, as on so many machines."""
    with tempfile.TemporaryDirectory() as logs, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        where = ["--standalone"] if machines == 1 else [
            f"--nnodes={machines}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{unused.getsockname()[1]}"]
        unused.close()
        started = [commands.start([
            "-m", "torch.distributed.run", *where, f"--nproc_per_node={n // machines}", f"--max_restarts={restarts}",
            f"--log_dir={logs}/{machine}", "--redirects=2", REPO / "tests" / program, *argv]) for machine in range(machines)]
        for process in started:
            process.communicate()
        errors = [path.read_text() for path in sorted(Path(logs).rglob("stderr.log"))]
        print(*errors, sep="\n")  # which pytest shows where a test fails
        return max(process.returncode for process in started), [line for text in errors for line in stderr_lines(text)]


@pytest.mark.integration
@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_divided_optimizer_equals_a_whole_one(n):
    """Every choice of --optimizer: weights, state, what each process keeps, and states that go from one number of processes
    to another."""
    assert launch("check_sharding.py", [], n) == (0, [])


def assert_equal_runs(path: Path, expected: Path):
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)


@pytest.mark.integration
def test_two_processes_train_as_one(data_path, tmp_path):
    """Bit for bit where each has one batch of a step: weights, state, losses and validation; and one process resumes what
    two have begun."""
    flags = "--mixer=DA", "--grad_clip=0.5", "--sampled_loops=1", "--loops=2", "--num_batch_accum=2"
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    train.main(command(one, data_path, *flags))
    assert torchrun("none", command(two, data_path, *flags)) == (0, [])
    assert_equal_runs(two, one)
    for path in (one, two):
        train.main(command(path, data_path, "--resume_checkpoint", "--max_iter=8"))
    assert_equal_runs(two, one)


@pytest.mark.integration
def test_processes_with_a_part_of_the_optimizer_train_as_one(data_path, tmp_path):
    """And one process resumes what they have begun, and they what one has."""
    flags = "--grad_clip=0.5", "--num_batch_accum=2"
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    train.main(command(one, data_path, *flags))
    assert torchrun("none", command(two, data_path, *flags, "--shard=optimizer")) == (0, [])
    for n_steps in (8, 10):
        (a, training), (b, expected) = saved_training(two), saved_training(one)
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b) and training["step"] == expected["step"]
        assert training["optimizer"].keys() == expected["optimizer"].keys()
        resumed = "--resume_checkpoint", f"--max_iter={n_steps}"
        train.main(command(two, data_path, *resumed, "--shard=none"))
        assert torchrun("none", command(one, data_path, *resumed, "--shard=optimizer")) == (0, [])


@pytest.mark.integration
@pytest.mark.parametrize("meta", [None, "fomaml"])
def test_two_processes_finetune_as_one(data_path, tmp_path, meta):
    """Bit for bit: weights, state, losses, validation and answers, though the batches of a step hold unequal numbers of
    targets."""
    base = train_tiny(tmp_path / "base" / "gpt.pt", data_path, "--max_iter=2", "--block_size=32")
    if meta:
        documents = tmp_path / "documents"
        documents.mkdir()
        for i in range(12):
            (documents / f"{i:02}.txt").write_text(f"the {i} times {i} is {i * i} " * (9 + i), encoding="utf-8")
        flags = [f"--dataset={documents}", f"--meta={meta}", "--val_documents=3", "--meta_contexts=1"]
    else:
        rows = [{"question": f"{i}?", "answer": "yes " * (1 + i % 9)} for i in range(60)]
        flags = [f"--dataset={write_jsonl(tmp_path / 'questions.jsonl', rows)}", "--val_conversations=35", "--batch_size=4"]
    flags += [f"--checkpoint_path={base}", "--verbose=0", "--device=cpu", "--dtype=fp32", "--num_batch_accum=2",
              "--val_intervals=2", "--log_intervals=1", "--max_iter=4", "--grad_clip=0.5"]
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    finetune.main([*flags, f"--out_path={one}"])
    assert torchrun("none", [*flags, f"--out_path={two}"], script="finetune") == (0, [])
    assert_equal_runs(two, one)
    assert read_answers(run_folder(two) / "answers.jsonl") == read_answers(run_folder(one) / "answers.jsonl")


@pytest.mark.slow
def test_two_processes_sample_answers_as_one(data_path, tmp_path, monkeypatch):
    """Weights, state, rows and answers, bit for bit, each process with a rollout of a step, after a warm start of all."""
    monkeypatch.setattr(grpo, "reward", lambda question, answer: float(len(answer.text) % 2))
    base = train_tiny(tmp_path / "base" / "gpt.pt", data_path, "--max_iter=2", "--block_size=64")
    flags = [f"--checkpoint_path={base}", "--task=arithmetic", "--verbose=0", "--device=cpu", "--dtype=fp32",
             "--questions=4", "--samples=4", "--answer_tokens=4", "--eval_questions=5", "--pass_k=2", "--num_batch_accum=2",
             "--max_iter=4", "--val_intervals=2", "--log_intervals=1", "--warm_start_iter=2", "--kl=0.05",
             "--learning_rate=0.02"]
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    selfplay.main([*flags, f"--out_path={one}"])
    code, lines = torchrun("rewarded", [*flags, f"--out_path={two}"], script="selfplay")
    assert code == 0 and len(lines) == 1 and "--answer_tokens=4 cuts them off" in lines[0], lines  # of one process
    (weights, training), (expected_weights, expected) = map(saved_training, (two, one))
    assert_same(weights, expected_weights)
    assert training["loader"]["questions_seen"] == expected["loader"]["questions_seen"] == 4 * 2 * 4
    timed = {"rollout_seconds"}
    for row, other in zip(run_rows(two), run_rows(one), strict=True):
        assert row.keys() == other.keys()
        assert {name: row[name] for name in row.keys() - timed} == pytest.approx(
            {name: other[name] for name in row.keys() - timed}, abs=1e-9)
    assert read_answers(run_folder(two) / "answers.jsonl") == read_answers(run_folder(one) / "answers.jsonl")


@pytest.mark.integration
@pytest.mark.parametrize("flags", [["--game=nim", "--board=1x2x3", "--updates=3", "--batch_size=8", "--rating_games=4"],
                                   ["--game=kuhn"]], ids=["nim", "kuhn"])
def test_two_processes_play_games_as_one(tmp_path, flags):
    """Each plays a part of a rollout and takes a batch of a step; one goes on from what two have saved. Weights, games and
    rows are equal up to rounding: the products of a model depend on how many games it reads at a time."""
    flags = [*flags, "--n_layer=1", "--n_head=2", "--head_size=8", "--rollout_games=17", "--max_iter=6",
             "--num_batch_accum=2", "--val_intervals=3", "--log_intervals=1", "--verbose=0", "--device=cpu", "--threads=0"]
    one, two = tmp_path / "one" / "run.pt", tmp_path / "two" / "run.pt"
    selfplay.main([*flags, f"--out_path={one}"])
    assert torchrun("none", [*flags, f"--out_path={two}"], script="selfplay") == (0, [])
    for _ in range(2):
        (a, training), (b, expected) = saved_training(two), saved_training(one)
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in b)
        assert training["step"] == expected["step"] and training["loader"]["rng"] == expected["loader"]["rng"]
        assert torch.equal(training["loader"]["replay"][0], expected["loader"]["replay"][0])
        for row, other in zip(run_rows(two), run_rows(one), strict=True):
            timed = {"games_per_sec", "positions_per_sec"}
            assert {name: row[name] for name in row.keys() - timed} == pytest.approx(
                {name: other[name] for name in other.keys() - timed}, abs=1e-4)
        for path in (one, two):
            selfplay.main([f"--out_path={path}", "--resume_checkpoint", "--max_iter=8"])


@pytest.mark.slow
def test_two_processes_adapt_as_one(trained, tmp_path, english):
    """The same rows, in the same order, but for their times; what one has begun, two end."""
    path = write_jsonl(tmp_path / "documents.jsonl", [{"text": text[:400]} for text in english[:4]])
    flags = [f"--checkpoint_path={trained}", f"--dataset={path}", "--device=cpu", "--dtype=fp32"]
    one, two = tmp_path / "one", tmp_path / "two"
    adapt.main([*flags, f"--out_path={one}"])
    adapt.main([*flags, f"--out_path={two}", "--limit=1"])
    assert torchrun("none", [*flags, f"--out_path={two}"], script="adapt") == (0, [])

    def rows(folder: Path) -> list[dict]:
        found = json.loads((folder / "adaptation.json").read_text())["rows"]
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in found]
    assert rows(one) == rows(two) and len(rows(one)) == 4


@pytest.mark.integration
def test_the_batch_that_fits_into_the_memory_of_each_process_is_that_of_all(data_path, tmp_path):
    """Two blocks, though one process has memory for eight."""
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    given, found = ["--batch_size=2", "--num_batch_accum=8"], ["--batch_size=auto", "--num_batch_accum=4"]
    assert torchrun("none", command(one, data_path, *given, "--max_iter=2")) == (0, [])
    assert torchrun("less_memory", command(two, data_path, *found, "--max_iter=2")) == (0, [])
    assert_same(saved_training(two), saved_training(one))
    assert run_rows(two)[-1]["step"] == 2


@pytest.mark.integration
def test_a_signal_to_one_process_stops_all(data_path, tmp_path):
    """At the same step, after which two processes go on, to weights that differ from those of one by rounding: each adds up
    two batches of four first; and the memory of pairs has a sparse gradient in one process alone."""
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    train.main(command(one, data_path, "--ngram_rows=40"))
    code, (line,) = torchrun("signal", command(two, data_path, "--ngram_rows=40"))
    assert code and "stopped at step 3, saved" in line and load_checkpoint(two)["training"]["step"] == 3
    assert torchrun("none", command(two, data_path, "--resume_checkpoint")) == (0, [])
    (a, training), (b, expected) = saved_training(two), saved_training(one)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b) and training["step"] == expected["step"] == 6
    for row, other in zip(run_rows(two), run_rows(one), strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=1e-6) if "val_loss" in other else row


@pytest.mark.integration
def test_killed_processes_go_on_from_the_checkpoint(data_path, tmp_path):
    """One is killed in the third step; torchrun starts all again, and they end as if nothing had been."""
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    flags = "--num_batch_accum=2", "--val_intervals=1"
    train.main(command(one, data_path, *flags))
    code, lines = torchrun("kill", command(two, data_path, *flags), restarts=1)
    assert code == 0, lines
    assert_equal_runs(two, one)


@pytest.mark.integration
def test_the_processes_of_two_machines_train_as_one(data_path, tmp_path):
    """As above; the machine whose process has not died counts no restart."""
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    flags = "--num_batch_accum=2", "--val_intervals=1"
    train.main(command(one, data_path, *flags))
    code, lines = torchrun("kill", command(two, data_path, *flags), restarts=1, machines=2)
    assert code == 0, lines
    assert_equal_runs(two, one)


@pytest.mark.slow
def test_processes_killed_ten_times_train_as_if_nothing_had_been(data_path, tmp_path):
    """By SIGKILL, at random moments, both in turn."""
    one, two = tmp_path / "one" / "gpt.pt", tmp_path / "two" / "gpt.pt"
    flags = "--num_batch_accum=2", "--val_intervals=5", "--max_iter=200", "--val_bytes=500"
    train.main(command(one, data_path, *flags))
    code, lines = torchrun("kill_often", command(two, data_path, *flags), restarts=10)
    assert code == 0 and sum("killed itself" in line for line in lines) == 10, lines
    assert_equal_runs(two, one)


def test_a_store_of_several_starts_is_used_by_each_alone():
    """Though the first has left a name to each of its processes, which have ended, and an address under it."""
    store, parts = dist.HashStore(), []
    for address in "dead", "alive":
        with ThreadPoolExecutor(3) as pool:
            late, *early = (pool.submit(distributed.store_of_this_start, store, World(rank, 3)) for rank in (0, 1, 2))
            parts = [late.result(), *(part.result() for part in early)]
        assert not parts[2].check(["address"])
        parts[1].set("address", address)
        assert [part.get("address").decode() for part in parts] == [address] * 3


@pytest.mark.integration
def test_a_process_that_fails_ends_all_with_one_line(data_path, tmp_path):
    path = tmp_path / "run" / "gpt.pt"
    code, lines = torchrun("raise", command(path, data_path))
    assert code and any("no more data here" in line for line in lines), lines
    assert all("no more data" in line or "another process of this run has ended" in line for line in lines), lines
    assert load_checkpoint(path)["training"]["step"] == 0


@pytest.mark.integration
def test_one_process_says_that_the_run_has_diverged(data_path, tmp_path):
    flags = "--learning_rate=1e38", "--grad_clip=0", "--warmup_iter=0", "--max_iter=50", "--val_intervals=1000"
    code, lines = torchrun("none", command(tmp_path / "run" / "gpt.pt", data_path, *flags))
    assert code and "skipped 1 step" in lines[0] and "lower --learning_rate" in lines[1] and len(lines) == 2, lines


@pytest.mark.integration
@pytest.mark.parametrize("event, flags, words", [
    ("none", ["--num_batch_accum=3"], "--num_batch_accum=3: 2 processes cannot take as many batches each"),
    ("differ", [], "--seed=1: in process 1, but 0 in the first"),
    ("first_fails", [], "--checkpoint_path=here: cannot be written"),
    ("first_fails", ["--batch_size=auto"], "--checkpoint_path=here: cannot be written")])
def test_bad_input_is_one_line(data_path, tmp_path, event, flags, words):
    code, lines = torchrun(event, command(tmp_path / "run" / "gpt.pt", data_path, *flags))
    assert code and len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "run" / "gpt.pt").exists()


def test_other_commands_refuse_several_processes(refused, monkeypatch):
    monkeypatch.setattr("trainer.join", lambda: World(size=2))
    refused(think.main, ["--task=addition"], "torchrun --nproc_per_node=2: think.py trains in one process")


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_loaders_take_the_batches_in_turns(data_path, n_ranks):
    """And agree on the position, from which one loader goes on."""
    data = open_data(data_path)
    whole = shard_loader(data, 2, 16, seed=5)
    parts = [shard_loader(data, 2, 16, seed=5, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    for _ in range(3):
        for part in parts:
            assert all(map(torch.equal, part.next_batch(), whole.next_batch()))
    assert all(part.state_dict() == whole.state_dict() for part in parts)


def test_one_process_by_itself(monkeypatch):
    """Nothing is communicated, and nothing changes."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    world, tensor = distributed.join.__wrapped__(), torch.ones(3)
    world.sum_in_place([tensor])
    assert world == World() and world.is_main and (tensor == 1).all() and world.largest(1, 2.5) == (1, 2.5)
    assert list(world.map_in_order(np.square, iter([1, 2, 3]))) == [(1, 1), (2, 4), (3, 9)]
