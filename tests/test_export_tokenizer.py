"""Vocabularies to and from the library `tokenizers`: the same ids, or a refusal."""
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from exporting import MIXED_TEXT, random_model, run_export  # noqa: E402
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as HFTokenizer  # noqa: E402

from convert.hf_tokenizer import (  # noqa: E402
    LLAMA3_PATTERN,
    add_chat_tokens,
    bytes_to_unicode,
    from_byte_level,
    load_hf_tokenizer,
    recover_merges,
    to_byte_level,
    to_hf_tokenizer,
    to_oniguruma,
)
from runtime.config import BadInput  # noqa: E402
from tokenizer import PATTERNS, Tokenizer  # noqa: E402

LANGUAGES = [
    "El niño pidió «más»: ¿por qué no? L'été, Straße, naïveté, 3ᵉ", "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία", "نص عربي مع أرقام ١٢٣٤ و٥٦٪", "עברית עם ניקוד: שָׁלוֹם", "हिन्दी में क्षत्रिय १२३४५",
    "ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "我能吞下玻璃而不伤身体。二〇二四年", "日本語のテキスト、カタカナと漢字１２３", "한국어 문장입니다 1234",
    "tiếng Việt có dấu", "🙂👩‍👩‍👧‍👦🇫🇷 ½ ② Ⅷ x² ㎏", "if x[0] != 'it\\'s':\n\treturn f\"{x!r:>10}\"  # 12_345\r\n"]


@pytest.fixture(scope="module")
def pairs(english, tmp_path_factory) -> dict:
    """pattern -> our tokenizer, and AutoTokenizer on its export, with special tokens in text encoded as text."""
    pairs = {}
    for pattern in PATTERNS:
        ours = Tokenizer.train(english[:40], 600, pattern)
        folder = run_export(random_model(n_layer=1), ours, tmp_path_factory.mktemp(pattern))
        pairs[pattern] = ours, transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return pairs


def assert_same_ids(pair, text: str):
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids, text[:50]
    assert theirs.encode(text) == [ours.separator_id, *ids]
    assert theirs.decode(ids) == ours.decode(ids)


# -- out --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", PATTERNS)
def test_exported_ids_equal_ours(pattern, pairs, english):
    for text in ["", MIXED_TEXT, *LANGUAGES, *english[40:60]]:
        assert_same_ids(pairs[pattern], text)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cn"]), st.sampled_from("'’sStTrReE 01\r\n\t\u017f"))))
def test_exported_ids_equal_ours_on_random_text(pattern, pairs, text):
    assert_same_ids(pairs[pattern], text)


@pytest.mark.integration
@pytest.mark.parametrize("pattern", PATTERNS)
def test_exported_ids_equal_ours_on_every_character(pattern, pairs):
    """Every assigned code point, next to a letter, a digit and a space."""
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    for start in range(0, len(characters), 2000):
        assert_same_ids(pairs[pattern], "".join(f"a{c}1{c} " for c in characters[start:start + 2000]))


# The text that tiktoken has for cl100k_base; other possessive quantifiers; and what Oniguruma reads otherwise
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
          r"|\s*[\r\n]|\s+(?!\S)|\s")
NUMBERS = " ".join(str(7 ** n) for n in range(60)) * 20


@pytest.mark.parametrize("pattern", [CL100K, r"(?:\p{L}\p{M}*){1,4}+|[\]0-9]{2}+|\s{1,}+|.",
                                     r"a{1,2}+b|\{{1,2}+|\p{L}+|\d{2,3}+|[^\p{L}]"])
def test_patterns_that_oniguruma_reads_otherwise_are_translated(pattern, english):
    ours = Tokenizer.train([*english[:10], NUMBERS], 600, pattern)
    theirs = to_hf_tokenizer(ours)
    theirs.encode_special_tokens = True
    for text in [MIXED_TEXT, "1234567 aab aaab {{{ ]]]0", *LANGUAGES, *english[40:60]]:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text), text[:50]


