"""The whole path as a user runs it: commands in processes of their own."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from conftest import REPO, TINY_MODEL
from runtime.checkpoint import load_checkpoint
from runtime.metrics import read_rows

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
BUFFERED = {name: value for name, value in ONE_THREAD.items() if name != "PYTHONUNBUFFERED"}


def run(script: str, *flags: str, given: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """given: what it reads from its standard input."""
    done = subprocess.run([sys.executable, str(REPO / script), *flags], env=ONE_THREAD | environment, capture_output=True,
                          text=True, input=given)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def text(tmp_path, english) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, document in enumerate(english[:30]):
        (folder / f"{i:02}.txt").write_text(document, encoding="utf-8")
    return folder


def test_text_to_shards_to_model_to_text(tmp_path, text):
    """From another folder than the repository, with every default that a test can afford."""
    data, checkpoint = f"--data_path={tmp_path / 'data'}", f"--checkpoint_path={tmp_path / 'runs' / 'tiny.pt'}"
    done = run("tokenizer.py", f"--dataset={text}", "--vocab_size=500", f"--tokenizer_path={tmp_path / 'tokenizer.json'}")
    assert done.returncode == 0 and "500 tokens" in done.stdout, done.stderr
    done = run("download_data.py", f"--dataset={text}", data, f"--tokenizer_path={tmp_path / 'tokenizer.json'}",
               "--val_tokens=3000")
    assert done.returncode == 0 and "train: " in done.stdout, done.stderr
    flags = [*TINY_MODEL, "--batch_size=8", "--num_batch_accum=2", "--learning_rate=0.01", "--val_intervals=10"]
    done = run("train.py", data, checkpoint, *flags, "--max_iter=20", "--vocab_size=500")
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"val (\d+\.\d+) nats/token", done.stdout)]
    assert len(losses) == 3 and losses[0] == pytest.approx(6.2146, abs=0.1) and losses[2] < losses[0]
    assert done.stdout.split("sample, the start of a document:")[1].strip()
    done = run("train.py", checkpoint, "--resume_checkpoint", "--max_iter=25")
    assert done.returncode == 0 and "going on from step 20" in done.stdout, done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")] == [0, 10, 20, 25]
    done = run("generate.py", checkpoint, "--prompt=défi ", "--max_new_tokens=10", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("d?fi "), done.stderr  # a terminal that knows no é


def test_a_model_that_answers_and_is_taken_elsewhere(tmp_path, run_train):
    """Finetuned, talked to, scored, exported, brought in again and sampled from; each a command."""
    base = run_train("--max_iter=2", "--preset=llama", "--block_size=64")
    talks, chat = tmp_path / "talks.jsonl", tmp_path / "chat.pt"
    talks.write_text("".join(json.dumps({"question": f"{i}?", "answer": "yes"}) + "\n" for i in range(60)))
    done = run("finetune.py", f"--checkpoint_path={base}", f"--dataset={talks}", f"--out_path={chat}", "--max_iter=40",
               "--batch_size=4", "--learning_rate=0.05", "--val_conversations=10", "--device=cpu")
    assert done.returncode == 0 and "answered right | 0.0% | 100.0%" in done.stdout, done.stderr
    done = run("generate.py", f"--checkpoint_path={chat}", "--chat", "--temperature=0", "--device=cpu", given="7?\n8?\n")
    assert done.returncode == 0 and done.stdout.split() == ["yes", "yes"], done
    done = run("evaluate.py", "--checkpoint_path", str(base), str(chat), "--task=answers", f"--dataset={talks}",
               "--device=cpu")
    assert done.returncode == 0 and re.search(r"answered right \| 0.0% ± 0.0% \| 100.0% ± 0.0%", done.stdout), done
    folder, again = tmp_path / "hf", tmp_path / "again.pt"
    done = run("export.py", f"--checkpoint_path={chat}", f"--out_path={folder}")
    assert done.returncode == 0 and "a Llama" in done.stdout and (folder / "model.safetensors").exists(), done
    done = run("export.py", f"--import_path={folder}", f"--checkpoint_path={again}")
    assert done.returncode == 0, done.stderr
    texts = [run("generate.py", f"--checkpoint_path={path}", "--prompt=the", "--num_samples=2", "--device=cpu").stdout
             for path in (chat, again)]
    assert texts[0] == texts[1] and texts[0].startswith("--- 1 of 2 ---\nthe")


@pytest.mark.parametrize("ends_with", ["0", "2"])
def test_a_command_that_read_parquet_ends_without_a_tear_down(tmp_path, english, ends_with):
    """The threads of pyarrow would abort it, now and then; what was printed before must not be lost in a pipe."""
    pyarrow.parquet.write_table(pyarrow.table({"text": english[:20]}), tmp_path / "a.parquet")
    program = """
import atexit, sys, tokenizer
from runtime.config import BadInput
ends_with = int(sys.argv.pop(1))
def save(tokenizer, path):
    print("printed late")
    if ends_with:
        raise BadInput("no")
atexit.register(print, "torn down")
tokenizer.Tokenizer.save = save
tokenizer.main()
"""
    done = subprocess.run([sys.executable, "-c", program, ends_with, f"--dataset={tmp_path / 'a.parquet'}",
                           "--vocab_size=300", f"--tokenizer_path={tmp_path / 'tokenizer.json'}"],
                          cwd=REPO, capture_output=True, text=True, env=BUFFERED)
    assert done.returncode == int(ends_with) and done.stdout.startswith("printed late\n"), done
    assert "torn down" not in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("number, to_group", [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)])
def test_a_signal_saves_and_the_run_resumes(tmp_path, data_path, number, to_group):
    """Ctrl-C in a terminal reaches the whole process group, workers and all."""
    path = tmp_path / "gpt.pt"
    flags = [f"--data_path={data_path}", f"--checkpoint_path={path}", *TINY_MODEL, "--batch_size=4",
             "--num_batch_accum=2", "--max_iter=100000", "--val_intervals=100000", "--val_iter=1", "--log_intervals=1",
             "--dataloader_num_workers=2"]
    process = subprocess.Popen([sys.executable, str(REPO / "train.py"), *flags], env=ONE_THREAD, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: len(read_rows(tmp_path / "gpt" / "metrics.jsonl")) > 5, process)
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error and "saved" in error
    step = load_checkpoint(path)["training"]["step"]
    rows = read_rows(tmp_path / "gpt" / "metrics.jsonl")
    assert step >= 5 and rows[-1]["step"] == step
    done = run("train.py", f"--checkpoint_path={path}", "--resume_checkpoint", f"--max_iter={step + 2}", "--verbose=0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    for script, flag in (("train.py", "--data_path"), ("download_data.py", "--dataset"), ("tokenizer.py", "--dataset"),
                         ("generate.py", "--checkpoint_path"), ("finetune.py", "--checkpoint_path"),
                         ("evaluate.py", "--checkpoint_path"), ("export.py", "--checkpoint_path")):
        done = run(script, f"{flag}={tmp_path / 'nowhere.txt'}", *(
            [f"--data_path={tmp_path / 'data'}"] if script == "download_data.py" else
            [f"--out_path={tmp_path / 'out'}"] if script in ("finetune.py", "export.py") else
            [f"--tokenizer_path={tmp_path / 'tokenizer.json'}"] if script == "tokenizer.py" else []))
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr and done.stderr.startswith(script)
