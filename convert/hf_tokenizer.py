"""Byte-level BPE vocabularies to and from the tokenizer.json of the library `tokenizers`.

    to_hf_tokenizer(Tokenizer.load("tokenizer.json")).save("exported/tokenizer.json")
    load_hf_tokenizer(Path("exported"), {"bos_token_id": 0})
"""
import functools
import itertools
import re
from collections.abc import Mapping
from pathlib import Path

from convert.hf_mapping import read_json
from runtime.checkpoint import explain_damage
from runtime.config import BadInput
from tokenizer import END_OF_MESSAGE, PATTERNS, ROLE_TOKENS, SEPARATOR, Tokenizer

CHAT_TOKENS = *ROLE_TOKENS.values(), END_OF_MESSAGE


def has_chat_tokens(tokenizer: Tokenizer) -> bool:
    return all(name in tokenizer.special_tokens for name in CHAT_TOKENS)


def add_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """With those of CHAT_TOKENS that it lacks, at the ids after its last."""
    missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
    new = {name: tokenizer.vocab_size + i for i, name in enumerate(missing)}
    return Tokenizer(tokenizer.ranks, tokenizer.pattern, tokenizer.special_tokens | new)


# -- byte-level strings and merges ------------------------------------------------------------------------------------

@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """The character that stands for each byte: itself if it is printable, else the next one from U+0100 on. Source:
    encoder.py of GPT-2 (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def to_byte_level(token: bytes) -> str:
    """b" the" -> "Ġthe"."""
    return "".join(bytes_to_unicode()[byte] for byte in token)


def from_byte_level(text: str) -> bytes | None:
    """"Ġthe" -> b" the"; None if a character stands for no byte."""
    unicode_to_bytes = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(unicode_to_bytes[c] for c in text) if all(c in unicode_to_bytes for c in text) else None


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged from, by rank. Tokens that merging never reaches have none."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := merge_below(token, ranks, rank)) == 2:
            merges.append(tuple(parts))
    return merges


def merge_below(token: bytes, ranks: Mapping[bytes, int], max_rank: int) -> list[bytes]:
    """The parts of `token` after all merges of a rank below `max_rank`, lowest first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], max_rank), i) for i in range(len(parts) - 1))
        if rank >= max_rank:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# -- out --------------------------------------------------------------------------------------------------------------

