"""Byte-level BPE vocabularies to and from the tokenizer.json of the library `tokenizers`.

    to_hf_tokenizer(Tokenizer.load("tokenizer.json")).save("exported/tokenizer.json")
    load_hf_tokenizer(Path("exported"), {"bos_token_id": 0})
"""
import functools
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from convert.hf_mapping import read_json
from convert.same_ids import check_same_ids
from runtime.checkpoint import explain_damage
from runtime.config import BadInput
from tokenizer import END_OF_MESSAGE, PATTERNS, ROLE_TOKENS, SEPARATOR, Tokenizer

CHAT_TOKENS = *ROLE_TOKENS.values(), END_OF_MESSAGE


def has_chat_tokens(tokenizer: Tokenizer) -> bool:
    return all(name in tokenizer.special_tokens for name in CHAT_TOKENS)


def add_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """With those of CHAT_TOKENS that it lacks, at the ids after its last, or where they are ordinary added tokens at the ids
    of those."""
    added = dict(tokenizer.added_tokens)
    missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
    special = tokenizer.special_tokens | {name: added.pop(name) for name in missing if name in added}
    missing = [name for name in missing if name not in special]
    special |= {name: tokenizer.vocab_size + i for i, name in enumerate(missing)}
    return Tokenizer(tokenizer.ranks, tokenizer.pattern, special, added, tokenizer.added_later, tokenizer.eos_ids)


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


