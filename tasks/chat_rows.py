"""The messages of a row of chat data, whichever of the usual forms it has.

    parse_row({"instruction": "2 + 2?", "output": "4", "id": 7})     two messages, and ["id"]: what was not used

| form | columns |
|---|---|
| OpenAI, TRL, UltraChat 200k | `messages`: [{"role", "content", "weight"}]; a content may be a list of parts of text |
| ShareGPT, axolotl, LLaMA-Factory | `conversations`: [{"from", "value"}] or [{"role", "value", "train"}]; `system` |
| xtuner | `conversation`: [{"system", "input", "output"}] |
| UltraChat, DailyDialog | `data`, `dialog`: texts of the user and the assistant in turn |
| Alpaca | `instruction`, `input`, `output`; `system`; `history`: [[question, answer]] |
| OpenOrca, Dolly, SQuAD and others | a question and an answer, see COLUMN_PAIRS; `system_prompt`; `context` |
| TRL | `prompt` and `completion`, each a text or messages; of preferences, `prompt` and `chosen` |
"""
import itertools
import math
from collections.abc import Iterable

from runtime.config import BadInput
from text.documents import valid_unicode
from text.messages import is_weight

# Columns that hold a whole conversation as a list.
CONVERSATION_COLUMNS = "messages", "conversations", "conversation", "dialog", "dialogue", "data"
# (question, answer) columns of well-known datasets; the first pair that a row has is used.
COLUMN_PAIRS = ("question", "answer"), ("instruction", "response"), ("instruction", "output"), ("prompt", "response"), \
    ("prompt", "completion"), ("prompt", "answer"), ("problem", "solution"), ("question", "response"), \
    ("query", "response"), ("query", "answer"), ("question", "answers"), ("question", "output"), ("instruction", "answer"), \
    ("instruction", "completion"), ("prompt", "chosen"), ("instruction", "chosen"), ("question", "chosen"), \
    ("input", "output"), ("input", "response"), ("inputs", "targets"), ("prompt", "generation"), ("context", "response"), \
    ("user", "assistant"), ("human", "assistant"), ("message_1", "message_2")
CONTEXT_COLUMNS = "context", "input"  # appended to the question
SYSTEM_COLUMNS = "system", "system_prompt", "system_message"
GROUP_COLUMNS = "kind", "task", "category"  # which scores are grouped by, see Conversation
FEEDBACK_COLUMNS = "label", "kto_tag"  # of TRL and LLaMA-Factory: false marks an answer that is not to be learned
KNOWN_COLUMNS = {*CONVERSATION_COLUMNS, *itertools.chain(*COLUMN_PAIRS), *CONTEXT_COLUMNS, *SYSTEM_COLUMNS, "history"}
TURN_PAIRS = ("instruction", "output"), ("input", "output"), ("human", "assistant"), ("user", "assistant"), \
    ("question", "answer")  # keys of a turn
# Keys of a message, of which the first is used that it has.
ROLE_KEYS, CONTENT_KEYS, WEIGHT_KEYS = \
    ("role", "from"), ("content", "value", "text"), ("weight", "train", "loss", "output_with_loss")
TOOL_KEYS = "tool_calls", "function_call"
MESSAGE_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *WEIGHT_KEYS, *TOOL_KEYS}
ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
              "ai": "assistant", "model": "assistant", "developer": "system"}
KNOWN_ROLES = {*ROLE_NAMES, *ROLE_NAMES.values()}
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "observation", "tool_call", "tool_response",
              "ipython"}
PARAGRAPH_KEYS = "contexts", "sentences", "text", "content", "passage_text"  # of a context that is a dict
TEXT_PARTS = "text", "input_text", "output_text"  # types of a part of a content


class UnknownForm(BadInput):
    """A row that has no known columns."""


def parse_row(row: dict, question_column: str | None = None,
              answer_column: str | None = None) -> tuple[list[dict], list[str]]:
    """The messages of a row, see text/messages.py, and the names of its columns, and of keys of its messages, that were not
    used. Raises UnknownForm, or BadInput where it holds what is not text.

    question_column, answer_column: use these columns. Values of None, as parquet has them, count as absent.
    """
    if question_column is None:  # "Question" is "question"
        missing = KNOWN_COLUMNS - row.keys()
        row = {name.lower() if name.lower() in missing else name: value for name, value in row.items()}
    values = {name: value for name, value in row.items() if value is not None}
    question, answer = find_columns(row, values, question_column, answer_column)
    feedback = {name: str(values[name]).lower() for name in FEEDBACK_COLUMNS if name in values}
    if answer and {"false", "0"} & {*feedback.values()}:
        raise BadInput("its answer is marked as a bad one, and would be learned")
    used = {question, answer, *GROUP_COLUMNS, *(name for name, value in feedback.items() if value in ("true", "1"))}
    unused = {}
    if answer:
        messages = read_pair(values, question, answer, used, unused)
    else:
        messages = read_turns(values[question], question, unused)
        if "chosen" in values and messages and messages[-1]["role"] != "assistant":
            used.add("chosen")
            messages += read_side(values, "chosen", "assistant", unused)
    messages = add_system(messages, values, used)
    return messages, [name for name in values if name not in used and not is_empty(values[name])] + list(unused)