def test_possessive_quantifiers_by_hand():
    assert to_oniguruma(r"\p{N}{1,3}+|[a\]{2}+]{2}+|(?:a|(b)){,4}+c{2}+?x++\{1}+") == \
        r"(?>\p{N}{1,3})|(?>[a\]{2}+]{2})|(?>(?:a|(b)){,4})(?>c{2})?x++\{1}+"


@pytest.mark.parametrize("pattern", [r"^\w+|\s+|.", r"\w+$|\s|.", r"[a-z&&[^x]]+|\s+|."])
def test_a_pattern_that_splits_text_otherwise_there_is_refused(pattern, tokenizer_600):
    with pytest.raises(BadInput, match="--pattern cannot be exported, because tokenizers splits text differently"):
        to_hf_tokenizer(Tokenizer(tokenizer_600.ranks, pattern, tokenizer_600.special_tokens))


def test_exported_special_tokens_are_special(tokenizer_600):
    """As everywhere in transformers, unless split_special_tokens is set. Ids may leave gaps."""
    ours = Tokenizer(tokenizer_600.ranks, "gpt4", {"<|endoftext|>": 700, "<|user|>": 650})
    theirs = to_hf_tokenizer(ours)
    assert theirs.encode("a<|user|>b").ids == [700, *ours.encode("a"), 650, *ours.encode("b")]
    assert theirs.decode([700, *ours.encode("ab")]) == "ab"


def test_the_chat_template_makes_our_ids(tokenizer_600, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(run_export(random_model(), tokenizer_600, tmp_path))
    messages = [{"role": "system", "content": " be brief\n"},
                {"role": "user", "content": MIXED_TEXT.replace("<|endoftext|>", "")},
                {"role": "assistant", "content": "42"}, {"role": "user", "content": "why?"}]
    for prompt in (False, True):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ids == tokenizer_600.encode_chat(messages, prompt)[0]
    with pytest.raises(Exception, match="unknown role robot"):
        theirs.apply_chat_template([{"role": "robot", "content": "x"}])


# -- in ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer_600(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600)


def gpt2_splitter():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def single_digits_splitter():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_splitter()])


def regex_splitter(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("splitter, is_compiled", [
    (gpt2_splitter(), True), (single_digits_splitter(), False), (regex_splitter(LLAMA3_PATTERN), True),
    (regex_splitter(r"\w+|\s+"), False)], ids=["gpt2", "smollm", "llama3", "words"])
def test_imported_ids_equal_theirs(splitter, is_compiled, english, tmp_path):
    """Of a vocabulary that `tokenizers` trained: special tokens first, other order of bytes, a separator of another name."""
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = splitter, decoders.ByteLevel()
    theirs.train_from_iterator(english[:40], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(bytes_to_unicode().values()),
        special_tokens=["<|begin|>", "<|end_of_text|>"], show_progress=False))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf_tokenizer(tmp_path, {"bos_token_id": 0, "eos_token_id": [1]})
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|end_of_text|>": 1}
    for text in [MIXED_TEXT, " 12  345\n 6a7 ½  ", "x  1", "a\n\n1", "  ", "'S 'll't", *LANGUAGES, *english[40:60]]:
        assert ours.encode(text) == theirs.encode(text).ids, text[:50]
    assert (ours.splitter is not None) == is_compiled


@pytest.fixture(scope="module")
def theirs_600(english) -> dict:
    """The saved form of a vocabulary that `tokenizers` trained, split as GPT-2 does."""
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = gpt2_splitter(), decoders.ByteLevel()
    theirs.train_from_iterator(english[:40], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(bytes_to_unicode().values()), special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False))
    return json.loads(theirs.to_str())


def import_saved(saved: dict, folder, **hf_config) -> tuple[Tokenizer, HFTokenizer]:
    """Ours and theirs of the content of a tokenizer.json, special tokens in text being text for both."""
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    theirs = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return load_hf_tokenizer(folder, {"bos_token_id": 0} | hf_config), theirs


ADDED = ["<think>", "</think>", "  ", "    ", "        ", "the", "then", "<tool_call>", "é!", "\n\n\n", "<|user|>", "nk> ",
         "> <"]


