"""A batch of documents in memory, packed as files and kernels hold them: UTF-8, end to end, with offsets.

    PackedDocuments.from_strings(["one", "two"]).utf8.tobytes()      b"onetwo"
"""
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
