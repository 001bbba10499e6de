"""Runs jobs on a Ray cluster (--cluster) instead of in processes of this machine.

    results = ClusterRunner(Cluster("auto"), n_parallel=8, stop=stop).run(jobs, "runs", on_end)

A job is the same process with the same flags as on this machine, on a node: one GPU, where the cluster has any, and a
share of the cores. The code is sent; what a job reads (data, models to start from) must be at the same path on every node,
on a shared disk or as a copy. What it writes comes back as it changes, checkpoints too, so that a job whose node dies goes
on from its last checkpoint on another one.
"""
import functools
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.remote import RemoteProcess, find_files
from experiments.runner import Job, Runner
from runtime.cli import log_line
from runtime.config import BadInput
from runtime.files import atomic_write
from runtime.signals import StopSignals

REPO = Path(__file__).parent.parent
CLUSTER_HELP = ("run them on a Ray cluster instead of on this machine: auto, ray://host:10001 or host:6379 (default: on "
                "this machine)")
CODE = ".py", ".txt", ".html"  # what scripts read of themselves
POLL_SECONDS = 1.0
MAX_DEATHS = 3  # of a job's nodes without a new file from it in between


class Cluster:
    """The connection of this process to a Ray cluster: "auto" (this machine's, or that of RAY_ADDRESS), "ray://host:10001"
    or "host:6379". Raises BadInput without Ray, or where nobody answers."""

    def __init__(self, address: str):
        try:
            import ray
        except ImportError:
            raise BadInput(f"--cluster={address}: needs Ray: pip install 'ray[default]'") from None
        self.ray = ray
        with tempfile.TemporaryDirectory() as code:
            copy_code(Path(code))
            with explain_no_cluster(address), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an address that does not answer, which is explained already
                check_address(address)
                ray.init(address, runtime_env={"working_dir": code}, log_to_driver=False, logging_level="error",
                         ignore_reinit_error=True)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if not nodes:
            raise BadInput(f"--cluster={address}: none of its nodes has a core: add one with `ray start --address=HOST`")
        resources = lambda name: [int(node["Resources"].get(name, 0)) for node in nodes]
        self.gpus, self.cores, self.cores_of_node = sum(resources("GPU")), sum(resources("CPU")), min(resources("CPU"))
        self.slots = self.gpus or self.cores  # jobs at a time
        self.text = f"a cluster of {len(nodes)} node{'s' * (len(nodes) > 1)}"
        best = max(nodes, key=lambda node: (node["Resources"].get("GPU", 0), node["Resources"].get("CPU", 0)))
        self.node, self.cores_alone = best["NodeID"], int(best["Resources"]["CPU"])  # where what is timed runs

    def run_alone(self, function: Callable, *args):
        """function(*args), one of this repository, on the node where what is timed runs."""
        remote = self.ray.remote(function).options(num_cpus=1, num_gpus=min(1, self.gpus), **self.alone())
        return self.ray.get(remote.remote(*args))

    def alone(self) -> dict:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(self.node, soft=True)}


@contextmanager
def explain_no_cluster(address: str):
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--cluster={address}: no Ray cluster answers there ({first_line[:120]}): start one with `ray start "
                       f"--head`, or leave the flag out") from None


def check_address(address: str):
    """Raises OSError or ValueError where nobody listens; Ray itself would try for minutes."""
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class ClusterRunner(Runner):
    """Runs `n_parallel` jobs at a time, which share the cores of the cluster; one at a time, all on the same node, with its
    cores to itself. on_gpu: whether each has a GPU, where the cluster has any."""

    def __init__(self, cluster: Cluster, n_parallel: int, stop: StopSignals, on_gpu: bool = True):
        super().__init__(n_parallel, stop)
        self.cluster, is_alone = cluster, n_parallel == 1
        self.threads = cluster.cores_alone if is_alone else max(1, min(cluster.cores // n_parallel, cluster.cores_of_node))
        placed = {"num_cpus": self.threads, "num_gpus": min(1, cluster.gpus) * on_gpu}
        placed |= cluster.alone() if is_alone else {}
        self.open_actor = functools.partial(cluster.ray.remote(RemoteProcess).options(**placed).remote)

    def start(self, job: Job) -> "ClusterProcess":
        return ClusterProcess(self, job)


class ClusterProcess:
    """The process of a job on a node, to the runner like a subprocess.Popen. When its node dies, it goes on on another."""

    def __init__(self, runner: ClusterRunner, job: Job):
        self.runner, self.job, self.ray, self.returncode = runner, job, runner.cluster.ray, None
        self.signal, self.actor, self.has_started = None, None, False

    def communicate(self) -> tuple[None, str]:
        """Waits for its end. Returns (None, what it printed on stderr)."""
        deaths, stderr = 0, ""
        while self.returncode is None:
            self.actor, self.has_started, node = self.runner.open_actor(), False, "a node"
            try:
                node = self.start()
                while node and self.returncode is None:
                    self.returncode, stderr, files = self.ray.get(self.actor.poll.remote())
                    for name, content in files.items():
                        with atomic_write(Path(name)) as file:
                            file.write(content)
                        deaths = 0
                    if self.returncode is None:
                        time.sleep(POLL_SECONDS)
            except self.ray.exceptions.RayActorError:
                deaths += 1
                if self.signal or deaths == MAX_DEATHS:
                    self.returncode = -(self.signal or signal.SIGKILL)
                else:
                    log_line(f"{self.job.files()[-1].name}: {node} died, and with it this run, which goes on elsewhere")
        with suppress(self.ray.exceptions.RayActorError):
            if self.has_started:
                self.ray.get(self.actor.close.remote())
            self.ray.kill(self.actor)
        return None, stderr

    def start(self) -> str:
        """Returns the name of the node, or "" if a signal came before one was free."""
        own = [os.path.abspath(path) for path in self.job.files()]
        _, script, *args = self.job.command()
        files = {os.path.abspath(file): file.read_bytes() for path in self.job.files() for file in find_files(path)}
        started = self.actor.start.remote(os.path.relpath(script, REPO), [absolute_path(arg) for arg in args], own, files,
                                          os.getcwd(), self.runner.threads)
        while not self.signal and not self.ray.wait([started], timeout=POLL_SECONDS)[0]:
            pass
        if self.signal:
            self.returncode = -self.signal
            return ""
        self.has_started = True
        return self.ray.get(started)

    def send_signal(self, number: int):
        self.signal = number
        if self.has_started:
            self.actor.send_signal.remote(number)


def open_runner(jobs: int, stop: StopSignals, cluster: Cluster | None) -> Runner:
    return Runner(jobs, stop) if cluster is None else ClusterRunner(cluster, jobs, stop)


def absolute_path(arg: str) -> str:
    """--data_path=data -> --data_path=/home/me/data; a --dataset that is not here is one of the hub."""
    name, _, value = arg.partition("=")
    if value and (name.endswith("_path") or name == "--dataset" and os.path.exists(value)):
        return f"{name}={os.path.abspath(value)}"
    return arg


def copy_code(folder: Path):
    """The scripts and packages of this repository, without data that may lie beside them."""
    packages = [init.parent for init in REPO.glob("*/__init__.py")]
    for path in [*REPO.glob("*.py"), *(path for package in packages for path in package.iterdir())]:
        if path.suffix in CODE:
            copy = folder / path.relative_to(REPO)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy2(path, copy)
