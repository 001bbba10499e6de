"""Each compiled loop against a slow, obvious twin."""
import heapq
import random
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from conftest import REPO
from kernels import bpe
from text.documents import PackedDocuments
from tokenizer import (
    MAX_VOCAB_SIZE,
    PATTERNS,
    Tokenizer,
    character_classes,
    count_words,
    find_splitter,
    learn_merges,
    split_words,
)

# what the patterns tell apart, often enough to meet; and any character
TEXT = st.text(st.sampled_from("aA'lLvVeErRsSdmtT 1٢½\n\r\t\u00a0\u2028.!-\u0301éſ中🙂\0\x1c\x85")
               | st.characters(exclude_categories=["Cs", "Cn"]), max_size=50)


# runs of one character that cross the windows of the scanner
RUNS = st.lists(st.tuples(st.sampled_from("aé中 \n\r\t'1.sſ\u00a0٢🙂\0"), st.integers(1, 70)), max_size=12).map(
    lambda runs: "".join(character * n for character, n in runs))


# -- sets of bits -----------------------------------------------------------------------------------------------------

@njit
def sets_of_bits(text, at):
    letters = bpe.bytes_between(text, at, 0x61, 0x7A)
    return (letters, bpe.bytes_between(text, at, 0, 0), bpe.bytes_between(text, at, 0x80, 0xFF), bpe.lowest_bit(letters),
            bpe.highest_bit(letters))


@settings(deadline=None)
@given(st.binary(min_size=bpe.WINDOW, max_size=90) | st.text("az`{", min_size=90).map(str.encode))
def test_sets_of_bits_equal_a_loop(data):
    text, at = np.frombuffer(data, np.uint8), len(data) - bpe.WINDOW
    window = data[at:]
    of = lambda is_member: sum(1 << i for i, byte in enumerate(window) if is_member(byte))
    letters = of(lambda byte: 0x61 <= byte <= 0x7A)
    assert sets_of_bits(text, at) == (
        letters, of(lambda byte: byte == 0), of(lambda byte: byte >= 0x80),
        (letters & -letters).bit_length() - 1 if letters else 64, letters.bit_length() - 1)


# -- scanning ---------------------------------------------------------------------------------------------------------

def scan_all(text: str, pattern: str, block: int = 400) -> list[str]:
    """Words of `text` as the compiled scanner finds them, `block` at a time; another document follows, which continues words
    of any kind."""
    packed = PackedDocuments.from_strings([text, "s a1.\n"])
    buffer, offsets = bpe.pad_text([packed.utf8]), packed.offsets
    words, at = [], 0
    while at < offsets[1]:
        ends = np.full(bpe.WINDOW + block + 1, -1)
        ends[0] = at
        n = bpe.scan(buffer, offsets[1], find_splitter(PATTERNS[pattern]), ends)
        assert 0 < n < block + bpe.WINDOW
        words += [buffer[start:stop].tobytes().decode() for start, stop in zip(ends[:n], ends[1:n + 1])]
        at = ends[n]
    return words


