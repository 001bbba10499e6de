"""Every form of chat data and of multiple choice that is read, and what is refused of each."""
import jinja2
import pyarrow
import pyarrow.parquet
import pytest
import transformers
from test_conversations import write_jsonl

from convert.hf_tokenizer import to_hf_tokenizer
from runtime.config import BadInput
from tasks.chat_rows import parse_row
from tasks.conversations import ConversationConfig, read_all
from tasks.multiple_choice import ChoiceColumns, parse_choice
from tokenizer import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, ROLES, Tokenizer


def said(**roles: str) -> list[dict]:
    """said(user="who?", assistant="me")"""
    return [{"role": role.rstrip("_"), "content": content} for role, content in roles.items()]


ASK = said(user="who?", assistant="me")
TWO = [*ASK, *said(user="sure?", assistant="yes")]
BRIEF = said(system="Be brief.")
HUMAN = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me"}]
FORMS = {
    "OpenAI": ({"messages": ASK}, ASK),
    "OpenAI, parts": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "who"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "me", "image_url": None}]}]},
        said(user="who\n?", assistant="me")),
    "OpenAI, weight": ({"messages": [ASK[0], ASK[1] | {"weight": 0}, *said(user="sure?"), *said(assistant="yes")]},
                       [ASK[0], ASK[1] | {"weight": 0}, *TWO[2:]]),
    "OpenAI, nulls": ({"messages": [ASK[0] | {"weight": None, "tool_calls": None, "name": None},
                                    ASK[1] | {"tool_calls": []}], "tools": None}, ASK),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *ASK]}, BRIEF + ASK),
    "ShareGPT": ({"conversations": HUMAN}, ASK),
    "ShareGPT, system": ({"system": "Be brief.", "conversations": HUMAN}, BRIEF + ASK),
    "ShareGPT, system twice": ({"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *HUMAN]},
                               BRIEF + ASK),
    "ShareGPT, number": ({"conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": 0.5}]},
                         said(user="7", assistant="0.5")),
    "axolotl": ({"conversations": [{"role": "human", "value": "who?"}, {"role": "gpt", "value": "me", "train": False},
                                   *said(user="sure?", assistant="yes")]}, [ASK[0], ASK[1] | {"weight": 0}, *TWO[2:]]),
    "LLaMA-Factory, preference": ({"conversations": HUMAN[:1], "chosen": HUMAN[1],
                                   "rejected": {"from": "gpt", "value": "no"}}, ASK),
    "xtuner": ({"conversation": [{"system": "Be brief.", "input": "who?", "output": "me"},
                                 {"input": "sure?", "output": "yes"}]}, BRIEF + TWO),
    "xtuner, without loss": ({"conversation": [{"input": "who?", "output": "me", "output_with_loss": False},
                                               {"input": "sure?", "output": "yes"}]},
                             [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]]),
    "turns with instructions": ({"conversations": [{"instruction": "Add", "input": "1 1", "output": "2"}]},
                                said(user="Add\n\n1 1", assistant="2")),
    "DREAM": ({"dialogue": ["W: hi", "M: hi"], "question": "who?", "answer": "me"}, ASK),
    "firefly": ({"conversation": [{"human": "who?", "assistant": "me"}, {"human": "sure?", "assistant": "yes"}]}, TWO),
    "role and text": ({"conversations": [["user", "who?"], ["assistant", "me"]]}, ASK),
    "question and answer": ({"conversations": [["who?", "me"], ["sure?", "yes"]]}, TWO),
    "UltraChat": ({"id": "1", "data": ["who?", "me", "sure?", "yes"]}, TWO),
    "UltraChat 200k": ({"prompt": "who?", "prompt_id": "1", "messages": ASK}, ASK),
    "DailyDialog": ({"dialog": ["who?", "me"]}, ASK),
    "Alpaca": ({"instruction": "Sum up.", "input": "A text.", "output": "Text."}, said(user="Sum up.\n\nA text.",
                                                                                      assistant="Text.")),
    "Alpaca, empty": ({"instruction": "who?", "input": "", "output": "me", "system": "", "history": []}, ASK),
    "Alpaca, history": ({"instruction": "sure?", "input": None, "output": "yes", "system": "Be brief.",
                         "history": [["who?", "me"]]}, BRIEF + TWO),
    "Alpaca, history of messages": ({"instruction": "sure?", "output": "yes", "history": ASK}, TWO),
    "OpenOrca": ({"id": 1, "system_prompt": "Be brief.", "question": "who?", "response": "me"}, BRIEF + ASK),
    "Dolly": ({"instruction": "who?", "context": "", "response": "me", "category": "qa"}, ASK),
    "context of lists": ({"question": "who?", "context": ["I am here.", ["You", "not"]], "answer": "me"},
                         said(user="who?\n\nI am here.\n\nYou\n\nnot", assistant="me")),
    "HotpotQA": ({"question": "who?", "context": {"title": ["A", "B"], "sentences": [["a.", "b."], ["c."]]}, "answer": "me"},
                 said(user="who?\n\nA\na.\nb.\n\nB\nc.", assistant="me")),
    "HotpotQA, lists": ({"question": "who?", "context": [["A", ["a.", "b."]]], "answer": "me"},
                        said(user="who?\n\nA\n\na.\n\nb.", assistant="me")),
    "PubMedQA": ({"question": "who?", "context": {"contexts": ["a", "b"], "labels": ["X", "Y"]}, "answer": "me"},
                 said(user="who?\n\na\n\nb", assistant="me")),
    "SQuAD": ({"question": "who?", "title": "T", "context": "I.", "answers": {"text": ["me", "I"], "answer_start": [0, 1]}},
              said(user="who?\n\nI.", assistant="me")),
    "TRL": ({"prompt": ASK[:1], "completion": ASK[1:]}, ASK),
    "TRL, text": ({"prompt": "who?", "completion": "me"}, ASK),
    "TRL, preference": ({"prompt": BRIEF + ASK[:1], "chosen": ASK[1:], "rejected": said(assistant="no")}, BRIEF + ASK),
    "TRL, no prompt": ({"chosen": ASK, "rejected": said(user="who?", assistant="no")}, ASK),
    "UltraFeedback": ({"prompt": "who?", "chosen": ASK, "rejected": ASK, "score_chosen": 1.5}, ASK),
    "capitals": ({"INSTRUCTION": "who?", "RESPONSE": "me", "System": "Be brief."}, BRIEF + ASK),
    "number as answer": ({"question": "2 + 2?", "answer": 4}, said(user="2 + 2?", assistant="4")),
    "half an emoji": ({"question": "\ud83d?", "answer": "\ud83d\ude00"}, said(user="\ufffd?", assistant="😀")),
    "null beside": ({"messages": None, "question": "who?", "answer": "me"}, ASK),
}


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:5], 400)


