"""Datasets of the Hugging Face hub, read over a network that drops.

Parquet files are read by `text.formats`, a few pages at a time, so that reading goes on at any row without what is before
it. Other formats come through `datasets`, which goes on from its `state_dict`.
"""
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from runtime.cli import log_line
from runtime.config import BadInput
from text.documents import from_strings
from text.formats import CHUNK_BYTES, Chunk, TextFile, chunks_from, read_files, require_column, require_text, split_files

REQUEST_BYTES = 1 << 24  # of a file are asked for at a time
# The hub's own library tries again by itself, for about 20 seconds; these are the pauses after that.
FIRST_PAUSE, LONGEST_PAUSE = 10, 60
# Within these the hub has to say what a dataset is, and what files it has, which can be many thousands.
ANSWER_SECONDS, LISTING_SECONDS = 60, 300


def open_hub(dataset: str, dataset_config: str | None, text_column: str, streaming: bool, skip_errors: bool,
             retry_seconds: int, revision: str | None, part: tuple[int, int]) -> tuple[str, Callable]:
    """The `train` split of a dataset: its revision, and `read(at)`, which yields its chunks.

    part: (k, n) is the k-th of n disjoint parts. Raises BadInput when the dataset or its column does not exist or, on the
    first contact, the hub is away; ConnectionError when it is away for more than `retry_seconds`.
    """
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it raises as well
    huggingface_hub.utils.logging.set_verbosity_error()
    announce_retries()
    # what `datasets` would try 20 times in silence, is tried here, aloud
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for interval in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL",
                     "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL"):
        setattr(datasets.config, interval, 0)
    is_new = revision is None
    given = f"--dataset={dataset}" + (f" --dataset_config={dataset_config}" if dataset_config else "")
    patience = RetryPolicy(given, retry_seconds)
    # asked first because it fails at once; pinning what it answers keeps one preparation on one state of the hub
    info = lambda: call_with_timeout(lambda: huggingface_hub.HfApi().dataset_info(dataset, revision=revision or "main").sha,
                            ANSWER_SECONDS)
    try:
        revision = info()
    except Exception as error:
        if is_new and is_network_error(error) and status(error) is None:  # perhaps there is no network at all
            raise BadInput(f"{given}: the hub cannot be reached ({short(error)}): check the network, or give a local file "
                           f"or `builtin`") from None
        patience.wait(error)
        revision = patience.call(info)
    listing = lambda: call_with_timeout(lambda: parquet_paths(dataset, dataset_config, revision), LISTING_SECONDS)
    if paths := patience.call(listing):
        paths, nth = split_files(paths, part)
        files = [hub_file(path, streaming) for path in paths]
        read = lambda at: read_files(files, text_column, at, skip_errors, nth)
    else:
        load = lambda: datasets.load_dataset(dataset, dataset_config, split="train", streaming=streaming,
                                             revision=revision)
        loaded = lambda: call_with_timeout(load, LISTING_SECONDS) if streaming else load()
        read = lambda at: read_rows(loaded(), text_column, dataset, at, part)
    read = patience.reading(read)
    if is_new and next(read(None), None) is None:  # where reading goes on, its beginning is not asked for again
        raise BadInput(f"{given}: the dataset is empty")
    return revision, read


def parquet_paths(dataset: str, dataset_config: str | None, revision: str) -> list[str]:
    """The train split's files, if they are parquet."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    builder = datasets.load_dataset_builder(dataset, dataset_config, revision=revision)
    files = builder.config.data_files or {}
    paths = list(files["train"]) if isinstance(builder, Parquet) and "train" in files else []
    return paths if all(path.endswith(".parquet") for path in paths) else []


def hub_file(path: str, streaming: bool) -> TextFile:
    """path: hf://datasets/… Without streaming, the file is downloaded before it is read, and kept where HF_HOME says."""
    import huggingface_hub
    system, name = huggingface_hub.HfFileSystem(), path.removeprefix("hf://")

    def download():
        found = system.resolve_path(name)
        return open(huggingface_hub.hf_hub_download(found.repo_id, found.path_in_repo, repo_type="dataset",
                                                    revision=found.revision), "rb")
    stream = lambda: system.open(name, block_size=REQUEST_BYTES, cache_type="readahead")
    return TextFile(name, 1, stream if streaming else download)