def to_hf_tokenizer(tokenizer: Tokenizer):
    """A `tokenizers.Tokenizer` with the same ids, which starts every text with the separator. Raises BadInput, see
    `to_hf_pattern`."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as HFTokenizer
    vocab = {to_byte_level(token): token_id for token, token_id in tokenizer.ranks.items()} | tokenizer.special_tokens
    merges = [tuple(map(to_byte_level, pair)) for pair in recover_merges(tokenizer.ranks)]
    theirs = HFTokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(to_hf_pattern(tokenizer.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.post_processor = processors.TemplateProcessing(
        single=[SEPARATOR, "$A"], pair=[SEPARATOR, "$A", "$B"], special_tokens=[(SEPARATOR, tokenizer.separator_id)])
    by_id = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get)
    theirs.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in by_id])
    return theirs


def to_hf_pattern(pattern: str):
    """`pattern` as a `tokenizers.Regex`. Raises BadInput when Oniguruma, which matches it there, does not support it."""
    from tokenizers import Regex
    try:
        return Regex(without_possessive(pattern))
    except Exception as error:  # the library raises nothing more specific
        raise BadInput(f"the tokenizer's --pattern cannot be exported: tokenizers does not support it ({error}): train a "
                       f"tokenizer with one of {', '.join(PATTERNS)}") from None


def without_possessive(pattern: str) -> str:
    """Our patterns without possessive quantifiers, which only save time: Oniguruma reads {1,2}+ as something else. A user's
    pattern stays as it is."""
    return re.sub(r"([?*+}])\+", r"\1", pattern) if pattern in PATTERNS.values() else pattern


# -- in ---------------------------------------------------------------------------------------------------------------

# Other spellings of the patterns that have a compiled scanner here -> their names
KNOWN_PATTERNS = {without_possessive(pattern): name for name, pattern in PATTERNS.items()}
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+")
KNOWN_PATTERNS[LLAMA3_PATTERN] = "gpt4"
# GPT-2's with every digit by itself, as SmolLM splits
SINGLE_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?=\p{N})|\s+(?!\S)|\s+"


def load_hf_tokenizer(folder: Path, hf_config: dict) -> Tokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt. Raises BadInput for anything but byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        vocab = read_json(folder / "vocab.json")
        added = {token: token_id for token, token_id in vocab.items() if token == SEPARATOR}
        return build_tokenizer(folder / "vocab.json", vocab, read_merges(folder / "merges.txt"), "gpt2", added, hf_config)
    saved = read_json(path)
    with explain_damage(path):
        model = saved["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback") or saved.get("normalizer"):
            raise BadInput("not a byte-level BPE, the only kind of vocabulary that can be imported")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
        return build_tokenizer(path, model["vocab"], merges, read_pattern(saved["pre_tokenizer"]), added, hf_config)


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: a pair a line, after a line with the version."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def read_pattern(pre_tokenizer: dict | None) -> str:
    """The regular expression, or its name in PATTERNS, that splits text as the saved pre-tokenizer does. Raises BadInput for
    pre-tokenizers that no pattern here equals."""
    is_sequence = pre_tokenizer and pre_tokenizer["type"] == "Sequence"
    *splits, byte_level = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer or {"type": None}]
    types = [part["type"] for part in (*splits, byte_level)]
    uses_regex = byte_level.get("use_regex", True)  # GPT-2's
    if not byte_level.get("add_prefix_space"):
        if types == ["ByteLevel"] and uses_regex:
            return "gpt2"
        if types == ["Digits", "ByteLevel"] and splits[0].get("individual_digits") and uses_regex:
            return SINGLE_DIGITS_PATTERN
        if types == ["Split", "ByteLevel"] and not uses_regex and keeps_matches(splits[0]):
            pattern = splits[0]["pattern"]["Regex"]
            return KNOWN_PATTERNS.get(pattern, pattern)
    raise BadInput(f"its pre-tokenizer, {', '.join(map(str, types))}, splits text in a way that cannot be imported")


def keeps_matches(split: dict) -> bool:
    """Whether a saved Split makes a word of every match of its regular expression, as ours do."""
    is_inverted = split.get("invert", False)
    return "Regex" in split["pattern"] and (split["behavior"], is_inverted) in (("Isolated", False), ("Removed", True))


def build_tokenizer(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str, added: dict[str, int],
                    hf_config: dict) -> Tokenizer:
    """added: the tokens that are no result of merging, by name. The one that begins texts becomes our separator.

    Raises BadInput naming `path` when our ids would differ from theirs.
    """
    ranks = {}
    for text, token_id in vocab.items():
        if text not in added:
            if (token := from_byte_level(text)) is None:
                raise BadInput(f"{path}: not a byte-level vocabulary: it holds {text[:20]!r}")
            ranks[token] = token_id
    if [tuple(map(to_byte_level, pair)) for pair in recover_merges(ranks)] != merges:
        raise BadInput(f"{path}: its merges are not in the order of its ids, so text would be encoded as other ids")
    bos_id, eos_id = hf_config.get("bos_token_id"), hf_config.get("eos_token_id")
    if bos_id is None:
        bos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
    special_tokens = {SEPARATOR if token_id == bos_id and SEPARATOR not in added else name: token_id
                      for name, token_id in added.items()}
    if SEPARATOR not in special_tokens:
        raise BadInput(f"{path}: neither {SEPARATOR} nor the bos_token_id of config.json is among its special tokens")
    return Tokenizer.from_ranks(ranks, pattern, special_tokens)