@pytest.mark.parametrize("row, messages", FORMS.values(), ids=FORMS)
def test_forms_of_conversations(row, messages):
    assert parse_row(row)[0] == messages


MIXED = "ShareGPT, number", "HotpotQA, lists", "context of lists"  # lists of several types, which parquet has not
LONE = "half an emoji", "OpenAI, nulls"


@pytest.mark.parametrize("name", [name for name in FORMS if name not in MIXED + LONE])
def test_forms_read_from_parquet(name, tmp_path):
    """Where keys that a message lacks are null."""
    row, messages = FORMS[name]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (one,) = read_all(ConversationConfig(str(tmp_path / "a.parquet")), ROLES)
    assert one.messages == messages


@pytest.mark.parametrize("row, unused", [
    ({"messages": ASK, "id": 1, "source": "x", "empty": "", "none": None}, ["id", "source"]),
    ({"prompt": "who?", "chosen": "me", "rejected": "no"}, ["rejected"]),
    ({"messages": [ASK[0] | {"name": "Ann"}, ASK[1] | {"train_detail": [1]}]}, ["messages.name", "messages.train_detail"]),
    ({"system": "Other.", "messages": BRIEF + ASK}, ["system"]),
    ({"messages": ASK, "question": "x", "answer": "y", "context": "z"}, ["question", "answer", "context"]),
    ({"conversation": [{"input": "who?", "output": "me", "need_eos_token": True}]}, ["conversation.need_eos_token"]),
    ({"question": "who?", "answer": "me", "label": "spam"}, ["label"]),
    ({"question": "who?", "answer": "me", "kind": "k", "task": "t", "category": "c", "label": True}, [])], ids=str)
