"""Where conversations come from: files, the hub, the built-in questions."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from runtime.config import BadInput
from tasks.builtin_questions import MAKERS, is_held_out, make_questions
from tasks.conversations import MOST_TURNS, ConversationConfig, messages_of, read_conversations
from tasks.rows import read_dataset

TALK = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]


def write_jsonl(path, rows: list):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- built-in questions -----------------------------------------------------------------------------------------------

def numbers_in(text: str) -> list[int]:
    return [int(word) for word in text.replace("?", " ").replace(".", " ").split() if word.isdigit()]


def right_answer(task: str, text: str) -> str:
    """Worked out again from the text of a question."""
    words = text.split(": ", 1)[-1].split()
    if task == "sum":
        return str(sum(numbers_in(text)))
    if task == "difference":
        total, a, b, d = numbers_in(text)
        return str(total - a - b + d)
    if task == "larger":
        return str(max(numbers_in(text.replace(",", " "))))
    if task == "count":
        first, last = numbers_in(text)
        return " ".join(map(str, range(first, last + 1)))
    if task == "repeat":
        *said, times = text.removeprefix("Say ").rstrip(".").replace(" times", "").split()
        return " ".join(said * {"twice": 2, "three": 3, "four": 4}[times])
    if task in ("after", "before"):
        at = words.index(text.split(" in: ")[0].split()[-1])
        return words[at + (1 if task == "after" else -1)]
    return {"backwards": " ".join(reversed(words)), "last": words[-1], "second": "".join(words[1:2]),
            "sorted": " ".join(sorted(words)), "length": str(len(words))}[task]


def test_the_answers_are_right():
    questions = list(make_questions(600, 3, held_out=False))
    assert {question.task for question in questions} == {task for makers in MAKERS.values() for task in makers}
    for question in questions:
        assert question.answer == right_answer(question.task, question.text), question


def test_questions_are_those_of_the_seed_and_different():
    first, again, other = (list(make_questions(240, seed, held_out=True)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({question.text for question in first}) == len(first) == 240


def test_held_out_questions_are_apart():
    """Whatever the seeds; those about a text with the text."""
    held_out = {question.text for question in make_questions(2400, 5, held_out=True)}
    learnt = {question.text for question in make_questions(2400, 6, held_out=False)}
    assert not held_out & learnt
    assert all(is_held_out(text) for text in held_out if " in: " not in text)
    passages = [{text.split(" in: ")[1] for text in texts if " in: " in text} for texts in (held_out, learnt)]
    assert all(passages) and len(passages[0] & passages[1]) <= 0.02 * len(passages[0])  # few words may stand in two texts


def test_built_in_conversations_have_several_turns():
    train, held_out = read_conversations(ConversationConfig(dataset="builtin", val_conversations=120))
    lengths = [len(one.messages) // 2 for one in train]
    assert set(lengths) == set(range(1, MOST_TURNS + 1)) and sum(lengths) > 50_000
    assert len(held_out) == 120 and all(len(one.messages) == 2 and ": " in one.task for one in held_out)
    asked = {message["content"] for one in train for message in one.messages if message["role"] == "user"}
    assert not asked & {one.messages[0]["content"] for one in held_out}


# -- files and the hub ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, config", [
    ({"messages": TALK}, {}), ({"question": "who?", "answer": "me"}, {}), ({"instruction": "who?", "output": "me"}, {}),
    ({"instruction": "who?", "context": "", "response": "me"}, {}), ({"prompt": "who?", "completion": "me"}, {}),
    ({"q": "who?", "a": "me", "question": 1, "answer": 2}, {"question_column": "q", "answer_column": "a"}),
    ({"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]}, {})], ids=str)
def test_rows_of_every_form(row, config):
    assert messages_of(row, ConversationConfig(**config)) == TALK


def test_what_belongs_to_a_question():
    row = {"instruction": "Sum up.", "input": "A long text.", "output": "Text."}
    assert messages_of(row, ConversationConfig())[0]["content"] == "Sum up.\n\nA long text."


def test_local_files_and_the_hub_give_the_same(tmp_path, hub):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(20)]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "a.jsonl", rows[:12])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[12:]), tmp_path / "files" / "b.parquet")
    hub.add("org/talk", {"default": [rows]})
    local, remote = (read_conversations(ConversationConfig(dataset=dataset, val_conversations=5))
                     for dataset in (str(tmp_path / "files"), "org/talk"))
    assert [[one.messages for one in part] for part in local] == [[one.messages for one in part] for part in remote]
    train, held_out = local
    assert len(train) == 15 and len(held_out) == 5
    assert train[0].where.startswith(f"{tmp_path / 'files' / 'a.jsonl'}: line ")


def test_what_begins_alike_is_held_out_together(tmp_path):
    rows = [{"question": f"{i // 4}?", "answer": str(i)} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, held_out = read_conversations(ConversationConfig(str(path), val_conversations=3))
    opening = lambda part: {one.messages[0]["content"] for one in part}
    assert len(held_out) == 12 and not opening(train) & opening(held_out)


@pytest.mark.parametrize("row, words", [
    ({"messages": []}, "an empty conversation"), ({"messages": "hi"}, "not a list"), ({"text": "hi"}, "no messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
    ({"messages": [{"role": "user"}]}, "no role and content"), ({"messages": ["hi"]}, "no role and content"),
    ({"messages": [{"role": "user", "content": None}]}, "no text but NoneType"),
    ({"question": "who?", "answer": None}, "no text but NoneType"),
    ({"conversations": None}, "an empty conversation")], ids=str)
def test_bad_rows_are_named(row, words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}, row])
    with pytest.raises(BadInput, match=words) as error:
        read_conversations(ConversationConfig(dataset=str(path)))
    assert str(error.value).startswith(f"{path}: line 2: ")


def test_bad_datasets_are_named(tmp_path, hub):
    hub.add("org/text", {"default": [[{"text": "hi"}]]})
    (tmp_path / "a.txt").write_text("hi")
    (tmp_path / "bad.jsonl").write_text('{"messages"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    one = write_jsonl(tmp_path / "one.jsonl", [{"messages": TALK}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    for dataset, words in ((tmp_path / "a.txt", "holds no rows"), (tmp_path / "bad.jsonl", "line 1 is no JSON"),
                           (tmp_path / "list.jsonl", "no JSON object"), (tmp_path / "bad.parquet", "no parquet"),
                           (one, "too few"), (empty, "holds no conversation|too few"), ("", "is empty"),
                           ("org/text", "--dataset=org/text: row 1: has no messages"), ("org/none", "org/none"),
                           ("gone.jsonl", "no such file")):
        with pytest.raises(BadInput, match=words):
            read_conversations(ConversationConfig(dataset=str(dataset)))
    with pytest.raises(BadInput, match="--dataset_config=x"):
        list(read_dataset(str(one), "x", "train"))
    with pytest.raises(BadInput, match="give both or none"):
        ConversationConfig(question_column="q")
    with pytest.raises(BadInput, match="columns q and a"):
        read_conversations(ConversationConfig(dataset=str(one), question_column="q", answer_column="a"))
