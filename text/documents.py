"""A batch of documents in memory, packed as files and kernels hold them: UTF-8, end to end, with offsets.

    PackedDocuments.from_strings(["one", "two"]).utf8.tobytes()      b"onetwo"

and sets of documents, to find those that occur twice.
"""
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class PackedDocuments:
    """Document i is utf8[offsets[i]:offsets[i + 1]].

    utf8: (bytes,) uint8, each document valid UTF-8. offsets: (documents + 1,) int64, starting with 0.
    """
    utf8: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_strings(cls, texts: Sequence[str | bytes]) -> "PackedDocuments":
        """Packs `texts`; what is not valid Unicode is replaced as in `valid_unicode`."""
        return cls.from_utf8([to_utf8(text) for text in texts])

    @classmethod
    def from_utf8(cls, parts: Iterable[bytes | np.ndarray]) -> "PackedDocuments":
        """Packs documents that are already valid UTF-8, as bytes or uint8 arrays."""
        parts = list(parts)
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.frombuffer(b"".join(parts), np.uint8), offsets)

    @classmethod
    def concat(cls, batches: Sequence["PackedDocuments"]) -> "PackedDocuments":
        """The documents of all `batches`, in order; at least one batch."""
        if len(batches) == 1:
            return batches[0]
        lengths = np.concatenate([np.diff(batch.offsets) for batch in batches])
        return cls(np.concatenate([batch.utf8 for batch in batches]), np.concatenate([[0], lengths]).cumsum())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> "PackedDocuments":
        """Documents start..stop, without copying their bytes."""
        first, last = self.offsets[start], self.offsets[stop]
        return PackedDocuments(self.utf8[first:last], self.offsets[start:stop + 1] - first)

    def select(self, mask: np.ndarray) -> "PackedDocuments":
        """The documents where `mask`, (documents,) bool, is true."""
        if mask.all():
            return self
        lengths = np.diff(self.offsets)
        return PackedDocuments(self.utf8[np.repeat(mask, lengths)], np.concatenate([[0], lengths[mask]]).cumsum())

    def strings(self) -> Iterator[str]:
        for start, stop in pairwise(self.offsets.tolist()):
            yield self.utf8[start:stop].tobytes().decode()


# -- sets of documents ------------------------------------------------------------------------------------------------

WHITE_SPACE = b" \t\n\r\x0b\x0c"
IS_WHITE_SPACE = np.isin(np.arange(256), list(WHITE_SPACE))
KEY_BYTES = 8  # at each end of a document, from which its key is made
KEY_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # any odd numbers


class DocumentSet:
    """A set of documents, which are equal if their texts are, white space at the ends aside.

    Holds hashes of 64 bits, see `document_hashes`. A document is only hashed if its length and its ends, which are compared
    for many documents at once, are those of a document of the set.
    """

    def __init__(self):
        self.numbers: dict[int, int] = {}  # hash -> how many documents were in the set before this one
        self.keys = np.zeros(0, np.uint64)  # sorted

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, documents: PackedDocuments):
        starts, stops = strip_offsets(documents)
        for start, stop in zip(starts, stops):
            self.numbers.setdefault(text_hash(documents.utf8[start:stop]), len(self.numbers))
        self.keys = np.union1d(self.keys, end_keys(documents.utf8, starts, stops))

    def find(self, documents: PackedDocuments) -> np.ndarray:
        """(documents,) int64: their numbers, in the order in which they were added; -1 for those not in the set."""
        found = np.full(len(documents), -1)
        if not len(self.keys):
            return found
        starts, stops = strip_offsets(documents)
        keys = end_keys(documents.utf8, starts, stops)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        for i in np.flatnonzero(self.keys[at] == keys):
            found[i] = self.numbers.get(text_hash(documents.utf8[starts[i]:stops[i]]), -1)
        return found

    def digest(self) -> str:
        """16 hex digits that change with any of the documents, and with their order."""
        return hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in self.numbers)).hexdigest()[:16]


def document_hashes(documents: PackedDocuments) -> np.ndarray:
    """(documents,) uint64: a hash of each text, without the white space at its ends; the same on every machine."""
    starts, stops = strip_offsets(documents)
    return np.array([text_hash(documents.utf8[start:stop]) for start, stop in zip(starts, stops)], np.uint64)


def text_hash(utf8: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest(), "little")


def strip_offsets(documents: PackedDocuments) -> tuple[np.ndarray, np.ndarray]:
    """Where each document starts and stops, (documents,) each, without the white space at its ends."""
    utf8, starts, stops = documents.utf8, documents.offsets[:-1].copy(), documents.offsets[1:].copy()
    for offsets, at, step in ((starts, 0, 1), (stops, -1, -1)):
        moving = np.flatnonzero(starts < stops)
        for _ in range(8):
            moving = moving[IS_WHITE_SPACE[utf8[offsets[moving] + at]]]
            offsets[moving] += step
            moving = moving[starts[moving] < stops[moving]]
        for i in moving[IS_WHITE_SPACE[utf8[offsets[moving] + at]]]:  # the few with more of it
            text = utf8[starts[i]:stops[i]].tobytes()
            offsets[i] += step * (len(text) - len(text.lstrip(WHITE_SPACE) if step > 0 else text.rstrip(WHITE_SPACE)))
    return starts, stops


def end_keys(utf8: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """(documents,) uint64: a hash of the length of each text utf8[start:stop] and of KEY_BYTES bytes at each of its ends."""
    if not len(utf8):
        return np.zeros(len(starts), np.uint64)
    offsets = np.arange(KEY_BYTES)
    is_inside = offsets < (stops - starts)[:, None]
    first = np.where(is_inside, utf8[np.minimum(starts[:, None] + offsets, len(utf8) - 1)], 0).astype(np.uint8)
    last = np.where(is_inside, utf8[np.maximum(stops[:, None] - 1 - offsets, 0)], 0).astype(np.uint8)
    ends = np.stack([first.view(np.uint64)[:, 0], last.view(np.uint64)[:, 0], (stops - starts).astype(np.uint64)], 1)
    return (ends * KEY_FACTORS).sum(1, dtype=np.uint64)  # modulo 2**64


# -- valid UTF-8 ------------------------------------------------------------------------------------------------------

def to_utf8(text: str | bytes) -> bytes:
    """`text` as valid UTF-8; see `valid_unicode`."""
    try:
        return text.encode()
    except (UnicodeEncodeError, AttributeError):
        return valid_unicode(text).encode()


def valid_unicode(text: str | bytes) -> str:
    """`text` as a str that UTF-8 can encode: surrogate pairs become one character; lone surrogates and bytes that are not
    UTF-8 become U+FFFD (as in tiktoken)."""
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