@pytest.fixture(scope="module")
def with_added_tokens(theirs_600, tmp_path_factory) -> tuple[Tokenizer, HFTokenizer]:
    """"the" is also a result of merging."""
    theirs = HFTokenizer.from_str(json.dumps(theirs_600))
    theirs.add_tokens([AddedToken(text, normalized=" " in text) for text in ADDED])
    return import_saved(json.loads(theirs.to_str()), tmp_path_factory.mktemp("added"))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from([*ADDED, "<", "think", " ", "\n", "a", "12", "'s", "<|im_end|>", "é"]), max_size=12))
def test_ids_of_added_tokens_equal_theirs(parts, with_added_tokens):
    """Which are no special tokens: <think>, runs of spaces, words, some inside others."""
    ours, theirs = with_added_tokens
    text = "".join(parts)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids and ours.decode(ids) == text


def test_added_tokens_are_exported_and_imported_again(with_added_tokens, english, tmp_path):
    ours, theirs = with_added_tokens
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|im_end|>": 1} and ours.added_tokens["the"] < 600
    again = to_hf_tokenizer(ours)
    again.encode_special_tokens = True
    for text in (MIXED_TEXT, "<think>then</think>  the      é!\n\n\n<|user|>", *english[50:55]):
        assert again.encode(text, add_special_tokens=False).ids == ours.encode(text) == theirs.encode(text).ids
    assert import_saved(json.loads(again.to_str()), tmp_path)[0].to_json() == ours.to_json()
    chat = add_chat_tokens(ours)  # one of the tokens of conversations is there already
    assert chat.special_tokens["<|user|>"] == ours.added_tokens["<|user|>"] and "<|user|>" not in chat.added_tokens
    assert chat.vocab_size == ours.vocab_size + 3 and len(chat.encode("<|user|>")) > 1


def test_only_the_models_own_tokens_end_a_text(theirs_600, tmp_path):
    """Those of config.json and of generation_config.json, and our separator."""
    ours = import_saved(theirs_600, tmp_path)[0]
    assert ours.end_ids == {0}
    assert import_saved(theirs_600, tmp_path, eos_token_id=1)[0].end_ids == {0, 1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 300, 70000]}')
    ours = import_saved(theirs_600, tmp_path)[0]
    assert ours.end_ids == {0, 1, 300}
    assert {0, 1, 300} < add_chat_tokens(ours).end_ids and len(add_chat_tokens(ours).end_ids) == 7
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "1"}')
    with pytest.raises(BadInput, match="generation_config.json: eos_token_id is 1, neither an id"):
        import_saved(theirs_600, tmp_path)


def as_tiktoken_is_converted(ranks: dict[bytes, int], pattern: str, ignore_merges: bool = True) -> dict:
    """As transformers' TikTokenConverter does it for Llama 3: all pairs that make up a token, by its rank and theirs."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    theirs = HFTokenizer(models.BPE({to_byte_level(token): rank for token, rank in ranks.items()},
                                    [tuple(map(to_byte_level, pair)) for pair in merges], ignore_merges=ignore_merges))
    theirs.pre_tokenizer, theirs.decoder = regex_splitter(pattern), decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken("<|begin_of_text|>", normalized=False)])
    return json.loads(theirs.to_str())


def test_a_vocabulary_made_from_tiktoken(tokenizer_600, english, tmp_path):
    """Several merges a token, and words that no merges lead to, as in Llama 3's; and out again."""
    ranks = tokenizer_600.mergeable_ranks()
    ranks |= {word.encode(): len(ranks) + i for i, word in enumerate((" xylophone", "qqzz", "....!"))}
    saved = as_tiktoken_is_converted(ranks, LLAMA3_PATTERN)
    assert len(saved["model"]["merges"]) > len(ranks) - 256
    ours, theirs = import_saved(saved, tmp_path, bos_token_id=len(ranks))
    exported = to_hf_tokenizer(ours)
    exported.encode_special_tokens = True
    for text in [MIXED_TEXT, "a xylophone, qqzz....! qqz", *LANGUAGES, *english[40:60]]:
        assert ours.encode(text) == theirs.encode(text).ids == exported.encode(text, add_special_tokens=False).ids
    saved["model"]["merges"].pop(5)
    with pytest.raises(BadInput, match="its merges are neither") as error:
        import_saved(saved, tmp_path, bos_token_id=len(ranks))
    assert str(error.value).count("tokenizer.json") == 1
    with pytest.raises(BadInput, match="' xylophone' is encoded as .* here, by tokenizers as"):
        import_saved(as_tiktoken_is_converted(ranks, LLAMA3_PATTERN, ignore_merges=False), tmp_path, bos_token_id=len(ranks))


