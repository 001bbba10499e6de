"""Conversations to finetune on and to evaluate with: from the hub, local files, or the built-in questions.

    train, held_out = read_conversations(ConversationConfig("mine.jsonl"), ROLES)

Which rows are read: see chat_rows.py.
"""
import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from runtime.config import BadInput, check_flags, flag
from tasks.builtin_questions import make_questions
from tasks.chat_rows import UnknownForm, name_list, parse_row
from tasks.rows import local_splits, read_dataset
from text.documents import valid_unicode
from text.messages import check_messages, has_loss

DOLLY = "databricks/databricks-dolly-15k"
N_BUILTIN_QUESTIONS, MAX_TURNS = 60_000, 4
HELD_OUT_RATIO = 10  # at most one conversation in 10 is held out


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations."""
    dataset: str = flag(DOLLY, "a dataset on the Hugging Face hub by its id, a local file or folder (jsonl, json, csv, "
                               "parquet), or `builtin`: questions about numbers, words and built-in text, no network. Rows "
                               "have messages, [{\"role\": …, \"content\": …}, …], or a question and an answer, in any of "
                               "the usual forms", scope="shared")
    dataset_config: str = flag(None, "configuration of a hub dataset", scope="shared")
    split: str = flag("train", "split of a hub dataset, or of a local folder whose files are named train, validation, test",
                      scope="shared")
    question_column: str = flag(None, "column with questions (default: the first of question, instruction, prompt …)",
                                scope="shared")
    answer_column: str = flag(None, "column with answers (default: the one that belongs to the question's)", scope="shared")
    val_conversations: int = flag(240, "conversations held out for validation, always the same ones, and at most a tenth",
                                  at_least=1, scope="shared")
    skip_errors: bool = flag(False, "1 leaves out and counts rows that cannot be read, such as those with pictures or tool "
                                    "calls, or without an answer", on_resume="free", scope="shared")

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


@dataclass
class ReadReport:
    """What was not used of a dataset. skipped: a message for each row, or part of a file, that could not be read. unused:
    names of columns. notes: what else to say of the reading."""
    skipped: list[str] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [*([f"left out {len(self.skipped):,} that cannot be read, the first: {self.skipped[0]}"]
                  if self.skipped else []),
                *([f"columns not used: {name_list(self.unused)}"] if self.unused else []), *self.notes]


def read_conversations(config: ConversationConfig, roles: Collection[str],
                       report: ReadReport | None = None) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and those held out: of the validation or test files of a local folder that has some, else as in
    `hold_out`.

    roles: those that a message may have, the tokenizer's. report: is added to. Raises BadInput.
    """
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
    if config.dataset == "builtin":
        return builtin_conversations(), builtin_held_out(config.val_conversations)
    report = report or ReadReport()
    splits = local_splits(config.dataset) if config.split == "train" else set()
    split = next((name for name in ("validation", "test") if name in splits), None)
    conversations = list(read_all(config, roles, report, {split}))
    if split is None:
        return hold_out(conversations, config, report)
    candidates = sorted(read_all(replace(config, split=split), roles, report, None), key=content_digest)
    held_out = candidates[:config.val_conversations]
    questions = {question for one in held_out for question in question_digests(one)}
    train = [one for one in conversations if not questions & question_digests(one)]
    report.notes.append(f"held out: {len(held_out):,} of the {len(candidates):,} conversations in its {split} files")
    if len(train) < len(conversations):
        report.notes.append(f"not trained on: {len(conversations) - len(train):,} conversations whose question is held out")
    if not train:
        raise BadInput(f"--dataset={config.dataset}: all questions of its train files are in its {split} files too")
    return train, held_out


