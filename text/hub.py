"""Datasets of the Hugging Face hub, read over an unreliable network.

    revision, read = open_hub("roneneldan/TinyStories", None, "text")

Parquet files are read by `text.formats`, a few pages at a time, so that reading can continue at any row without what
precedes it. Other formats are read by `datasets`, which continues from its `state_dict`.
"""
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout

from runtime.cli import log_line
from runtime.config import BadInput
from text.columns import column_value, require_text
from text.documents import PackedDocuments
from text.formats import CHUNK_BYTES, Chunk, TextFile, read_files, read_from, split_files

REQUEST_BYTES = 1 << 24  # read-ahead: how much of a file one request fetches
# Seconds. huggingface_hub itself retries a request for about 20 seconds; these are the pauses after that.
FIRST_PAUSE, LONGEST_PAUSE = 10, 60
# Seconds in which the hub must describe a dataset, and list its files, which can be many thousands.
ANSWER_SECONDS, LISTING_SECONDS = 60, 300
PATIENCE_SECONDS = 2  # of waiting without a word


def open_hub(dataset: str, dataset_config: str | None, text_column: str, *, streaming: bool = True,
             skip_errors: bool = False, retry_seconds: int = 600, revision: str | None = None,
             part: tuple[int, int] = (0, 1)) -> tuple[str, Callable]:
    """The `train` split of a dataset: its revision, and `read(state)`, which yields its chunks.

    revision: the one that a resumed preparation started with; by default the latest. part: (k, n) is the k-th of n disjoint
    parts. Raises BadInput when the dataset or its column does not exist, or the hub cannot be reached at the first contact;
    ConnectionError when it has not answered for `retry_seconds`.
    """
    configure_libraries()
    flags = dataset_flags(dataset, dataset_config)
    policy = RetryPolicy(flags, retry_seconds)
    is_new = revision is None
    revision = find_revision(dataset, revision, flags, policy)
    paths = policy.call(lambda: call_with_timeout(lambda: parquet_paths(dataset, dataset_config, revision),
                                                  LISTING_SECONDS, flags))
    if paths:
        parts = split_files([hub_file(path, streaming) for path in paths], part)
        read = lambda state: read_files(parts, text_column, state, skip_errors)
    else:
        read = lambda state: dataset_chunks(load_rows(dataset, dataset_config, revision, streaming), text_column, dataset,
                                            state, part)
    read = policy.retry_reading(read)
    if is_new and next(read(None), None) is None:  # a resumed preparation does not fetch the beginning again
        raise BadInput(f"{flags}: the dataset is empty")
    return revision, read


def configure_libraries():
    """Silences the hub's libraries, which log as an error what they also raise, and leaves retrying to RetryPolicy:
    `datasets` would silently retry 20 times."""
    import datasets
    from huggingface_hub.utils import logging
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for interval in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL",
                     "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL"):
        setattr(datasets.config, interval, 0)


def dataset_flags(dataset: str, dataset_config: str | None) -> str:
    """The flags that name a dataset, as error messages start with them."""
    return f"--dataset={dataset}" + (f" --dataset_config={dataset_config}" if dataset_config else "")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a repository's id on the hub: a name, or owner/name."""
    return len(text) < 200 and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", text) is not None


def find_revision(dataset: str, revision: str | None, flags: str, policy: "RetryPolicy") -> str:
    """The commit that `revision` names, by default the latest: a preparation reads one state of the dataset. Looked up
    first, because without a network that fails at once."""
    import huggingface_hub
    was_reached = revision is not None

    def look_up() -> str:
        nonlocal was_reached
        try:
            return call_with_timeout(lambda: huggingface_hub.HfApi().dataset_info(dataset, revision=revision or "main").sha,
                                     ANSWER_SECONDS, flags)
        except Exception as error:
            if not was_reached and is_network_error(error) and http_status(error) is None:  # perhaps no network at all
                raise hub_unreachable(flags, error, "a local file or `builtin`") from None
            was_reached = True
            raise
    return policy.call(look_up)


def parquet_paths(dataset: str, dataset_config: str | None, revision: str) -> list[str]:
    """The files of the train split if they are parquet; else []."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    builder = datasets.load_dataset_builder(dataset, dataset_config, revision=revision)
    files = builder.config.data_files or {}
    paths = list(files["train"]) if isinstance(builder, Parquet) and "train" in files else []
    return paths if all(path.endswith(".parquet") for path in paths) else []


def hub_file(path: str, streaming: bool) -> TextFile:
    """path: hf://datasets/… Without streaming, the file is downloaded into the HF_HOME folder before it is read."""
    import huggingface_hub
    system, name = huggingface_hub.HfFileSystem(), path.removeprefix("hf://")

    def download():
        found = system.resolve_path(name)
        return open(huggingface_hub.hf_hub_download(found.repo_id, found.path_in_repo, repo_type="dataset",
                                                    revision=found.revision), "rb")
    stream = lambda: system.open(name, block_size=REQUEST_BYTES, cache_type="readahead")
    return TextFile(name, 1, stream if streaming else download)


def load_rows(dataset: str, dataset_config: str | None, revision: str, streaming: bool):
    """The train split as an IterableDataset or, downloaded, as a Dataset."""
    import datasets
    load = lambda: datasets.load_dataset(dataset, dataset_config, split="train", streaming=streaming, revision=revision)
    return call_with_timeout(load, LISTING_SECONDS, dataset_flags(dataset, dataset_config)) if streaming else load()


