"""The messages of a conversation: [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]."""
from runtime.config import BadInput

ROLES = "system", "user", "assistant"


def check_messages(messages):
    """Raises BadInput, naming the message, unless `messages` is a list in which each has a known role and a content of
    text."""
    if not isinstance(messages, list):
        raise BadInput(f"messages are {type(messages).__name__}, not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadInput(f"message {number} has no role and content: give it both")
        if message["role"] not in ROLES:
            raise BadInput(f"message {number} has the unknown role {str(message['role'])[:40]!r}: give {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise BadInput(f"message {number} has a content of type {type(message['content']).__name__}: give text")