def test_what_is_not_used_is_named(row, unused):
    assert parse_row(row)[1] == unused


def test_columns_by_name():
    row = {"q": "who?", "a": "me", "question": 1, "answer": 2, "context": "here", "messages": TWO}
    assert parse_row(row, "q", "a") == (said(user="who?\n\nhere", assistant="me"), ["question", "answer", "messages"])


TOOL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "w"}}]}


@pytest.mark.parametrize("row, words", [
    ({"messages": []}, "has no messages in its conversation"), ({"messages": None}, "has no messages in its conversation"),
    ({"conversations": None}, "its conversations is empty"), ({"messages": "hi"}, "its messages is of type str, not a list"),
    ({"text": "hi"}, "has text, which does not say who speaks: train on it with download_data.py"),
    ({"x": "hi"}, "has no messages, nor question and answer: its columns are x: name them with --question_column"),
    ({f"x{i}": i for i in range(90)}, "x11, … (90)"),
    ({"messages": [{"role": "user"}]}, "the content of message 1 is null"), ({"messages": [7]}, "no role and content"),
    ({"messages": [{"role": "x", "content": ""}]}, "unknown role 'x'"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "message 1 has no role"),
    ({"messages": [{"role": "user", "content": None}]}, "the content of message 1 is null"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the content of message 1 is of type dict"),
    ({"messages": [{"role": "user", "content": True}]}, "of type bool"),
    ({"messages": [{"role": "user", "content": []}]}, "is empty"),
    ({"messages": [{"role": "user", "content": float("nan")}]}, "of type float"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASK[1]]},
     "the content of message 1 has a part of type image_url: only text can be read"),
    ({"messages": [ASK[0], TOOL, {"role": "tool", "content": "sunny"}, ASK[1]]}, "message 2 uses a tool"),
    ({"conversations": [{"from": "observation", "value": "1"}]}, "message 1 uses a tool"),
    ({"messages": ASK[:1]}, "no message of the assistant"), ({"prompt": ASK[:1]}, "nor question and answer"),
    ({"messages": [ASK[0], ASK[1] | {"weight": 0}]}, "no message of the assistant"),
    ({"messages": [ASK[0], ASK[1] | {"weight": 0.5}]}, "message 2 has the weight '0.5': give 0 or 1"),
    ({"messages": [ASK[0], ASK[1] | {"train": "no"}]}, "message 2 has the train 'no': give 0 or 1"),
    ({"question": "?", "answer": " "}, "its answer is empty"), ({"data": ["?", ""]}, "its answer is empty"),
    ({"prompt": "?", "completion": "bad", "label": "False"}, "marked as a bad one"),
    ({"prompt": "?", "completion": "bad", "label": 0}, "marked as a bad one"),
    ({"question": "?", "answer": None}, "its answer is null"), ({"question": None, "answer": ""}, "its question is null"),
    ({"question": "who?", "answer": ["me", "I"]}, "its answer is a list of 2"),
    ({"question": "who?", "answers": {"text": []}}, "its answers is empty"),
    ({"question": "who?", "answer": "me", "context": {"x": "y"}}, "its context is a dict of x"),
    ({"question": "who?", "answer": "me", "context": True}, "its context is of type bool"),
    ({"question": "who?", "answer": "me", "history": "x"}, "its history is of type str"),
    ({"question": "who?", "answer": "me", "history": [["a", True]]}, "turn 1 of its history is of type bool"),
    ({"prompt": "who?", "completion": "no", "label": False}, "marked as a bad one")], ids=ascii)
