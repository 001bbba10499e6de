"""The tokenizer against tiktoken and rustbpe, by hand, on odd text, in pieces and threads, its file and its command."""
import functools
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as tokenizer_script
from conftest import REPO
from runtime.config import BadInput
from text.documents import PackedDocuments, valid_unicode
from tokenizer import PATTERNS, SEPARATOR, SPECIAL_TOKENS, Tokenizer

SCRIPTS = """The quick brown fox's 12345 jumps — it'LL, 'Cause we've 3.14 reasons.\r\n\r\n   Indented\tcode = f(x)  \n
中文分词没有空格,一共有12个字。 日本語のテキストはカタカナとひらがなを含む。 한국어 문장은 띄어쓰기가 있다.
النص العربي يُكتب من اليمين إلى اليسار ١٢٣. متن فارسی با نیم‌فاصله. Русский текст, ещё раз! Ελληνικά με τόνους.
Tiếng Việt có nhiều dấu. Größe, Straße, ſ long s, ça va? हिन्दी में लिखा ३४५। ภาษาไทยไม่มีช่องว่าง
👩‍👩‍👧‍👦 👍🏽 🇩🇪 ½ Ⅷ ² ﷽ \u2028 \u00a0nbsp\u3000wide \x00 nul \x1c \x85 e\u0301 \ufeff 'ſ
"""


OTHER_PATTERN = r"\p{Lu}?\p{Ll}+|\s+|\S"  # has no compiled scanner


@pytest.fixture(scope="module", params=[*PATTERNS, OTHER_PATTERN])
def trained(request, english) -> Tokenizer:
    return Tokenizer.train(english[:60], 1500, request.param)


def as_tiktoken(tokenizer: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.mergeable_ranks(),
                             special_tokens={})


# -- oracles ----------------------------------------------------------------------------------------------------------

def test_ids_equal_tiktoken(trained, english):
    oracle = as_tiktoken(trained)
    rng = random.Random(0)
    noise = ["".join(chr(rng.randrange(256)) for _ in range(2000)), rng.randbytes(4000).decode("utf-8", "replace"),
             "".join(rng.choice("ab \n'1é中") for _ in range(4000))]
    for text in [*english[60:], "".join(english[60:]), SCRIPTS, *SCRIPTS.splitlines(), *noise, "", " ", "\n"]:
        assert trained.encode(text) == oracle.encode_ordinary(text)


def encoders(tokenizer: Tokenizer, monkeypatch) -> tuple[Tokenizer, Tokenizer]:
    """Two copies of it: one that encodes what it may without the kernels, and one that never does."""
    copies = []
    for short_text in (100_000, 0):
        monkeypatch.setattr(tokenizer_script, "SHORT_TEXT", short_text)
        copies.append(Tokenizer.from_json(tokenizer.to_json()))
    return copies


def test_the_kernels_give_the_ids_of_merging_slowly(trained, english, monkeypatch):
    slow, fast = encoders(trained, monkeypatch)
    noise = "".join(random.Random(0).choices("ab \n'1.Z\t", k=3000))
    texts = [*(text[:3000] for text in english[60:66]), SCRIPTS, *SCRIPTS.splitlines(), noise, "a" * 300, "", " ", "\n"]
    may = [text for text in texts if text.isascii() or trained.pattern == OTHER_PATTERN]
    assert len(may) > 4 and [slow.encode(text) for text in may] == [fast.encode(text) for text in may]
    packed = PackedDocuments.from_strings(may)
    for a, b in zip(slow.encode_documents(packed, add_separators=True), fast.encode_documents(packed, add_separators=True)):
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    assert "vocabulary" not in vars(slow) and "vocabulary" in vars(fast)
    assert [slow.encode(text) for text in texts] == [fast.encode(text) for text in texts]
    # a built-in pattern means the same in every version of `regex` only for ASCII
    assert ("vocabulary" in vars(slow)) == (trained.pattern != OTHER_PATTERN)