@settings(deadline=None, max_examples=400)
@given(TEXT | RUNS | st.tuples(RUNS, TEXT, RUNS).map("".join), st.integers(1, 5))
def test_scanner_equals_regex(text, block):
    for pattern, expression in PATTERNS.items():
        assert scan_all(text, pattern, block) == regex.findall(expression, text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_scanner_equals_regex_on_real_text(pattern, english):
    text = "".join(english[:60])
    assert scan_all(text, pattern) == regex.findall(PATTERNS[pattern], text)


def test_scanner_by_hand():
    text = "I'll SHE'LL 'Cause don't!! (a) 12345 x  y\t\tz \n\n  end \n"
    assert scan_all(text, "default") == [
        "I", "'ll", " SHE", "'LL", " '", "Cause", " don", "'t", "!!", " (", "a", ")", " ", "12", "34", "5", " x", " ", " y",
        "\t", "\tz", " \n\n", " ", " end", " \n"]
    assert scan_all(text, "gpt2") == [
        "I", "'ll", " SHE", "'", "LL", " '", "Cause", " don", "'t", "!!", " (", "a", ")", " 12345", " x", " ", " y",
        "\t", "\t", "z", " \n\n ", " end", " \n"]


def test_words_end_with_their_document():
    """Even if the next document in the buffer would continue the word."""
    texts = PackedDocuments.from_strings(["ab", "cd", "'", "s", " ", " ", "中", "文", "", "1", "2"])
    splitter = find_splitter(PATTERNS["default"])
    words = bpe.add_documents(bpe.empty_words(), bpe.pad_text([texts.utf8]), texts.offsets, splitter)
    assert as_counter(words) == Counter(["ab", "cd", "'", "s", " ", " ", "中", "文", "1", "2"])


def test_character_classes_equal_regex():
    """For all characters that Python knows; `regex` may know newer ones, which are compared with tiktoken's."""
    classes = character_classes()
    characters = "".join(chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn"))
    classes = np.where([unicodedata.category(chr(code)) == "Cn" for code in range(0x110000)], bpe.OTHER, classes)
    for pattern, kinds in ((r"\p{L}", {bpe.LETTER}), (r"\p{N}", {bpe.NUMBER}), (r"\s", {bpe.BLANK, bpe.SPACE, bpe.NEWLINE}),
                           (r"[\r\n]", {bpe.NEWLINE}), (" ", {bpe.BLANK}), ("'", {bpe.APOSTROPHE})):
        expected = [ord(char) for char in regex.findall(pattern, characters)]
        assert np.flatnonzero(np.isin(classes, list(kinds))).tolist() == expected


# -- counting ---------------------------------------------------------------------------------------------------------

def as_counter(words: bpe.Words) -> Counter:
    """{word: count}, read from the table."""
    found = Counter()
    for low, high, count in words.slots.tolist():
        if high >= int(bpe.LONG):
            start, stop = words.long_ends[high - int(bpe.LONG):][:2]
            found[words.long_bytes[start:stop].tobytes().decode()] += count
        elif high:
            found[(low.to_bytes(8, "little") + high.to_bytes(8, "little"))[:high >> 56].decode()] += count
    return found


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[^ ]+| ", r"(?s).*", r"\s*\S*"])
def test_counts_equal_a_counter(pattern, english):
    rng = random.Random(2)
    # words of every length around those that a key holds, NUL bytes in them, and many words, so that the tables grow
    words = ["\0" * n for n in range(40)] + ["a" * n + "\0" * (20 - n) for n in range(20)]
    words += ["".join(rng.choices("abc\0", k=rng.randrange(1, 40))) for _ in range(9000)]
    texts = [*english[:10], " ".join(words), " ".join(rng.choices(words, k=9000)), "", "x" * 100_000, "x" * 100_000]
    expected = Counter(word for text in texts for word in split_words(regex.compile(PATTERNS.get(pattern, pattern)), text))
    assert as_counter(count_words(texts, PATTERNS.get(pattern, pattern), progress=False)) == expected


# -- learning ---------------------------------------------------------------------------------------------------------

def merges_by_recounting(words: dict[str, int], n_merges: int) -> list[list[int]]:
    """The definition: count all pairs, merge the most frequent one, repeat."""
    spelled, merges = [(list(word.encode()), count) for word, count in words.items()], []
    for new_id in range(256, 256 + n_merges):
        pairs = Counter()
        for ids, count in spelled:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        spelled = [(replace(ids, merges[-1], new_id), count) for ids, count in spelled]
    return [list(pair) for pair in merges]


def replace(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """[1, 1, 1, 2], (1, 1), 9 -> [9, 1, 2]."""
    replaced = []
    while ids:
        if tuple(ids[:2]) == pair:
            replaced.append(new_id)
            ids = ids[2:]
        else:
            replaced.append(ids[0])
            ids = ids[1:]
    return replaced


@settings(deadline=None)
@given(st.dictionaries(st.text("abcd", min_size=1, max_size=25), st.integers(1, 5), min_size=1, max_size=8), st.booleans())
def test_incremental_merges_equal_recounting(words, one_at_a_time):
    counted = count_words([word for word, count in words.items() for _ in range(count)], "[a-d]+", progress=False)
    expected = merges_by_recounting(words, 30)
    learnt = bpe.learn(counted, 30, per_call=1 if one_at_a_time else 256)
    assert [pair for merges in learnt for pair in merges.tolist()] == expected


def test_pair_tables_grow(english, monkeypatch):
    def learn():
        return list(learn_merges(count_words(english[:40], PATTERNS["gpt2"], progress=False), 700))
    expected = learn()
    grown = []
    monkeypatch.setattr(bpe, "grow_pairs", lambda pairs, grow=bpe.grow_pairs: grown.append(1) or grow(pairs))
    monkeypatch.setattr(bpe, "PAIR_SLOTS", 1 << 12)  # room for the pairs of bytes, and few more
    assert learn() == expected and len(grown) > 1


def test_64_bit_positions_give_the_same_merges(english, monkeypatch):
    def learn():
        return list(learn_merges(count_words(english[:5], PATTERNS["gpt2"], progress=False), 100))
    expected = learn()
    dtypes = []
    monkeypatch.setattr(bpe, "find_byte_pairs", lambda corpus, pairs, find=bpe.find_byte_pairs: (
        dtypes.append(pairs.positions.dtype), find(corpus, pairs)))
    monkeypatch.setattr(bpe, "MANY_PARTS", 0)
    assert learn() == expected and dtypes == [np.int64]


# -- merging ----------------------------------------------------------------------------------------------------------

def merge_slowly(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: merge the pair of lowest rank, the leftmost of equals, until there is none."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while True:
        best = min(((ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks), default=None)
        if best is None:
            return [ranks[part] for part in parts]
        parts[best[1]:best[1] + 2] = [b"".join(parts[best[1]:best[1] + 2])]


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=20), unique=True, max_size=30),
       st.lists(st.text("abc", min_size=1, max_size=200), max_size=5), st.randoms(use_true_random=False))
def test_merging_equals_the_definition(tokens, words, rng):
    """With tokens that no training would produce: some cannot be reached by merges, some in several ways."""
    tokens = [bytes([byte]) for byte in range(256)] + [token.encode() for token in tokens]
    rng.shuffle(tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    tokenizer = Tokenizer(ranks, r"[^ ]+| +", {})
    text = " ".join(words + words)  # again, from the cache
    assert tokenizer.encode(text) == [
        token_id for word in regex.findall(r"[^ ]+| +", text) for token_id in merge_slowly(word.encode(), ranks)]


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[^ ]+| +"])
def test_words_of_every_length_equal_the_definition(pattern, english):
    """Those of a block are merged together, in arrays of a width that depends on the length."""
    rng = random.Random(3)
    tokenizer = Tokenizer.train(english[:30], 700, pattern)
    lengths = *range(1, 70), 254, 255, 256, 511, 512, 513, 600
    words = ["".join(rng.choices("etaoin", k=n)) for n in lengths for _ in range(3)]
    rng.shuffle(words)
    expected = [i for word in [words[0], *(f" {word}" for word in words[1:])] for part in split_words(
        regex.compile(tokenizer.pattern), word) for i in merge_slowly(part.encode(), tokenizer.ranks)]
    assert tokenizer.encode(" ".join(words)) == expected
    assert tokenizer.encode(" ".join(words)) == expected  # from the cache


def test_words_that_do_not_fit_into_the_block_are_merged_alone(english, monkeypatch):
    tokenizer = Tokenizer.train(english[:30], 400)
    text = " ".join("".join(random.Random(n).choices("etaoin", k=20 + n)) for n in range(100))
    expected = tokenizer.encode(text)
    monkeypatch.setattr(bpe, "MERGED_PARTS", bpe.BLOCK * bpe.LANES + 1000)
    assert Tokenizer.from_ranks(tokenizer.ranks, "default").encode(text) == expected


def test_only_one_pair_merges_into_a_token_of_a_trained_vocabulary(english):
    tokenizer = Tokenizer.train(english[:30], 1000)
    assert np.count_nonzero(tokenizer.vocabulary.pairs) == sum(len(token) > 2 for token in tokenizer.ranks)


def test_a_token_with_a_byte_that_is_none_does_not_merge():
    tokens = [bytes([byte]) for byte in range(256) if byte != ord("x")] + [b"ab", b"xab", b"abx", b"abc", b"abcab"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in ("ab", "abc", "abab", "abcabab", "cab"):
        assert Tokenizer(ranks, "gpt2", {}).encode(text) == merge_slowly(text.encode(), ranks)


def test_the_highest_ids():
    top = MAX_VOCAB_SIZE - 1
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": top - 2, b"abc": top - 1, b"abcab": top}
    text = "abcab abc ab abcabcab"
    assert Tokenizer(ranks, "gpt2", {}).encode(text) == [
        i for word in regex.findall(PATTERNS["gpt2"], text) for i in merge_slowly(word.encode(), ranks)]


def test_the_table_of_merges_grows():
    """A vocabulary of runs has more ways to join two tokens than the table holds initially."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a" * n: 254 + n for n in range(2, 200)}
    text = "a" * 1000
    assert Tokenizer(ranks, "gpt2", {}).encode(text) == merge_slowly(text.encode(), ranks)


def test_kernels_release_the_gil():
    kernels = [value for value in vars(bpe).values() if hasattr(value, "targetoptions")]
    assert len(kernels) > 30 and all(kernel.targetoptions["nogil"] for kernel in kernels)


@pytest.mark.integration
def test_works_without_a_cache_of_machine_code():
    program = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
from tokenizer import Tokenizer
assert Tokenizer.train(["hello hello"], 258, special_tokens=()).encode("hell") == [257, ord("l")]
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True)


def test_a_full_cache_changes_nothing(english, monkeypatch):
    tokenizer = Tokenizer.train(english[:20], 400)
    expected = [tokenizer.encode(text) for text in english[:5]]
    monkeypatch.setattr(bpe, "CACHED_WORDS", 3)
    small = Tokenizer.from_ranks(tokenizer.ranks, "default")
    assert [small.encode(text) for text in english[:5]] == expected
    assert small.caches[0].room[0] == 0
    assert small.encode("a") == [ord("a")] and small.caches[0].room[0] == 3  # emptied, and "a" needs no room


def test_a_token_of_a_million_bytes_costs_little():
    tokenizer = Tokenizer.train(["a" * (1 << 21)], 256 + 20, special_tokens=())
    assert len(tokenizer.tokens[-1]) == 1 << 20
    assert tokenizer.encode("a" * (1 << 20) + "b" * 20) == [275] + [ord("b")] * 20


# -- the heap ---------------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)) | st.none(), max_size=60))
def test_heap_equals_heapq(commands):
    """commands: a pair is pushed, None pops."""
    heap, twin = np.zeros((60, 2), np.uint64), []
    for command in commands:
        if command is not None:
            bpe.heap_push(heap, len(twin), *map(np.uint64, command))
            heapq.heappush(twin, command)
        elif twin:
            assert tuple(heap[0].tolist()) == twin[0]
            bpe.heap_pop(heap, len(twin))
            heapq.heappop(twin)
    for i in range(len(twin), 0, -1):
        assert tuple(heap[0].tolist()) == heapq.heappop(twin)
        bpe.heap_pop(heap, i)
