"""Conversations to finetune on and to evaluate with: from the hub, local files, or the built-in questions.

Rows are {"messages": [{"role": "user", "content": …}, …]}, or a question and an answer: see `parse_messages`.
"""
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from runtime.config import BadInput, check_flags, flag
from tasks.builtin_questions import make_questions
from tasks.rows import read_dataset
from text.messages import check_messages

DOLLY = "databricks/databricks-dolly-15k"
N_BUILTIN_QUESTIONS, MAX_TURNS = 60_000, 4
# (question, answer) columns of well-known datasets; the first pair that a row has is used.
COLUMNS = ("question", "answer"), ("instruction", "response"), ("instruction", "output"), ("prompt", "response"), \
    ("prompt", "completion"), ("prompt", "answer"), ("problem", "solution"), ("input", "output")
EXTRA_CONTEXT_COLUMNS = "context", "input"  # appended to the question, where a row has them
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations."""
    dataset: str = flag(DOLLY, "a dataset on the Hugging Face hub by its id, a local file or folder (jsonl, parquet), or "
                               "`builtin`: questions about numbers, words and built-in text, no network. Rows have "
                               "messages, [{\"role\": …, \"content\": …}, …], or a question and an answer", scope="shared")
    dataset_config: str = flag(None, "configuration of a hub dataset", scope="shared")
    split: str = flag("train", "split of a hub dataset", scope="shared")
    question_column: str = flag(None, "column with questions (default: the first of question, instruction, prompt …)",
                                scope="shared")
    answer_column: str = flag(None, "column with answers (default: the one that belongs to the question's)", scope="shared")
    val_conversations: int = flag(240, "conversations held out for validation, always the same ones", at_least=1,
                                  scope="shared")

    def __post_init__(self):
        check_flags(self)
        if (self.question_column is None) != (self.answer_column is None):
            raise BadInput("--question_column and --answer_column: give both or none")


@dataclass(frozen=True)
class Conversation:
    """messages: see text/messages.py. where: file and row, for error messages. kind, task: the kind of question and the task
    within it, which scores are grouped by; "" if unknown."""
    messages: list[dict]
    where: str
    kind: str = ""
    task: str = ""


def read_conversations(config: ConversationConfig, roles: Collection[str]) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and those held out. Conversations that start with the same user's message stay together.

    roles: those that a message may have, the tokenizer's. The split goes by a hash of that first message, so it does not
    depend on the order of the rows. Raises BadInput.
    """
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
    if config.dataset == "builtin":
        return builtin_conversations(), builtin_held_out(config.val_conversations)
    conversations = list(read_all(config, roles))
    digests = [hashlib.sha256(first_message(one).encode("utf-8", "replace")).digest() for one in conversations]
    ranked = sorted(set(digests))
    if len(ranked) < 2:
        raise BadInput(f"--dataset={config.dataset}: has only {len(ranked)} different first messages, too few to hold some "
                       f"out: give more conversations")
    last = ranked[min(config.val_conversations, len(ranked) // 2) - 1]
    train = [one for one, digest in zip(conversations, digests) if digest > last]
    return train, [one for one, digest in zip(conversations, digests) if digest <= last]


def first_message(conversation: Conversation) -> str:
    """The first message of the user, "" without one."""
    return next((message["content"] for message in conversation.messages if message["role"] == "user"), "")


def read_all(config: ConversationConfig, roles: Collection[str]) -> Iterator[Conversation]:
    """Every conversation of a dataset. Raises BadInput, which names the row."""
    n = 0
    for where, row in read_dataset(config.dataset, config.dataset_config, config.split):
        try:
            messages = parse_messages(row, config)
            check_messages(messages, roles)
            if not messages:
                raise BadInput("has no messages in its conversation: add some, or remove the row")
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        n += 1
        task = str(row.get("task") or row.get("category") or "")
        yield Conversation(messages, where, str(row.get("kind") or task), task)
    if not n:
        raise BadInput(f"--dataset={config.dataset}: holds no conversations")


def parse_messages(row: dict, config: ConversationConfig) -> list[dict]:
    """The messages of a row: its `messages`, ShareGPT's `conversations`, or a question, with its context, and an answer.
    Raises BadInput when it has none of them."""
    if config.question_column is None:
        if "messages" in row:
            return row["messages"]
        if "conversations" in row:
            return [{"role": SHAREGPT_ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
                    if isinstance(turn, dict) and "from" in turn else turn for turn in row["conversations"] or []]
    pairs = [(config.question_column, config.answer_column)] if config.question_column else COLUMNS
    question, answer = next((pair for pair in pairs if set(pair) <= row.keys()), (None, None))
    if question is None:
        wanted = f"columns {' and '.join(pairs[0])}" if config.question_column else "messages, nor question and answer"
        raise BadInput(f"has no {wanted}: its columns are {', '.join(row)}: name them with --question_column and "
                       f"--answer_column")
    content = row[question]
    if isinstance(content, str):
        contexts = [row[name] for name in EXTRA_CONTEXT_COLUMNS if name not in (question, answer) and row.get(name)]
        content = "\n\n".join([content, *(context for context in contexts if isinstance(context, str))])
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row[answer]}]


# -- built-in questions -----------------------------------------------------------------------------------------------

def builtin_conversations() -> list[Conversation]:
    """Conversations of 1 to MAX_TURNS questions each, so that the model learns to answer the last one and not an earlier
    one."""
    rng, questions = np.random.default_rng(0), list(make_questions(N_BUILTIN_QUESTIONS, 0, held_out=False))
    order, conversations = rng.permutation(len(questions)).tolist(), []
    while order:
        turns = [questions[order.pop()] for _ in range(min(len(order), rng.integers(1, MAX_TURNS + 1)))]
        messages = [message for turn in turns for message in turn.messages()]
        conversations.append(Conversation(messages, "a built-in conversation"))
    return conversations


def builtin_held_out(n: int) -> list[Conversation]:
    """`n` held-out questions, one per conversation."""
    return [Conversation(question.messages(), "a built-in question", question.kind, question.task)
            for question in make_questions(n, 0, held_out=True)]