def test_added_tokens_are_found_without_the_kernels(monkeypatch):
    added = {"<think>": 257, "  ": 258, "ab": 260}
    slow, fast = encoders(Tokenizer(BYTE_RANKS, "gpt4", {SEPARATOR: 256}, added), monkeypatch)
    texts = ["abab", "", "plain <|endoftext|>", "<think>", "a<think>    b"]
    for tokenizer in slow, fast:
        ids, offsets = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators=True)
        assert [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)] == [
            [256, 260, 260], [256], [256, *b"plain <|endoftext|>"], [256, 257], [256, *b"a", 257, 258, 258, *b"b"]]


@pytest.mark.integration
def test_a_short_first_text_loads_no_kernels(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    program = """
import sys, tokenizer
ours = tokenizer.Tokenizer.load(sys.argv[1])
print(ours.decode(ours.encode("a first text")), "numba" in sys.modules)
print(len(ours.encode("one word " * 200)) > 1, "numba" in sys.modules)
print(tokenizer.bpe.BLOCK, ours.n_before_kernels)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "tokenizer.json")], cwd=REPO, capture_output=True,
                          text=True)
    assert done.stdout.splitlines() == ["a first text False", "True True", f"1024 {1000 - len('a first text')}"], done.stderr


@pytest.mark.parametrize("char", ["a", " ", "é", "中", "\n", "1", "!"])
def test_a_very_long_word_equals_tiktoken(trained, char):
    text = char * 20_000 + "b"
    assert trained.encode(text) == as_tiktoken(trained).encode_ordinary(text)


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(), max_size=60) | st.text("aA'lL sS1 \n\t.ſ\u00a0é", max_size=40))
def test_any_text_equals_tiktoken_and_round_trips(text):
    for tokenizer, oracle in hypothesis_pairs():
        ids = tokenizer.encode(text)
        assert ids == oracle.encode_ordinary(text)
        assert tokenizer.decode(ids) == valid_unicode(text)  # the text itself but for lone surrogates


@functools.cache  # hypothesis calls the test hundreds of times
def hypothesis_pairs() -> list[tuple[Tokenizer, tiktoken.Encoding]]:
    texts = [SCRIPTS, "it's the theory that matters, isn't it? 'Cause 2024"]
    tokenizers = [Tokenizer.train(texts, 600, pattern) for pattern in PATTERNS]
    return [(tokenizer, as_tiktoken(tokenizer)) for tokenizer in tokenizers]


@pytest.mark.integration
@pytest.mark.parametrize("pattern", ["default", pytest.param("gpt4", marks=pytest.mark.slow),
                                     pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_code_point_equals_tiktoken(pattern):
    """Between letters, spaces, digits, line breaks, and before what could be a contraction."""
    tokenizer = Tokenizer.train([SCRIPTS], 600, pattern)
    oracle = as_tiktoken(tokenizer)
    code_points = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for i in range(0, len(code_points), 4096):
        texts = ["a{0}b {0} 1{0}\n{0}'s  {0}{0}'{0}".format(chr(code)) for code in code_points[i:i + 4096]]
        ids, offsets = tokenizer.encode_batch(texts, threads=1)
        for text, start, stop in zip(texts, offsets, offsets[1:]):
            assert ids[start:stop].tolist() == oracle.encode_ordinary(text), ascii(text)


@pytest.mark.parametrize("pattern", [*PATTERNS, OTHER_PATTERN])
def test_merges_equal_rustbpe(pattern, english):
    oracle = rustbpe.Tokenizer()
    texts = [*english, SCRIPTS]
    oracle.train_from_iterator(iter(texts), 3000, pattern=PATTERNS.get(pattern, pattern))
    expected = {bytes(token): rank for token, rank in oracle.get_mergeable_ranks()}
    assert Tokenizer.train(texts, 3000 + len(SPECIAL_TOKENS), pattern).mergeable_ranks() == expected


# -- by hand ----------------------------------------------------------------------------------------------------------

def test_the_wikipedia_example():
    """aaabdaaabac -> ZabdZabac -> ZYdZYac -> XdXac, where of the equally frequent ab and Za the smaller ids are first."""
    tokenizer = Tokenizer.train(["aaabdaaabac"], 256 + 3, pattern=".+", special_tokens=())
    assert [tokenizer.tokens[i] for i in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]
    assert tokenizer.encode("aaabdaaabac") == [258, ord("d"), 258, ord("a"), ord("c")]


def test_lowest_rank_merges_first_not_leftmost():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 257, b"bc": 256}
    assert Tokenizer.from_ranks(ranks, "gpt4", ()).encode("abc") == [ord("a"), 256]


def test_default_pattern_takes_two_digits_at_a_time():
    tokenizer = Tokenizer.train(["12345 12345"], 256 + 2, special_tokens=())
    assert sorted(tokenizer.tokens[256:]) == [b"12", b"34"]


# -- special tokens ---------------------------------------------------------------------------------------------------

def test_special_tokens_have_the_highest_ids_and_are_never_encoded(trained):
    assert trained.vocab_size == 1500
    assert sorted(trained.special_tokens.values()) == list(range(1500 - len(SPECIAL_TOKENS), 1500))
    text = "".join(SPECIAL_TOKENS)
    ids = trained.encode(text)
    assert not set(ids) & set(trained.special_tokens.values())
    assert trained.decode(ids) == text
    assert trained.decode([trained.separator_id]) == SEPARATOR


def test_token_bytes(trained):
    lengths = trained.token_bytes()
    assert lengths.shape == (1500,)
    assert lengths[trained.separator_id] == 0
    assert lengths[trained.encode(SCRIPTS)].sum() == len(SCRIPTS.encode())


# -- conversations ----------------------------------------------------------------------------------------------------

def test_a_conversation_is_rendered_by_hand():
    tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")
    separator, system, user, assistant, end = range(256, 261)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yo"}]
    ids, assistant_mask = tokenizer.encode_chat(messages)
    assert ids == [separator, system, ord("s"), end, user, ord("h"), ord("i"), end, assistant, ord("y"), ord("o"), end]
    assert [ids[i] for i, mask in enumerate(assistant_mask) if mask] == [ord("y"), ord("o"), end]
    prompt, assistant_mask = tokenizer.encode_chat(messages[:2], add_generation_prompt=True)
    assert prompt == ids[:9] and not any(assistant_mask)
    assert tokenizer.decode(ids) == "<|endoftext|><|system|>s<|end|><|user|>hi<|end|><|assistant|>yo<|end|>"


@pytest.mark.parametrize("message, words", [
    ({"role": "robot", "content": "x"}, "message 2 has the unknown role 'robot': give system, user, assistant"),
    ({"role": "user"}, "message 2 has no role and content"), ({"content": "x"}, "message 2 has no role and content"),
    ("hi", "message 2 has no role and content"), ({"role": ["user"], "content": "x"}, "message 2 has the unknown role"),
    ({"role": "user", "content": None}, "message 2 has a content of type NoneType")], ids=str)
def test_malformed_messages_are_refused(trained, message, words):
    with pytest.raises(BadInput, match=words):
        trained.encode_chat([{"role": "user", "content": "hi"}, message])


def test_a_vocabulary_without_chat_tokens_refuses_conversations(trained):
    plain = Tokenizer.from_ranks(trained.ranks, trained.pattern, (SEPARATOR,))
    with pytest.raises(BadInput, match=r"no <\|system\|> token"):
        plain.encode_chat([])


# -- foreign vocabularies ---------------------------------------------------------------------------------------------

def test_a_foreign_vocabulary_may_number_bytes_differently(trained):
    """GPT-2's 256 single bytes do not have the ids 0..255 in order, and its ids need not be without gaps."""
    order = list(range(256))
    random.Random(1).shuffle(order)
    ranks = {token: order[rank] if rank < 256 else rank + 7 for token, rank in trained.mergeable_ranks().items()}
    foreign = Tokenizer.from_ranks(ranks, trained.pattern, {SEPARATOR: 5000})
    oracle = as_tiktoken(foreign)
    assert foreign.encode(SCRIPTS) == oracle.encode_ordinary(SCRIPTS)
    assert foreign.decode(foreign.encode(SCRIPTS)) == SCRIPTS
    assert foreign.vocab_size == 5001
    assert Tokenizer.from_json(foreign.to_json()).encode(SCRIPTS) == foreign.encode(SCRIPTS)


def test_invalid_vocabularies_are_refused():
    ranks = {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(BadInput, match="share an id"):
        Tokenizer.from_ranks(ranks | {b"ab": 3}, "gpt2")
    with pytest.raises(BadInput, match="twice in x, x"):
        Tokenizer.from_ranks(ranks, "gpt2", ("x", "x"))
    with pytest.raises(BadInput, match="no token is a single byte"):
        Tokenizer.from_ranks({b"ab": 0}, "gpt2")
    with pytest.raises(BadInput, match="an added token is empty"):
        Tokenizer(ranks, "gpt2", {}, {"": 300})
    with pytest.raises(BadInput, match="an id that ends texts is no token's"):
        Tokenizer(ranks, "gpt2", {}, eos_ids=[256])


BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}


def test_added_tokens_are_found_before_text_is_split():
    """The leftmost first, of these the longest; in documents of their own, beside separators, and in pieces."""
    added = {"<think>": 257, "  ": 258, "    ": 259, "ab": 260, "abc": 261, "é": 262}
    tokenizer = Tokenizer(BYTE_RANKS, "gpt4", {SEPARATOR: 256}, added)
    assert tokenizer.encode("<think>xabcd     é") == [257, *b"x", 261, *b"d", 259, *b" ", 262]
    later = Tokenizer(BYTE_RANKS, "gpt4", {}, {"ab": 257, "bcd": 258, "xa": 259}, added_later=["ab", "xa"])
    for one in (later, Tokenizer.from_json(later.to_json())):
        assert one.encode("xabcdab") == [259, 258, 257]
    texts = ["abab", "", "plain <|endoftext|>", "<think>", "a<think>"]
    ids, offsets = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators=True)
    assert [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])] == [
        [256, 260, 260], [256], [256, *b"plain <|endoftext|>"], [256, 257], [256, *b"a", 257]]
    for text in [*texts, SCRIPTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes()[[256, 257, 262]].tolist() == [0, 7, 2]  # text, and counted as such
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode(SCRIPTS) == tokenizer.encode(SCRIPTS) and again.added_tokens == added
    assert again.fingerprint() != Tokenizer(BYTE_RANKS, "gpt4", {SEPARATOR: 256}).fingerprint()


def test_added_tokens_may_be_results_of_merging():
    tokenizer = Tokenizer(BYTE_RANKS | {b"ab": 256, b"abc": 257}, "gpt2", {}, {"ab": 256})
    assert tokenizer.encode("abc") == [256, ord("c")] and tokenizer.vocab_size == 258
    with pytest.raises(BadInput, match="share an id"):
        Tokenizer(BYTE_RANKS | {b"ab": 256}, "gpt2", {}, {"ac": 256})


def test_encoding_with_added_tokens_in_pieces_changes_nothing(english, monkeypatch):
    tokenizer = Tokenizer(BYTE_RANKS, "gpt4", {SEPARATOR: 256}, {"the ": 257, " a": 258})
    texts = ["".join(english[:3]), "", "the  a the "]
    expected = [part.tolist() for part in tokenizer.encode_documents(PackedDocuments.from_strings(texts), True)]
    monkeypatch.setattr(tokenizer_script, "PIECE_BYTES", 500)
    assert [part.tolist() for part in tokenizer.encode_documents(PackedDocuments.from_strings(texts), True)] == expected


def test_a_byte_without_a_token_is_refused_when_it_occurs():
    """As in SmolLM2's vocabulary."""
    tokenizer = Tokenizer({token: rank for token, rank in BYTE_RANKS.items() if token not in (b"\xf0", b"\xc3")},
                          "gpt2", {SEPARATOR: 256})
    assert tokenizer.encode("plain ж") == [*"plain ж".encode()] and tokenizer.decode([100, 256]) == "d" + SEPARATOR
    for text in ("a cat 🙂", "é", "x" * 70_000 + "é"):
        with pytest.raises(BadInput, match="no token for the byte 0x(F0|C3), which the text holds near '.*[🙂é]'"):
            tokenizer.encode(text)
    assert Tokenizer.from_json(tokenizer.to_json()).to_json() == tokenizer.to_json()


def test_ids_that_end_texts():
    tokenizer = Tokenizer.from_ranks(BYTE_RANKS, "gpt2")
    assert tokenizer.end_ids == set(tokenizer.special_tokens.values()) and "eos_ids" not in tokenizer.to_json()
    foreign = Tokenizer(BYTE_RANKS, "gpt2", {SEPARATOR: 256, "<pad>": 257, "<eot>": 258}, eos_ids=[256, 258])
    assert foreign.end_ids == {256, 258} and foreign.eos_ids == [258]
    assert Tokenizer.from_json(foreign.to_json()).end_ids == {256, 258}


# -- odd text and patterns --------------------------------------------------------------------------------------------

def test_invalid_unicode_becomes_the_replacement_character(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.decode(trained.encode("\ud83d\ude00")) == "😀"
    assert trained.encode(b"caf\xc3\xa9 \xff") == trained.encode("café \ufffd")


@pytest.mark.parametrize("pattern", [r"\w+", r"(\w)(\w)?", r"[^ ]+", "x*", r"(?s).*", r"\s*\S*"])
def test_no_pattern_loses_text(pattern):
    """Even if it matches nothing, or the empty string."""
    tokenizer = Tokenizer.train(["hello hello  world, x xx"], 262, pattern, special_tokens=())
    texts = ["hello,  world\n", "", SCRIPTS, "xx", *"abc" * 9, ""]
    ids, offsets = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids[start:stop]) for start, stop in zip(offsets, offsets[1:])] == texts


