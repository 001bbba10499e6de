"""Our tokenizer against rustbpe, gigabpe, gigatoken, fastokens and tiktoken: training, encoding, memory, start.

    python bench/tokenizer.py --train docs_train.parquet --val docs_val.parquet --mixed mixed_scripts.parquet

Installs the peers from bench/requirements.txt. Each measurement is a process of its own, except that one and two threads
share one, and the kinds of text; the sides take turns. Writes its table into docs/benchmarks.md and a bar chart into
studies/tokenizer.png.
"""
import argparse
import base64
import json
import os
import random
import statistics
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from side_by_side import REPO, install_peers, machine, measure_in_turns, peak_memory, run, table, write_into_docs

sys.path[0] = str(REPO)  # instead of bench/: this file has the name of the module that it measures

from text.sources import SourceConfig, open_source  # noqa: E402

SAMPLE_BYTES = 3_000_000  # of generated text, and of code
WHITESPACE = " ", "  ", "\t", "\n", "\r\n", " \n", "\u00a0"
N_SPECIAL = 5  # special tokens of our vocabulary; the peers learn as many merges, without them


# -- measurements: each runs in a process of its own ------------------------------------------------------------------

def documents(path: str) -> Iterator[str]:
    return open_source(SourceConfig(dataset=path)).documents()