def all_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that make up a third, in the order of its rank: what tiktoken merges."""
    lengths = {len(token) for token in ranks}
    pairs = [(rank, ranks[token[:i]], ranks[token[i:]], token, i) for token, rank in ranks.items()
             for i in range(1, len(token)) if i in lengths and token[:i] in ranks and token[i:] in ranks]
    return [(token[:i], token[i:]) for *_, token, i in sorted(pairs)]


# -- out --------------------------------------------------------------------------------------------------------------

def to_hf_tokenizer(tokenizer: Tokenizer):
    """A `tokenizers.Tokenizer` with the same ids, which starts every text with the separator. Raises BadInput where that
    library would encode text as other ids."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as HFTokenizer
    vocab = {to_byte_level(token): token_id for token, token_id in tokenizer.ranks.items()}
    added = sorted([*tokenizer.special_tokens.items(), *tokenizer.added_tokens.items()], key=lambda item: item[1])
    if clash := next((name for name, token_id in added if vocab.get(name, token_id) != token_id), None):
        raise BadInput(f"the special token {clash!r} cannot be exported: tokenizers would take it for an ordinary token")
    merges, ignore_merges = recover_merges(tokenizer.ranks), False
    if len(merges) < sum(len(token) > 1 for token in tokenizer.ranks):  # a foreign vocabulary, made for tiktoken
        merges, ignore_merges = all_merges(tokenizer.ranks), True
    theirs = HFTokenizer(models.BPE(vocab | dict(added), [tuple(map(to_byte_level, pair)) for pair in merges],
                                    ignore_merges=ignore_merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(to_hf_pattern(tokenizer.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.post_processor = processors.TemplateProcessing(
        single=[SEPARATOR, "$A"], pair=[SEPARATOR, "$A", "$B"], special_tokens=[(SEPARATOR, tokenizer.separator_id)])
    for name, _ in added:
        is_special = name in tokenizer.special_tokens
        add = theirs.add_special_tokens if is_special else theirs.add_tokens
        add([AddedToken(name, normalized=name in tokenizer.added_later, special=is_special)])
    try:
        check_same_ids(tokenizer, theirs.to_str())
    except BadInput as error:
        raise BadInput(f"the tokenizer's --pattern cannot be exported, because tokenizers splits text differently "
                       f"({error}): train a tokenizer with one of {', '.join(PATTERNS)}") from None
    return theirs


def to_hf_pattern(pattern: str):
    """`pattern` as a `tokenizers.Regex`. Raises BadInput when Oniguruma, which matches it there, does not support it."""
    from tokenizers import Regex
    try:
        return Regex(without_possessive(pattern) if pattern in PATTERNS.values() else to_oniguruma(pattern))
    except Exception as error:  # the library raises nothing more specific
        raise BadInput(f"the tokenizer's --pattern cannot be exported: tokenizers does not support it ({error}): train a "
                       f"tokenizer with one of {', '.join(PATTERNS)}") from None


def without_possessive(pattern: str) -> str:
    """One of our patterns without possessive quantifiers, which only save time there."""
    return re.sub(r"([?*+}])\+", r"\1", pattern)


# Parts of a regular expression: escapes, classes, quantifiers, brackets and other characters
PATTERN_PART = re.compile(r"\\[pPx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]"
                          r"|(?:[?*+]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)


def to_oniguruma(pattern: str) -> str:
    r"""A{1,3}+ -> (?>A{1,3}): the possessive quantifier, which Oniguruma reads as one or more times A{1,3}."""
    parts, opened, atom = [], [], 0  # indices into `parts`: of the brackets that are open, and where the last atom starts
    for part in PATTERN_PART.findall(pattern):
        if part[0] == "{" and part[-1] == "+" and len(part) > 2:
            parts[atom:] = ["(?>", *parts[atom:], part[:-1], ")"]
            continue
        if part == ")" and opened:
            atom = opened.pop()
        elif part == "(":
            opened.append(len(parts))
        elif part[0] not in "?*+{" or len(parts) == 0 or parts[-1] == "(":
            atom = len(parts)
        parts.append(part)
    return "".join(parts)


# -- in ---------------------------------------------------------------------------------------------------------------

# Other spellings of the patterns that have a compiled scanner here -> their names
KNOWN_PATTERNS = {without_possessive(pattern): name for name, pattern in PATTERNS.items()}
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+")
KNOWN_PATTERNS[LLAMA3_PATTERN] = "gpt4"
# GPT-2's with every digit by itself, as SmolLM splits
SINGLE_DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?=\p{N})|\s+(?!\S)|\s+"


# Up to here the sum over all tokens of their squared lengths is a second's work; Llama 3's is 8 million.
MAX_SQUARED_LENGTHS = 200_000_000


def load_hf_tokenizer(folder: Path, hf_config: dict) -> Tokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt. Raises BadInput, which names the file, for anything but
    byte-level BPE with the ids that `tokenizers` gives."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        path = folder / "vocab.json"
        vocab = read_json(path)
        added = [{"id": vocab[SEPARATOR], "content": SEPARATOR, "special": True}] if SEPARATOR in vocab else []
        saved = {"model": {"type": "BPE", "vocab": vocab, "merges": read_merges(folder / "merges.txt")},
                 "added_tokens": added, "pre_tokenizer": {
                     "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}}
    else:
        saved = read_json(path)
    eos_ids = read_eos_ids(folder, hf_config)
    with explain_damage(path):
        tokenizer = read_tokenizer(saved, hf_config, eos_ids)
        check_same_ids(tokenizer, to_saved(saved))
        return tokenizer


def read_eos_ids(folder: Path, hf_config: dict) -> list[int]:
    """The ids at which the model in `folder` ends a text, from both of its configs."""
    paths, eos_ids = [folder / "config.json", folder / "generation_config.json"], []
    for path in paths:
        values = hf_config if path == paths[0] else read_json(path) if path.exists() else {}
        found = values.get("eos_token_id")
        eos_ids += found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token_id) is int for token_id in eos_ids):
            raise BadInput(f"{path}: eos_token_id is {str(found)[:40]}, neither an id nor a list of ids")
    return eos_ids


def to_saved(saved: dict) -> str:
    """The parts of a tokenizer.json that make ids of text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
                       "decoder": None, "added_tokens": [flags | token for token in saved.get("added_tokens") or []],
                       "pre_tokenizer": saved["pre_tokenizer"], "model": saved["model"]})


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


def read_tokenizer(saved: dict, hf_config: dict, eos_ids: list[int]) -> Tokenizer:
    """saved: the content of a tokenizer.json. The token that begins texts becomes our separator. Raises BadInput where our
    ids would differ from theirs."""
    model, added = saved["model"], read_added_tokens(saved)
    require_byte_level(saved)
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    products = {left + right for left, right in merges}
    ranks = {}
    for text, token_id in model["vocab"].items():
        if text in added and len(text) > 1 and text not in products:
            continue  # only written as a whole
        if (token := from_byte_level(text)) is None:
            raise BadInput(f"not a byte-level vocabulary: it holds {text[:20]!r}")
        ranks[token] = token_id
    check_merges(ranks, merges)
    bos_id, names = hf_config.get("bos_token_id"), {name: token["id"] for name, token in added.items()}
    if bos_id is None and eos_ids:
        bos_id = eos_ids[0]
    special = {SEPARATOR if token_id == bos_id and SEPARATOR not in names else name: token_id
               for name, token_id in names.items() if added[name].get("special") or token_id == bos_id or name == SEPARATOR}
    if SEPARATOR not in special:
        raise BadInput(f"neither {SEPARATOR} nor the bos_token_id of config.json is among its special tokens")
    ordinary = {name: token_id for name, token_id in names.items() if token_id not in special.values()}
    later = [name for name in ordinary if added[name].get("normalized")]
    known_ids = {*ranks.values(), *names.values()}
    return Tokenizer(ranks, read_pattern(saved["pre_tokenizer"]), special, ordinary, later,
                     [token_id for token_id in eos_ids if token_id in known_ids])


def require_byte_level(saved: dict):
    """Raises BadInput for a vocabulary of another kind, or one that changes text before it is split."""
    model, normalizer = saved["model"], saved.get("normalizer")
    if model.get("type") != "BPE" or any(model.get(name) for name in (
            "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise BadInput("not a byte-level BPE, the only kind of vocabulary that can be imported")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise BadInput(f"its normalizer, {str(normalizer.get('type'))[:40]}, changes text before it is split: only "
                       f"vocabularies without one can be imported")


def read_added_tokens(saved: dict) -> dict[str, dict]:
    """The entries of added_tokens by content. Raises BadInput for those that would be found in another way here."""
    added = {token["content"]: token for token in saved.get("added_tokens") or []}
    ordinary = {name: token for name, token in added.items() if not token.get("special")}
    for name, token in ordinary.items():
        if kind := next((kind for kind in ("lstrip", "rstrip", "single_word") if token.get(kind)), None):
            raise BadInput(f"its added token {name[:40]!r} has {kind}, so it depends on the text around it: such tokens "
                           f"cannot be imported")
    return added


def check_merges(ranks: dict[bytes, int], merges: list[tuple[str, str]]):
    """Raises BadInput unless the merges are those that our algorithm makes of the ids: one for each token, or as converted
    from tiktoken all pairs of tokens that make up a third."""
    if sum(len(token) ** 2 for token in ranks) > MAX_SQUARED_LENGTHS:
        raise BadInput("its tokens are too long to be those of a vocabulary")
    if [tuple(map(to_byte_level, pair)) for pair in recover_merges(ranks)] == merges:
        return
    theirs = [(from_byte_level(left), from_byte_level(right)) for left, right in merges]
    order = [ranks.get((left or b"") + (right or b""), -1) for left, right in theirs]
    if order != sorted(order) or len(set(theirs)) < len(theirs) or set(theirs) != set(all_merges(ranks)):
        raise BadInput("its merges are neither one for each token nor all that lead to it, in the order of its ids, so text "
                       "would be encoded as other ids")