@pytest.mark.parametrize("pattern", ["", "GPT4", "gpt-4", r"(?r)\w+", "([", "(?a)(?u)b", "(" * 3000])
def test_invalid_patterns_are_refused(pattern):
    with pytest.raises(BadInput, match="neither one of default, gpt4, gpt2 nor a regular expression") as error:
        Tokenizer.train(["hello"], 262, pattern)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("pattern", [r"(x+)*(x+)*(x+)*y|(x)", r"(?:(?:x*)*)*z|."])
def test_a_pattern_that_never_ends_is_refused(pattern, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "SPLIT_SECONDS", (0.2, 0))
    tokenizer = Tokenizer(BYTE_RANKS, pattern, {})
    assert tokenizer.encode("xxz") == [*b"xxz"]
    with pytest.raises(BadInput, match="the pattern .* has not split 3,000 characters within 0 s"):
        tokenizer.encode("x" * 3000)


def test_encode_batch_keeps_texts_apart(trained):
    texts = ["hello", "", "hello hello", SCRIPTS]
    ids, offsets = trained.encode_batch(texts)
    assert ids.dtype == "uint16" and offsets.tolist()[0] == 0 and len(offsets) == len(texts) + 1
    for i, text in enumerate(texts):
        assert ids[offsets[i]:offsets[i + 1]].tolist() == trained.encode(text)
    empty, offsets = trained.encode_batch([])
    assert len(empty) == 0 and offsets.tolist() == [0]


