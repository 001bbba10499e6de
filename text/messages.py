"""The messages of a conversation: [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}].

An assistant's message may have "weight": 0, as in OpenAI's format: it is context, and carries no loss.
"""
from collections.abc import Collection

from runtime.config import BadInput


def check_messages(messages, roles: Collection[str]):
    """Raises BadInput, naming the message, unless `messages` is a list in which each has one of `roles`, a content of text,
    and no weight but 0 or 1."""
    if not isinstance(messages, list):
        raise BadInput(f"messages are {type(messages).__name__}, not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadInput(f"message {number} has no role and content: give it both")
        if message["role"] not in roles:
            raise BadInput(f"message {number} has the unknown role {str(message['role'])[:40]!r}: give {', '.join(roles)}")
        if not isinstance(message["content"], str):
            raise BadInput(f"message {number} has a content of type {type(message['content']).__name__}: give text")
        if not is_weight(message.get("weight", 1)):
            raise BadInput(f"message {number} has the weight {str(message['weight'])[:40]!r}: give 0 or 1")


def is_weight(value) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def has_loss(message: dict) -> bool:
    """Whether the message is one that the model learns to say."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0