def find_columns(row: dict, values: dict, question_column: str | None,
                 answer_column: str | None) -> tuple[str, str | None]:
    """(question, answer) columns of a row, or (column of a whole conversation, None). values: its columns that are not
    None. Raises UnknownForm, or BadInput where they are empty."""
    if question_column is None:
        has_pair = any(set(pair) <= values.keys() for pair in COLUMN_PAIRS)
        for name in CONVERSATION_COLUMNS:
            turns = values.get(name)
            if turns and isinstance(turns, list) and not (has_pair and all(isinstance(turn, str) for turn in turns)):
                return name, None  # beside a question and an answer, a list of texts is no conversation
        pairs = COLUMN_PAIRS
    else:
        pairs = [(question_column, answer_column)]
    if pair := next((pair for pair in pairs if set(pair) <= values.keys()), None):
        return pair
    if question_column is None and values.get("chosen") and isinstance(values["chosen"], list):
        return "chosen", None
    if empty := next((name for pair in pairs if set(pair) <= row.keys() for name in pair if name not in values), None):
        raise BadInput(f"its {empty} is null: give text")
    columns, flags = name_list(row), "name them with --question_column and --answer_column"
    if question_column:
        raise UnknownForm(f"has no columns {question_column} and {answer_column}: its columns are {columns}: {flags}")
    if name := next((name for name in CONVERSATION_COLUMNS if name in row), None):
        what = "empty" if is_empty(row[name]) else f"of type {type(row[name]).__name__}, not a list"
        raise BadInput(f"has no messages in its conversation: its {name} is {what}")
    if isinstance(values.get("text"), str):
        raise UnknownForm(f"has text, which does not say who speaks: train on it with download_data.py and train.py, or "
                          f"give messages, or a question and an answer (its columns are {columns})")
    raise UnknownForm(f"has no messages, nor question and answer: its columns are {columns}: {flags}")


def read_pair(values: dict, question: str, answer: str, used: set, unused: dict) -> list[dict]:
    """The messages of a question, with its context and earlier turns, and an answer. Adds columns to `used`."""
    answers = read_side(values, answer, "assistant", unused)
    if answers and answers[0]["role"] != "assistant":  # of a preference: the whole conversation
        return answers
    questions = read_side(values, question, "user", unused)
    if isinstance(values[question], (str, int, float)):
        contexts = [name for name in CONTEXT_COLUMNS if name not in (question, answer) and name in values]
        used.update(contexts)
        texts = [questions[0]["content"], *(text for name in contexts for text in flatten(values[name], name))]
        questions[0]["content"] = "\n\n".join(text for text in texts if text)
    history = values.get("history") or []
    if not isinstance(history, list):
        raise BadInput(f"its history is of type {type(history).__name__}: give a list of turns")
    used.add("history")
    return read_turns(history, "history", unused) + questions + answers


def read_side(values: dict, column: str, role: str, unused: dict) -> list[dict]:
    """The messages of a question or an answer: a text, which `role` says, a message, or a list of messages."""
    value = values[column]
    if column == "answers" and isinstance(value, dict):  # SQuAD's: {"text": [equally good ones], "answer_start": […]}
        value = value.get("text")
        if isinstance(value, list) and value:
            value = value[0]
    turns = value if isinstance(value, list) else [value]
    if turns and all(isinstance(turn, dict) and first_of(turn, ROLE_KEYS) is not None for turn in turns):
        return read_turns(turns, column, unused)
    return [{"role": role, "content": read_text(value, f"its {column}")}]


def add_system(messages: list[dict], values: dict, used: set) -> list[dict]:
    """`messages` after the system message that a column of the row holds, unless they have their own."""
    for column in SYSTEM_COLUMNS:
        if column not in used and isinstance(values.get(column), (str, list)):
            text = "\n\n".join(flatten(values[column], column))
            if not text or not messages or messages[0]["role"] != "system":
                used.add(column)
                return [{"role": "system", "content": text}] * bool(text) + messages
            if text == messages[0]["content"]:
                used.add(column)
    return messages


# -- turns ------------------------------------------------------------------------------------------------------------