def test_decode_refuses_unknown_ids(trained):
    for bad in (-1, 1500):
        with pytest.raises(ValueError, match=f"id {bad} "):
            trained.decode([5, bad])
    for wrong in ([2.7], "12"):
        with pytest.raises(TypeError):
            trained.decode(wrong)


@pytest.mark.parametrize("pattern", ["default", r"\w+|\W+"])
def test_single_token_words_are_counted(english, pattern):
    """As by encoding each word alone, with and without separators."""
    tokenizer = Tokenizer.train(english[:60], 900, pattern)
    texts = [*english[50:53], SCRIPTS, "", "one"]
    words = [word for text in texts for word in tokenizer_script.split_words(tokenizer.split_regex, text)]
    expected = sum(len(tokenizer.encode(word)) == 1 for word in words) / len(words)
    assert 0.1 < expected < 0.9
    ids, _ = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators=True)
    assert tokenizer.single_token_words(ids) == pytest.approx(expected, abs=1e-12)
    words = tokenizer_script.split_words(tokenizer.split_regex, texts[0])
    assert tokenizer.single_token_words(np.array(tokenizer.encode(texts[0]))) == pytest.approx(
        np.mean([len(tokenizer.encode(word)) == 1 for word in words]))


@pytest.mark.parametrize("pattern", ["default", "gpt4", "gpt2", r"\w+|\W+"])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("abS'tdLl  \n\t12.,中ä🙂") | st.characters(exclude_categories=["Cs"])), max_size=5),
       st.integers(4, 20), st.booleans())