def test_bad_row_is_named(row, words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": ASK}, row])
    with pytest.raises(BadInput) as error:
        list(read_all(ConversationConfig(dataset=str(path)), ROLES))
    assert str(error.value).startswith(f"{path}: line 2: ") and words in str(error.value)


@pytest.mark.parametrize("messages", [
    ASK, BRIEF + TWO, [ASK[0], ASK[1] | {"weight": 0}, *TWO[2:]], [ASK[0], {"role": "assistant", "content": ""}], ASK * 3,
    said(user="né \n", assistant=" 😀é\n\n") + said(user="", assistant="x" * 9), BRIEF], ids=str)
def test_assistant_mask_of_transformers_is_ours(tokenizer, messages):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=to_hf_tokenizer(tokenizer))
    encoded = theirs.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, return_dict=True,
                                         return_assistant_tokens_mask=True)
    ids, assistant_mask = tokenizer.encode_chat(messages)
    assert encoded["input_ids"] == ids and encoded["assistant_masks"] == [int(mask) for mask in assistant_mask]
    for prompt in (False, True):  # programs that know only Jinja
        plain = jinja2.Template(PLAIN_CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=prompt)
        assert plain == tokenizer.decode(tokenizer.encode_chat(messages, prompt)[0])


# -- multiple choice --------------------------------------------------------------------------------------------------

ARC = {"question": "Which is a number?", "choices": {"text": ["dog", "one", "cat"], "label": ["A", "B", "C"]},
       "answerKey": "B"}
