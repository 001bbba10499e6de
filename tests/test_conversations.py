"""Where conversations and multiple choice come from: files, the hub, the built-in questions."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from runtime.config import BadInput
from tasks import builtin_questions
from tasks.builtin_questions import MAKERS, is_held_out, make_questions
from tasks.conversations import MAX_TURNS, ConversationConfig, ReadReport, read_conversations
from tasks.multiple_choice import read_choices
from tasks.rows import read_dataset
from tokenizer import ROLES

MESSAGES = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
HELLASWAG = {"ctx": "If x is None, the", "endings": ["sea", "default is used", "cat", "dog runs"], "label": "1"}
ARC = {"question": "Which is a number?", "choices": {"text": ["dog", "one", "cat"], "label": ["A", "B", "C"]},
       "answerKey": "B"}


def write_jsonl(path, rows: list):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- built-in questions -----------------------------------------------------------------------------------------------

@pytest.fixture
def few_documents(english, monkeypatch):
    """Makes look-up questions from a part of the built-in text; all of it takes seconds to collect."""
    monkeypatch.setattr(builtin_questions, "builtin_texts", lambda: english)
    builtin_questions.passages.cache_clear()
    yield
    builtin_questions.passages.cache_clear()


def numbers_in(text: str) -> list[int]:
    return [int(word) for word in text.replace("?", " ").replace(".", " ").replace(",", " ").split() if word.isdigit()]


def solve(task: str, text: str) -> str:
    """The answer, worked out from the text of the question."""
    words = text.split(": ", 1)[-1].split()
    if task == "sum":
        return str(sum(numbers_in(text)))
    if task == "difference":
        total, a, b, d = numbers_in(text)
        return str(total - a - b + d)
    if task == "larger":
        return str(max(numbers_in(text)))
    if task == "count":
        first, last = numbers_in(text)
        return " ".join(map(str, range(first, last + 1)))
    if task == "repeat":
        *repeated, times = text.removeprefix("Say ").rstrip(".").replace(" times", "").split()
        return " ".join(repeated * {"twice": 2, "three": 3, "four": 4}[times])
    if task in ("after", "before"):
        i = words.index(text.split(" in: ")[0].split()[-1])
        return words[i + (1 if task == "after" else -1)]
    return {"backwards": " ".join(reversed(words)), "last": words[-1], "second": "".join(words[1:2]),
            "sorted": " ".join(sorted(words)), "length": str(len(words))}[task]


def test_answers_are_right(few_documents):
    questions = list(make_questions(600, 3, held_out=False))
    assert {question.task for question in questions} == {task for makers in MAKERS.values() for task in makers}
    for question in questions:
        assert question.answer == solve(question.task, question.text), question


def test_questions_are_different_and_depend_on_the_seed(few_documents):
    first, again, other = (list(make_questions(240, seed, held_out=True)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({question.text for question in first}) == len(first) == 240


def test_held_out_questions_are_apart_whatever_the_seeds(few_documents):
    held_out = {question.text for question in make_questions(2400, 5, held_out=True)}
    train = {question.text for question in make_questions(2400, 6, held_out=False)}
    assert not held_out & train
    assert all(is_held_out(text) for text in held_out if " in: " not in text)
    passages = [{text.split(" in: ")[1] for text in texts if " in: " in text} for texts in (held_out, train)]
    # whole documents are held out; a few runs of words occur in two documents
    assert all(passages) and len(passages[0] & passages[1]) <= 0.02 * len(passages[0])


@pytest.mark.integration  # all 60,000 questions, from all of the built-in text
def test_built_in_conversations():
    train, held_out = read_conversations(ConversationConfig(dataset="builtin", val_conversations=120), ROLES)
    n_turns = [len(one.messages) // 2 for one in train]
    assert set(n_turns) == set(range(1, MAX_TURNS + 1)) and sum(n_turns) > 50_000
    assert len(held_out) == 120 and all(len(one.messages) == 2 for one in held_out)
    assert {(one.kind, one.task) for one in held_out} == {(kind, task) for kind, makers in MAKERS.items() for task in makers}
    questions = {message["content"] for one in train for message in one.messages if message["role"] == "user"}
    assert not questions & {one.messages[0]["content"] for one in held_out}


# -- conversations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields, expected", [
    ({}, ("", "")), ({"task": "sums"}, ("sums", "sums")), ({"category": "open_qa"}, ("open_qa", "open_qa")),
    ({"kind": "maths", "task": "sums"}, ("maths", "sums")), ({"kind": "m: easy", "task": "a: b"}, ("m: easy", "a: b")),
    ({"kind": "maths"}, ("maths", "")), ({"task": 7, "kind": ["x"]}, ("7", "7")),
    ({"task": "half \ud83d"}, ("half \ufffd",) * 2)], ids=ascii)
def test_kind_and_task_are_fields_of_the_row(fields, expected, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "yes"} | fields for i in range(4)])
    train, held_out = read_conversations(ConversationConfig(dataset=str(path)), ROLES)
    assert {(one.kind, one.task) for one in train + held_out} == {expected}


def test_local_files_and_the_hub_give_the_same(tmp_path, hub):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(50)]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "a.jsonl", rows[:12])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[12:]), tmp_path / "files" / "b.parquet")
    hub.add("org/talk", {"default": [rows]})
    local, remote = (read_conversations(ConversationConfig(dataset=dataset, val_conversations=5), ROLES)
                     for dataset in (str(tmp_path / "files"), "org/talk"))
    assert [[one.messages for one in part] for part in local] == [[one.messages for one in part] for part in remote]
    train, held_out = local
    assert len(train) == 45 and len(held_out) == 5
    assert train[0].where.startswith(f"{tmp_path / 'files' / 'a.jsonl'}: line ")


def read(rows: list[dict], tmp_path, n: int) -> tuple[list, list]:
    """What is trained on and what is held out of `rows`, each conversation as the contents of its messages."""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    parts = read_conversations(ConversationConfig(str(path), val_conversations=n), ROLES)
    return tuple([tuple(message["content"] for message in one.messages) for one in part] for part in parts)


GREETINGS = [["hi", "hello", f"{i // 2} plus {i % 2}?", "1"] for i in range(1000)]


@pytest.mark.parametrize("rows, n, expected", [
    ([{"question": f"{i}?", "answer": "a"} for i in range(3000)], 240, 240),
    ([{"question": f"{i}?", "answer": "a"} for i in range(100)], 240, 10),
    ([{"question": f"{i}?", "answer": "a"} for i in range(3)], 240, 1),
    ([{"question": f"{i // 4}?", "answer": str(i)} for i in range(400)], 40, 40),
    ([{"question": f"{i // 4}?", "answer": str(i)} for i in range(12)], 3, 1),   # every group is larger than the share
    ([{"question": f"{i % 2}?" + " " * (i % 3), "answer": str(i)} for i in range(1000)], 240, 100),
    ([{"question": "0?" if i < 50 else f"{i}?", "answer": str(i)} for i in range(100)], 20, 10),
    ([{"system": f"{i}", "question": "the same?", "answer": "a"} for i in range(100)], 240, 10),
    ([{"data": [f"hi {i % 7}", *turns[1:]]} for i, turns in enumerate(GREETINGS)], 240, 100)], ids=[
        "many", "few", "three", "of 4 answers", "few of 4 answers", "two questions", "half ask the same",
            "system texts", "7 greetings"])
def test_held_out_share_and_what_leaks(rows, n, expected, tmp_path):
    """At most --val_conversations and a tenth are held out; what is asked there is not trained on."""
    train, held_out = read(rows, tmp_path, n)
    n_unused = {12: 3, 1000: 400}.get(len(rows), 0) if "data" not in rows[0] else 0  # of questions with many answers
    assert len(held_out) == expected and len(train) == len(rows) - expected - n_unused
    asked = [{turns[:-1] if "hi" not in turns[0] else turns[2:-1] for turns in part} for part in (train, held_out)]
    asked = [{tuple(text.strip() for text in turns) for turns in part} for part in asked]
    assert train and not asked[0] & asked[1]
    again = read(rows[::-1], tmp_path, n)
    assert [sorted(part) for part in again] == [sorted(train), sorted(held_out)]


def test_conversations_that_the_training_files_go_on_with_are_not_trained_on(tmp_path):
    """Nor those that differ in white space."""
    turns = ["a?", "a", "b?", "b", "c?", "c"]
    write_jsonl(tmp_path / "train.jsonl", [{"data": turns}, {"data": ["d? ", "d"]}, {"data": ["e?", "e"]}])
    write_jsonl(tmp_path / "test.jsonl", [{"data": turns[:4]}, {"data": ["d?", "other"]}])
    report = ReadReport()
    train, held_out = read_conversations(ConversationConfig(str(tmp_path)), ROLES, report)
    assert [one.messages[0]["content"] for one in train] == ["e?"] and len(held_out) == 2
    assert "not trained on: 2 conversations whose question is held out" in report.lines()


def test_conversations_that_ask_the_same_cannot_be_held_out(tmp_path):
    with pytest.raises(BadInput, match="ask the same"):
        read([{"question": "?", "answer": str(i)} for i in range(9)], tmp_path, 3)


def test_held_out_files_of_a_folder(tmp_path):
    """A folder's validation files, else its test files, are what is held out; their questions are not trained on."""
    write_jsonl(tmp_path / "train.jsonl", [{"question": f"{i}?", "answer": "a"} for i in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [{"question": f"{i}?", "answer": "a"} for i in range(28, 50)])
    for files, n, n_train in (("test", 100, 28), ("validation", 5, 30)):
        report = ReadReport()
        train, held_out = read_conversations(ConversationConfig(str(tmp_path), val_conversations=n), ROLES, report)
        assert len(train) == n_train and all(f"{files}.jsonl" in one.where for one in held_out)
        assert f"conversations in its {files} files" in report.notes[0]
        write_jsonl(tmp_path / "validation.jsonl", [{"question": f"v{i}?", "answer": "a"} for i in range(9)])
    assert len(held_out) == 5 and "held out: 5 of the 9" in report.notes[0]


def test_rows_that_cannot_be_read_are_counted(tmp_path):
    good = [{"messages": [{"role": "user", "content": f"{i}?"}, MESSAGES[1]], "id": i} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES[:1]}, *good, {"messages": None}])
    with pytest.raises(BadInput, match="a.jsonl: line 1: has no message of the assistant.*--skip_errors=1 leaves such rows"):
        read_conversations(ConversationConfig(str(path)), ROLES)
    train, held_out = read_conversations(ConversationConfig(str(path), skip_errors=True), ROLES, report := ReadReport())
    assert len(train) + len(held_out) == 5 and len(report.skipped) == 2
    assert report.lines()[0].startswith(f"left out 2 that cannot be read, the first: {path}: line 1: has no message")
    assert report.lines()[1:] == ["columns not used: id"]
    write_jsonl(path, [{"messages": None}])
    with pytest.raises(BadInput, match="holds no conversations that can be read, the first: .*line 1: has no messages"):
        read_conversations(ConversationConfig(str(path), skip_errors=True), ROLES)


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"hi", "a.txt"), ("bad.jsonl", b'{"messages"\n', "bad.jsonl: line 1"), ("list.jsonl", b"[1]\n", "JSON object"),
    ("bad.parquet", b"PAR1", "bad.parquet"), ("one.jsonl", json.dumps({"messages": MESSAGES}).encode(), "ask the same"),
    ("empty.jsonl", b"", "holds no conversations")])
