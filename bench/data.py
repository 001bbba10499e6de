"""Local parquet to token shards: download_data.py against tiktoken in a pool of processes, one a core, as in build-nanogpt.

    python bench/data.py --text docs_train.parquet

Installs tiktoken from bench/requirements.txt. Both sides have the same vocabulary and must write the same tokens. Each
measurement is a process of its own; the sides take turns. What happens once is not timed: imports, starting the pool,
loading kernels, and the copy that `datasets` makes of the parquet file. Writes its table into docs/benchmarks.md.
"""
import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from side_by_side import REPO, install_peers, machine, peak_memory, run, table, take_turns, write_into_docs

sys.path[0] = str(REPO)  # instead of bench/, where tokenizer.py is another file

import download_data  # noqa: E402
from runtime.threads import available_cores  # noqa: E402
from shards import open_data  # noqa: E402
from text.sources import SourceConfig, open_source  # noqa: E402
from tokenizer import PATTERNS, Tokenizer  # noqa: E402

SHARD_TOKENS = 10_000_000


def read_documents(path: str | Path) -> list[str]:
    return list(open_source(SourceConfig(dataset=str(path))).documents())


# -- measurements: each runs in a process of its own ------------------------------------------------------------------

def prepare(args, shard_tokens: int = SHARD_TOKENS) -> float:
    """Seconds that download_data.py takes, without its start."""
    source = SourceConfig(dataset=args.text)
    config = download_data.PrepareConfig(
        data_path=Path(args.out) / "ours", tokenizer_path=Path(args.tokenizer), shard_size_threshold=shard_tokens)
    Tokenizer.load(args.tokenizer).encode_batch(["loads the kernels"])
    start = time.perf_counter()
    download_data.prepare(config, source, "")
    return time.perf_counter() - start


def prepare_in_pool(args) -> float:
    """Seconds that the same work takes in the manner of build-nanogpt's fineweb.py."""
    import datasets
    import tiktoken
    datasets.disable_progress_bars()
    ours = Tokenizer.load(args.tokenizer)
    global encode_row  # so that the processes inherit it

    def encode_row(row):
        ids = np.array([ours.separator_id, *peer.encode_ordinary(row["text"])])
        assert (ids >= 0).all() and (ids < 2**16).all()
        return ids.astype(np.uint16)
    peer = tiktoken.Encoding("ours", pat_str=PATTERNS["default"], mergeable_ranks=ours.mergeable_ranks(), special_tokens={})
    rows = datasets.load_dataset("parquet", data_files=args.text, split="train", cache_dir=f"{args.out}/cache")
    folder = Path(args.out) / "pool"
    folder.mkdir()
    with multiprocessing.get_context("fork").Pool(available_cores()) as pool:
        pool.map(encode_row, [{"text": "starts the processes"}] * 8)
        start = time.perf_counter()
        shard, n, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0
        for ids in pool.imap(encode_row, rows, chunksize=16):
            while n + len(ids) >= SHARD_TOKENS:
                shard[n:] = ids[:SHARD_TOKENS - n]
                np.save(folder / f"{number:06}.npy", shard)
                ids, n, number = ids[SHARD_TOKENS - n:], 0, number + 1
            shard[n:n + len(ids)] = ids
            n += len(ids)
        np.save(folder / f"{number:06}.npy", shard[:n])
        return time.perf_counter() - start


def encode_batch(args) -> float:
    """Seconds that `Tokenizer.encode_batch` takes on all cores for the same texts in memory."""
    tokenizer, texts = Tokenizer.load(args.tokenizer), read_documents(args.text)
    tokenizer.encode_batch(["loads the kernels"])
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    return time.perf_counter() - start


def memory(args) -> float:
    """Peak MB of a process that prepares the text in shards of the default size."""
    prepare(args, download_data.PrepareConfig().shard_size_threshold)
    return peak_memory()


ARMS = {arm.__name__: arm for arm in (prepare, prepare_in_pool, encode_batch, memory)}


# -- running and comparing --------------------------------------------------------------------------------------------

