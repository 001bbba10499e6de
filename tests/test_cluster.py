"""Runs on a Ray cluster: those of this machine, one process for one, also after a node or a signal has stopped them."""
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import compare
import download_data
from conftest import REPO, TINY_MODEL, run_rows
from experiments.cluster import Cluster, ClusterRunner, absolute_path, copy_code
from experiments.remote import RemoteProcess
from experiments.runner import Runner, TrainingJob
from runtime.device import DeviceConfig
from runtime.signals import StopSignals

FLAGS = (*TINY_MODEL, "--dtype=fp32", "--device=cpu", "--batch_size=4", "--num_batch_accum=1", "--val_intervals=10",
         "--log_intervals=10", "--val_iter=2", "--sample_tokens=0", "--dataloader_num_workers=0")


def numbers(checkpoint: Path) -> list[dict]:
    """Of a run's metrics, without times."""
    return [{name: value for name, value in row.items() if name.startswith(("step", "val_", "train_loss", "tokens"))}
            for row in run_rows(checkpoint)]


def make_job(folder: Path, data_path: Path, max_iter: int, seed: int = 1) -> TrainingJob:
    return TrainingJob(REPO / "train.py", folder / f"{seed}.pt", (f"--data_path={data_path}", *FLAGS, f"--seed={seed}",
                                                                 f"--max_iter={max_iter}"), keeps_model=True)


def run_jobs(runner, jobs: list) -> list[str]:
    return [result.status for result in runner.run(jobs, "runs", lambda i, result: None)]


# -- without Ray ------------------------------------------------------------------------------------------------------