def texts_of_kinds(args) -> dict[str, list[str]]:
    """kind -> documents, none of which is part of the text that the vocabulary was trained on."""
    rng = random.Random(0)
    kinds = {"English": list(documents(args.val))}
    if args.mixed:
        kinds["mixed scripts"] = list(documents(args.mixed))
    code, n_bytes = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        code.append(path.read_text(encoding="utf-8", errors="replace"))
        n_bytes += len(code[-1])
        if n_bytes > SAMPLE_BYTES:
            break
    words = " ".join(kinds["English"][:100]).split()
    kinds["code"] = code
    spaced_word = lambda: rng.choice(words) + rng.choice(WHITESPACE) * rng.randrange(1, 20)
    kinds["whitespace-heavy"] = ["".join(spaced_word() for _ in range(200)) for _ in range(SAMPLE_BYTES // 3200)]
    kinds["random"] = ["".join(rng.choices(string.printable, k=4000)) for _ in range(SAMPLE_BYTES // 4000)]
    return kinds


def train_ours(texts, vocab_size: int, pattern: str):
    from tokenizer import Tokenizer
    return Tokenizer.train(texts, vocab_size, pattern)


def train_rustbpe(texts, vocab_size: int):
    import rustbpe

    from tokenizer import PATTERNS
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), vocab_size - N_SPECIAL, pattern=PATTERNS["default"])
    return trained


def cpu_seconds(function: Callable, *args) -> float:
    """CPU seconds of all threads of this process while it runs `function(*args)`."""
    start = time.process_time()
    function(*args)
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


def train_seconds_gigatoken(args) -> float:
    import gigatoken
    text = "\n".join(documents(args.train)).encode()
    return cpu_seconds(lambda: gigatoken.train_bpe(text, args.vocab_size - N_SPECIAL, []))


def train_memory_ours(args) -> float:
    train_ours(documents(args.train), args.vocab_size, "default")
    return peak_memory()


def train_memory_rustbpe(args) -> float:
    train_rustbpe(documents(args.train), args.vocab_size)
    return peak_memory()


# An encoder is made anew for each kind of text, so that each is a first pass, and encodes a few words first.

def open_ours(path: str) -> Callable[[list[str]], object]:
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.load(path)
    return lambda texts: tokenizer.encode_batch(texts, threads=1)


def open_tiktoken(path: str) -> Callable[[list[str]], list[list[int]]]:
    import tiktoken

    from tokenizer import Tokenizer
    ours = Tokenizer.load(path)
    peer = tiktoken.Encoding("ours", pat_str=ours.pattern, mergeable_ranks=ours.mergeable_ranks(), special_tokens={})
    return lambda texts: [peer.encode_ordinary(text) for text in texts]


def write_ranks(path: str, file) -> str:
    """Writes a tokenizer.json in the format of tiktoken. Returns the name of the open file."""
    from tokenizer import Tokenizer
    ranks = sorted(Tokenizer.load(path).mergeable_ranks().items(), key=lambda item: item[1])
    file.write("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
    file.flush()
    return file.name


def open_gigatoken(path: str) -> Callable[[list[str]], object]:
    """Returns awkward arrays. It has GPT-2's pattern, not the one that is our default."""
    from gigatoken.gigatoken_rs import BPETokenizer
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as file:
        peer = BPETokenizer.from_tiktoken(write_ranks(path, file), "gpt2")
    return lambda texts: peer.encode_batch(texts, parallel=False)


def open_fastokens(path: str) -> Callable[[list[str]], list[list[int]]]:
    from fastokens._native import Tokenizer as Peer

    from tokenizer import PATTERNS
    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as file:
        peer = Peer.from_tiktoken(write_ranks(path, file), pattern=PATTERNS["gpt2"], special_tokens={})
    return lambda texts: [peer.encode(text).ids for text in texts]


def encode_seconds(open_encoder: Callable, path: str, kinds: dict[str, list[str]]) -> dict[str, float]:
    """kind of text -> CPU seconds."""
    seconds = {}
    for kind, texts in kinds.items():
        encode = open_encoder(path)
        encode(["the first call"])
        seconds[kind] = cpu_seconds(encode, texts)
    return seconds


def encode_seconds_ours_default(args) -> float:
    return encode_seconds(open_ours, args.tokenizer, {"English": list(documents(args.val))})["English"]


def encode_seconds_tiktoken_default(args) -> float:
    return encode_seconds(open_tiktoken, args.tokenizer, {"English": list(documents(args.val))})["English"]


def encode_seconds_ours(args) -> dict[str, float]:
    return encode_seconds(open_ours, args.tokenizer_gpt2, texts_of_kinds(args))


def encode_seconds_tiktoken(args) -> dict[str, float]:
    return encode_seconds(open_tiktoken, args.tokenizer_gpt2, texts_of_kinds(args))


def encode_seconds_gigatoken(args) -> dict[str, float]:
    return encode_seconds(open_gigatoken, args.tokenizer_gpt2, texts_of_kinds(args))


def encode_seconds_fastokens(args) -> dict[str, float]:
    return encode_seconds(open_fastokens, args.tokenizer_gpt2, texts_of_kinds(args))


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
    """Raises AssertionError unless our merges are rustbpe's and our ids tiktoken's, for two patterns and all kinds of
    text, and with GPT-2's pattern also gigatoken's. Returns how many of both."""
    from tokenizer import Tokenizer
    tokenizer, n_ids = Tokenizer.load(args.tokenizer), 0
    trained = train_rustbpe(documents(args.train), args.vocab_size).get_mergeable_ranks()
    assert tokenizer.mergeable_ranks() == {bytes(token): rank for token, rank in trained}
    for path, peers in ((args.tokenizer, [open_tiktoken]), (args.tokenizer_gpt2, [open_tiktoken, open_gigatoken])):
        encoders = [open_encoder(path) for open_encoder in peers]
        for kind, texts in texts_of_kinds(args).items():
            texts = [*texts, "".join(texts)]
            ids, offsets = Tokenizer.load(path).encode_batch(texts)
            ours = [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])]
            for encode in encoders:
                encoded = encode(texts)
                assert ours == (encoded if isinstance(encoded, list) else encoded.tolist()), f"{kind}: other ids"
            n_ids += len(ids)
    return len(trained) - 256, n_ids


ARMS = {arm.__name__: arm for arm in (
    train_seconds_ours, train_seconds_ours_gpt2, train_seconds_rustbpe, train_seconds_gigabpe, train_seconds_gigatoken,
    train_memory_ours, train_memory_rustbpe, encode_seconds_ours_default, encode_seconds_tiktoken_default,
    encode_seconds_ours, encode_seconds_tiktoken, encode_seconds_gigatoken, encode_seconds_fastokens, threads_seconds,
    check_equal)}


# -- running and comparing --------------------------------------------------------------------------------------------

def start_seconds(args, compiled: bool) -> float:
    """Wall seconds from the start of a process to its first encoded document. compiled: its kernels are in numba's cache."""
    program = ("import time; from tokenizer import Tokenizer; "
               f"Tokenizer.load({str(args.tokenizer)!r}).encode('the words of a first document ' * 30); print(time.time())")
    with tempfile.TemporaryDirectory() as empty:
        environment = dict(os.environ) if compiled else os.environ | {"NUMBA_CACHE_DIR": empty}
        start = time.time()
        done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=environment, check=True, capture_output=True)
        return float(done.stdout) - start


def measure(arm: str, args):
    """The result of an arm in a process of its own, with one thread for the peers written in Rust."""
    names = "train", "val", "mixed", "vocab_size", "tokenizer", "tokenizer_gpt2", "rounds"
    flags = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name)]
    return run(__file__, arm, flags, RAYON_NUM_THREADS="1")


@dataclass(frozen=True)
class Comparison:
    """what: of what the ratio is. ratios: one of every round. ours, peer: the medians of the figures, as text."""
    what: str
    ratios: list[float]
    better: str
    ours: str
    peer: str

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def describe(self) -> str:
        """The ratio, and between which its middle half lies."""
        if len(self.ratios) < 2:
            return f"{self.ratio:.2f}"
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return f"{self.ratio:.2f} ({low:.2f}–{high:.2f})"


def compare(what: str, ours: list[float], peer: list[float], show: Callable[[float], str]) -> Comparison:
    """From times, of which the peer's are divided by ours, round by round."""
    return Comparison(what, [b / a for a, b in zip(ours, peer)], "higher", show(statistics.median(ours)),
                      show(statistics.median(peer)))


