"""Documents in memory as they are in files and in kernels: end to end, in UTF-8."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class PackedDocuments:
    """Document i is utf8[offsets[i]:offsets[i + 1]].

    utf8: (bytes,) uint8, each document valid UTF-8. offsets: (documents + 1,) int64, the first of which is 0.
    """
    utf8: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, start: int, stop: int) -> "PackedDocuments":
        """Documents start..stop; their bytes are not copied."""
        first, last = self.offsets[start], self.offsets[stop]
        return PackedDocuments(self.utf8[first:last], self.offsets[start:stop + 1] - first)

    def chosen(self, mask: np.ndarray) -> "PackedDocuments":
        """The documents where `mask`, (documents,) bool, is true."""
        if mask.all():
            return self
        lengths = np.diff(self.offsets)
        return PackedDocuments(self.utf8[np.repeat(mask, lengths)], np.concatenate([[0], lengths[mask]]).cumsum())

    def strings(self) -> Iterator[str]:
        for start, stop in pairwise(self.offsets.tolist()):
            yield self.utf8[start:stop].tobytes().decode()


def from_strings(texts: Sequence[str | bytes]) -> PackedDocuments:
    """`texts` as `as_text` has them."""
    return from_utf8([utf8(text) for text in texts])


def from_utf8(parts: Iterable[bytes | np.ndarray]) -> PackedDocuments:
    """Documents that are each valid UTF-8."""
    parts = list(parts)
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return PackedDocuments(np.frombuffer(b"".join(parts), np.uint8), offsets)


def concat(parts: Sequence[PackedDocuments]) -> PackedDocuments:
    """The documents of several."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return PackedDocuments(np.concatenate([part.utf8 for part in parts]), np.concatenate([[0], lengths]).cumsum())


def utf8(text: str | bytes) -> bytes:
    """`text` as valid UTF-8; see `as_text`."""
    try:
        return text.encode()
    except (UnicodeEncodeError, AttributeError):
        return as_text(text).encode()


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
