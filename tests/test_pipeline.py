"""Whole commands in processes of their own: from text to shards to a model to text, chats, exports, signals, exit codes."""
import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import commands
import pyarrow
import pyarrow.parquet
import pytest

from conftest import REPO, TINY_MODEL
from runtime.checkpoint import load_checkpoint
from runtime.metrics import read_rows

pytestmark = pytest.mark.integration
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run(script: str, *flags: str, stdin: str | None = None, code: int = 0, start=commands.run, **environment: str) -> str:
    """Runs the script, which must exit with `code` and without a traceback. Returns what it printed on stdout."""
    done = start([str(REPO / script), *flags], env=os.environ | environment, input=stdin)
    assert "Traceback" not in done.stderr and done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture
def text(tmp_path, english) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, document in enumerate(english[:30]):
        (folder / f"{i:02}.txt").write_text(document, encoding="utf-8")
    return folder


def test_text_to_shards_to_model_to_text(tmp_path, text):
    """From another folder than the repository, with as many defaults as a test can afford, in interpreters of their own."""
    run_fresh = functools.partial(run, start=commands.run_from_start)
    data, checkpoint = f"--data_path={tmp_path / 'data'}", f"--checkpoint_path={tmp_path / 'runs' / 'tiny.pt'}"
    tokenizer = f"--tokenizer_path={tmp_path / 'tokenizer.json'}"
    assert "500 tokens" in run_fresh("tokenizer.py", f"--dataset={text}", "--vocab_size=500", tokenizer)
    assert "train: " in run_fresh("download_data.py", f"--dataset={text}", data, tokenizer, "--val_bytes=8000")
    flags = [*TINY_MODEL, "--batch_size=8", "--num_batch_accum=2", "--learning_rate=0.01", "--val_intervals=10"]
    out = run_fresh("train.py", data, checkpoint, *flags, "--max_iter=20", "--vocab_size=500")
    losses = [float(loss) for loss in re.findall(r"val (\d+\.\d+) nats/token", out)]
    assert len(losses) == 3 and losses[0] == pytest.approx(6.2146, abs=0.1) and losses[2] < losses[0]
    assert out.split("sample, the start of a document:")[1].strip()
    assert "resuming at step 20" in run_fresh("train.py", checkpoint, "--resume_checkpoint", "--max_iter=25")
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")] == [0, 10, 20, 25]
    out = run_fresh("generate.py", checkpoint, "--prompt=défi ", "--max_new_tokens=10", PYTHONIOENCODING="ascii")
    assert out.startswith("d?fi ")  # the terminal's encoding has no é


def test_a_finetuned_model_chats_is_scored_exported_and_imported(tmp_path, run_train):
    base = run_train("--max_iter=2", "--preset=llama", "--block_size=64")
    questions, chat = tmp_path / "questions.jsonl", tmp_path / "chat.pt"
    questions.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(60)))
    run("finetune.py", f"--checkpoint_path={base}", f"--dataset={questions}", f"--out_path={chat}", "--max_iter=40",
        "--batch_size=4", "--learning_rate=0.05", "--val_conversations=10", "--device=cpu")
    accuracies = [row["exact_match"] for row in read_rows(tmp_path / "chat" / "metrics.jsonl") if "exact_match" in row]
    assert accuracies == [0.0, 1.0]
    out = run("chat.py", f"--checkpoint_path={chat}", "--temperature=0", "--device=cpu", stdin="7?\n8?\n")
    assert out.split() == ["yes", "yes"]
    out = run("evaluate.py", "--checkpoint_path", str(base), str(chat), "--task=answers", f"--dataset={questions}",
              "--device=cpu")
    assert re.search(r"\| +0.0% ± 0.0% +\| +100.0% ± 0.0%", out), out
    folder, imported = tmp_path / "hf", tmp_path / "imported.pt"
    assert "Llama" in run("export.py", f"--checkpoint_path={chat}", f"--out_path={folder}")
    assert (folder / "model.safetensors").exists()
    run("export.py", f"--import_path={folder}", f"--checkpoint_path={imported}")
    samples = [run("generate.py", f"--checkpoint_path={path}", "--prompt=the", "--samples=2", "--device=cpu")
               for path in (chat, imported)]
    assert samples[0] == samples[1] and samples[0].startswith("--- 1 of 2 ---\nthe")


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_command_that_read_parquet_exits_without_teardown(tmp_path, english, code):
    """pyarrow's threads would sometimes abort it. What was printed before must not be lost in a pipe."""
    pyarrow.parquet.write_table(pyarrow.table({"text": english[:20]}), tmp_path / "a.parquet")
    program = """
import atexit, sys, tokenizer
from runtime.config import BadInput
code = int(sys.argv.pop(1))
def save(tokenizer, path):
    print("printed late")
    if code:
        raise BadInput("no")
atexit.register(print, "torn down")
tokenizer.Tokenizer.save = save
tokenizer.main()
"""
    done = commands.run_from_start(["-c", program, code, f"--dataset={tmp_path / 'a.parquet'}", "--vocab_size=300",
                                    f"--tokenizer_path={tmp_path / 'tokenizer.json'}"], cwd=REPO, env=BUFFERED)
    assert done.returncode == int(code) and done.stdout.startswith("printed late\n"), done
    assert "torn down" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("number, to_group", [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
                         ids=["Ctrl-C", "SIGTERM", "SIGTERM to the group"])
def test_a_signal_saves_and_the_run_resumes(tmp_path, data_path, number, to_group):
    """Ctrl-C in a terminal reaches the whole process group, workers included."""
    path = tmp_path / "gpt.pt"
    flags = [f"--data_path={data_path}", f"--checkpoint_path={path}", *TINY_MODEL, "--batch_size=4",
             "--num_batch_accum=2", "--max_iter=100000", "--val_intervals=100000", "--val_iter=1", "--log_intervals=1",
             "--dataloader_num_workers=2"]
    process = commands.start([str(REPO / "train.py"), *flags], start_new_session=True)
    wait_until(lambda: len(read_rows(tmp_path / "gpt" / "metrics.jsonl")) > 5, process)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error and "saved" in error
    step = load_checkpoint(path)["training"]["step"]
    rows = read_rows(tmp_path / "gpt" / "metrics.jsonl")
    assert step >= 5 and rows[-1]["step"] == step
    done = commands.run([str(REPO / "train.py"), f"--checkpoint_path={path}", "--resume_checkpoint",
                         f"--max_iter={step + 2}", "--verbose=0"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("script, flag, output", [
    ("train.py", "--data_path", None), ("download_data.py", "--dataset", "--data_path"),
    ("tokenizer.py", "--dataset", "--tokenizer_path"), ("generate.py", "--checkpoint_path", None),
    ("chat.py", "--checkpoint_path", None), ("finetune.py", "--checkpoint_path", "--out_path"),
    ("evaluate.py", "--checkpoint_path", None), ("export.py", "--checkpoint_path", "--out_path")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, script, flag, output):
    flags = [f"{flag}=nowhere.txt", *([f"{output}=out"] if output else [])]
    done = commands.run([str(REPO / script), *flags], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and done.stderr.startswith(script)
    assert list(tmp_path.iterdir()) == []
