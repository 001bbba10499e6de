"""The messages of a conversation: [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]."""
from collections.abc import Collection

from runtime.config import BadInput


def check_messages(messages, roles: Collection[str]):
    """Raises BadInput, naming the message, unless `messages` is a list in which each has one of `roles` and a content of
    text."""
    if not isinstance(messages, list):
        raise BadInput(f"messages are {type(messages).__name__}, not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadInput(f"message {number} has no role and content: give it both")
        if message["role"] not in roles:
            raise BadInput(f"message {number} has the unknown role {str(message['role'])[:40]!r}: give {', '.join(roles)}")
        if not isinstance(message["content"], str):
            raise BadInput(f"message {number} has a content of type {type(message['content']).__name__}: give text")