def read_all(config: ConversationConfig, roles: Collection[str], report: ReadReport | None = None,
             also_read: Collection[str] | None = ()) -> Iterator[Conversation]:
    """Every conversation of a dataset. also_read: see `read_dataset`. Raises BadInput, which names the row; with
    --skip_errors, adds that to `report`."""
    n, report = 0, report or ReadReport()
    rows = read_dataset(config.dataset, config.dataset_config, config.split,
                        report.skipped if config.skip_errors else None, also_read)
    for where, row in rows:
        try:
            messages, unused = parse_row(row, config.question_column, config.answer_column)
            check_messages(messages, roles)
            if not messages:
                raise BadInput("has no messages in its conversation")
            if not any(map(has_loss, messages)):
                raise BadInput("has no message of the assistant, so there is nothing to learn")
            if not any(message["content"].strip() for message in messages if has_loss(message)):
                raise BadInput("its answer is empty")
        except BadInput as error:
            if not config.skip_errors:
                advice = "" if isinstance(error, UnknownForm) and not n else "; --skip_errors=1 leaves such rows out"
                raise BadInput(f"{where}: {error}{advice}") from None
            report.skipped.append(f"{where}: {error}")
            continue
        n += 1
        report.unused |= dict.fromkeys(unused)
        task = group_name(row.get("task") or row.get("category"))
        yield Conversation(messages, where, group_name(row.get("kind")) or task, task)
    if not n:
        raise BadInput(f"--dataset={config.dataset}: holds no conversations"
                       + (f" that can be read, the first: {report.skipped[0]}" if report.skipped else ""))


def group_name(value) -> str:
    """The name of a kind or a task; "" where a row has none."""
    return valid_unicode(str(value))[:100] if value and isinstance(value, (str, int, float)) else ""


# -- held-out conversations -------------------------------------------------------------------------------------------

def hold_out(conversations: list[Conversation], config: ConversationConfig,
             report: ReadReport) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and --val_conversations held-out ones, at most a tenth of all, which depend neither on the order of
    the rows nor on a seed.

    Conversations with the same system message and opening stay together. Where so many share these that they would be more
    than all the held-out ones, as after a greeting, those with the same further questions stay together. Where even these
    are too many, some of them are held out and the others not used at all, which `report` notes. Raises BadInput when all
    have the same.
    """
    n_held_out = max(1, min(config.val_conversations, len(conversations) // HELD_OUT_RATIO))
    sizes = Counter(groups := [opening_digest(one) for one in conversations])
    groups = [group if sizes[group] <= n_held_out else follow_up_digest(one) for group, one in zip(groups, conversations)]
    sizes, chosen, n = Counter(groups), set(), 0
    if len(sizes) < 2:
        raise BadInput(f"--dataset={config.dataset}: all its conversations ask the same, so none can be held out: give "
                       f"more of them")
    for group in sorted(sizes):
        if n + sizes[group] <= n_held_out:
            chosen.add(group)
            n += sizes[group]
    if not chosen:  # every group is larger
        chosen.add(min(sizes, key=lambda group: (sizes[group], group)))
    train = [one for group, one in zip(groups, conversations) if group not in chosen]
    held_out = [one for group, one in zip(groups, conversations) if group in chosen]
    if (n_unused := len(held_out) - n_held_out) > 0:
        kept = set(sorted(map(content_digest, held_out))[:n_held_out])
        held_out = [one for one in held_out if content_digest(one) in kept][:n_held_out]
        report.notes.append(f"not used: {n_unused:,} conversations with the same question as held-out ones")
    return train, held_out


def opening_digest(conversation: Conversation) -> bytes:
    """Equal where the user's first message and the system message before it are."""
    first = next(iter(user_messages(conversation)), "")
    system = "\0".join(message["content"] for message in conversation.messages if message["role"] == "system")
    return digest(first) + (digest(system) if system else b"")  # the first message decides the order


def follow_up_digest(conversation: Conversation) -> bytes:
    """Equal where all the user's messages but the first are; of a single question, where the opening is."""
    return digest("\0".join(later)) if (later := user_messages(conversation)[1:]) else opening_digest(conversation)


def content_digest(conversation: Conversation) -> bytes:
    return digest("\0".join(itertools.chain(*((message["role"], message["content"]) for message in conversation.messages))))


def question_digests(conversation: Conversation) -> set[bytes]:
    """One for each answer of the assistant, equal where everything before it is."""
    messages = conversation.messages
    said = [f"{message['role']}\0{message['content'].strip()}" for message in messages]
    return {digest("\0".join(said[:i])) for i, message in enumerate(messages) if message["role"] == "assistant"}


def user_messages(conversation: Conversation) -> list[str]:
    """White space at the ends makes no other question."""
    return [message["content"].strip() for message in conversation.messages if message["role"] == "user"]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


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
