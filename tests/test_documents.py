"""text/documents.py: documents packed as UTF-8."""
import numpy as np
import pytest

from text.documents import DocumentSet, PackedDocuments, document_hashes

TEXTS = ["one", "", "zwei ä", b"b\xffad", "\ud83d\ude42 \ud800"]
STRINGS = ["one", "", "zwei ä", "b\ufffdad", "🙂 \ufffd"]  # invalid bytes and lone surrogates are replaced


@pytest.fixture
def documents() -> PackedDocuments:
    return PackedDocuments.from_strings(TEXTS)


def test_strings_are_packed_end_to_end(documents):
    assert list(documents.strings()) == STRINGS and len(documents) == 5
    assert documents.utf8.tobytes() == "".join(STRINGS).encode()
    assert documents.offsets.tolist() == [0, 3, 3, 10, 16, 24]


def test_packed_utf8_is_taken_as_it_is():
    assert list(PackedDocuments.from_utf8([b"a", np.frombuffer(b"bc", np.uint8)]).strings()) == ["a", "bc"]
    assert len(PackedDocuments.from_utf8([])) == 0


def test_a_slice_starts_at_offset_0(documents):
    part = documents.slice(1, 4)
    assert list(part.strings()) == STRINGS[1:4] and part.offsets[0] == 0
    assert len(documents.slice(2, 2)) == 0


def test_a_mask_selects_documents(documents):
    assert list(documents.select(np.array([True, False, True, False, True])).strings()) == STRINGS[::2]
    assert documents.select(np.ones(5, bool)) is documents


def test_batches_are_concatenated(documents):
    joined = PackedDocuments.concat([documents, PackedDocuments.from_utf8([]), documents.slice(0, 1)])
    assert list(joined.strings()) == [*STRINGS, "one"]
    assert PackedDocuments.concat([documents]) is documents


SPACE = " \t\n" * 30


@pytest.mark.parametrize("text, is_in", [
    ("one", True), ("  one\n", True), (f"{SPACE}one{SPACE}", True), ("on", False), ("one.", False), ("One", False),
    ("", True), (SPACE, True), ("x" * 100 + "y" + "x" * 100, True), ("x" * 100 + "z" + "x" * 100, False),
    ("ä\u00a0", True), ("ä", False), ("12345678", True), ("123456789", False)])
def test_a_set_of_documents(text, is_in):
    """White space of ASCII at the ends does not count; the middle of a text does."""
    documents = DocumentSet()
    assert documents.find(PackedDocuments.from_strings([text])).tolist() == [-1]
    documents.add(PackedDocuments.from_strings([" one ", "x" * 100 + "y" + "x" * 100, "\n"]))
    documents.add(PackedDocuments.from_strings(["ä\u00a0", "12345678"]))
    for others in ([], ["two", "three"]):
        found = documents.find(PackedDocuments.from_strings([*others, text, *others]))
        assert (found >= 0).tolist() == [False] * len(others) + [is_in] + [False] * len(others)


def test_a_set_of_documents_is_that_of_their_stripped_bytes():
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice(list(b"ab \n"), rng.integers(0, 12))) for _ in range(2000)]
    documents, known = DocumentSet(), {text.strip() for text in texts[:300]}
    documents.add(PackedDocuments.from_utf8(texts[:300]))
    found = documents.find(PackedDocuments.from_utf8(texts))
    assert (found >= 0).tolist() == [text.strip() in known for text in texts]
    assert len(documents) == len(known) and sorted({*found.tolist()}) == [*range(-1, len(known))]
    assert len(documents.find(PackedDocuments.from_utf8([]))) == 0


def test_hashes_are_the_same_on_every_machine():
    """The validation split is chosen by them: another hash would choose another one."""
    documents = PackedDocuments.from_strings(["one", " one\n", "zwei ä", ""])
    assert [f"{number:016x}" for number in document_hashes(documents).tolist()] == [
        "c915768baaddf234", "c915768baaddf234", "1e04baf77c89f090", "b4b2797457a0a6e4"]
    one, two = DocumentSet(), DocumentSet()
    one.add(documents.slice(0, 3))
    two.add(documents.slice(1, 3))
    assert one.digest() == two.digest() != DocumentSet().digest()
