"""Our tokenizer against rustbpe, gigabpe and tiktoken: seconds, memory, threads and start.

    python bench/tokenizer.py --train docs_train.parquet --val docs_val.parquet

Installs the peers from bench/requirements.txt. Every measurement is a process of its own (one and two threads
share one), the sides take turns, and medians are compared. The table goes into README.md, between the lines that name
this file, and as a picture into studies/tokenizer.png.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from side_by_side import REPO, install_peers, machine, peak_memory, run, table, take_turns, write_into_readme

sys.path[0] = str(REPO)  # this file has the name of the module that it measures

from text.sources import SourceConfig, open_source  # noqa: E402

SPECIALS = 5  # of our vocabulary; the peers learn as many merges without them


# -- what is measured: each runs in a process of its own and returns what it measured ---------------------------------

def documents(path: str) -> Iterator[str]:
    return open_source(SourceConfig(dataset=path)).documents()


def train_ours(texts, vocab_size: int, pattern: str):
    from tokenizer import Tokenizer
    return Tokenizer.train(texts, vocab_size, pattern)


def train_rustbpe(texts, vocab_size: int):
    import rustbpe

    from tokenizer import PATTERNS
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), vocab_size - SPECIALS, pattern=PATTERNS["default"])
    return trained


def seconds_of(work) -> float:
    """CPU seconds of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def train_seconds_ours(args, pattern: str = "default") -> float:
    texts = list(documents(args.train))
    train_ours(texts[:20], 300, pattern)  # loads the kernels; their start is measured by itself
    return seconds_of(lambda: train_ours(texts, args.vocab_size, pattern))


def train_seconds_ours_gpt2(args) -> float:
    return train_seconds_ours(args, "gpt2")


def train_seconds_rustbpe(args) -> float:
    texts = list(documents(args.train))
    return seconds_of(lambda: train_rustbpe(texts, args.vocab_size))


def train_seconds_gigabpe(args) -> float:
    import gigabpe
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(documents(args.train)))
        file.flush()
        return seconds_of(lambda: gigabpe.train_bpe([file.name], args.vocab_size - SPECIALS, threads=1, special_tokens=[]))


def train_memory_ours(args) -> float:
    train_ours(documents(args.train), args.vocab_size, "default")
    return peak_memory()


def train_memory_rustbpe(args) -> float:
    train_rustbpe(documents(args.train), args.vocab_size)
    return peak_memory()


def encode_seconds_ours(args) -> float:
    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.val))
    tokenizer.encode("loads the kernels")
    return seconds_of(lambda: tokenizer.encode_batch(texts, threads=1))


def encode_seconds_tiktoken(args) -> float:
    import tiktoken

    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.val))
    peer = tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.mergeable_ranks(),
                             special_tokens={})
    peer.encode_ordinary("the first call")
    return seconds_of(lambda: [peer.encode_ordinary(text) for text in texts])


def threads_seconds(args) -> tuple[float, float]:
    """Wall seconds of encoding the training text with two threads and with one, which take turns."""
    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.train))
    seconds = {2: [], 1: []}
    for _ in range(2 * args.rounds + 1):
        for threads, seen in seconds.items():
            start = time.perf_counter()
            tokenizer.encode_batch(texts, threads)
            seen.append(time.perf_counter() - start)
    return tuple(statistics.median(seen[1:]) for seen in seconds.values())  # the first round warms up


def equality(args) -> str:
    """Says that merges and ids are those of the peers. Raises AssertionError if not."""
    import tiktoken

    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.val))
    learnt = train_rustbpe(documents(args.train), args.vocab_size).get_mergeable_ranks()
    merges = {bytes(token): rank for token, rank in learnt}
    assert tokenizer.mergeable_ranks() == merges
    peer = tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=merges, special_tokens={})
    ids, offsets = tokenizer.encode_batch(texts)
    for text, start, stop in zip(texts, offsets, offsets[1:]):
        assert ids[start:stop].tolist() == peer.encode_ordinary(text)
    whole = "".join(texts)
    assert tokenizer.encode(whole) == peer.encode_ordinary(whole)
    return (f"In the same run, all {len(merges) - 256:,} merges were equal to rustbpe's, and all {len(ids):,} ids to "
            f"tiktoken's, by document and as one text.")


ARMS = {arm.__name__: arm for arm in (
    train_seconds_ours, train_seconds_ours_gpt2, train_seconds_rustbpe, train_seconds_gigabpe, train_memory_ours,
    train_memory_rustbpe, encode_seconds_ours, encode_seconds_tiktoken, threads_seconds, equality)}


# -- running and comparing --------------------------------------------------------------------------------------------