def read_turns(turns: list, column: str, unused: dict) -> list[dict]:
    """The messages of a list of messages, of texts of the user and the assistant in turn, or of questions with their
    answers. Keys of messages that are not used are added to `unused` as "column.key"."""
    messages = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, list) and len(turn) == 2 and isinstance(turn[0], str) and turn[0].lower() in KNOWN_ROLES:
            turn = {"role": turn[0], "content": turn[1]}
        keys = next((keys for keys in TURN_PAIRS if set(keys) <= turn.keys()), None) if isinstance(turn, dict) else None
        weight = {}
        if keys:
            contexts = [name for name in CONTEXT_COLUMNS if name not in keys and name in turn]
            question = turn[keys[0]]
            if texts := [text for name in contexts for text in flatten(turn[name], name)]:
                question = "\n\n".join([read_text(question, f"turn {number} of its {column}"), *texts])
            said = ("system", turn.get("system") or None), ("user", question), ("assistant", turn[keys[1]])
            weight = read_weight(turn, number)
            unused |= unused_keys(turn, column, {*keys, *contexts, "system", *WEIGHT_KEYS})
        elif isinstance(turn, list) and len(turn) == 2:
            said = ("user", turn[0]), ("assistant", turn[1])
        elif isinstance(turn, str):
            said = (("user", "assistant")[(number - 1) % 2], turn),
        else:
            messages.append(read_message(turn, number))
            unused |= unused_keys(turn, column, MESSAGE_KEYS)
            continue
        messages += [{"role": role, "content": read_text(value, f"turn {number} of its {column}")}
                     | (weight if role == "assistant" else {}) for role, value in said if value is not None]
    return messages


def unused_keys(turn: dict, column: str, used: set) -> dict:
    return {f"{column}.{key}": None for key, value in turn.items() if key not in used and not is_empty(value)}


def read_message(turn, number: int) -> dict:
    """Message `number`, with a role of this program, and "weight": 0 if it is the assistant's and context only. Raises
    BadInput."""
    role = first_of(turn, ROLE_KEYS) if isinstance(turn, dict) else None
    if not isinstance(role, str):
        raise BadInput(f"message {number} has no role and content: give it both")
    if role.lower() in TOOL_ROLES or any(turn.get(key) for key in TOOL_KEYS):
        raise BadInput(f"message {number} uses a tool, for which the vocabulary has no tokens")
    content = read_text(first_of(turn, CONTENT_KEYS), f"the content of message {number}")
    role, weight = ROLE_NAMES.get(role.lower(), role.lower()), read_weight(turn, number)
    return {"role": role, "content": content} | (weight if role == "assistant" else {})


def read_weight(turn: dict, number: int) -> dict:
    """{"weight": 0} for a turn whose answer is context only, else {}. Raises BadInput for other weights than 0 and 1."""
    weights = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
    if wrong := [key for key, value in weights.items() if not is_weight(value)]:
        raise BadInput(f"message {number} has the {wrong[0]} {str(weights[wrong[0]])[:40]!r}: give 0 or 1")
    return {"weight": 0} if 0 in weights.values() else {}


def first_of(turn: dict, keys: Iterable[str]):
    """The value of the first of `keys` that has one, else None."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


# -- text -------------------------------------------------------------------------------------------------------------

def read_text(value, what: str) -> str:
    """Text, a number as text, or parts of text, [{"type": "text", "text": …}], joined by line ends. Raises BadInput, which
    starts with `what`."""
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    if isinstance(value, list) and value:
        if all(isinstance(part, dict) for part in value):
            return "\n".join(read_part(part, what) for part in value)
        if len(value) == 1 and isinstance(value[0], str):
            return valid_unicode(value[0])
        raise BadInput(f"{what} is a list of {len(value)}: give text")
    kind = "null" if value is None else "empty" if value == [] else f"of type {type(value).__name__}"
    raise BadInput(f"{what} is {kind}: give text")


def read_part(part: dict, what: str) -> str:
    kind = part.get("type") or "text"
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        kind = kind[:40] if isinstance(kind, str) else "unknown"
        raise BadInput(f"{what} has a part of type {kind}: only text can be read")
    return valid_unicode(part["text"])


def flatten(value, what: str, depth: int = 4) -> list[str]:
    """The paragraphs of a context: a text, lists of texts, or dicts of these (HotpotQA, PubMedQA). Raises BadInput."""
    if is_empty(value):
        return []
    if isinstance(value, list) and depth:
        return [text for item in value for text in flatten(item, what, depth - 1)]
    if isinstance(value, dict) and depth:
        key = next((key for key in PARAGRAPH_KEYS if not is_empty(value.get(key))), None)
        if key is None:
            raise BadInput(f"its {what} is a dict of {name_list(value)}: give text")
        titles, texts = value.get("title") or [], value[key]
        if isinstance(titles, list) and isinstance(texts, list) and len(titles) == len(texts):  # a title for each
            return ["\n".join([*flatten(title, what, 0), *flatten(text, what, depth - 1)])
                    for title, text in zip(titles, texts)]
        return ["\n".join(flatten(titles, what, 1) + flatten(texts, what, depth - 1))] if titles else \
            flatten(texts, what, depth - 1)
    return [read_text(value, f"its {what}")]


def is_empty(value) -> bool:
    return value is None or value in ("", [], {})


def name_list(names: Iterable[str]) -> str:
    """The first names, for a message: "id, source, … (12)"."""
    names = [valid_unicode(str(name))[:40] for name in names]
    return ", ".join(names[:12]) + (f", … ({len(names)})" if len(names) > 12 else "") or "none"
