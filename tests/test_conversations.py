"""Where conversations and multiple choice come from: files, the hub, the built-in questions."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from runtime.config import BadInput
from tasks import builtin_questions
from tasks.builtin_questions import MAKERS, is_held_out, make_questions
from tasks.conversations import MAX_TURNS, ConversationConfig, parse_messages, read_conversations
from tasks.multiple_choice import parse_choice, read_choices
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

@pytest.mark.parametrize("row, config", [
    ({"messages": MESSAGES}, {}), ({"question": "who?", "answer": "me"}, {}), ({"instruction": "who?", "output": "me"}, {}),
    ({"instruction": "who?", "context": "", "response": "me"}, {}), ({"prompt": "who?", "completion": "me"}, {}),
    ({"q": "who?", "a": "me", "question": 1, "answer": 2}, {"question_column": "q", "answer_column": "a"}),
    ({"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]}, {})], ids=str)
def test_row_formats(row, config):
    assert parse_messages(row, ConversationConfig(**config)) == MESSAGES


def test_context_is_appended_to_the_question():
    row = {"instruction": "Sum up.", "input": "A long text.", "output": "Text."}
    assert parse_messages(row, ConversationConfig())[0]["content"] == "Sum up.\n\nA long text."


@pytest.mark.parametrize("fields, expected", [
    ({}, ("", "")), ({"task": "sums"}, ("sums", "sums")), ({"category": "open_qa"}, ("open_qa", "open_qa")),
    ({"kind": "maths", "task": "sums"}, ("maths", "sums")), ({"kind": "m: easy", "task": "a: b"}, ("m: easy", "a: b")),
    ({"kind": "maths"}, ("maths", ""))], ids=str)
def test_kind_and_task_are_fields_of_the_row(fields, expected, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "yes"} | fields for i in range(4)])
    train, held_out = read_conversations(ConversationConfig(dataset=str(path)), ROLES)
    assert {(one.kind, one.task) for one in train + held_out} == {expected}


def test_local_files_and_the_hub_give_the_same(tmp_path, hub):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(20)]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "a.jsonl", rows[:12])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[12:]), tmp_path / "files" / "b.parquet")
    hub.add("org/talk", {"default": [rows]})
    local, remote = (read_conversations(ConversationConfig(dataset=dataset, val_conversations=5), ROLES)
                     for dataset in (str(tmp_path / "files"), "org/talk"))
    assert [[one.messages for one in part] for part in local] == [[one.messages for one in part] for part in remote]
    train, held_out = local
    assert len(train) == 15 and len(held_out) == 5
    assert train[0].where.startswith(f"{tmp_path / 'files' / 'a.jsonl'}: line ")


def test_conversations_with_the_same_first_message_stay_together(tmp_path):
    rows = [{"question": f"{i // 4}?", "answer": str(i)} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, held_out = read_conversations(ConversationConfig(str(path), val_conversations=3), ROLES)
    questions = lambda part: {one.messages[0]["content"] for one in part}
    assert len(held_out) == 12 and not questions(train) & questions(held_out)


@pytest.mark.parametrize("row, words", [
    ({"messages": []}, "has no messages in its conversation"), ({"messages": "hi"}, "not a list"),
    ({"text": "hi"}, "has no messages, nor question"), ({"messages": [{"role": "user"}]}, "no role and content"),
    ({"messages": ["hi"]}, "no role and content"), ({"messages": [{"role": "x", "content": ""}]}, "unknown role 'x'"),
    ({"messages": [{"role": "user", "content": None}]}, "type NoneType"),
    ({"question": "who?", "answer": None}, "type NoneType"), ({"question": None, "answer": "me"}, "type NoneType"),
    ({"conversations": None}, "has no messages in its conversation")], ids=str)
def test_bad_row_is_named(row, words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES}, row])
    with pytest.raises(BadInput, match=words) as error:
        read_conversations(ConversationConfig(dataset=str(path)), ROLES)
    assert str(error.value).startswith(f"{path}: line 2: ")


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"hi", "a.txt"), ("bad.jsonl", b'{"messages"\n', "bad.jsonl: line 1"), ("list.jsonl", b"[1]\n", "JSON object"),
    ("bad.parquet", b"PAR1", "bad.parquet"), ("one.jsonl", json.dumps({"messages": MESSAGES}).encode(), "too few"),
    ("empty.jsonl", b"", "holds no conversations")])
def test_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_conversations(ConversationConfig(dataset=str(tmp_path / name)), ROLES)


@pytest.mark.parametrize("dataset, words", [
    ("", "is empty"), ("org/text", "--dataset=org/text: row 1: has no messages"), ("org/none", "org/none"),
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

@pytest.mark.parametrize("row, context, endings, label", [
    (HELLASWAG, HELLASWAG["ctx"], HELLASWAG["endings"], 1),
    (HELLASWAG | {"label": 3}, HELLASWAG["ctx"], HELLASWAG["endings"], 3),
    (ARC, "Which is a number?", ["dog", "one", "cat"], 1),
    (ARC | {"choices": {"text": ["dog", "one"], "label": ["1", "2"]}, "answerKey": "2"}, "Which is a number?",
     ["dog", "one"], 1),
    ({"query": "Go on", "choices": ["a", "b"], "gold": 1}, "Go on", ["a", "b"], 1),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, "Which?", ["a", "b"], 0)], ids=str)
def test_choice_formats(row, context, endings, label):
    choice = parse_choice(row, "here")
    assert (choice.context, choice.endings, choice.label, choice.where) == (context, endings, label, "here")


def test_choice_columns_by_name():
    row = {"text": "Go on", "ctx": "not this", "endings": ["a", "b"], "label": 0, "right": "1"}
    choice = parse_choice(row, "", question_column="text", answer_column="right")
    assert (choice.context, choice.label) == ("Go on", 1)


@pytest.mark.parametrize("changes, words", [
    ({"label": ""}, "the label is '': must be one of 0, 1, 2, 3"), ({"label": "4"}, "the label is '4'"),
    ({"label": -1}, "the label is '-1'"), ({"label": None}, "the label is 'None'"), ({"label": "B"}, "the label is 'B'"),
    ({"endings": ["one"]}, "has 1 endings: give at least 2"), ({"endings": "one"}, "has no list of endings"),
    ({"endings": {"label": ["A"]}}, "has no list of endings"), ({"endings": ["a", ""]}, "an ending is empty"),
    ({"endings": ["a", 5]}, "is not text"), ({"ctx": None}, "is not text")], ids=str)
def test_bad_choice_is_named(changes, words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [HELLASWAG, HELLASWAG | changes])
    with pytest.raises(BadInput, match=words) as error:
        read_choices(str(path), None, "train")
    assert str(error.value).startswith(f"{path}: line 2: ")


def test_limit_stops_before_a_bad_choice(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [HELLASWAG, {"ctx": "no endings"}])
    assert [choice.label for choice in read_choices(str(path), None, "train", limit=1)] == [1]


def test_no_choices(tmp_path):
    with pytest.raises(BadInput, match="has no rows"):
        read_choices(str(write_jsonl(tmp_path / "a.jsonl", [])), None, "train")
