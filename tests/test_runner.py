"""experiments/runner.py with jobs that are a line of Python each."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import REPO
from experiments.runner import JobResult, Runner, TrainingJob, error_line, interpret_exit
from runtime.files import folder_lock
from runtime.signals import StopSignals


@dataclass
class FakeJob:
    """Runs `program`; done: how it ended before."""
    program: str
    done: JobResult | None = None
    script: Path = Path("fake.py")
    completed: list[JobResult] = field(default_factory=list)

    def previous_result(self) -> JobResult | None:
        return self.done

    def command(self) -> list[str]:
        return [sys.executable, "-S", "-c", self.program]

    def files(self) -> list[Path]:
        return []

    def complete(self, result: JobResult) -> JobResult:
        self.completed.append(result)
        return result


def run_jobs(*jobs: FakeJob, n_parallel: int = 1) -> list[JobResult]:
    with StopSignals() as stop:
        return Runner(n_parallel, stop).run(list(jobs), "jobs", lambda i, result: None)


def exit_with(code: int, error: str = "") -> FakeJob:
    return FakeJob(f"import sys; print({error!r}, file=sys.stderr); sys.exit({code})")


# -- processes and their exits ----------------------------------------------------------------------------------------

def test_results_are_read_from_exit_codes_not_words():
    diverged_in_words = "fake.py: loss is nan at step 3: lower --learning_rate"
    jobs = [exit_with(0), exit_with(3, "fake.py: what"), exit_with(1, diverged_in_words), exit_with(2, "fake.py: bad"),
            FakeJob("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    assert run_jobs(*jobs, n_parallel=2) == [
        JobResult("finished"), JobResult("diverged", "what"), JobResult("failed", diverged_in_words[9:]),
        JobResult("bad input", "bad"), JobResult("killed", "by signal 9")]
    assert all(len(job.completed) == 1 for job in jobs)


def test_finished_jobs_are_not_run_again():
    job = FakeJob("raise SystemExit(1)", done=JobResult("diverged", "before"))
    assert run_jobs(job) == [JobResult("diverged", "before")] and not job.completed


@pytest.mark.parametrize("given, threads", [("", "4"), ("2", "2"), ("16", "4")])
def test_jobs_share_the_cores(monkeypatch, tmp_path, given, threads):
    monkeypatch.setattr("experiments.runner.available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    program = f"import os; open({str(tmp_path / 'threads')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run_jobs(FakeJob(program), n_parallel=2)
    assert (tmp_path / "threads").read_text() == threads


def test_on_end_is_called_once_per_job():
    ended = []
    with StopSignals() as stop:
        Runner(2, stop).run([exit_with(0), exit_with(1, "x")], "jobs", lambda i, result: ended.append((i, result.status)))
    assert sorted(ended) == [(0, "finished"), (1, "failed")]


@pytest.mark.parametrize("stderr, line", [
    ("a warning\ntrain.py: the disk is full\nat exit: leaked\n", "the disk is full"),
    ("Traceback …\nRuntimeError: no  kernel\n", "RuntimeError: no kernel"), ("", "printed nothing on stderr")])
def test_error_line(stderr, line):
    assert error_line(stderr, Path("/somewhere/train.py")) == line


def test_unknown_exit_codes_and_signals():
    assert interpret_exit(77, "why") == JobResult("failed", "why")
    assert interpret_exit(-200, "why") == JobResult("killed", "by signal 200")


# -- stopping ---------------------------------------------------------------------------------------------------------

SLEEPER = """
import os, signal, sys, time
def save(*args):
    open({path!r} + ".saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save if {saves} else signal.SIG_IGN)
open({path!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""


def wait_for(*paths: Path):
    end = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)


def signal_when_running(number: int, *paths: Path, again_after: float | None = None):
    """Sends this process the signal once the jobs run, from a thread."""
    def send():
        wait_for(*paths)
        os.kill(os.getpid(), number)
        if again_after is not None:
            time.sleep(again_after)
            os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()


def assert_gone(pid: int):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_first_signal_lets_running_jobs_save_and_starts_no_more(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    jobs = [FakeJob(SLEEPER.format(path=str(path), saves=True)) for path in paths]
    signal_when_running(signal.SIGINT, *paths[:2])
    assert run_jobs(*jobs, n_parallel=2) == [JobResult("stopped")] * 3
    assert [Path(f"{path}.saved").exists() for path in paths] == [True, True, False]
    assert not any(job.completed for job in jobs)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_nothing_keeps_running_after_a_second_signal(tmp_path, monkeypatch):
    """Not even a job that ignores the first."""
    monkeypatch.setattr("experiments.runner.GRACE", 0.2)
    path = tmp_path / "a"
    signal_when_running(signal.SIGINT, path, again_after=0.7)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(FakeJob(SLEEPER.format(path=str(path), saves=False)))
    assert_gone(int(path.read_text()))


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_error_leaves_nothing_running(tmp_path):
    """Such as a disk that is full when the first result is written."""
    path = tmp_path / "a"
    broken = exit_with(0)
    broken.complete = lambda result: wait_for(path) or (_ for _ in ()).throw(OSError("no space left"))
    with pytest.raises(OSError, match="no space"):
        run_jobs(FakeJob(SLEEPER.format(path=str(path), saves=True)), broken, n_parallel=2)
    assert_gone(int(path.read_text()))


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_terminal_ctrl_c_does_not_reach_the_jobs(tmp_path):
    """A terminal signals its whole process group: jobs would die before they could save."""
    path = tmp_path / "a"
    program = f"""
import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]
from test_runner import FakeJob, SLEEPER, run_jobs
print(run_jobs(FakeJob(SLEEPER.format(path={str(path)!r}, saves=True)))[0].status)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0].strip() == "stopped" and Path(f"{path}.saved").exists()


# -- training jobs ----------------------------------------------------------------------------------------------------

FINAL_ROW = {"step": 3, "tokens": 30, "seconds": 3.0, "flops": 90, "val_loss": 3.0, "val_bpb": 1.5, "tok_per_sec": 10.0}


@pytest.fixture
def job(tmp_path) -> TrainingJob:
    job = TrainingJob(Path("train.py"), tmp_path / "run.pt", ("--seed=1",))
    job.folder.mkdir()
    (job.folder / "metrics.jsonl").write_text(json.dumps(FINAL_ROW) + "\n")
    job.checkpoint.write_text("checkpoint")
    return job


def test_training_job_resumes_from_its_checkpoint(job):
    assert job.command()[1:] == ["train.py", f"--checkpoint_path={job.checkpoint}", "--resume_checkpoint", "--verbose=0"]
    job.delete()
    assert job.command()[1:] == ["train.py", f"--checkpoint_path={job.checkpoint}", "--seed=1", "--overwrite", "--verbose=0"]


@pytest.mark.parametrize("status", ["finished", "diverged"])
def test_final_result_is_kept_without_checkpoints(job, status):
    (job.folder / "best.pt").write_text("best")
    result = JobResult(status, "why")
    assert job.complete(result) == job.previous_result() == result
    assert not job.checkpoint.exists() and {path.name for path in job.folder.iterdir()} == {"metrics.jsonl", "result.json"}


def test_the_model_is_kept_where_it_is_needed(job):
    job.keeps_model = True
    (job.folder / "best.pt").write_text("best")
    assert job.complete(JobResult("finished")) == job.previous_result() == JobResult("finished")
    assert job.checkpoint.exists() and not (job.folder / "best.pt").exists()


@pytest.mark.parametrize("status", ["failed", "killed"])
def test_failed_job_keeps_its_checkpoint_and_runs_again(job, status):
    assert job.complete(JobResult(status, "why")).status == status
    assert job.previous_result() is None and job.checkpoint.exists()


def test_unreadable_checkpoint_is_deleted(job):
    """The job would fail forever."""
    assert "--resume_checkpoint" in job.command()
    assert job.complete(JobResult("bad input", "damaged")) == JobResult("failed", "damaged")
    assert not job.checkpoint.exists() and not job.folder.exists()


def test_bad_input_of_a_new_run_deletes_nothing(job):
    """Another process may have begun to write there since."""
    job.checkpoint.unlink()
    assert "--overwrite" in job.command()
    job.checkpoint.write_text("another process's")
    assert job.complete(JobResult("bad input", "locked")) == JobResult("failed", "locked")
    assert job.checkpoint.exists() and job.rows() == [FINAL_ROW]


def test_checkpoint_of_a_running_process_is_not_deleted(job):
    """As when compare.py was killed and its runs were not: their checkpoints cannot be resumed, nor are they damaged."""
    job.command()
    with folder_lock(job.folder, "--checkpoint_path"):
        assert job.complete(JobResult("bad input", "another process is writing there")).status == "failed"
        assert job.checkpoint.exists() and job.rows() == [FINAL_ROW]


@pytest.mark.parametrize("result", [
    '{"status": "fin', "", "[]", "3", "null", '{"status": ["finished"], "reason": "", "flags": ["--seed=1"]}',
    '{"status": "finished", "reason": 3, "flags": ["--seed=1"]}',
    '{"status": "finished", "reason": "", "flags": ["--seed=2"]}',
    '{"status": "finished", "reason": ""}', "[" * 100_000], ids=lambda text: text[:50])
def test_damaged_results_are_run_again(job, result):
    job.complete(JobResult("finished"))
    (job.folder / "result.json").write_text(result)
    assert job.previous_result() is None and not job.folder.exists()


@pytest.mark.parametrize("rows", [
    [], [{"step": 1, "tok_per_sec": 9.0}], [FINAL_ROW | {"val_bpb": None}], [FINAL_ROW | {"val_bpb": "1.5"}],
    [FINAL_ROW | {"tok_per_sec": 0}], [FINAL_ROW | {"step": 1, "flops": []}, FINAL_ROW], [FINAL_ROW | {"val_bpb": 1.4}]])
@pytest.mark.parametrize("knows_digest", [True, False])
def test_results_without_their_metrics_are_run_again(job, rows, knows_digest):
    """As a power cut leaves them: metrics are not flushed to disk row by row. Earlier versions wrote no digest."""
    job.complete(JobResult("finished"))
    if not knows_digest:
        result = json.loads((job.folder / "result.json").read_text())
        (job.folder / "result.json").write_text(json.dumps({name: result[name] for name in ("status", "reason", "flags")}))
        assert job.previous_result() == JobResult("finished")
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if knows_digest or rows != [FINAL_ROW | {"val_bpb": 1.4}]:
        assert job.previous_result() is None and not job.folder.exists()


def test_exit_0_without_final_row_is_a_failure(job):
    (job.folder / "metrics.jsonl").unlink()
    assert job.complete(JobResult("finished")).status == "failed" and not job.folder.exists()


@pytest.mark.parametrize("given, jobs, threads", [("", 1, 8), ("1", 1, 1), ("16", 2, 4), ("many", 4, 2), ("", 99, 1)])
def test_threads_of_a_job(monkeypatch, given, jobs, threads):
    monkeypatch.setattr("experiments.runner.available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert Runner(jobs, None).environment["OMP_NUM_THREADS"] == str(threads)
