"""Byte-level BPE from scratch: train a vocabulary, encode text, decode ids.

Owns the split patterns, the special tokens, the rendering of conversations, and the `tokenizer.json` format.

    python tokenizer.py --vocab_size=8192 --dataset=builtin        trains a tokenizer and writes tokenizer.json
    python tokenizer.py --show "text or file"                      shows its tokens, in colour
    python tokenizer.py --compare a.json b.json                    what tokenizers make of different kinds of text

A regular expression splits text into words; within a word, a sequence of UTF-8 bytes, the adjacent pair of tokens with the
lowest rank is merged until no pair has a rank. Training determines the ranks: it merges the most frequent pair of the whole
text, again and again. Source: Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2 (Radford et al. 2019). The loops
over bytes are compiled, in `kernels/bpe.py`; their slow, obvious twins stand in tests/test_bpe.py.
"""
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import operator
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import regex
from tqdm import tqdm

from runtime.cli import Parser, add_flags, command, log_line, parse_flags, say, terminal_width
from runtime.config import BadInput, check_flags, flag
from runtime.files import atomic_write, check_writable, require_regular_file
from runtime.threads import available_cores, map_in_threads
from text.builtin import builtin_texts
from text.documents import PackedDocuments, to_utf8, valid_unicode
from text.messages import check_messages, has_loss
from text.samples import sample_texts
from text.sources import SourceConfig, open_source, take_text


def import_when_used(name: str) -> ModuleType:
    """A module that is not executed before its first attribute is read."""
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# numba and its first use of a cached kernel take half a second, which a short text and decoding do not need
bpe = sys.modules.get("kernels.bpe") or import_when_used("kernels.bpe")