def test_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_conversations(ConversationConfig(dataset=str(tmp_path / name)), ROLES)


@pytest.mark.parametrize("dataset, words", [
    ("", "is empty"), ("org/text", "--dataset=org/text: row 1: has text.*its columns are text.$"), ("org/none", "org/none"),
    ("gone.jsonl", "no such file")])
def test_bad_dataset_is_named(hub, dataset, words):
    hub.add("org/text", {"default": [[{"text": "hi"}]]})
    with pytest.raises(BadInput, match=words):
        read_conversations(ConversationConfig(dataset=dataset), ROLES)


def test_column_flags_go_together_and_must_exist(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(BadInput, match="give both or none"):
        ConversationConfig(question_column="q")
    with pytest.raises(BadInput, match="columns q and a"):
        read_conversations(ConversationConfig(dataset=str(path), question_column="q", answer_column="a"), ROLES)
    with pytest.raises(BadInput, match="--dataset_config=x"):
        list(read_dataset(str(path), "x", "train"))


# -- multiple choice --------------------------------------------------------------------------------------------------

def test_choices_that_cannot_be_used_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [HELLASWAG | {"label": ""}, HELLASWAG, {"ctx": "no endings"}])
    with pytest.raises(BadInput, match="a.jsonl: line 1: the label is ''.*--skip_errors=1 leaves such rows out"):
        read_choices(str(path), None, "train")
    assert len(read_choices(str(path), None, "train", skipped=(skipped := []))) == 1
    assert [message.split(": ")[1] for message in skipped] == ["line 1", "line 3"]
    write_jsonl(path, [HELLASWAG | {"label": ""}])
    with pytest.raises(BadInput, match="has no rows that can be used, the first: .*line 1"):
        read_choices(str(path), None, "train", skipped=[])


def test_limit_stops_before_a_bad_choice(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [HELLASWAG, {"ctx": "no endings"}])
    assert [choice.label for choice in read_choices(str(path), None, "train", limit=1)] == [1]


def test_no_choices(tmp_path):
    with pytest.raises(BadInput, match="has no rows"):
        read_choices(str(write_jsonl(tmp_path / "a.jsonl", [])), None, "train")
