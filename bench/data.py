"""Local parquet to token shards, against the way build-nanogpt does it: tiktoken in a pool of processes, one a core.

    python bench/data.py --text docs_train.parquet

Installs tiktoken from bench/requirements.txt. Both sides have the same vocabulary and write the same tokens, which is
checked. Every measurement is a process of its own, the sides take turns, and medians are compared; what is done once
(imports, starting the pool, loading kernels, the copy that `datasets` makes of the parquet file) is outside the time. The
table goes into README.md, between the lines that name this file.
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
from side_by_side import REPO, install_peers, machine, peak_memory, run, table, take_turns, write_into_readme

sys.path[0] = str(REPO)

import download_data  # noqa: E402
from runtime.threads import available_cores  # noqa: E402
from shards import open_data  # noqa: E402
from text.sources import SourceConfig, open_source  # noqa: E402
from tokenizer import PATTERNS, Tokenizer  # noqa: E402

SHARD_TOKENS = 10_000_000


# -- what is measured: each runs in a process of its own and returns what it measured ---------------------------------

def prepare(args, shard_tokens: int = SHARD_TOKENS) -> float:
    """Seconds of download_data.py's work, without its start."""
    source = SourceConfig(dataset=args.text)
    config = download_data.PrepareConfig(
        data_path=Path(args.out) / "ours", tokenizer_path=Path(args.tokenizer), shard_size_threshold=shard_tokens)
    Tokenizer.load(args.tokenizer).encode_batch(["loads the kernels"])
    start = time.perf_counter()
    download_data.prepare(config, source, "")
    return time.perf_counter() - start


def prepare_in_a_pool(args) -> float:
    """Seconds of the same work as build-nanogpt's fineweb.py goes about it."""
    import datasets
    import tiktoken
    datasets.disable_progress_bars()
    ours = Tokenizer.load(args.tokenizer)
    global pool_encode  # inherited by the processes

    def pool_encode(row):
        ids = np.array([ours.separator_id, *peer.encode_ordinary(row["text"])])
        assert (ids >= 0).all() and (ids < 2**16).all()
        return ids.astype(np.uint16)
    peer = tiktoken.Encoding("ours", pat_str=PATTERNS["default"], mergeable_ranks=ours.mergeable_ranks(), special_tokens={})
    rows = datasets.load_dataset("parquet", data_files=args.text, split="train", cache_dir=f"{args.out}/cache")
    folder = Path(args.out) / "pool"
    folder.mkdir()
    with multiprocessing.get_context("fork").Pool(available_cores()) as pool:
        pool.map(pool_encode, [{"text": "starts the processes"}] * 8)
        start = time.perf_counter()
        shard, n, number = np.empty(SHARD_TOKENS, np.uint16), 0, 0
        for ids in pool.imap(pool_encode, rows, chunksize=16):
            while n + len(ids) >= SHARD_TOKENS:
                shard[n:] = ids[:SHARD_TOKENS - n]
                np.save(folder / f"{number:06}.npy", shard)
                ids, n, number = ids[SHARD_TOKENS - n:], 0, number + 1
            shard[n:n + len(ids)] = ids
            n += len(ids)
        np.save(folder / f"{number:06}.npy", shard[:n])
        return time.perf_counter() - start


def encode_batch(args) -> float:
    """Seconds of `Tokenizer.encode_batch` on all cores, of texts in memory."""
    tokenizer = Tokenizer.load(args.tokenizer)
    texts = list(open_source(SourceConfig(dataset=args.text)).documents())
    tokenizer.encode_batch(["loads the kernels"])
    start = time.perf_counter()
    tokenizer.encode_batch(texts)
    return time.perf_counter() - start


def memory(args) -> float:
    """MB at most of a whole preparation, in shards of the default size."""
    prepare(args, download_data.PrepareConfig().shard_size_threshold)
    return peak_memory()


ARMS = {arm.__name__: arm for arm in (prepare, prepare_in_a_pool, encode_batch, memory)}


# -- running and comparing --------------------------------------------------------------------------------------------

def measure(arm: str, args, text: Path, keep: Path | None = None):
    with tempfile.TemporaryDirectory() as folder:
        return run(__file__, arm, [f"--text={text}", f"--tokenizer={args.tokenizer}", f"--out={keep or folder}"])


def check_equal(folder: Path):
    """Raises AssertionError unless both sides have written the same tokens."""
    data = open_data(folder / "ours")
    ours = np.concatenate([data.split(split).read(0, len(data.split(split))) for split in ("val", "train")])
    assert np.array_equal(ours, np.concatenate([np.load(path) for path in sorted((folder / "pool").glob("*.npy"))]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a parquet file with a column `text`, of 100 MB or so")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("arm", "tokenizer", "out"):
        parser.add_argument(f"--{name}", help="used by the measurements among themselves")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args)))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        folder, text = Path(folder), Path(args.text)
        args.tokenizer = folder / "tokenizer.json"
        texts = list(open_source(SourceConfig(dataset=args.text)).documents())
        Tokenizer.train(texts, 32_768).save(args.tokenizer)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for name, rows, size in (("four", texts * 4, 1000), ("one_group", texts * 12, 10**9),
                                 ("long", ["".join(texts)] * 4, 1), ("repeated", ["".join(texts)[:400_000]] * 4000, 10**9)):
            pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.large_string())}),
                                        folder / f"{name}.parquet", row_group_size=size)
        del texts, rows
        (folder / "kept").mkdir()
        for arm in ("prepare", "prepare_in_a_pool"):
            measure(arm, args, text, folder / "kept")
        check_equal(folder / "kept")
        ours, pool, encode = take_turns(lambda arm: measure(arm, args, text),
                                        ["prepare", "prepare_in_a_pool", "encode_batch"], args.rounds)
        four, = take_turns(lambda arm: measure(arm, args, folder / "four.parquet"), ["prepare"], args.rounds)
        held = {name: measure("memory", args, path) for name, path in (
            ("it", text), *((name, folder / f"{name}.parquet") for name in ("one_group", "long", "repeated")))}
    speed = lambda seconds, n=1: f"{n * megabytes / seconds:.0f} MB/s"
    rows = [(f"{megabytes:.0f} MB of text in parquet to shards, against tiktoken in a pool of processes: times as fast",
             f"**{pool / ours:.2f}×**", speed(ours), speed(pool)),
            ("the same, against `encode_batch` alone, of texts in memory", f"**{encode / ours:.2f}×**", speed(ours),
             speed(encode)),
            ("the same text four times over: speed against that of once", f"**{4 * ours / four:.2f}×**", speed(four, 4),
             speed(ours)),
            (f"peak memory of a preparation of {megabytes:.0f} MB", "", f"{held['it']:.0f} MB", ""),
            (f"of {12 * megabytes:.0f} MB that stand in one row group", "", f"{held['one_group']:.0f} MB", ""),
            (f"of four documents of {megabytes:.0f} MB", "", f"{held['long']:.0f} MB", ""),
            ("of 1600 MB that take 20 KB of parquet, a document 4,000 times", "", f"{held['repeated']:.0f} MB", "")]
    found = (f"{table(rows)}\n\nMedians of {args.rounds} runs, wall time on all cores, vocabulary 32,768, {machine()}: "
             f"`python bench/data.py --text {Path(args.text).name}`. In the same run, all tokens were equal to tiktoken's.")
    print(found)
    write_into_readme("bench/data.py", found)


if __name__ == "__main__":
    main()