def start_seconds(args, compiled: bool) -> float:
    """Wall seconds from the start of a process until it has encoded a document."""
    program = ("import time; from tokenizer import Tokenizer; "
               f"Tokenizer.load({str(args.tokenizer)!r}).encode('a first document'); print(time.time())")
    with tempfile.TemporaryDirectory() as empty:
        environment = dict(os.environ) if compiled else os.environ | {"NUMBA_CACHE_DIR": empty}
        start = time.time()
        done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=environment, check=True, capture_output=True)
        return float(done.stdout) - start


def flags(args) -> list[str]:
    return [f"--train={args.train}", f"--val={args.val}", f"--vocab_size={args.vocab_size}", f"--tokenizer={args.tokenizer}",
            f"--rounds={args.rounds}"]


def compare(args, ours: str, peer: str) -> list[float]:
    """Medians of two arms that take turns."""
    return take_turns(lambda arm: measured(arm, args), [ours, peer], args.rounds)


def measured(arm: str, args):
    """The figure of one arm, from a fresh process; Rust's worker threads are one."""
    return run(__file__, arm, flags(args), RAYON_NUM_THREADS="1")


def measure(args) -> list[tuple[str, str, str, str, float]]:
    """Rows: what, ratio, ours, peer, ratio as a number."""
    megabytes = {name: sum(len(text.encode()) for text in documents(path)) / 1e6
                 for name, path in (("train", args.train), ("val", args.val))}
    rows = []

    def add(what: str, mine: float, theirs: float, show, ratio):
        factor = ratio(mine, theirs)
        rows.append((what, f"**{factor:.2f}×**", show(mine), show(theirs), factor))

    faster = lambda mine, theirs: theirs / mine
    seconds = lambda value: f"{value:.2f} s"
    of_train = f"training on {megabytes['train']:.0f} MB"
    add(f"{of_train} against rustbpe: times as fast",
        *compare(args, "train_seconds_ours", "train_seconds_rustbpe"), seconds, faster)
    add(f"{of_train}, GPT-2's pattern, against gigabpe: times as fast",
        *compare(args, "train_seconds_ours_gpt2", "train_seconds_gigabpe"), seconds, faster)
    add(f"encoding {megabytes['val']:.1f} MB of unseen documents, first pass, against tiktoken (lists): times as fast",
        *compare(args, "encode_seconds_ours", "encode_seconds_tiktoken"),
        lambda value: f"{megabytes['val'] / value:.0f} MB/s", faster)
    add(f"encoding {megabytes['train']:.0f} MB, two threads (with a cache each) against one, wall time: times as fast",
        *measured("threads_seconds", args), lambda value: f"{megabytes['train'] / value:.0f} MB/s", faster)
    add(f"{of_train}, peak memory of the process against rustbpe's: times as much",
        *compare(args, "train_memory_ours", "train_memory_rustbpe"), lambda value: f"{value:.0f} MB",
        lambda mine, theirs: mine / theirs)
    cached = statistics.median(start_seconds(args, True) for _ in range(args.rounds))
    fresh = statistics.median(start_seconds(args, False) for _ in range(3))
    rows.append(("process start to first encoded document, kernels cached", "", f"{cached:.2f} s", "", 0))
    rows.append(("the same, kernels never compiled", "", f"{fresh:.1f} s", "", 0))
    return rows


def page(rows, equal: str, args) -> str:
    return (f"{table(rows)}\n\nMedians of {args.rounds} runs, CPU seconds of one thread where nothing else is said, "
            f"vocabulary {args.vocab_size:,}, {machine()}: `python bench/tokenizer.py --train {Path(args.train).name} "
            f"--val {Path(args.val).name}`. {equal}")


def draw(rows, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    bars = [row for row in rows if row[4]][::-1]
    figure, axis = plt.subplots(figsize=(10, 0.6 * len(bars) + 1.2), layout="constrained")
    axis.barh([row[0].replace(": times", "\ntimes") for row in bars], [row[4] for row in bars], color="#4878a8")
    for i, (_, _, ours, peer, factor) in enumerate(bars):
        axis.text(factor, i, f"  {factor:.2f}  ({ours}, {peer})", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlim=(0, 1.35 * max(row[4] for row in bars)), title="Our tokenizer against its peers (ours, peer)")
    axis.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="text to train on: parquet, jsonl or txt")
    parser.add_argument("--val", required=True, help="other text, to encode")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS, help="measure only this, here, and print the figure")
    parser.add_argument("--tokenizer", help="used with --arm")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args)))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = f"{folder}/tokenizer.json"
        train_ours(documents(args.train), args.vocab_size, "default").save(args.tokenizer)
        text = page(rows := measure(args), measured("equality", args), args)
    print(text)
    write_into_readme("bench/tokenizer.py", text)
    draw(rows, REPO / "studies" / "tokenizer.png")


if __name__ == "__main__":
    main()
