"""How byte-level vocabularies are written down elsewhere: bytes as characters, merges as pairs."""
import functools
import itertools
from collections.abc import Mapping


@functools.cache
def byte_characters() -> list[str]:
    """The character that stands for each byte: itself where that can be seen, else one from U+0100 on, in order. Source: the
    encoder of GPT-2 (Radford et al. 2019)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def as_characters(token: bytes) -> str:
    """b" the" -> "Ġthe"."""
    characters = byte_characters()
    return "".join(characters[byte] for byte in token)


def as_bytes(text: str) -> bytes | None:
    """The inverse; None for what is not written so."""
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    return bytes(bytes_of[c] for c in text) if all(c in bytes_of for c in text) else None


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged from, in order of rank. A token that merging never reaches has
    none."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := merged(token, ranks, rank)) == 2:
            merges.append(tuple(parts))
    return merges


def merged(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What is left of `token` when all merges of a rank below `below` are done, the lowest first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
