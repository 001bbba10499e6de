"""Byte-level BPE from scratch: learn a vocabulary, turn text into ids and back.

Owns the split patterns, the special tokens and the `tokenizer.json` format.

    python tokenizer.py --vocab_size=32768 --dataset=builtin        trains one and writes tokenizer.json

A text is split into words by a regular expression, each word is UTF-8 bytes, and inside a word the adjacent pair of
tokens with the lowest rank is merged until none is left. Training makes the ranks: it merges the most frequent pair of
the whole text, again and again. Source: Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2 (Radford 2019).
"""
import hashlib
import heapq
import itertools
import json
import operator
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

from runtime.files import require_writable, whole_file
from runtime.flags import BadInput, check_flags, command, flag, parse_flags
from runtime.sources import SourceConfig, open_source, take_text

FORMAT = "gpt-workbench tokenizer 1"
SEPARATOR = "<|endoftext|>"  # leads every document
# Reserved from day one, so that finetuning on conversations never resizes an embedding.
SPECIAL_TOKENS = (SEPARATOR, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PATTERNS = {
    # GPT-4's with at most two digits a word: at 32k ids, nanochat measured 0.965 bits per byte against 0.972 with three
    "default": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
               r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
}
TRAINING_BYTES = 100_000_000  # of text are plenty for 32k merges; --tokenizer_bytes changes it
MAX_VOCAB_SIZE = 10_000_000
CACHED_WORDS = 1 << 19        # a word's ids are kept until so many are; then the cache starts again


class Tokenizer:
    """A byte-level BPE vocabulary.

    ranks: token bytes -> id, all 256 single bytes among them; a lower id merges first.
    pattern: a name in PATTERNS or any regular expression; text between its matches is a word too, so nothing is lost.
    special_tokens: name -> id. They never come out of `encode`, whatever the text holds.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]):
        self.ranks, self.special_tokens = dict(ranks), dict(special_tokens)
        self.pattern = PATTERNS.get(pattern, pattern)
        self.split_regex = compile_pattern(self.pattern)
        by_id = {token_id: token for token, token_id in self.ranks.items()}
        by_id |= {token_id: name.encode() for name, token_id in self.special_tokens.items()}
        if len(by_id) < len(self.ranks) + len(self.special_tokens):
            raise BadInput("two tokens share an id: give every rank and special token its own")
        if min(by_id, default=0) < 0 or max(by_id, default=0) >= MAX_VOCAB_SIZE:
            raise BadInput(f"token ids must lie between 0 and {MAX_VOCAB_SIZE - 1:,}")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise BadInput(f"no token for byte {missing[0]} alone: a byte-level vocabulary has all 256")
        # the bytes of each id, special tokens by name; ids that an adopted vocabulary leaves out are empty
        self.tokens = [by_id.get(token_id, b"") for token_id in range(max(by_id) + 1)]
        self.word_ids: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def separator_id(self) -> int:
        """The id that leads every document. Raises BadInput if this vocabulary has none."""
        if SEPARATOR not in self.special_tokens:
            raise BadInput(f"the tokenizer has no {SEPARATOR} token to separate documents with")
        return self.special_tokens[SEPARATOR]

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = "default",
              special_tokens: Sequence[str] = SPECIAL_TOKENS, progress: bool = False) -> "Tokenizer":
        """Learns `vocab_size` tokens: 256 bytes, then merges, then the special tokens with the highest ids.

        The most frequent pair merges first; among equals the one with the smallest left id, then right id.
        Raises BadInput when the text holds too few different pairs for that many merges.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts is one text: give a list of texts")  # its characters would be taken for texts
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise BadInput(f"--vocab_size={vocab_size}: must be at least {vocab_size - n_merges} "
                           f"(256 bytes and {len(special_tokens)} special tokens)")
        words = count_words(texts, compile_pattern(PATTERNS.get(pattern, pattern)), progress)
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in learn_merges(words, n_merges, progress):
            tokens.append(tokens[left] + tokens[right])
        if len(tokens) < 256 + n_merges:
            raise BadInput(f"--vocab_size={vocab_size}: the text has merges for only {len(tokens) + len(special_tokens)} "
                           f"tokens: give more text or a smaller --vocab_size")
        return cls.from_ranks({token: rank for rank, token in enumerate(tokens)}, pattern, special_tokens)

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int], pattern: str,
                   special_tokens: Sequence[str] | Mapping[str, int] = SPECIAL_TOKENS) -> "Tokenizer":
        """Takes over an existing byte-level vocabulary, as `tiktoken.Encoding._mergeable_ranks` holds it.

        special_tokens: names, which get the ids after the highest rank, or a mapping name -> id.
        """
        if not isinstance(special_tokens, Mapping):
            if len(set(special_tokens)) < len(special_tokens):
                raise BadInput(f"a special token stands twice in {', '.join(special_tokens)}")
            first = max(ranks.values(), default=-1) + 1
            special_tokens = {name: first + i for i, name in enumerate(special_tokens)}
        return cls(ranks, pattern, special_tokens)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises BadInput naming the file when it is missing or something else."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{path}: no tokenizer to read ({error.strerror}): "
                           f"make one with `python tokenizer.py --tokenizer_path={path}`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: not a tokenizer of ours ({error}): "
                           f"make one with `python tokenizer.py`") from None

    def save(self, path: str | Path):
        """Writes `tokenizer.json`, whole or not at all."""
        with whole_file(Path(path), "w") as file:
            file.write(self.to_json())

    def to_json(self) -> str:
        """One JSON object; in `tokens`, place is id and each character one byte (Latin-1); null where an id is unused."""
        in_order = {token_id: token.decode("latin-1") for token, token_id in self.ranks.items()}
        tokens = [in_order.get(token_id) for token_id in range(max(in_order) + 1)]
        return json.dumps({"format": FORMAT, "pattern": self.pattern, "special_tokens": self.special_tokens,
                           "tokens": tokens}, indent=0)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError on anything else."""
        try:
            blob = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if blob.get("format") != FORMAT:
            raise ValueError(f"its format is {blob.get('format')!r}, expected {FORMAT!r}")
        in_order = {token_id: token for token_id, token in enumerate(blob["tokens"]) if token is not None}
        ranks = {token.encode("latin-1"): token_id for token_id, token in in_order.items()}
        if len(ranks) < len(in_order) or b"" in ranks:
            raise ValueError("a token is empty or stands twice")
        if not all(type(token_id) is int for token_id in blob["special_tokens"].values()):
            raise ValueError("an id is not a whole number")
        return cls(ranks, blob["pattern"], blob["special_tokens"])

    def fingerprint(self) -> str:
        """16 hex digits that change with any token, id, special token or the pattern."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    # -- using it -------------------------------------------------------------------------------------------------

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`; special tokens written in it are ordinary text. See `as_text` for what is not valid Unicode."""
        ids: list[int] = []
        for word in split(self.split_regex, as_text(text)):
            word_ids = self.word_ids.get(word)
            if word_ids is None:
                word_ids = self.merge(word.encode())
                if len(self.word_ids) >= CACHED_WORDS:
                    self.word_ids.clear()
                self.word_ids[word] = word_ids
            ids += word_ids
        return ids

    def encode_batch(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all `texts` end to end, (n,) uint16 or uint32, and offsets, (texts + 1,) int64.

        Text i owns ids[offsets[i]:offsets[i + 1]]; nothing merges across texts and no separator is added.
        """
        encoded = [np.array(self.encode(text), dtype=self.dtype) for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        return np.concatenate(encoded) if encoded else np.zeros(0, self.dtype), offsets

    @property
    def dtype(self) -> np.dtype:
        """uint16 halves the shards and holds ids up to 65,535."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def merge(self, word: bytes) -> list[int]:
        """Ids of one word: the adjacent pair of lowest rank, the leftmost of equals, merges until none is left.

        A heap keeps this O(n log n), so that a "word" of 300,000 letters takes seconds and not days.
        """
        if word in self.ranks:
            return [self.ranks[word]]
        # Part i is word[i:stop[i]]; stop is 0 where no part starts any more, and before[j] is the part that ends at j.
        stop = list(range(1, len(word) + 1)) + [0]
        before = list(range(-1, len(word)))
        heap = []

        def offer(left: int):
            """Queues the merge of the part at `left` with the one after it, if the vocabulary has their sum."""
            end = stop[stop[left]]
            if end and (rank := self.ranks.get(word[left:end])) is not None:
                heapq.heappush(heap, (rank, left, end))

        for left in range(len(word)):
            offer(left)
        while heap:
            _, left, end = heapq.heappop(heap)
            right = stop[left]
            if right == 0 or right == end or stop[right] != end:
                continue  # one of the two was merged away since
            stop[left], stop[right], before[end] = end, 0, left
            offer(left)
            if before[left] >= 0:
                offer(before[left])
        ids, at = [], 0
        while at < len(word):
            ids.append(self.ranks[word[at:stop[at]]])
            at = stop[at]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, special tokens by name. Raises ValueError on an id outside the vocabulary."""
        tokens = self.tokens
        try:
            ids = [operator.index(i) for i in ids]
            if ids and min(ids) < 0:
                raise IndexError
            return b"".join([tokens[i] for i in ids])
        except IndexError:
            bad = next(i for i in ids if not 0 <= i < len(tokens))
            raise ValueError(f"id {bad} is not in the vocabulary of {len(tokens)}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text per id, 0 for special tokens. What bits per byte divides by."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def mergeable_ranks(self) -> dict[bytes, int]:
        """token bytes -> id without the special tokens: what tiktoken.Encoding takes."""
        return dict(self.ranks)


def compile_pattern(pattern: str) -> regex.Pattern:
    """Raises BadInput for what is not a regular expression that can split text."""
    given = f"--pattern={pattern[:100]}: neither one of {', '.join(PATTERNS)} nor a regular expression to split text with"
    if regex.fullmatch(r"[\w-]*", pattern):
        raise BadInput(given)  # a misspelt name would be a pattern that hardly ever matches
    try:
        compiled = regex.compile(pattern)
    except (regex.error, ValueError, RecursionError) as error:
        raise BadInput(f"{given} ({error})") from None
    if compiled.flags & regex.REVERSE:
        raise BadInput(f"{given}: it matches from the end")
    return compiled


def as_text(text: str | bytes) -> str:
    """`text` as Unicode that UTF-8 can hold: halves of surrogate pairs are joined; a lone half and bytes that are not
    UTF-8 become U+FFFD (as tiktoken does)."""
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")


def split(pattern: regex.Pattern, text: str) -> list[str]:
    """Words of `text`; joined they are the text, also where `pattern` matches nothing."""
    if not pattern.groups:  # with groups, findall would return those instead of the match
        words = pattern.findall(text)
        if sum(map(len, words)) == len(text):
            return words
    words, at = [], 0
    for match in pattern.finditer(text):
        if match.group():
            words += [text[at:match.start()], match.group()]
            at = match.end()
    words.append(text[at:])
    return [word for word in words if word]


def count_words(texts: Iterable[str | bytes], pattern: regex.Pattern, progress: bool) -> Counter:
    """How often each word occurs in `texts`."""
    words: Counter = Counter()
    with tqdm(desc="counting words", unit="B", unit_scale=True, disable=not progress) as bar:
        for text in texts:
            text = as_text(text)
            words.update(split(pattern, text))
            bar.update(len(text))
    return words


def learn_merges(words: Mapping[str, int], n_merges: int, progress: bool = False) -> Iterator[tuple[int, int]]:
    """Yields up to `n_merges` pairs of ids, the i-th of which becomes id 256 + i; fewer when no pair is left.

    words: word -> how often it occurs. Only words that hold the merged pair are looked at, and only pairs beside a
    merge change their count.
    """
    spelled, counts = [list(word.encode()) for word in words], list(words.values())
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    holders: dict[tuple[int, int], list[int]] = defaultdict(list)  # words that had the pair; some no longer do
    for w, ids in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            pair_counts[pair] += counts[w]
            holders[pair].append(w)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # equal counts: smallest pair of ids first
    heapq.heapify(heap)
    for new_id in tqdm(range(256, 256 + n_merges), desc="merging", unit="merge", disable=not progress):
        pair = pop_most_frequent(heap, pair_counts)
        if pair is None:
            return
        yield pair
        changes: dict[tuple[int, int], int] = defaultdict(int)
        for w in dict.fromkeys(holders.pop(pair)):
            spelled[w], changed = merge_pair(spelled[w], pair, new_id)
            for other, sign in changed:
                changes[other] += sign * counts[w]
                if sign > 0:
                    holders[other].append(w)
        for other, change in changes.items():
            pair_counts[other] += change
            if change > 0:  # only pairs with the new id can grow; the others are found stale when they reach the top
                heapq.heappush(heap, (-pair_counts[other], other))
        del pair_counts[pair]


def pop_most_frequent(heap: list, pair_counts: Mapping[tuple[int, int], int]) -> tuple[int, int] | None:
    """The pair with the highest count now. Counts in the heap may be too high, as they only ever fall."""
    while heap:
        count, pair = heapq.heappop(heap)
        current = pair_counts.get(pair, 0)
        if current == -count:
            return pair
        if current > 0:
            heapq.heappush(heap, (-current, pair))
    return None


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> tuple[list[int], list[tuple[tuple, int]]]:
    """Replaces `pair` by `new_id` from left to right. [1, 2, 3], (1, 2), 9 -> [9, 3], [((2, 3), -1), ((9, 3), 1)].

    Returns the new ids and the neighbouring pairs that went (-1) and came (+1).
    """
    left, right = pair
    merged: list[int] = []
    changed = []
    i, last = 0, len(ids) - 1
    while i <= last:
        if i < last and ids[i] == left and ids[i + 1] == right:
            if merged:
                changed += [((merged[-1], left), -1), ((merged[-1], new_id), 1)]
            if i + 1 < last:
                changed += [((right, ids[i + 2]), -1), ((new_id, ids[i + 2]), 1)]
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged, changed


@dataclass(frozen=True)
class TokenizerConfig:
    """The vocabulary."""
    tokenizer_path: Path = flag(Path("tokenizer.json"), "file to write")
    vocab_size: int = flag(32_768, "tokens in all: 256 bytes, merges and special tokens", at_least=256,
                           at_most=MAX_VOCAB_SIZE)
    pattern: str = flag("default", f"how text is split into words: {', '.join(PATTERNS)}, or any regular expression")
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text, from the head of the stream, to learn from", at_least=1)
    overwrite: bool = flag(False, "replace an existing file")
    __post_init__ = check_flags


@command
def main(argv=None):
    """Trains a byte-level BPE tokenizer on a sample of text and writes tokenizer.json."""
    config, source_config = parse_flags(main.__doc__, argv, TokenizerConfig, SourceConfig)
    require_writable(config.tokenizer_path, f"--tokenizer_path={config.tokenizer_path}")
    if config.tokenizer_path.exists() and not config.overwrite:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: exists: choose another path or add --overwrite")
    start = time.perf_counter()
    documents = open_source(source_config).documents()
    sample = list(take_text(documents, min(config.tokenizer_bytes, 1_000_000)))
    n_bytes = sum(len(as_text(text).encode()) for text in sample)
    texts = itertools.chain(sample, take_text(documents, config.tokenizer_bytes - n_bytes))
    tokenizer = Tokenizer.train(texts, config.vocab_size, config.pattern, progress=True)
    tokenizer.save(config.tokenizer_path)
    n_tokens = len(tokenizer.encode_batch(sample)[0])
    print(f"{config.tokenizer_path}: {tokenizer.vocab_size:,} tokens (256 bytes, {len(tokenizer.ranks) - 256:,} merges, "
          f"{len(tokenizer.special_tokens)} special), {n_bytes / n_tokens:.2f} bytes per token on the first "
          f"{n_bytes / 1e6:.1f} MB of its text, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