def test_encoding_in_pieces_changes_nothing(pattern, texts, piece_bytes, add_separators):
    tokenizer = piecewise(pattern)
    expected, offsets = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators)
    whole = tokenizer_script.PIECE_BYTES
    try:
        tokenizer_script.PIECE_BYTES = piece_bytes
        ids, found = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators)
    finally:
        tokenizer_script.PIECE_BYTES = whole
    assert ids.tolist() == expected.tolist() and found.tolist() == offsets.tolist()


@functools.cache
def piecewise(pattern):
    return Tokenizer.train(["all Still, it's and'll last 12 3 at a " * 9, SCRIPTS], 330, pattern)


def test_pieces_are_small(english, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "PIECE_BYTES", 1000)
    texts = ["".join(english[:5]), "short", "x" * 5000, "中文 " * 2000]
    pieces, is_start = tokenizer_script.split_long_documents(PackedDocuments.from_strings(texts))
    assert list(np.flatnonzero(is_start)[-3:]) == [len(is_start) - 3, len(is_start) - 2, len(is_start) - 1]
    lengths = np.diff(pieces.offsets)
    assert len(lengths) > 30 and lengths[:-3].max() <= 1000  # except where there is no letter before a space
    assert "".join(pieces.strings()) == "".join(texts)