FORMAT = "gpt-workbench tokenizer 1"
SEPARATOR = "<|endoftext|>"  # precedes every document
# Every new vocabulary has the tokens of a chat, so that finetuning on conversations never resizes an embedding.
ROLES = "system", "user", "assistant"  # of a message in a conversation
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
END_OF_MESSAGE = "<|end|>"
SPECIAL_TOKENS = (SEPARATOR, *ROLE_TOKENS.values(), END_OF_MESSAGE)
# What `encode_chat` does, as a Jinja template for other programs. transformers takes the assistant mask from what stands
# between the `generation` tags, which are its own: programs that know only Jinja get the template without them.
CHAT_TEMPLATE = (
    "{{ '" + SEPARATOR + "' }}{% for message in messages %}{% if message['role'] not in ['" + "', '".join(ROLES) + "'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and message['weight'] != 0 %}"
    "{% generation %}{{ message['content'] + '" + END_OF_MESSAGE + "' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + END_OF_MESSAGE + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ROLE_TOKENS["assistant"] + "' }}{% endif %}")
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PATTERNS = {
    # GPT-4's, but with at most two digits in a word: at 32k ids, nanochat measured 0.965 bits per byte, 0.972 with three
    "default": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
               r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+",
}
TRAINING_BYTES = 100_000_000  # text that is plenty for 32k merges; --tokenizer_bytes changes it
MAX_VOCAB_SIZE = 2_000_000    # ids have at most bpe.ID_BITS
PIECE_BYTES = 1 << 24         # longer texts are encoded in pieces
SHORT_TEXT = 1000             # bytes in all that are encoded before the kernels are loaded
NO_ID = -1                    # precedes a piece of text that is not to follow a token
BATCH_CHARACTERS = 1 << 18    # characters of text encoded or counted in one call
# Seconds that a regular expression may take to split a text, and more for each million characters: some never end. Sound
# ones split ten million a second.
SPLIT_SECONDS = 10, 30


class TooFewMerges(BadInput):
    """A text is too small, or repeats itself too much, for `vocab_size` tokens; it has merges for `available`."""

    def __init__(self, vocab_size: int, available: int):
        super().__init__(f"--vocab_size={vocab_size}: the text has merges for only {available} tokens: give more text or "
                         f"--vocab_size={available}")
        self.available = available


class Tokenizer:
    """A byte-level BPE vocabulary.

    ranks: token bytes -> id; the lower id is merged first. Of the 256 single bytes a foreign vocabulary may lack some: then
        text that holds one of these bytes is refused.
    pattern: a name in PATTERNS or any regular expression; text between its matches is a word too, so nothing is lost.
    special_tokens: name -> id. `encode` never returns them, whatever the text contains.
    added_tokens: text -> id, of a foreign vocabulary. They are found in a text before it is split, the leftmost first and of
        these the longest, and are text in every other way. Their ids may be those of equal tokens in `ranks`.
    added_later: those of added_tokens that are looked for when all others have been found.
    eos_ids: ids of a foreign model's own that end a generated text; see `end_ids`.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int],
                 added_tokens: Mapping[str, int] | None = None, added_later: Iterable[str] = (),
                 eos_ids: Iterable[int] = ()):
        self.ranks, self.special_tokens, self.added_tokens = dict(ranks), dict(special_tokens), dict(added_tokens or {})
        ours = {self.special_tokens.get(name) for name in SPECIAL_TOKENS}
        self.eos_ids = sorted(set(eos_ids) - ours)
        self.pattern = PATTERNS.get(pattern, pattern)
        self.split_regex = compile_pattern(self.pattern)
        added = {text.encode(): token_id for text, token_id in self.added_tokens.items()}
        new = {token: token_id for token, token_id in added.items() if self.ranks.get(token) != token_id}
        by_id = {token_id: token for token, token_id in (*self.ranks.items(), *new.items())}
        by_id |= {token_id: name.encode() for name, token_id in self.special_tokens.items()}
        if len(by_id) < len(self.ranks) + len(new) + len(self.special_tokens):
            raise BadInput("two tokens share an id: give every rank and every special token its own")
        if min(by_id, default=0) < 0 or max(by_id, default=0) >= MAX_VOCAB_SIZE:
            raise BadInput(f"token ids must lie between 0 and {MAX_VOCAB_SIZE - 1:,}")
        if b"" in added or not by_id.keys() >= set(self.eos_ids):
            raise BadInput("an added token is empty, or an id that ends texts is no token's")
        self.lacks_byte = np.array([bytes([byte]) not in self.ranks for byte in range(256)])
        if self.lacks_byte.all():
            raise BadInput("no token is a single byte: not a byte-level vocabulary")
        self.is_complete = not self.lacks_byte.any()
        self.added_later = sorted(self.added_tokens.keys() & {*added_later})
        later = {text.encode() for text in self.added_later}
        # named lists, which `regex` looks up by hash: the leftmost match, and of these the longest
        self.added_regexes = [regex.compile(rb"\L<added>", added=list(group))
                              for group in (added.keys() - later, later) if group]
        # id -> bytes, the name for special tokens; empty for ids that a foreign vocabulary does not use
        self.tokens = [by_id.get(token_id, b"") for token_id in range(max(by_id) + 1)]
        self.caches: list[bpe.Cache] = []  # word -> ids caches that no thread is using
        self.n_before_kernels = SHORT_TEXT

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def separator_id(self) -> int:
        """The id that precedes every document. Raises BadInput if this vocabulary has none."""
        if SEPARATOR not in self.special_tokens:
            raise BadInput(f"the tokenizer has no {SEPARATOR} token to separate documents with")
        return self.special_tokens[SEPARATOR]

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a generated text: the separator, the tokens of a chat, and a foreign model's own."""
        ours = (self.special_tokens[name] for name in SPECIAL_TOKENS if name in self.special_tokens)
        return frozenset((*ours, *self.eos_ids))

    # -- creating and storing -----------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = "default",
              special_tokens: Sequence[str] = SPECIAL_TOKENS, progress: bool = False) -> "Tokenizer":
        """Learns `vocab_size` tokens: 256 bytes, then merges, then the special tokens with the highest ids.

        The most frequent pair is merged first; among equals the one with the smallest left id, then right id. Raises
        BadInput when the text has too few different pairs for that many merges.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts is one text: give a list of texts")  # its characters would be taken for texts
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise BadInput(f"--vocab_size={vocab_size}: must be at least {vocab_size - n_merges} "
                           f"(256 bytes and {len(special_tokens)} special tokens)")
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in learn_merges(count_words(texts, PATTERNS.get(pattern, pattern), progress), n_merges, progress):
            tokens.append(tokens[left] + tokens[right])
        if len(tokens) < 256 + n_merges:
            raise TooFewMerges(vocab_size, len(tokens) + len(special_tokens))
        return cls.from_ranks({token: rank for rank, token in enumerate(tokens)}, pattern, special_tokens)

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int], pattern: str,
                   special_tokens: Sequence[str] | Mapping[str, int] = SPECIAL_TOKENS) -> "Tokenizer":
        """Wraps an existing byte-level vocabulary, in the form of `tiktoken.Encoding._mergeable_ranks`.

        special_tokens: names, which get the ids after the highest rank, or a mapping name -> id.
        """
        if not isinstance(special_tokens, Mapping):
            if len(set(special_tokens)) < len(special_tokens):
                raise BadInput(f"a special token occurs twice in {', '.join(special_tokens)}")
            first = max(ranks.values(), default=-1) + 1
            special_tokens = {name: first + i for i, name in enumerate(special_tokens)}
        return cls(ranks, pattern, special_tokens)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises BadInput naming the file when it is missing or is something else."""
        if os.path.lexists(path):
            require_regular_file(Path(path), str(path))
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{path}: no tokenizer to read ({error.strerror}): "
                           f"train one with `python tokenizer.py --tokenizer_path={path}`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: not a tokenizer.json of this program ({error}): "
                           f"train one with `python tokenizer.py`") from None

    def save(self, path: str | Path):
        """Writes `tokenizer.json`, atomically."""
        with atomic_write(Path(path), "w") as file:
            file.write(self.to_json())

    def to_json(self) -> str:
        """One JSON object. `tokens` lists the tokens by id, each character one byte (Latin-1), null for an unused id. Only
        foreign vocabularies have `added_tokens`, `added_later` and `eos_ids`."""
        by_id = {token_id: token.decode("latin-1") for token, token_id in self.ranks.items()}
        tokens = [by_id.get(token_id) for token_id in range(max(by_id) + 1)]
        foreign = {"added_tokens": self.added_tokens, "added_later": self.added_later, "eos_ids": self.eos_ids}
        return json.dumps({"format": FORMAT, "pattern": self.pattern, "special_tokens": self.special_tokens,
                           "tokens": tokens} | {name: value for name, value in foreign.items() if value}, indent=0)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError on anything else."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, expected {FORMAT!r}")
        by_id = {token_id: token for token_id, token in enumerate(values["tokens"]) if token is not None}
        ranks = {token.encode("latin-1"): token_id for token_id, token in by_id.items()}
        if len(ranks) < len(by_id) or b"" in ranks:
            raise ValueError("a token is empty or occurs twice")
        added_tokens, added_later, eos_ids = (
            values.get(name, empty) for name, empty in (("added_tokens", {}), ("added_later", []), ("eos_ids", [])))
        if not all(type(token_id) is int for token_id in
                   (*values["special_tokens"].values(), *added_tokens.values(), *eos_ids)):
            raise ValueError("an id is not an integer")
        return cls(ranks, values["pattern"], values["special_tokens"], added_tokens, added_later, eos_ids)

    def fingerprint(self) -> str:
        """16 hex digits that change with any token, id, special token or the pattern."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    # -- encoding -----------------------------------------------------------------------------------------------------

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`. Special tokens written in it are ordinary text; what is not valid Unicode becomes U+FFFD."""
        return self.encode_documents(PackedDocuments.from_strings([text]))[0].tolist() if text else []

    def can_encode(self, text: str) -> bool:
        """Whether the vocabulary has a token for every byte of `text`; only foreign ones may lack some."""
        return self.is_complete or not self.lacks_byte[np.frombuffer(to_utf8(text), np.uint8)].any()

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False,
                    max_tokens: int | None = None) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, [{"role": …, "content": …}, …], and the assistant mask: which of them the assistant
        generates, that is the content of its messages and the token that ends each, but not of those with "weight": 0.

        The separator, then for each message its role's token, the content and the end token. add_generation_prompt: ends
        with the assistant's role token, where its next message starts. max_tokens: returns the first so many; the rest of a
        long conversation is not encoded. Raises BadInput naming the message that is malformed, or if this vocabulary has no
        chat tokens.
        """
        role_ids, end_id = self.chat_token_ids()
        ids, assistant_mask = [self.separator_id], [False]
        check_messages(messages, ROLES)
        for message in messages:
            if max_tokens is not None and len(ids) >= max_tokens:
                return ids[:max_tokens], assistant_mask[:max_tokens]
            content, _ = self.encode_documents(PackedDocuments.from_strings([message["content"]]))
            content = content[:max_tokens].tolist()  # a list takes ten times the memory of an array
            ids += [role_ids[message["role"]], *content, end_id]
            assistant_mask += [False, *[has_loss(message)] * (len(content) + 1)]
        if add_generation_prompt:
            ids.append(role_ids["assistant"])
            assistant_mask.append(False)
        return ids[:max_tokens], assistant_mask[:max_tokens]

    def chat_token_ids(self) -> tuple[dict[str, int], int]:
        """role -> id of its token, and the id of the token that ends a message. Raises BadInput if this vocabulary has no
        chat tokens."""
        if missing := [name for name in (*ROLE_TOKENS.values(), END_OF_MESSAGE) if name not in self.special_tokens]:
            raise BadInput(f"the tokenizer has no {missing[0]} token, so its model cannot hold conversations")
        return {role: self.special_tokens[name] for role, name in ROLE_TOKENS.items()}, self.special_tokens[END_OF_MESSAGE]

    def encode_batch(self, texts: Iterable[str | bytes], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all `texts` end to end, (n,) uint16 or uint32, and offsets, (texts + 1,) int64.

        Text i is ids[offsets[i]:offsets[i + 1]]; no pair is merged across texts, and no separator is added. threads: how
        many encode in parallel (default: one per core), with equal results. `texts` is consumed lazily.
        """
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts is one text: give a list of texts")  # its characters would be taken for texts
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: must be at least 1")
        _ = self.vocabulary  # built here, or else by every thread
        encode = lambda batch: self.encode_documents(PackedDocuments.from_strings(batch))
        ids, lengths, n = np.empty(0, self.dtype), [[0]], 0
        for part, offsets in map_in_threads(encode, batch_texts(texts), threads or available_cores()):
            if n + len(part) > len(ids):  # in place: to touch twice as much new memory takes some % of the time
                ids.resize(max(n + len(part), len(ids) * 9 // 8), refcheck=False)
            ids[n:n + len(part)] = part
            n += len(part)
            lengths.append(np.diff(offsets))
        ids.resize(n, refcheck=False)
        return ids, np.concatenate(lengths, dtype=np.int64).cumsum()

    def encode_documents(self, documents: PackedDocuments, add_separators: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `documents` end to end, (n,) uint16 or uint32, and offsets, (documents + 1,) int64. Runs in the calling
        thread; several threads may call it. add_separators: the separator precedes each document. Raises BadInput for a byte
        that the vocabulary has no token for."""
        pieces, is_start = documents, np.ones(len(documents), bool)
        prefixes = np.full(len(documents), self.separator_id if add_separators else NO_ID, np.int64)
        for added_regex in self.added_regexes:
            pieces, is_start, prefixes = self.split_added_tokens(added_regex, pieces, is_start, prefixes)
        if is_built_in(self.pattern):
            pieces, is_first = split_long_documents(pieces)
            if not is_first.all():
                whole = is_first.cumsum() - 1  # the index of the piece that each one is now part of
                is_start, prefixes = is_first & is_start[whole], np.where(is_first, prefixes[whole], NO_ID)
        # encode runs of pieces of about PIECE_BYTES together
        bounds = [0, *np.flatnonzero(np.diff(pieces.offsets[:-1] // PIECE_BYTES)) + 1, len(pieces)]
        encoded = [self.encode_pieces(pieces.slice(start, stop), prefixes[start:stop])
                   for start, stop in itertools.pairwise(bounds)]
        ids = encoded[0][0] if len(encoded) == 1 else np.concatenate([ids for ids, _ in encoded])
        ends = np.concatenate([[0], *(np.diff(offsets) for _, offsets in encoded)]).cumsum()
        return ids, ends[np.flatnonzero(np.append(is_start, True))]

    def split_added_tokens(self, added_regex: regex.Pattern, pieces: PackedDocuments, is_start: np.ndarray,
                           prefixes: np.ndarray) -> tuple[PackedDocuments, np.ndarray, np.ndarray]:
        """Cuts pieces of documents at the added tokens that the pattern finds. is_start, (pieces,) bool: which pieces start
        a document; prefixes, (pieces,) int64: the id that precedes each, or NO_ID. Returns the three for the new pieces."""
        utf8, parts, starts, ids = pieces.utf8.tobytes(), [], [], []
        for (start, stop), *first in zip(itertools.pairwise(pieces.offsets.tolist()), is_start.tolist(), prefixes.tolist()):
            matches = [*added_regex.finditer(utf8, start, stop)]
            cuts = [start, *(i for match in matches for i in match.span()), stop]
            parts += [utf8[i:j] for i, j in zip(cuts[::2], cuts[1::2])]
            starts += [first[0], *[False] * len(matches)]
            ids += [first[1], *(self.added_tokens[match.group().decode()] for match in matches)]
        return PackedDocuments.from_utf8(parts), np.array(starts, bool), np.array(ids, np.int64)

    def encode_pieces(self, pieces: PackedDocuments, prefixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_documents`, for pieces that together fit into memory several times over. prefixes, (pieces,) int64: the
        id that precedes each piece, or NO_ID."""
        if not self.is_complete:
            self.check_bytes(pieces.utf8)
        if "vocabulary" not in self.__dict__ and len(pieces.utf8) <= self.n_before_kernels and (
                not is_built_in(self.pattern) or pieces.utf8.max(initial=0) < 128):  # `regex` may know another Unicode
            self.n_before_kernels -= len(pieces.utf8)
            return self.encode_short(pieces, prefixes)
        text, offsets = bpe.pad_text([pieces.utf8]), pieces.offsets
        ids, id_offsets = np.empty(len(text) + len(offsets) + bpe.PADDING, np.uint32), np.zeros_like(offsets)
        cache = self.acquire_cache()
        if self.splitter is not None:
            bpe.encode_documents(text, offsets, prefixes, self.splitter, self.vocabulary, cache, ids, id_offsets)
        else:
            for i, ends in enumerate(find_word_ends(self.split_regex, text, offsets)):
                at = id_offsets[i]
                ids[at] = prefixes[i]
                id_offsets[i + 1] = bpe.encode_words(text, ends, len(ends) - 1, self.vocabulary, cache, ids,
                                                     at + (prefixes[i] >= 0))
        self.caches.append(cache)
        return ids[:id_offsets[-1]].astype(self.dtype), id_offsets

    def encode_short(self, pieces: PackedDocuments, prefixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_pieces`, without the kernels."""
        ids, offsets = [], [0]
        for text, prefix in zip(pieces.strings(), prefixes.tolist()):
            ids += [prefix] * (prefix >= 0)
            for word in split_words(self.split_regex, text):
                ids += merge_word(word.encode(), self.ranks)
            offsets.append(len(ids))
        return np.array(ids, self.dtype), np.array(offsets)

    def check_bytes(self, utf8: np.ndarray):
        """Raises BadInput if the text, (bytes,) uint8, holds a byte that has no token."""
        is_missing = self.lacks_byte[utf8]
        if is_missing.any():
            at = int(is_missing.argmax())
            before = utf8[max(0, at - 3):at + 4].tobytes().decode(errors="ignore")
            raise BadInput(f"the tokenizer has no token for the byte 0x{utf8[at]:02X}, which the text holds near "
                           f"{before!r}: leave such text out, or use another tokenizer")

    @functools.cached_property
    def splitter(self) -> "bpe.Splitter | None":
        return find_splitter(self.pattern)

    @functools.cached_property
    def vocabulary(self) -> "bpe.Vocabulary":
        """The tables for encoding; built at the first use, as decoding does not need them."""
        tokens = [b""] * self.vocab_size
        for token, token_id in self.ranks.items():
            tokens[token_id] = token
        return bpe.make_vocabulary(tokens)

    def acquire_cache(self) -> "bpe.Cache":
        """A cache for one thread, which puts it back into `caches`; emptied if it is full."""
        try:
            cache = self.caches.pop()
        except IndexError:
            return bpe.make_cache(self.vocabulary)
        if cache.room[0] == 0:
            bpe.reset_cache(cache, self.vocabulary)
        return cache

    @property
    def dtype(self) -> np.dtype:
        """The type of encoded ids: uint16, which halves the shards, up to 65,536 ids; else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    # -- decoding and measuring ---------------------------------------------------------------------------------------

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
        """Text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def single_token_words(self, ids: np.ndarray) -> float:
        """The fraction of words that are a single token, in whole documents. ids: (n,), with or without separators."""
        lengths = self.token_bytes()[ids]
        token_ends = lengths.cumsum()
        n_words = n_single = 0
        offsets = np.unique([0, *token_ends[lengths == 0], token_ends[-1] if len(ids) else 0])
        text = np.frombuffer(self.decode_bytes(ids[lengths > 0]), np.uint8)
        for ends in find_word_ends(self.split_regex, text, offsets):
            tokens_before = np.searchsorted(token_ends[lengths > 0], ends, side="right")
            n_words += len(ends) - 1
            n_single += int((np.diff(tokens_before) == 1).sum())
        return n_single / max(n_words, 1)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text of each id, 0 for special tokens; the denominator of bits per byte."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    def mergeable_ranks(self) -> dict[bytes, int]:
        """token bytes -> id without the special tokens, as tiktoken.Encoding takes them."""
        return dict(self.ranks)


# -- splitting text into words ----------------------------------------------------------------------------------------

def compile_pattern(pattern: str) -> regex.Pattern:
    """Raises BadInput unless it is a regular expression that can split text."""
    refusal = f"--pattern={pattern[:100]}: neither one of {', '.join(PATTERNS)} nor a regular expression to split text with"
    if regex.fullmatch(r"[\w-]*", pattern):
        raise BadInput(refusal)  # a misspelt name would be a pattern that hardly ever matches
    try:
        compiled = regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"{refusal} ({error})") from None
    if compiled.flags & regex.REVERSE:
        raise BadInput(f"{refusal}: it matches from the end")
    return compiled


@functools.cache
def character_classes() -> np.ndarray:
    """(0x110000,) uint8: the class of every code point in Unicode 16, whatever version the installed `regex` knows."""
    classes = np.full(0x110000, bpe.OTHER, np.uint8)
    kinds = {"L": bpe.LETTER, "N": bpe.NUMBER, "s": bpe.SPACE}
    for line in Path(bpe.__file__).with_name("unicode16.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, first, last = line.split()
            classes[int(first, 16):int(last, 16) + 1] = kinds[kind]
    classes[[ord("\r"), ord("\n")]] = bpe.NEWLINE
    classes[[ord(" "), ord("'")]] = bpe.BLANK, bpe.APOSTROPHE
    return classes


def is_built_in(pattern: str) -> bool:
    return pattern in PATTERNS.values()


def find_splitter(pattern: str) -> "bpe.Splitter | None":
    """The compiled equivalent of a pattern in PATTERNS; None for others, which `regex` has to match."""
    for name, max_digits in (("default", 2), ("gpt4", 3)):
        if pattern == PATTERNS[name]:
            return bpe.gpt4_splitter(character_classes(), max_digits)
    return bpe.gpt2_splitter(character_classes()) if pattern == PATTERNS["gpt2"] else None


def merge_word(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of a word: the adjacent tokens whose pair has the lowest id are merged until no pair is a token."""
    if word in ranks:  # as in tiktoken, even where merges would not lead there
        return [ranks[word]]
    parts = [word[i:i + 1] for i in range(len(word))]
    while len(parts) > 1:
        pairs = enumerate(itertools.pairwise(parts))
        rank, i = min((ranks.get(left + right, MAX_VOCAB_SIZE), i) for i, (left, right) in pairs)
        if rank == MAX_VOCAB_SIZE:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def find_word_ends(pattern: regex.Pattern, text: np.ndarray, offsets: np.ndarray) -> Iterator[np.ndarray]:
    """Yields, for each document text[offsets[i]:offsets[i + 1]], the array `ends`: word i is text[ends[i]:ends[i + 1]]."""
    for start, stop in itertools.pairwise(offsets):
        words = split_words(pattern, text[start:stop].tobytes().decode())
        yield np.array([start, *(len(word.encode()) for word in words)]).cumsum()


def split_words(pattern: regex.Pattern, text: str) -> list[str]:
    """The words of `text`, which join to `text`: what lies between matches of `pattern` is a word too. Raises BadInput when
    that takes longer than SPLIT_SECONDS."""
    seconds = SPLIT_SECONDS[0] + SPLIT_SECONDS[1] * len(text) / 1e6
    try:
        if not pattern.groups:  # with groups, findall would return those instead of the match
            words = pattern.findall(text, timeout=seconds)
            if sum(map(len, words)) == len(text):
                return [word for word in words if word]  # a pattern may match the empty string between others
        words, at = [], 0
        for match in pattern.finditer(text, timeout=seconds):
            if match.group():
                words += [text[at:match.start()], match.group()]
                at = match.end()
    except TimeoutError:
        raise BadInput(f"the pattern {pattern.pattern[:100]!r} has not split {len(text):,} characters within "
                       f"{seconds:.0f} s: use a tokenizer with another --pattern") from None
    words.append(text[at:])
    return [word for word in words if word]


def split_long_documents(documents: PackedDocuments) -> tuple[PackedDocuments, np.ndarray]:
    """Cuts long documents between words, so that no piece takes much memory. Returns the pieces, and which of them start a
    document, (pieces,) bool.

    Cuts only between an ASCII letter and a space: there a word ends under every pattern in PATTERNS, whatever follows, and
    the next one starts, whatever precedes. Where these are too rare, pieces are longer.
    """
    is_start = np.ones(len(documents), bool)
    long = np.flatnonzero(np.diff(documents.offsets) > PIECE_BYTES)
    if not len(long):
        return documents, is_start
    cuts = []
    for start, stop in zip(documents.offsets[long].tolist(), documents.offsets[long + 1].tolist()):
        while stop - start > PIECE_BYTES:
            window = documents.utf8[start + PIECE_BYTES // 2:start + PIECE_BYTES]
            is_letter = (window[:-1] | 32) - np.uint8(ord("a")) < 26
            found = np.flatnonzero(is_letter & (window[1:] == ord(" ")))
            start += PIECE_BYTES // 2 + int(found[-1]) + 1 if len(found) else PIECE_BYTES // 2
            if len(found):
                cuts.append(start)
    offsets = np.sort(np.concatenate([documents.offsets, np.array(cuts, np.int64)]))
    return PackedDocuments(documents.utf8, offsets), ~np.isin(offsets[:-1], cuts)


# -- training ---------------------------------------------------------------------------------------------------------

def batch_texts(texts: Iterable[str | bytes]) -> Iterator[list[str | bytes]]:
    """`texts` in lists of about BATCH_CHARACTERS each."""
    batch, n_characters = [], 0
    for text in texts:
        batch.append(text)
        n_characters += len(text)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def count_words(texts: Iterable[str | bytes], pattern: str, progress: bool) -> "bpe.Words":
    """How often each word occurs in `texts`, which are consumed a batch at a time."""
    words, split_regex, splitter = bpe.empty_words(), compile_pattern(pattern), find_splitter(pattern)
    with tqdm(desc="counting words", unit="B", unit_scale=True, disable=not progress) as bar:
        for batch in batch_texts(texts):
            documents = PackedDocuments.from_strings(batch)
            text, offsets = bpe.pad_text([documents.utf8]), documents.offsets
            if splitter is not None:
                words = bpe.add_documents(words, text, offsets, splitter)
            else:
                for ends in find_word_ends(split_regex, text, offsets):
                    for i in range(0, len(ends) - 1, bpe.BLOCK):
                        words = bpe.add_words(words, text, ends[i:i + bpe.BLOCK + 1])
            bar.update(int(offsets[-1]))
    return words


def learn_merges(words: "bpe.Words", n_merges: int, progress: bool = False) -> Iterator[tuple[int, int]]:
    """Yields up to `n_merges` pairs of ids, the i-th of which becomes id 256 + i; fewer when no pair is left."""
    batches = bpe.learn(words, n_merges)
    del words  # `learn` frees them once it has spelled them
    with tqdm(total=n_merges, desc="merging", unit="merge", disable=not progress) as bar:
        for merges in batches:
            yield from merges.tolist()
            bar.update(len(merges))


# -- the command ------------------------------------------------------------------------------------------------------

SHOWN_BYTES = 20_000  # of a file; a page of more tokens is slow to draw
SHOWN_SHAPES = (4, 256), (12, 768)  # n_layer and width of models, for the embedding's share


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""
    tokenizer_path: Path = flag(Path("tokenizer.json"), "file to write; with --show the one to use, or a folder that holds "
                                                        "it")
    vocab_size: int = flag(32_768, "size of the vocabulary: 256 bytes, merges and special tokens", at_least=256,
                           at_most=MAX_VOCAB_SIZE)
    pattern: str = flag("default", f"how text is split into words: {', '.join(PATTERNS)}, or any regular expression")
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text to train on, from the start of the stream", at_least=1)
    overwrite: bool = flag(False, "replace an existing file")
    show: str = flag(None, "train nothing: show the tokens of this text, or of the file of this name, in the terminal and "
                           "as a page")
    ids: bool = flag(False, "with --show, print the id of each token too")
    compare: tuple[Path, ...] = flag((), "train nothing: compare these tokenizers by kind of text; a --dataset that is "
                                         "given is one more kind, of which --tokenizer_bytes are read")
    out_path: Path = flag(None, "page to write (default: tokens.html with --show, tokenizers.html with --compare, beside "
                                "the tokenizer)")

    def __post_init__(self):
        check_flags(self)
        if self.show is not None and self.compare:
            raise BadInput("--show and --compare: give one of them")
        if self.ids and self.show is None:
            raise BadInput("--ids: belongs to --show")
        if self.out_path and self.show is None and not self.compare:
            raise BadInput(f"--out_path={self.out_path}: belongs to --show and --compare: --tokenizer_path names the "
                           f"tokenizer to write")


def train_command(config: TokenizerConfig, source_config: SourceConfig):
    """Trains a tokenizer on the start of a source and writes it."""
    check_writable(config.tokenizer_path, f"--tokenizer_path={config.tokenizer_path}")
    if config.tokenizer_path.exists() and not config.overwrite:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: exists already: choose another path or add --overwrite")
    start = time.perf_counter()
    documents = open_source(source_config).documents()
    sample = list(take_text(documents, min(config.tokenizer_bytes, 1_000_000)))
    n_bytes = sum(len(to_utf8(text)) for text in sample)
    texts = itertools.chain(sample, take_text(documents, config.tokenizer_bytes - n_bytes))
    tokenizer = Tokenizer.train(texts, config.vocab_size, config.pattern, progress=True)
    tokenizer.save(config.tokenizer_path)
    n_tokens = len(tokenizer.encode_batch(sample)[0])
    say(f"{config.tokenizer_path}: {tokenizer.vocab_size:,} tokens (256 bytes, {len(tokenizer.ranks) - 256:,} merges, "
        f"{len(tokenizer.special_tokens)} special), {n_bytes / n_tokens:.2f} bytes per token on the first "
        f"{n_bytes / 1e6:.1f} MB of its text, {time.perf_counter() - start:.1f} s")


def load_any(path: Path) -> Tokenizer:
    """The tokenizer of a file, or of a data folder."""
    return Tokenizer.load(path / "tokenizer.json" if path.is_dir() else path)


def report_path(config: TokenizerConfig, tokenizer_path: Path, name: str) -> Path:
    """Where the page goes. Raises BadInput if it cannot be written."""
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    path = config.out_path or folder / name
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--out_path={path}: is a page: let its name end in .html")
    check_writable(path, f"--out_path={path}")
    return path


def show_tokens(config: TokenizerConfig):
    """Prints the tokens of --show, and writes a page of them."""
    from experiments import token_report  # imports torch: a start without it takes a third of the time
    tokenizer, path = load_any(config.tokenizer_path), report_path(config, config.tokenizer_path, "tokens.html")
    text, title = config.show.encode(), "Tokens"
    if os.path.lexists(config.show) and not os.path.isdir(config.show):
        require_regular_file(Path(config.show), f"--show={config.show}")
        title = config.show
        with open(config.show, "rb") as file:
            text = file.read(SHOWN_BYTES + 1)
    elif regex.fullmatch(r"\S+\.\w{1,5}", config.show):
        log_line(f"--show={config.show}: there is no such file, so these are the tokens of this text itself")
    is_cut = len(text) > SHOWN_BYTES
    text = valid_unicode(text[:SHOWN_BYTES]).rstrip("\ufffd") if is_cut else valid_unicode(text)
    ids = tokenizer.encode(text)
    tokens, n_bytes = [tokenizer.tokens[i] for i in ids], len(text.encode())
    if not ids:
        raise BadInput("--show: is empty: give a text or a file")
    summary = (f"{len(ids):,} tokens of {config.tokenizer_path}, {n_bytes:,} bytes{' at the start' * is_cut}: "
               f"{n_bytes / len(ids):.2f} bytes per token, {tokenizer.single_token_words(np.array(ids)):.0%} of words are "
               f"one token")
    with_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(token_report.terminal_text(tokens, ids, config.ids, with_color))
    say(summary)
    token_report.write_token_page(path, title, summary, tokens, ids)
    print(path)


def compare_tokenizers(config: TokenizerConfig, source_config: SourceConfig | None):
    """Prints what --compare asks for, and writes a page of it. source_config: of the --dataset, if it is given."""
    from experiments import token_report
    from experiments.report import align_columns, split_columns
    paths, page = config.compare, report_path(config, config.compare[0], "tokenizers.html")
    several = [path.stem for path in paths], [path.absolute().parent.name for path in paths], [*map(str, paths)]
    names = next((names for names in several if len(set(names)) == len(paths)), several[-1])
    tokenizers = [load_any(path) for path in paths]
    samples, counted = {kind: [text] for kind, text in sample_texts().items()}, "the built-in text"
    if source_config:
        counted = f"{source_config.dataset}"
        samples[counted] = list(take_text(open_source(source_config).documents(), config.tokenizer_bytes))
    texts = samples[counted] if source_config else builtin_texts()
    stats = []
    for name, tokenizer in zip(names, tokenizers):
        bytes_per_token = {kind: sum(len(to_utf8(text)) for text in sample) / len(tokenizer.encode_batch(sample)[0])
                           for kind, sample in samples.items()}
        counts = np.bincount(tokenizer.encode_batch(texts)[0], minlength=tokenizer.vocab_size)
        counts = np.delete(counts, [*tokenizer.special_tokens.values()])
        prose = np.array(tokenizer.encode(samples["prose"][0]))
        stats.append(token_report.TokenizerStats(
            name, tokenizer.vocab_size, bytes_per_token, tokenizer.single_token_words(prose),
            int((counts < token_report.RARE).sum()),
            {f"{n_layer} layers x {width}": token_report.embedding_share(tokenizer.vocab_size, n_layer, width)
             for n_layer, width in SHOWN_SHAPES}))
    counted += f", {sum(len(to_utf8(text)) for text in texts) / 1e6:.1f} MB"
    table = token_report.comparison_table(stats)
    width = terminal_width() if sys.stdout.isatty() else math.inf
    print(*("\n".join(align_columns(rows, width)) for rows in split_columns([table.head, *table.rows], width)), sep="\n\n")
    token_report.write_tokenizer_page(page, stats, counted)
    print(page)


@command
def main(argv=None):
    """Trains a byte-level BPE tokenizer on a sample of text and writes tokenizer.json."""
    config, source_config = parse_flags(main.__doc__, argv, TokenizerConfig, SourceConfig)
    if config.show is not None:
        show_tokens(config)
    elif config.compare:
        compare_tokenizers(config, source_config if "dataset" in given_flags(argv) else None)
    else:
        train_command(config, source_config)


def given_flags(argv) -> set[str]:
    """The names of the flags that are on the command line."""
    parser = Parser(None)
    add_flags(parser, TokenizerConfig, SourceConfig, suppress=True)
    return set(vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