def dataset_chunks(rows, text_column: str, dataset: str, state: dict | None, part: tuple[int, int]) -> Iterator[Chunk]:
    """Chunks of the rows of `load_rows`. state: a `state_dict` of the IterableDataset."""
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node
    if isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset()
    if part[1] > 1:
        rows = split_dataset_by_node(rows, *part)
    if state:
        rows.load_state_dict(state)
    texts, n_characters = [], 0
    for row in rows:
        if text := require_text(column_value(row, text_column, dataset), text_column, dataset):
            texts.append(text)
            n_characters += len(text)
        if n_characters >= CHUNK_BYTES:
            yield Chunk(PackedDocuments.from_strings(texts), state)
            state, texts, n_characters = rows.state_dict(), [], 0
    if texts:
        yield Chunk(PackedDocuments.from_strings(texts), state)


# -- retrying ---------------------------------------------------------------------------------------------------------

def call_with_timeout(function: Callable, seconds: float, flags: str):
    """function(), in a thread of its own; a line on stderr says so when it takes longer than PATIENCE_SECONDS. Raises
    TimeoutError when it takes longer than `seconds`: for some requests, huggingface_hub waits for an answer without limit.
    flags: those that name the dataset, for the line."""
    thread = ThreadPoolExecutor(1)
    try:
        future, patience = thread.submit(function), min(PATIENCE_SECONDS, seconds)
        if not wait([future], patience).done and seconds > patience:
            log_line(f"{flags}: the hub does not answer yet: trying for up to {seconds} s")
        return future.result(seconds - patience)
    except FutureTimeout:
        raise TimeoutError(f"no answer in {seconds} s") from None
    finally:
        thread.shutdown(wait=False)


class RetryPolicy:
    """Retries network failures after pauses of FIRST_PAUSE to LONGEST_PAUSE seconds, each with a line on stderr, for at
    most `seconds` in all. flags: those that name the dataset, for messages."""

    def __init__(self, flags: str, seconds: int):
        self.flags, self.seconds = flags, seconds

    def call(self, function: Callable):
        """function(), once it succeeds. Raises ConnectionError on giving up; failures that are not the network's at once, as
        `hub_error` explains them."""
        import tenacity

        def attempt():
            try:
                return function()
            except (BadInput, MemoryError):
                raise
            except Exception as error:
                if is_network_error(error):
                    raise
                raise hub_error(error, self.flags) from None

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_network_error), stop=tenacity.stop_before_delay(self.seconds),
            wait=tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE), before_sleep=self.report,
            retry_error_callback=self.give_up)
        return retrying(attempt)

    def report(self, state):
        log_line(f"{self.flags}: the hub does not answer ({brief(state.outcome.exception())}): trying again in "
                 f"{state.next_action.sleep:.0f} s")

    def give_up(self, state):
        raise ConnectionError(f"{self.flags}: the hub stopped answering ({brief(state.outcome.exception())})") from None

    def retry_reading(self, read: Callable) -> Callable:
        """`read(state)` whose chunks continue after a failure; every chunk restarts the clock."""
        def read_with_retries(state) -> Iterator[Chunk]:
            position, stream = {"at": state, "skip": 0}, None

            def next_chunk() -> Chunk | None:
                nonlocal stream
                stream = stream or read_from(read, position)
                try:
                    return next(stream, None)
                except Exception:
                    stream = None
                    raise

            while (chunk := self.call(next_chunk)) is not None:
                yield chunk
                position = chunk.position_after(len(chunk.documents))
        return read_with_retries


# -- what went wrong --------------------------------------------------------------------------------------------------

def is_network_error(error: BaseException) -> bool:
    """Whether a later attempt may succeed. The HTTP libraries below `datasets` have changed over its versions, and their
    exceptions have no common base class, so they are recognised by the package that defines them."""
    from huggingface_hub import errors
    if isinstance(error, errors.LocalEntryNotFoundError):  # could not be downloaded
        return True
    if isinstance(error, errors.HfHubHTTPError):  # 404 and the like are answers
        return http_status(error) in (None, 408, 425, 429) or http_status(error) >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(
        ".")[0] in {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "socket", "ssl"}


def http_status(error: Exception) -> int | None:
    """The HTTP status that the hub answered with; None if it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def hub_unreachable(flags: str, error: Exception, alternative: str) -> BadInput:
    """The exception to raise when the first request already fails for want of a network. alternative: what the user could
    give instead."""
    return BadInput(f"{flags}: the hub cannot be reached ({brief(error)}): check the network, or give {alternative}")


def hub_error(error: Exception, flags: str) -> Exception:
    """The exception to raise for an `error` of `datasets`, or of a library below it, that is not the network's: OSError for
    a failing local disk, otherwise BadInput. flags: those that name the repository, for the message."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        reason = "is gated: accept its terms on its page and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "the hub no longer has the revision that this preparation started with: choose another --data_path"
    elif isinstance(error, (DatasetNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError)):
        reason = "neither a local file or folder nor a repository on the hub that you may read"
    elif type(error) is ValueError or isinstance(error, DatasetsError):
        reason = brief(error)  # written for the user: which configurations and splits there are
    elif isinstance(error, OSError) and error.errno is not None:
        return OSError(f"{flags}: the local copy, in the HF_HOME folder, failed: {error}")
    else:  # of pyarrow, gzip, yaml, codecs …
        reason = f"cannot be read; perhaps one of its files is damaged ({brief(error)})"
    return BadInput(f"{flags}: {reason}")


def brief(error: BaseException) -> str:
    """The error in one line of at most 200 characters, with its type unless that is ValueError."""
    message = " ".join(str(error).split())[:200]
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"