@pytest.mark.parametrize("pattern", ["default", "gpt2", r"\w+|\W+"])
def test_separators_precede_each_text(english, pattern):
    tokenizer = Tokenizer.train(english[:20], 400, pattern)
    texts = [*english[:5], "", SCRIPTS]
    ids, offsets = tokenizer.encode_documents(PackedDocuments.from_strings(texts), add_separators=True)
    assert [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])] == [
        [tokenizer.separator_id, *tokenizer.encode(text)] for text in texts]
    assert ids.dtype == np.uint16 and offsets[0] == 0


def test_one_thread_equals_many(trained, english, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "BATCH_CHARACTERS", 3000)
    texts = [*english[:40], "", SCRIPTS, "x" * 50_000]
    expected = [trained.encode(text) for text in texts]
    for threads in (1, 2, 7, None):
        ids, offsets = trained.encode_batch(iter(texts), threads)
        assert [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])] == expected


def test_threads_encode_in_parallel(trained, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "BATCH_CHARACTERS", 10)
    both_arrived = threading.Barrier(2)

    def encode_documents(texts, encode=trained.encode_documents):
        both_arrived.wait(timeout=20)  # raises if the other thread does not come
        return encode(texts)
    monkeypatch.setattr(trained, "encode_documents", encode_documents)
    assert len(trained.encode_batch(["ten letters"] * 8, threads=2)[1]) == 9


