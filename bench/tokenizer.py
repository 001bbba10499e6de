"""Our tokenizer against rustbpe, gigabpe and tiktoken: speed of training and encoding, memory, threads, start.

    python bench/tokenizer.py --train docs_train.parquet --val docs_val.parquet

Installs the peers from bench/requirements.txt. Each measurement is a process of its own, except that one and two threads
share one; the sides take turns. Writes its table into docs/benchmarks.md and a bar chart into studies/tokenizer.png.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from side_by_side import REPO, install_peers, machine, peak_memory, run, table, take_turns, write_into_docs

sys.path[0] = str(REPO)  # instead of bench/: this file has the name of the module that it measures

from text.sources import SourceConfig, open_source  # noqa: E402

N_SPECIAL = 5  # special tokens of our vocabulary; the peers learn as many merges, without them


# -- measurements: each runs in a process of its own ------------------------------------------------------------------

def documents(path: str) -> Iterator[str]:
    return open_source(SourceConfig(dataset=path)).documents()


def train_ours(texts, vocab_size: int, pattern: str):
    from tokenizer import Tokenizer
    return Tokenizer.train(texts, vocab_size, pattern)


def train_rustbpe(texts, vocab_size: int):
    import rustbpe

    from tokenizer import PATTERNS
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), vocab_size - N_SPECIAL, pattern=PATTERNS["default"])
    return trained


def cpu_seconds(function: Callable) -> float:
    """CPU seconds of all threads of this process while it runs `function()`."""
    start = time.process_time()
    function()
    return time.process_time() - start


def train_seconds_ours(args, pattern: str = "default") -> float:
    texts = list(documents(args.train))
    train_ours(texts[:20], 300, pattern)  # loads the kernels, which start_seconds measures
    return cpu_seconds(lambda: train_ours(texts, args.vocab_size, pattern))


def train_seconds_ours_gpt2(args) -> float:
    return train_seconds_ours(args, "gpt2")


def train_seconds_rustbpe(args) -> float:
    texts = list(documents(args.train))
    return cpu_seconds(lambda: train_rustbpe(texts, args.vocab_size))


def train_seconds_gigabpe(args) -> float:
    import gigabpe
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(documents(args.train)))
        file.flush()
        return cpu_seconds(lambda: gigabpe.train_bpe([file.name], args.vocab_size - N_SPECIAL, threads=1, special_tokens=[]))


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
    return cpu_seconds(lambda: tokenizer.encode_batch(texts, threads=1))


def encode_seconds_tiktoken(args) -> float:
    import tiktoken

    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.val))
    peer = tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.mergeable_ranks(),
                             special_tokens={})
    peer.encode_ordinary("the first call")
    return cpu_seconds(lambda: [peer.encode_ordinary(text) for text in texts])


def threads_seconds(args) -> tuple[float, float]:
    """Wall seconds to encode the training text with two threads and with one, which take turns."""
    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.train))
    seconds = {2: [], 1: []}
    for _ in range(2 * args.rounds + 1):
        for threads, times in seconds.items():
            start = time.perf_counter()
            tokenizer.encode_batch(texts, threads)
            times.append(time.perf_counter() - start)
    return tuple(statistics.median(times[1:]) for times in seconds.values())  # the first round warms up


def check_equal(args) -> tuple[int, int]:
    """Raises AssertionError unless our merges are rustbpe's and our ids tiktoken's. Returns how many of both."""
    import tiktoken

    from tokenizer import Tokenizer
    tokenizer, texts = Tokenizer.load(args.tokenizer), list(documents(args.val))
    trained = train_rustbpe(documents(args.train), args.vocab_size).get_mergeable_ranks()
    ranks = {bytes(token): rank for token, rank in trained}
    assert tokenizer.mergeable_ranks() == ranks
    peer = tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
    ids, offsets = tokenizer.encode_batch(texts)
    for text, start, stop in zip(texts, offsets, offsets[1:]):
        assert ids[start:stop].tolist() == peer.encode_ordinary(text)
    joined = "".join(texts)
    assert tokenizer.encode(joined) == peer.encode_ordinary(joined)
    return len(ranks) - 256, len(ids)


ARMS = {arm.__name__: arm for arm in (
    train_seconds_ours, train_seconds_ours_gpt2, train_seconds_rustbpe, train_seconds_gigabpe, train_memory_ours,
    train_memory_rustbpe, encode_seconds_ours, encode_seconds_tiktoken, threads_seconds, check_equal)}


# -- running and comparing --------------------------------------------------------------------------------------------

def start_seconds(args, compiled: bool) -> float:
    """Wall seconds from the start of a process to its first encoded document. compiled: its kernels are in numba's cache."""
    program = ("import time; from tokenizer import Tokenizer; "
               f"Tokenizer.load({str(args.tokenizer)!r}).encode('a first document'); print(time.time())")
    with tempfile.TemporaryDirectory() as empty:
        environment = dict(os.environ) if compiled else os.environ | {"NUMBA_CACHE_DIR": empty}
        start = time.time()
        done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=environment, check=True, capture_output=True)
        return float(done.stdout) - start


