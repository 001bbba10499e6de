"""text/documents.py: documents packed as UTF-8."""
import numpy as np
import pytest

from text.documents import PackedDocuments

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