def measure(arm: str, args, text: Path, keep: Path | None = None):
    """The result of an arm in a process of its own. keep: the folder for its output, which is otherwise deleted."""
    with tempfile.TemporaryDirectory() as folder:
        return run(__file__, arm, [f"--text={text}", f"--tokenizer={args.tokenizer}", f"--out={keep or folder}"])


def check_equal(folder: Path):
    """Raises AssertionError unless both sides have written the same tokens."""
    data = open_data(folder / "ours")
    ours = np.concatenate([data.split(split).read(0, len(data.split(split))) for split in ("val", "train")])
    assert np.array_equal(ours, np.concatenate([np.load(path) for path in sorted((folder / "pool").glob("*.npy"))]))


def write_variants(texts: list[str], folder: Path) -> dict[str, Path]:
    """Parquet files of the same text in other shapes: name -> path."""
    joined = "".join(texts)
    shapes = {"four_times": (texts * 4, 1000), "one_row_group": (texts * 12, 10**9), "long_documents": ([joined] * 4, 1),
              "repeated": ([joined[:400_000]] * 4000, 10**9)}
    paths = {}
    for name, (rows, row_group_size) in shapes.items():
        paths[name] = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.large_string())}), paths[name],
                                    row_group_size=row_group_size)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a parquet file with a column `text`, of about 100 MB")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    for name in ("arm", "tokenizer", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of one measurement, printed as JSON
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args)))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        folder, text = Path(folder), Path(args.text)
        args.tokenizer = folder / "tokenizer.json"
        texts = read_documents(text)
        Tokenizer.train(texts, args.vocab_size).save(args.tokenizer)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        repeated_megabytes = 4000 * len("".join(texts)[:400_000].encode()) / 1e6
        paths = {"once": text, **write_variants(texts, folder)}
        del texts
        (folder / "kept").mkdir()
        for arm in ("prepare", "prepare_in_pool"):
            measure(arm, args, text, folder / "kept")
        check_equal(folder / "kept")
        ours, pool, encode = take_turns(lambda arm: measure(arm, args, text),
                                        ["prepare", "prepare_in_pool", "encode_batch"], args.rounds)
        four_times, = take_turns(lambda arm: measure(arm, args, paths["four_times"]), ["prepare"], args.rounds)
        peaks = {name: measure("memory", args, path) for name, path in paths.items() if name != "four_times"}
    speed = lambda seconds, n=1: f"{n * megabytes / seconds:.0f} MB/s"
    rows = [(f"speed, {megabytes:.0f} MB of text in parquet to shards: ours / tiktoken in a pool of processes",
             f"{pool / ours:.2f}", "higher", speed(ours), speed(pool)),
            ("speed: parquet to shards / `encode_batch` of the same texts in memory", f"{encode / ours:.2f}", "higher",
             speed(ours), speed(encode)),
            ("speed: four times that text / that text", f"{4 * ours / four_times:.2f}", "higher", speed(four_times, 4),
             speed(ours))]
    rows += [(f"peak memory, {what}", f"{peaks[name] / peaks['once']:.2f}" if name != "once" else "", "lower",
              f"{peaks[name]:.0f} MB", f"{peaks['once']:.0f} MB" if name != "once" else "") for name, what in (
                  ("once", f"{megabytes:.0f} MB of text"),
                  ("one_row_group", f"{12 * megabytes:.0f} MB in one row group / {megabytes:.0f} MB"),
                  ("long_documents", f"four documents of {megabytes:.0f} MB / {megabytes:.0f} MB"),
                  ("repeated", f"one document 4,000 times, {repeated_megabytes:.0f} MB in 20 KB of parquet / "
                               f"{megabytes:.0f} MB"))]
    text = (f"{table(rows)}\n\nMedians of {args.rounds} runs, wall time on all cores, vocabulary {args.vocab_size:,}, "
            f"{machine()}: `python bench/data.py --text {Path(args.text).name}`. In the same run, all tokens were equal to "
            f"tiktoken's.")
    print(text)
    write_into_docs("bench/data.py", text)


if __name__ == "__main__":
    main()
