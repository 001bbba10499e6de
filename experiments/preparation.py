"""Prepares the parts of a data folder on a Ray cluster: one run of download_data.py with --num_nodes and --node for each."""
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.cluster import Cluster, ClusterRunner
from experiments.runner import JobResult
from runtime.cli import log_line
from runtime.config import BadInput
from runtime.files import folder_lock
from runtime.signals import StopSignals


@dataclass(frozen=True)
class PartJob:
    """Makes the folder of one node, or goes on with it. flags: of download_data.py for all of them; what the last ones say
    counts. is_complete(folder): whether there is nothing left to do."""
    script: Path
    folder: Path
    node: int
    flags: tuple[str, ...]
    is_complete: Callable[[Path], bool]

    def previous_result(self) -> JobResult | None:
        return JobResult("finished") if self.is_complete(self.folder) else None

    def command(self) -> list[str]:
        return [sys.executable, str(self.script), *self.flags, "--cluster=", f"--node={self.node}",
                f"--data_path={self.folder}"]

    def files(self) -> list[Path]:
        return [self.folder / "manifest.json", self.folder]

    def complete(self, result: JobResult) -> JobResult:
        is_partial = result.status == "finished" and not self.is_complete(self.folder)
        return JobResult("failed", "its manifest is not complete") if is_partial else result


def prepare_on_cluster(address: str, script: Path, data_path: Path, n_parts: int, flags: Sequence[str], resume_command: str,
                       is_complete: Callable[[Path], bool]) -> bool:
    """Makes data_path/0, data_path/1, …, which together are a data folder. Returns whether they were complete already.
    is_complete: see PartJob. Raises BadInput or OSError where parts could not be made, and SystemExit when a signal stopped
    them."""
    jobs = [PartJob(script, data_path / str(node), node, tuple(flags), is_complete) for node in range(n_parts)]

    def report_failure(i: int, result: JobResult):
        if result.status != "finished":
            log_line(f"{jobs[i].folder}: {result.status}: {result.reason}")
    with folder_lock(data_path, f"--data_path={data_path}"):
        cluster, was_complete = Cluster(address), {is_complete(job.folder) for job in jobs} == {True}
        n_parallel = max(2, min(n_parts, cluster.cores))  # alone, it would be kept to one node
        with StopSignals() as stop:
            results = ClusterRunner(cluster, n_parallel, stop, on_gpu=False).run(jobs, "parts", report_failure)
    if stop.signal:
        log_line(f"stopped, finished shards are kept: the same command continues: {resume_command}")
        raise SystemExit(128 + stop.signal)
    if failed := [result for result in results if result.status != "finished"]:
        kind = BadInput if all(result.status == "bad input" for result in failed) else OSError
        raise kind(f"{len(failed)} of {n_parts} parts failed, see above; the same command goes on with them: "
                   f"{resume_command}")
    return was_complete
