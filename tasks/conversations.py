"""Conversations to learn from and to be asked from: the hub's, local files', or the built-in questions."""
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runtime.config import BadInput, check_flags, flag
from tasks.builtin_questions import make_questions
from tasks.rows import read_dataset

DOLLY = "databricks/databricks-dolly-15k"
BUILTIN_QUESTIONS, MOST_TURNS = 60_000, 4
# Columns of well-known sets, of which the first that are all there count.
COLUMNS = ("question", "answer"), ("instruction", "response"), ("instruction", "output"), ("prompt", "response"), \
    ("prompt", "completion"), ("prompt", "answer"), ("problem", "solution"), ("input", "output")
CONTEXT_COLUMNS = "context", "input"  # that belong to the question, where there are such
ROLES = "system", "user", "assistant"
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class ConversationConfig:
    """Where conversations come from."""
    dataset: str = flag(DOLLY, "a dataset on the Hugging Face hub by its id, a local file or folder (jsonl, parquet), or "
                               "`builtin`: questions about numbers, words and built-in text, no network. Rows have "
                               "messages, [{\"role\": …, \"content\": …}, …], or a question and an answer", scope="shared")
    dataset_config: str = flag(None, "configuration of a hub dataset", scope="shared")
    split: str = flag("train", "split of a hub dataset", scope="shared")
    question_column: str = flag(None, "column with questions (default: the first of question, instruction, prompt …)",
                                scope="shared")
    answer_column: str = flag(None, "column with answers (default: the one that goes with it)", scope="shared")
    val_conversations: int = flag(240, "conversations that are held out, always the same ones", at_least=1, scope="shared")

    def __post_init__(self):
        check_flags(self)
        if (self.question_column is None) != (self.answer_column is None):
            raise BadInput("--question_column and --answer_column: give both or none")


@dataclass(frozen=True)
class Conversation:
    """messages: [{"role": …, "content": …}, …]. where: file and row, for error messages. kind, task: which kind of question
    it is, and which task of that kind; "" where that is not known."""
    messages: list[dict]
    where: str
    kind: str = ""
    task: str = ""


def read_conversations(config: ConversationConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and those that are held out: none of these begins as one of the others. Raises BadInput."""
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
    if config.dataset == "builtin":
        return builtin_conversations(), builtin_held_out(config.val_conversations)
    everything = list(read_everything(config))
    rank = lambda one: hashlib.sha256(opening(one).encode("utf-8", "replace")).digest()
    ranks = sorted({rank(one) for one in everything})
    if len(ranks) < 2:
        raise BadInput(f"--dataset={config.dataset}: has {len(everything)} conversations, which is too few to hold some out")
    last = ranks[min(config.val_conversations, len(ranks) // 2) - 1]
    return [one for one in everything if rank(one) > last], [one for one in everything if rank(one) <= last]


def builtin_held_out(n: int) -> list[Conversation]:
    return [Conversation(question.messages(), "a built-in question", question.kind, question.task)
            for question in make_questions(n, 0, held_out=True)]


def builtin_conversations() -> list[Conversation]:
    """Of one to MOST_TURNS questions each, so that what was said before is not taken for the question."""
    rng, questions = np.random.default_rng(0), list(make_questions(BUILTIN_QUESTIONS, 0, held_out=False))
    order, made = rng.permutation(len(questions)).tolist(), []
    while order:
        turns = [questions[order.pop()] for _ in range(min(len(order), rng.integers(1, MOST_TURNS + 1)))]
        made.append(Conversation([message for turn in turns for message in turn.messages()], "a built-in conversation"))
    return made


def opening(one: Conversation) -> str:
    return next((message["content"] for message in one.messages if message["role"] == "user"), "")


def read_everything(config: ConversationConfig) -> Iterator[Conversation]:
    n = 0
    for where, row in read_dataset(config.dataset, config.dataset_config, config.split):
        try:
            messages = checked(messages_of(row, config))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        n += 1
        task = str(row.get("task") or row.get("category") or "")
        yield Conversation(messages, where, str(row.get("kind") or task), task)
    if not n:
        raise BadInput(f"--dataset={config.dataset}: holds no conversation")


def messages_of(row: dict, config: ConversationConfig) -> list[dict]:
    """Of a row with messages, or with a question and an answer. Raises BadInput."""
    if config.question_column is None:
        if "messages" in row:
            return row["messages"]
        if "conversations" in row:  # as ShareGPT has them
            return [{"role": SHAREGPT.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
                    if isinstance(turn, dict) and "from" in turn else turn for turn in row["conversations"] or []]
    pairs = [(config.question_column, config.answer_column)] if config.question_column else COLUMNS
    question, answer = next((pair for pair in pairs if set(pair) <= row.keys()), (None, None))
    if question is None:
        wanted = f"columns {' and '.join(pairs[0])}" if config.question_column else "messages, nor question and answer"
        raise BadInput(f"has no {wanted}: its columns are {', '.join(row)}: name them by --question_column and "
                       f"--answer_column")
    contexts = [row[name] for name in CONTEXT_COLUMNS if name not in (question, answer) and row.get(name)]
    asked = "\n\n".join(part for part in (row[question], *contexts) if isinstance(part, str))
    return [{"role": "user", "content": asked if isinstance(row[question], str) else row[question]},
            {"role": "assistant", "content": row[answer]}]


def checked(messages: list[dict]) -> list[dict]:
    """`messages`, if they are a conversation. Raises BadInput."""
    if not isinstance(messages, list):
        raise BadInput(f"messages are {type(messages).__name__}, not a list")
    if not messages:
        raise BadInput("an empty conversation: give it messages, or remove it")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadInput(f"message {i + 1} has no role and content")
        if message["role"] not in ROLES:
            raise BadInput(f"message {i + 1} has the unknown role {str(message['role'])[:40]!r}: give {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise BadInput(f"message {i + 1} has content that is no text but {type(message['content']).__name__}")
    return messages