def test_a_vocabulary_that_lacks_bytes(english, tmp_path):
    """As SmolLM2's does: the bytes that its training text lacked. Then theirs drops them, ours refuses."""
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer = single_digits_splitter()
    theirs.train_from_iterator(english[:40], trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"],
                                                                 show_progress=False))
    ours, theirs = import_saved(json.loads(theirs.to_str()), tmp_path)
    assert ours.lacks_byte.sum() > 50
    for text in english[:40]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert theirs.decode(theirs.encode("a🙂b").ids) != "a🙂b"
    with pytest.raises(BadInput, match="no token for the byte 0xF0"):
        ours.encode("a🙂b")
    assert to_hf_tokenizer(ours).encode(english[3], add_special_tokens=False).ids == ours.encode(english[3])


def test_byte_level_strings_by_hand():
    assert to_byte_level(b" the\n") == "ĠtheĊ" and from_byte_level("ĠtheĊ") == b" the\n" and from_byte_level("▁the") is None
    assert len(set(bytes_to_unicode().values())) == 256


def test_recovered_merges_by_hand():
    """Merging never reaches "cab" by its parts' ranks alone, and "xyz" has no parts."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6, b"xyz": 7}
    assert recover_merges(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"c", b"ab")]


@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["model"]["merges"].reverse(), "its merges are neither"),
    (lambda saved: saved["model"]["merges"].pop(0), "its merges are neither"),
    (lambda saved: saved["model"]["vocab"].update({"▁the": 700}), "not a byte-level vocabulary"),
    (lambda saved: saved["added_tokens"].clear(), "bos_token_id"),
    (lambda saved: saved.update(normalizer={"type": "NFC"}), "its normalizer, NFC, changes text"),
    (lambda saved: saved.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda saved: saved.update(pre_tokenizer=None), "pre-tokenizer"),
    (lambda saved: saved["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits"}), "Digits, Split, ByteLevel"),
    (lambda saved: saved["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"^.*|\s+|."}), "encoded as"),
    (lambda saved: saved["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(?P<a>x)|."}), "cannot use it"),
    (lambda saved: saved["added_tokens"].append(added_token("x", rstrip=True)), "'x' has rstrip"),
    (lambda saved: saved["added_tokens"].append(added_token("the")), "encoded as"),
    (lambda saved: saved["model"].update(dropout=0.1), "not a byte-level BPE"),
    (lambda saved: saved["model"].update(end_of_word_suffix="</w>"), "not a byte-level BPE"),
    (lambda saved: saved["model"]["vocab"].update({"a" * 20_000: 700}), "too long"),
    (lambda saved: saved["model"].update(merges=[["a"]]), "damaged"),
    (lambda saved: saved["model"].update(vocab=[1]), "damaged"), (lambda saved: saved.update(model=None), "damaged"),
    (lambda saved: saved.update(added_tokens=[7]), "damaged")])
def test_a_vocabulary_that_would_give_other_ids_is_refused(change, words, saved_600, tmp_path):
    saved = json.loads(saved_600)
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(BadInput, match=words) as error:
        load_hf_tokenizer(tmp_path, {"bos_token_id": 595})
    assert str(error.value).count("tokenizer.json") == 1


@pytest.fixture(scope="module")
def saved_600(tokenizer_600) -> str:
    return to_hf_tokenizer(tokenizer_600).to_str()


def added_token(content: str, **changes) -> dict:
    return {"id": 700 + len(content), "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False} | changes