def compare_all(args) -> list[Comparison]:
    sizes = {kind: sum(len(text.encode()) for text in texts) / 1e6 for kind, texts in texts_of_kinds(args).items()}
    train_size = sum(len(text.encode()) for text in documents(args.train)) / 1e6
    seconds = lambda value: f"{value:.2f} s"
    speed = lambda size: lambda value: f"{size / value:.0f} MB/s"
    training = f"training on {train_size:.0f} MB"

    def in_turns(*arms: str) -> list[list]:
        return list(measure_in_turns(lambda arm: measure(arm, args), list(arms), args.rounds).values())
    ours, rustbpe = in_turns("train_seconds_ours", "train_seconds_rustbpe")
    comparisons = [compare(f"speed, {training}: ours / rustbpe", ours, rustbpe, seconds)]
    ours, gigatoken, gigabpe = in_turns("train_seconds_ours_gpt2", "train_seconds_gigatoken", "train_seconds_gigabpe")
    comparisons += [compare(f"speed, {training}, GPT-2's pattern: ours / {name}", ours, peer, seconds)
                    for name, peer in (("gigatoken", gigatoken), ("gigabpe", gigabpe))]
    ours, tiktoken = in_turns("encode_seconds_ours_default", "encode_seconds_tiktoken_default")
    comparisons.append(compare(f"speed, encoding {sizes['English']:.1f} MB of English, our default pattern: ours / tiktoken",
                               ours, tiktoken, speed(sizes["English"])))
    names = "gigatoken", "fastokens", "tiktoken"
    ours, *peers = in_turns("encode_seconds_ours", *(f"encode_seconds_{name}" for name in names))
    comparisons += [compare(f"speed, encoding {size:.1f} MB, {kind}: ours / {name}", [row[kind] for row in ours],
                            [row[kind] for row in peer], speed(size))
                    for kind, size in sizes.items() for name, peer in zip(names, peers)]
    two, one = measure("threads_seconds", args)
    comparisons.append(compare(f"speed in wall time, encoding {train_size:.0f} MB: two threads / one", [two], [one],
                               speed(train_size)))
    ours, peer = in_turns("train_memory_ours", "train_memory_rustbpe")
    comparisons.append(Comparison(f"peak memory, {training}: ours / rustbpe", [a / b for a, b in zip(ours, peer)], "lower",
                                  f"{statistics.median(ours):.0f} MB", f"{statistics.median(peer):.0f} MB"))
    return comparisons


def describe(comparisons: list[Comparison], n_equal: tuple[int, int], args) -> str:
    """The table and its caption."""
    cached = statistics.median(start_seconds(args, True) for _ in range(args.rounds))
    compiling = statistics.median(start_seconds(args, False) for _ in range(3))
    rows = [(row.what, row.describe(), row.better, row.ours, row.peer) for row in comparisons]
    rows += [("time from process start to the first encoded document, kernels cached", "", "lower", f"{cached:.2f} s", ""),
             ("the same, kernels compiled for the first time", "", "lower", f"{compiling:.1f} s", "")]
    command = " ".join(["python bench/tokenizer.py", *(f"--{name} {Path(getattr(args, name)).name}" for name in
                                                       ("train", "val", "mixed") if getattr(args, name))])
    return (f"{table(rows)}\n\nMedians of {args.rounds} rounds in which the sides took turns; in brackets the quartiles "
            f"of the rounds' ratios. CPU seconds of one thread unless stated otherwise; vocabulary {args.vocab_size:,}. "
            f"Encoding is of unseen documents, first pass, with GPT-2's pattern unless stated otherwise; tiktoken and "
            f"fastokens return lists. {machine()}: `{command}`. "
            f"In the same run, all {n_equal[0]:,} merges were equal to rustbpe's, and all "
            f"{n_equal[1]:,} ids, by document and as one text, to tiktoken's and with GPT-2's pattern to gigatoken's.")


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
    parser.add_argument("--mixed", help="text in many scripts, to encode")
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=9, help="processes of each side")
    for name in ("arm", "tokenizer", "tokenizer_gpt2"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of one measurement, printed as JSON
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args)))
        return
    install_peers()
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer, args.tokenizer_gpt2 = f"{folder}/tokenizer.json", f"{folder}/gpt2.json"
        train_ours(documents(args.train), args.vocab_size, "default").save(args.tokenizer)
        train_ours(documents(args.train), args.vocab_size, "gpt2").save(args.tokenizer_gpt2)
        comparisons = compare_all(args)
        text = describe(comparisons, measure("check_equal", args), args)
    print(text)
    write_into_docs("bench/tokenizer.py", text)
    draw(comparisons, REPO / "studies" / "tokenizer.png")


if __name__ == "__main__":
    main()