def measure(arm: str, args):
    """The result of an arm in a process of its own, with one thread for the peers written in Rust."""
    flags = [f"--{name}={getattr(args, name)}" for name in ("train", "val", "vocab_size", "tokenizer", "rounds")]
    return run(__file__, arm, flags, RAYON_NUM_THREADS="1")


@dataclass(frozen=True)
class Comparison:
    """what: of what the ratio is. ours, peer: the figures as text."""
    what: str
    ratio: float
    better: str
    ours: str
    peer: str


def compare_all(args) -> list[Comparison]:
    megabytes = {name: sum(len(text.encode()) for text in documents(path)) / 1e6
                 for name, path in (("train", args.train), ("val", args.val))}
    seconds = lambda value: f"{value:.2f} s"
    speed = lambda split: lambda value: f"{megabytes[split] / value:.0f} MB/s"
    training = f"training on {megabytes['train']:.0f} MB"

    def medians(ours: str, peer: str) -> list[float]:
        return take_turns(lambda arm: measure(arm, args), [ours, peer], args.rounds)

    def faster(what: str, ours: float, peer: float, show: Callable) -> Comparison:
        """From times, of which the peer's is divided by ours."""
        return Comparison(what, peer / ours, "higher", show(ours), show(peer))
    ours_mb, peer_mb = medians("train_memory_ours", "train_memory_rustbpe")
    return [
        faster(f"speed, {training}: ours / rustbpe", *medians("train_seconds_ours", "train_seconds_rustbpe"), seconds),
        faster(f"speed, {training}, GPT-2's pattern: ours / gigabpe",
               *medians("train_seconds_ours_gpt2", "train_seconds_gigabpe"), seconds),
        faster(f"speed, encoding {megabytes['val']:.1f} MB of unseen documents, first pass: ours / tiktoken (lists)",
               *medians("encode_seconds_ours", "encode_seconds_tiktoken"), speed("val")),
        faster(f"speed in wall time, encoding {megabytes['train']:.0f} MB: two threads / one",
               *measure("threads_seconds", args), speed("train")),
        Comparison(f"peak memory, {training}: ours / rustbpe", ours_mb / peer_mb, "lower", f"{ours_mb:.0f} MB",
                   f"{peer_mb:.0f} MB")]


def describe(comparisons: list[Comparison], n_equal: tuple[int, int], args) -> str:
    """The table and its caption."""
    cached = statistics.median(start_seconds(args, True) for _ in range(args.rounds))
    compiling = statistics.median(start_seconds(args, False) for _ in range(3))
    rows = [(row.what, f"{row.ratio:.2f}", row.better, row.ours, row.peer) for row in comparisons]
    rows += [("time from process start to the first encoded document, kernels cached", "", "lower", f"{cached:.2f} s", ""),
             ("the same, kernels compiled for the first time", "", "lower", f"{compiling:.1f} s", "")]
    return (f"{table(rows)}\n\nMedians of {args.rounds} runs, CPU seconds of one thread unless stated otherwise, vocabulary "
            f"{args.vocab_size:,}, {machine()}: `python bench/tokenizer.py --train {Path(args.train).name} --val "
            f"{Path(args.val).name}`. In the same run, all {n_equal[0]:,} merges were equal to rustbpe's, and all "
            f"{n_equal[1]:,} ids to tiktoken's, by document and as one text.")


def draw(comparisons: list[Comparison], path: Path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    bars = comparisons[::-1]
    figure, axis = plt.subplots(figsize=(10, 0.6 * len(bars) + 1.2), layout="constrained")
    axis.barh([f"{bar.what}\n({bar.better} is better)" for bar in bars], [bar.ratio for bar in bars], color="#4878a8")
    for i, bar in enumerate(bars):
        axis.text(bar.ratio, i, f"  {bar.ratio:.2f}  ({bar.ours}, {bar.peer})", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlim=(0, 1.35 * max(bar.ratio for bar in bars)), title="Our tokenizer against its peers: ratio (ours, peer)")
    axis.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="text to train on: parquet, jsonl or txt")
    parser.add_argument("--val", required=True, help="other text, to encode")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    for name in ("arm", "tokenizer"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of one measurement, printed as JSON
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args)))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = f"{folder}/tokenizer.json"
        train_ours(documents(args.train), args.vocab_size, "default").save(args.tokenizer)
        comparisons = compare_all(args)
        text = describe(comparisons, measure("check_equal", args), args)
    print(text)
    write_into_docs("bench/tokenizer.py", text)
    draw(comparisons, REPO / "studies" / "tokenizer.png")


if __name__ == "__main__":
    main()