def test_a_process_has_its_files_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What an earlier one wrote is there, what it writes comes back once, and flags have its paths."""
    script = tmp_path / "script.py"
    script.write_text("import pathlib, sys\nfolder = pathlib.Path(sys.argv[1].partition('=')[2])\n"
                      "old = (folder / 'run' / 'old').read_text()\n(folder / 'run' / 'new').write_text(old + sys.argv[2])\n"
                      "(folder / 'run' / '.lock').touch()\nprint('one line', file=sys.stderr)\nsys.exit(3)\n")
    (tmp_path / "node").mkdir()
    monkeypatch.chdir(tmp_path / "node")
    process = RemoteProcess()
    process.start(str(script), ["--out_path=/far/away", "--dataset=/far"], ["/far/away/run"],
                  {"/far/away/run/old": b"text "}, "/no/such/folder", 1)
    found = {}
    while (polled := process.poll())[0] is None:
        found |= polled[2]
        time.sleep(0.01)
    assert polled[:2] == (3, "one line\n") and found | polled[2] == {"/far/away/run/new": b"text --dataset=/far"}
    assert not Path("/far").exists() and process.poll() == (3, "one line\n", {})
    process.send_signal(signal.SIGTERM)
    process.close()
    assert not list((tmp_path / "node").iterdir())


def test_paths_of_flags_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert [absolute_path(arg) for arg in ("--data_path=mine", "--dataset=mine", "--dataset=org/name", "--mixer=mine",
                                           "--resume_checkpoint", "mixer=DA")] == [
        f"--data_path={tmp_path / 'mine'}", f"--dataset={tmp_path / 'mine'}", "--dataset=org/name", "--mixer=mine",
        "--resume_checkpoint", "mixer=DA"]


def test_the_code_is_sent_and_nothing_that_lies_beside_it(tmp_path):
    copy_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"train.py", "probes.py", "layers", "kernels", "experiments"}
    assert not {"tests", "docs", "studies", ".git"} & {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "kernels" / "unicode16.txt").exists() and (tmp_path / "experiments" / "page.html").exists()


def test_without_ray_there_is_one_line(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(compare.main, ["--cluster=auto"], "--cluster=auto: needs Ray: pip install")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_an_address_that_does_not_answer_is_one_line(address, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", object())
    refused(compare.main, [f"--cluster={address}"], f"--cluster={address}: no Ray cluster answers there")


def test_a_forecast_of_this_machine_is_not_one_of_a_cluster(refused):
    refused(compare.main, ["--cluster=auto", "--dry_run"], "--cluster=auto: --dry_run times batches on this machine")


@pytest.mark.parametrize("flags, words", [
    (["--cluster=auto"], ["--cluster=auto: needs --num_nodes=N"]),
    (["--cluster=auto", "--num_nodes=2", "--node=1"], ["--node=1: --cluster=auto makes the parts of all nodes"]),
    (["--cluster=auto", "--num_nodes=2", "--dry_run"], ["--cluster=auto: --dry_run is about this machine"]),
    (["--cluster=127.0.0.1:1", "--num_nodes=2"], ["--cluster=127.0.0.1:1: no Ray cluster answers there"])])
def test_preparing_on_a_cluster_needs_one(flags, words, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", object())
    refused(download_data.main, [f"--data_path={tmp_path / 'data'}", *flags], *words)


# -- with Ray ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cluster():
    """Of this machine alone."""
    ray = pytest.importorskip("ray")
    yield Cluster("local")
    ray.shutdown()


@pytest.mark.slow
def test_runs_equal_those_of_this_machine(cluster, data_path, tmp_path):
    device = DeviceConfig("cpu", "fp32")
    machine, hardware = compare.query_device(device, cluster)
    assert machine == compare.query_device(device)[0] and hardware.startswith("a cluster of 1 node, of which one: ")
    here, there = ([make_job(tmp_path / name, data_path, 20, seed) for seed in (1, 2, 3)] for name in ("here", "there"))
    with StopSignals() as stop:
        assert run_jobs(Runner(2, stop), here) == run_jobs(ClusterRunner(cluster, 2, stop), there) == ["finished"] * 3
        no_data = make_job(tmp_path / "there", tmp_path / "none", 20, 4)
        assert run_jobs(ClusterRunner(cluster, 1, stop), [no_data]) == ["failed"]
    for a, b in zip(here, there):
        assert numbers(a.checkpoint) == numbers(b.checkpoint) != [] and b.checkpoint.exists()


def kill_when_saved(checkpoint: Path):
    """Kills the process of Ray that has the run, as when a node is lost."""
    while not checkpoint.exists():
        time.sleep(0.1)
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        if process.read_bytes().startswith(b"ray::RemoteProcess"):
            os.kill(int(process.parent.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_whose_node_dies_goes_on_from_its_checkpoint(cluster, data_path, tmp_path, capsys):
    whole, killed = make_job(tmp_path / "whole", data_path, 600), make_job(tmp_path / "killed", data_path, 600)
    thread = threading.Thread(target=kill_when_saved, args=(killed.checkpoint,))
    thread.start()
    with StopSignals() as stop:
        assert run_jobs(ClusterRunner(cluster, 1, stop), [killed]) == run_jobs(Runner(1, stop), [whole]) == ["finished"]
    thread.join()
    assert numbers(whole.checkpoint) == numbers(killed.checkpoint)
    assert "died, and with it this run, which goes on elsewhere" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_signal_saves_and_this_machine_goes_on(cluster, data_path, tmp_path):
    """Other runs still wait for a node then."""
    whole, *jobs = [make_job(tmp_path / name, data_path, 400) for name in ("whole", "a", "b", "c")]
    begun = lambda: [job for job in jobs if job.checkpoint.exists()]

    def stop_when_saved():
        while not begun():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=stop_when_saved)
    thread.start()
    with StopSignals() as stop:
        runner = ClusterRunner(cluster, 3, stop)
        remote = cluster.ray.remote(RemoteProcess).options(num_cpus=cluster.cores)  # so that one runs at a time
        runner.open_actor = remote.remote
        assert run_jobs(runner, jobs) == ["stopped"] * 3
    thread.join()
    job, = begun()
    with StopSignals() as stop:
        assert run_jobs(Runner(1, stop), [job, whole]) == ["finished"] * 2
    assert job.resumed and numbers(whole.checkpoint) == numbers(job.checkpoint)


@pytest.mark.slow
def test_parts_of_a_data_folder_equal_those_made_by_hand(cluster, english, tmp_path, capsys, refused):
    """A second command has nothing to do, and one with other flags is refused; parts that fail are counted."""
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(english[:30]):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    flags = [f"--dataset={tmp_path / 'texts'}", "--num_nodes=2", "--vocab_size=300", "--val_bytes=2000",
             "--shard_size_threshold=9000"]
    for node in range(2):
        download_data.main([*flags, f"--data_path={tmp_path / 'hand' / str(node)}", f"--node={node}"])
    by_cluster = [*flags, f"--data_path={tmp_path / 'data'}", "--cluster=local"]
    download_data.main(by_cluster)
    download_data.main(by_cluster)
    assert "already complete, nothing to do" in capsys.readouterr().out
    files = lambda folder: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.[jn][sp]*")}
    assert files(tmp_path / "data") == files(tmp_path / "hand") and len(files(tmp_path / "data")) > 8
    refused(download_data.main, [flag.replace("300", "400") for flag in by_cluster], "was prepared with --vocab_size=300")
    other = [flag.replace("/data", "/new").replace("texts", "none") for flag in by_cluster]
    with pytest.raises(SystemExit) as stop:
        download_data.main(other)
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code in (1, 2) and "2 of 2 parts failed" in error and "new/1: bad input: " in error, error