def test_errors_in_threads_are_raised(trained, english, monkeypatch):
    monkeypatch.setattr(tokenizer_script, "BATCH_CHARACTERS", 3000)
    with pytest.raises(AttributeError):
        trained.encode_batch([*english[:9], "x" * 5000, ["no text"], *english[9:20]], threads=2)
    with pytest.raises(TypeError, match="give a list of texts"):
        trained.encode_batch("hello")
    with pytest.raises(ValueError, match="threads=0: must be at least 1"):
        trained.encode_batch(["hello"], threads=0)


def test_texts_are_consumed_lazily(trained, monkeypatch):
    """So that a stream of any length fits into memory."""
    monkeypatch.setattr(tokenizer_script, "BATCH_CHARACTERS", 10)
    encoded = []

    class Counted(str):
        def encode(self):
            encoded.append(self)
            return super().encode()

    def texts():
        for i in range(300):
            assert i - len(encoded) < 25
            yield Counted("ten letters")

    assert len(trained.encode_batch(texts(), threads=2)[1]) == 301 and len(encoded) == 300


def test_many_special_tokens(english):
    names = [f"<|special {i}|>" for i in range(10_000)]
    tokenizer = Tokenizer.train(english[:20], 10_400, special_tokens=names)
    assert tokenizer.vocab_size == 10_400 and tokenizer.special_tokens[names[-1]] == 10_399
    text = "".join(names[:50]) + english[3]
    assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)
    assert tokenizer.decode([10_399, *tokenizer.encode(text)]) == names[-1] + text
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode(text) == tokenizer.encode(text) and again.fingerprint() == tokenizer.fingerprint()


# -- files ------------------------------------------------------------------------------------------------------------

def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.pattern == trained.pattern and loaded.special_tokens == trained.special_tokens
    assert loaded.mergeable_ranks() == trained.mergeable_ranks()
    assert loaded.encode(SCRIPTS) == trained.encode(SCRIPTS)
    assert loaded.fingerprint() == trained.fingerprint()