def read_rows(rows, text_column: str, dataset: str, at: dict | None, part: tuple[int, int]) -> Iterator[Chunk]:
    """rows: of `datasets`; at: a `state_dict` of theirs."""
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node
    if isinstance(rows, Dataset):  # downloaded
        rows = rows.to_iterable_dataset()
    if part[1] > 1:
        rows = split_dataset_by_node(rows, *part)
    if at:
        rows.load_state_dict(at)
    texts, size = [], 0
    for row in rows:
        require_column(text_column, row, dataset)
        if text := require_text(row[text_column], text_column, dataset):
            texts.append(text)
            size += len(text)
        if size >= CHUNK_BYTES:
            yield Chunk(from_strings(texts), at)
            at, texts, size = rows.state_dict(), [], 0
    if texts:
        yield Chunk(from_strings(texts), at)


# -- trying again -----------------------------------------------------------------------------------------------------

def call_with_timeout(function: Callable, seconds: float):
    """function(), in a thread of its own. Raises TimeoutError when it takes longer than `seconds`: the hub's library waits
    without end for an answer to some requests."""
    thread = ThreadPoolExecutor(1)
    try:
        return thread.submit(function).result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer in {seconds} s") from None
    finally:
        thread.shutdown(wait=False)


class RetryPolicy:
    """Tries again, after pauses that grow, what the network failed; until nothing has come for `seconds`."""

    def __init__(self, given: str, seconds: int):
        self.given, self.seconds = given, seconds
        self.progress()

    def progress(self):
        self.failing_since, self.pause = None, FIRST_PAUSE

    def wait(self, error: Exception):
        """Returns when it is time to try again. Raises ConnectionError when it is time to give up, and what is no failure of
        the network as what it is."""
        if isinstance(error, (BadInput, MemoryError)):
            raise error
        if not is_network_error(error):
            raise hub_failure(error, self.given) from None
        self.failing_since = self.failing_since or time.monotonic()
        if time.monotonic() + self.pause - self.failing_since > self.seconds:
            raise ConnectionError(f"{self.given}: the hub stopped answering ({short(error)})") from None
        log_line(f"{self.given}: the hub does not answer ({short(error)}): trying again in {self.pause} s")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def call(self, function: Callable):
        """function(), when it succeeds."""
        while True:
            try:
                found = function()
                self.progress()
                return found
            except Exception as error:
                self.wait(error)

    def reading(self, read: Callable) -> Callable:
        """`read`, whose chunks go on where the network failed."""
        def patient(at) -> Iterator[Chunk]:
            place = {"at": at, "skip": 0}
            while True:
                try:
                    for chunk in chunks_from(read, place):
                        self.progress()
                        yield chunk
                        place = chunk.place(len(chunk.texts))
                    return
                except Exception as error:
                    self.wait(error)
        return patient


def announce_retries():
    """Lets huggingface_hub, which tries a request several times by itself, say so in a line of ours."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.handlers, logger.propagate = [RetryLines()], False
    logger.setLevel(logging.WARNING)


class RetryLines(logging.Handler):
    """It logs two warnings for each: what failed, then how long it waits."""
    reason = ""

    def emit(self, record: logging.LogRecord):
        message = record.getMessage()
        if " thrown while requesting" in message:
            self.reason = message.split(" thrown while requesting")[0].strip("'")
        elif "Retry" in message:
            log_line(f"the hub does not answer ({self.reason}): {message}")


def is_network_error(error: Exception) -> bool:
    """Whether it may pass by itself. The HTTP libraries below `datasets` changed over its versions, and their errors have no
    common base."""
    from huggingface_hub import errors
    if isinstance(error, errors.LocalEntryNotFoundError):  # could not be downloaded
        return True
    if isinstance(error, errors.HfHubHTTPError):  # 404 and the like are answers
        return status(error) in (None, 408, 425, 429) or status(error) >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(
        ".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "socket", "ssl"}


def status(error: Exception) -> int | None:
    """The HTTP status that the hub answered with, if it did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def hub_failure(error: Exception, given: str) -> Exception:
    """What to raise for an error, not of the network, that comes out of `datasets` or a library below it: OSError where
    a local disk is the trouble, otherwise BadInput, for it is the dataset that cannot be read."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        reason = "is gated: accept its terms on its page and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "the hub no longer has the revision this preparation began with: choose another --data_path"
    elif isinstance(error, (DatasetNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError)):
        reason = "neither a local file or folder nor on the hub, or not to be read there"
    elif type(error) is ValueError or isinstance(error, DatasetsError):
        reason = short(error)  # written for the user: which configurations and splits there are
    elif isinstance(error, OSError) and error.errno is not None:
        return OSError(f"{given}: the local copy of it, in the folder that HF_HOME sets: {error}")
    else:  # pyarrow's, gzip's, yaml's, codecs' …
        reason = f"cannot be read, perhaps a file of it is damaged ({short(error)})"
    return BadInput(f"{given}: {reason}")


def short(error: Exception) -> str:
    words = " ".join(str(error).split())[:200]
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"