HELLASWAG = {"ctx": "If x is None, the", "endings": ["sea", "default is used", "cat", "dog runs"], "label": "1"}
CHOICES = {
    "HellaSwag": (HELLASWAG, HELLASWAG["ctx"], HELLASWAG["endings"], 1),
    "HellaSwag, int": (HELLASWAG | {"label": 3}, HELLASWAG["ctx"], HELLASWAG["endings"], 3),
    "ARC": (ARC, "Which is a number?", ["dog", "one", "cat"], 1),
    "ARC, numbers": (ARC | {"choices": {"text": ["dog", "one"], "label": ["1", "2"]}, "answerKey": "2"},
                     "Which is a number?", ["dog", "one"], 1),
    "OpenBookQA": ({"question_stem": "The sun is", "choices": ARC["choices"], "answerKey": "C"}, "The sun is",
                   ["dog", "one", "cat"], 2),
    "harness": ({"query": "Go on", "choices": ["a", "b"], "gold": 1}, "Go on", ["a", "b"], 1),
    "MMLU": ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, "Which?", ["a", "b"], 0),
    "MMLU-Pro": ({"question": "What?", "options": ["x", "y", "z", "w"], "answer": "C", "answer_index": 2}, "What?",
                 ["x", "y", "z", "w"], 2),
    "MedQA": ({"question": "What?", "options": {"A": "x", "B": "y", "E": None}, "answer": "y", "answer_idx": "B"}, "What?",
              ["x", "y"], 1),
    "RACE": ({"article": "It rained.", "question": "Why?", "options": ["a", "b"], "answer": "B"}, "It rained.\nWhy?",
             ["a", "b"], 1),
    "numbers": ({"question": "2+2?", "choices": [3, 4, 5], "answer": 1}, "2+2?", ["3", "4", "5"], 1),
    "float label": ({"question": "2+2?", "choices": [3, 4, 5.5], "answer": 1.0}, "2+2?", ["3", "4", "5.5"], 1),
    "PIQA": ({"goal": "Open it.", "sol1": "pull", "sol2": "eat", "label": 1}, "Open it.", ["pull", "eat"], 1),
    "COPA": ({"premise": "It rained.", "choice1": "I got wet.", "choice2": "The sun.", "question": "effect", "label": 0},
             "It rained therefore", ["i got wet.", "the sun."], 0),
    "SIQA": ({"context": "Ann ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
             "Ann ran.\nWhy?", ["a", "b", "c"], 2),
    "SWAG": ({"startphrase": "He", "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d", "label": 2}, "He",
             ["a", "b", "c", "d"], 2),
    "MedMCQA": ({"question": "What?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3}, "What?",
                ["a", "b", "c", "d"], 3),
    "BoolQ": ({"passage": "It rained.", "question": "wet", "answer": True}, "It rained.\nwet", ["no", "yes"], 1),
}


@pytest.mark.parametrize("row, context, endings, label", CHOICES.values(), ids=CHOICES)
def test_forms_of_choices(row, context, endings, label):
    choice = parse_choice(row | {"unused": None}, "here")
    assert (choice.context, choice.endings, choice.label, choice.where) == (context, endings, label, "here")


def test_winogrande_scores_what_follows_the_gap():
    choice = parse_choice({"sentence": "Ann gave Bob _ coat.", "option1": "his", "option2": "her", "answer": "2"}, "")
    assert choice.contexts == ("Ann gave Bob his", "Ann gave Bob her")
    assert choice.endings == ["coat."] * 2 and choice.label == 1


def test_sciq_has_its_right_answer_anywhere():
    rows = [{"question": f"{i}?", "correct_answer": "right", "distractor1": "a", "distractor2": "b", "distractor3": "c",
             "support": "s"} for i in range(40)]
    choices = [parse_choice(row, "") for row in rows]
    assert all(choice.endings[choice.label] == "right" and sorted(choice.endings) == ["a", "b", "c", "right"]
               and choice.context.startswith("s\n") for choice in choices)
    assert {choice.label for choice in choices} == {0, 1, 2, 3} and choices == [parse_choice(row, "") for row in rows]


def test_a_number_as_the_right_ending():
    assert parse_choice({"question": "30?", "choices": ["10", "20", "30", "40"], "answer": "30"}, "").label == 2


def test_choice_columns_by_name():
    row = {"text": "Go on", "ctx": "not this", "answers": ["a", "b"], "endings": ["c", "d"], "label": 0, "right": "B"}
    choice = parse_choice(row, "", ChoiceColumns("text", "answers", "right"))
    assert (choice.context, choice.endings, choice.label) == ("Go on", ["a", "b"], 1)


@pytest.mark.parametrize("changes, words", [
    ({"label": ""}, "the label is '': must be one of 0, 1, 2, 3 or A, B, C, D: the rows of a test split"),
    ({"label": "4"}, "the label is '4'"), ({"label": "E"}, "the label is 'E'"), ({"label": "AB"}, "the label is 'AB'"),
    ({"label": -1}, "the label is '-1'"), ({"label": "١"}, "the label is '١'"), ({"label": True}, "the label is 'True'"),
    ({"label": [1]}, "the label is of type list"), ({"label": None}, "has no column label"),
    ({"endings": ["one"]}, "has 1 endings: give at least 2"), ({"endings": "one"}, "has no list of endings"),
    ({"endings": {"label": ["A"]}}, "has no list of endings"), ({"endings": ["a", "", "c"]}, "ending 2 is empty"),
    ({"endings": ["a", "b", None]}, "ending 3 is null"), ({"endings": ["a", {"b": 1}]}, "ending 2 is of type dict"),
    ({"ctx": True}, "the context is of type bool"), ({"ctx": None}, "has no column ctx"),
    ({"sol1": "a", "sol2": "", "endings": None, "label": 0}, "its sol2 is empty"),
    ({"endings": ["1", "2", "3", "4"], "label": "3"}, "'3', the text of ending 3, but also means ending 4"),
    ({"endings": ["B", "A"], "label": "A"}, "'A', the text of ending 2, but also means ending 1")],
    ids=ascii)
def test_bad_choice_is_named(changes, words):
    with pytest.raises(BadInput) as error:
        parse_choice(HELLASWAG | changes, "")
    assert words in str(error.value)