def test_fingerprint_changes_with_everything(trained):
    ranks, specials = trained.mergeable_ranks(), trained.special_tokens
    other_ranks = dict(ranks)
    other_ranks[b"a"], other_ranks[b"b"] = ranks[b"b"], ranks[b"a"]
    others = [Tokenizer(other_ranks, trained.pattern, specials), Tokenizer(ranks, r"\w+", specials),
              Tokenizer(ranks, trained.pattern, dict(reversed(list(zip(specials, reversed(specials.values()))))))]
    assert len({trained.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def tokenizer_json(**changes) -> str:
    """A tokenizer.json of the 256 bytes and the separator, with some values changed."""
    tokens = [bytes([byte]).decode("latin-1") for byte in range(256)]
    return json.dumps({"format": tokenizer_script.FORMAT, "pattern": r"\w+", "special_tokens": {SEPARATOR: 256},
                       "tokens": tokens + changes.pop("more", [])} | changes)


def test_a_tokenizer_is_read_from_a_file_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "a pipe or a device"), (".", "a folder"), ("none", "no tokenizer")):
        with pytest.raises(BadInput, match=words):
            Tokenizer.load(tmp_path / name)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": "other"}', '{"model": {"vocab": {}}}', "\x00", "[" * 100_000,
    tokenizer_json(tokens=["ab"]), tokenizer_json(more=["a"]), tokenizer_json(more=[""]),
    tokenizer_json(special_tokens={SEPARATOR: 256.5}), tokenizer_json(special_tokens={SEPARATOR: 3}),
    tokenizer_json(special_tokens=[SEPARATOR]), tokenizer_json(pattern=None), tokenizer_json(pattern="(["),
    tokenizer_json(added_tokens=["x"]), tokenizer_json(added_tokens={"x": "1"}), tokenizer_json(added_tokens={"x": 3}),
    tokenizer_json(eos_ids=7), tokenizer_json(eos_ids=["7"]), tokenizer_json(eos_ids=[300])])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert Tokenizer.load(tmp_path / "tokenizer.json").vocab_size == 257
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match="tokenizer.json: not a tokenizer.json of this program"):
        Tokenizer.load(tmp_path / "tokenizer.json")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_executed(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(pickle.dumps(Evil(tmp_path / "executed"), protocol=0))
    with pytest.raises(BadInput):
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert not (tmp_path / "executed").exists()


# -- the command ------------------------------------------------------------------------------------------------------

def test_the_command_trains_and_reports(tmp_path, english, capsys, refused):
    (tmp_path / "text.txt").write_text("\n\n".join(english[:20]), encoding="utf-8")
    flags = [f"--dataset={tmp_path / 'text.txt'}", f"--tokenizer_path={tmp_path / 'tokenizer.json'}", "--pattern=gpt2"]
    tokenizer_script.main([*flags, "--vocab_size=600"])
    printed = capsys.readouterr()
    assert "600 tokens (256 bytes, 339 merges, 5 special)" in printed.out and "bytes per token" in printed.out
    assert "counting words" in printed.err and "merging" in printed.err
    assert Tokenizer.load(tmp_path / "tokenizer.json").pattern == PATTERNS["gpt2"]
    before = (tmp_path / "tokenizer.json").read_bytes()
    refused(tokenizer_script.main, [*flags, "--vocab_size=500"], "--tokenizer_path=", "exists already", "--overwrite")
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    tokenizer_script.main([*flags, "--vocab_size=500", "--overwrite"])
    assert Tokenizer.load(tmp_path / "tokenizer.json").vocab_size == 500


@pytest.mark.parametrize("moment", ["counting words", "merging"])
def test_ctrl_c_leaves_no_file(tmp_path, english, moment, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(english[:20]), encoding="utf-8")

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        yield from loop(*args)
    owner, name = {"counting words": (tokenizer_script, "batch_texts"), "merging": (tokenizer_script.bpe, "learn")}[moment]
    loop = getattr(owner, name)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(SystemExit) as stop:
        tokenizer_script.main([f"--dataset={tmp_path / 'text.txt'}", "--vocab_size=600",
                               f"--tokenizer_path={tmp_path / 'out' / 'tokenizer.json'}"])
    printed = capsys.readouterr().err
    assert stop.value.code == 130 and moment in printed and printed.endswith("interrupted\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_on_a_gigabyte_takes_little_memory():
    """Built-in text under 60 ciphers, so that new words keep coming: more of them than 1 GB of English has."""
    program = """
import random, re, string
from pathlib import Path
from text.builtin import builtin_documents
from tokenizer import Tokenizer
n_bytes = 0
def texts():
    global n_bytes
    documents = list(builtin_documents())
    while n_bytes < 1e9:
        cipher = random.Random(n_bytes % 60).sample(string.ascii_lowercase, 26)
        table = str.maketrans(string.ascii_letters, "".join(cipher) + "".join(cipher).upper())
        for text in documents:
            n_bytes += len(text.encode())
            yield text.translate(table)
tokenizer = Tokenizer.train(texts(), 32_768)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
print(n_bytes, tokenizer.vocab_size, peak)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_bytes, vocab_size, peak = map(int, done.stdout.split())
    assert n_bytes >= 1e9 and vocab_size == 32_768 and peak < 1.5e6, done.stdout


def test_a_single_text_is_refused():
    with pytest.raises(TypeError, match="give a list of texts"):
        Tokenizer.train("hello hello", 262)


@pytest.mark.parametrize("flags, words", [
    ([], ["--vocab_size=32768", "merges for only", "or --vocab_size="]),
    (["--vocab_size=258"], ["--vocab_size=258", "at least 261"]),
    (["--vocab_size=262", "--pattern=(["], ["--pattern=([", "regular expression"]),
    (["--tokenizer_path=text.txt/x.json"], ["--tokenizer_path=", "cannot be written"])], ids=str)
def test_the_command_refuses_bad_flags(tmp_path, monkeypatch, refused, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("only a few words")
    refused(tokenizer_script.main, ["--dataset=text.txt", "--tokenizer_path=out/tokenizer.json", *flags], *words)
    assert not (tmp_path / "out").exists()
