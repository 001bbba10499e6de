"""Vocabularies out to tokenizer.json of the library `tokenizers`, and in from it."""
import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from convert.hf_mapping import read_json
from runtime.checkpoint import reading
from runtime.config import BadInput
from tokenizer import PATTERNS, SEPARATOR, Tokenizer


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


def tokenizer_blob(tokenizer: Tokenizer) -> dict:
    """tokenizer.json as the library `tokenizers` has it."""
    vocab = {as_characters(token): token_id for token, token_id in tokenizer.ranks.items()} | tokenizer.special_tokens
    special = [{"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True}
               for name, token_id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])]
    split = {"type": "Split", "pattern": {"Regex": plain_pattern(tokenizer.pattern)}, "behavior": "Isolated",
             "invert": False}
    as_they_are = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    first, text = {"SpecialToken": {"id": SEPARATOR, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **as_they_are}]},
            "post_processor": {"type": "TemplateProcessing", "single": [first, text],
                               "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
                               "special_tokens": {SEPARATOR: {"id": SEPARATOR, "ids": [tokenizer.separator_id],
                                                              "tokens": [SEPARATOR]}}},
            "decoder": {"type": "ByteLevel", **as_they_are},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                      "merges": [[as_characters(part) for part in pair] for pair in merges_of(tokenizer.ranks)]}}


def plain_pattern(pattern: str) -> str:
    """Without possessive quantifiers, where ours are: they only save time, and Oniguruma reads {1,2}+ as something else."""
    return re.sub(r"([?*+}])\+", r"\1", pattern) if pattern in PATTERNS.values() else pattern


# -- vocabularies in --------------------------------------------------------------------------------------------------

# How others write the patterns that have a compiled scanner here.
KNOWN_PATTERNS = {plain_pattern(pattern): name for name, pattern in PATTERNS.items()} | {
    # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "gpt4"}
# GPT-2's between digits that each stand alone, as SmolLM has it
DIGITS_ALONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?=\p{N})|\s+(?!\S)|\s+"


def read_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """From tokenizer.json, or vocab.json and merges.txt. Raises BadInput for what is no byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        vocab, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
        added = {token: token_id for token, token_id in vocab.items() if token == SEPARATOR}
        return made_tokenizer(folder / "vocab.json", vocab, merges, "gpt2", added, config)
    blob = read_json(path)
    with reading(path):
        model = blob["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback") or blob.get("normalizer"):
            raise BadInput("no byte-level BPE, the only kind of vocabulary that can be read")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in blob.get("added_tokens", [])}
        return made_tokenizer(path, model["vocab"], merges, pattern_of(blob["pre_tokenizer"]), added, config)


def read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def pattern_of(blob: dict | None) -> str:
    """The pattern that splits as a `pre_tokenizer` does. Raises BadInput."""
    parts = blob["pretokenizers"] if blob and blob["type"] == "Sequence" else [blob]
    kinds = [part and part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise BadInput(f"splits text by {', '.join(map(str, kinds))}, which cannot be read")
    by_bytes = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and by_bytes:
        return "gpt2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and by_bytes:
        return DIGITS_ALONE
    if kinds == ["Split", "ByteLevel"] and not by_bytes and "Regex" in parts[0]["pattern"] and \
            parts[0]["behavior"] in ("Isolated", "Removed") and parts[0].get("invert", False) == (
                parts[0]["behavior"] == "Removed"):
        pattern = parts[0]["pattern"]["Regex"]
        return KNOWN_PATTERNS.get(pattern, pattern)
    raise BadInput(f"splits text by {', '.join(map(str, kinds))}, which cannot be read")


def made_tokenizer(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str,
                   added: dict[str, int], config: dict) -> Tokenizer:
    """added: tokens that are not of the vocabulary's making, by name. Raises BadInput when ids would come out otherwise."""
    ranks = {}
    for text, token_id in vocab.items():
        if text not in added:
            if (token := as_bytes(text)) is None:
                raise BadInput(f"{path}: no byte-level vocabulary: it holds {text[:20]!r}")
            ranks[token] = token_id
    if [tuple(map(as_characters, pair)) for pair in merges_of(ranks)] != merges:
        raise BadInput(f"{path}: its merges are not in the order of its ids, so that text would come out as other ids")
    first, ends = config.get("bos_token_id"), config.get("eos_token_id")
    first = first if first is not None else ends[0] if isinstance(ends, list) else ends
    special = {SEPARATOR if token_id == first and SEPARATOR not in added else name: token_id
               for name, token_id in added.items()}
    if SEPARATOR not in special:
        raise BadInput(f"{path}: neither {SEPARATOR} nor the bos_token_id of config.json is among its special tokens")
    return Tokenizer.from_ranks(ranks, pattern, special)
