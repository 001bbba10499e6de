"""Vocabularies to and from the library `tokenizers`: the same ids, or a refusal."""
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from exporting import MIXED_TEXT, random_model, run_export  # noqa: E402
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402
from tokenizers import Tokenizer as HFTokenizer  # noqa: E402

from convert.hf_tokenizer import (  # noqa: E402
    LLAMA3_PATTERN,
    bytes_to_unicode,
    from_byte_level,
    load_hf_tokenizer,
    recover_merges,
    to_byte_level,
    to_hf_tokenizer,
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


def test_byte_level_strings_by_hand():
    assert to_byte_level(b" the\n") == "ĠtheĊ" and from_byte_level("ĠtheĊ") == b" the\n" and from_byte_level("▁the") is None
    assert len(set(bytes_to_unicode().values())) == 256


def test_recovered_merges_by_hand():
    """Merging never reaches "cab" by its parts' ranks alone, and "xyz" has no parts."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6, b"xyz": 7}
    assert recover_merges(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"c", b"ab")]


@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["model"]["merges"].reverse(), "not in the order"),
    (lambda saved: saved["model"]["merges"].pop(0), "not in the order"),
    (lambda saved: saved["model"]["vocab"].update({"▁the": 700}), "not a byte-level vocabulary"),
    (lambda saved: saved["added_tokens"].clear(), "bos_token_id"),
    (lambda saved: saved.update(normalizer={"type": "NFC"}), "not a byte-level BPE"),
    (lambda saved: saved.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda saved: saved.update(pre_tokenizer=None), "pre-tokenizer")],
    ids=["merges-reversed", "merge-missing", "sentencepiece-token", "no-special-tokens", "normalizer", "whitespace", "none"])
def test_a_vocabulary_that_would_give_other_ids_is_refused(change, words, tokenizer_600, tmp_path):
    saved = json.loads(to_hf_tokenizer(tokenizer_600).to_str())
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(BadInput, match=words):
        load_hf_tokenizer(tmp_path, {"bos_token_id": 595})
