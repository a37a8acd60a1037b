"""Dialogues: messages of roles, and the text that a chat template makes of them.

The text is what the template gives, special tokens and all; tokenised like any other
text it is what transformers' `apply_chat_template` gives.
"""

from pathlib import Path
from typing import Any

Message = dict[str, Any]
PLAIN = "plain"
# For models that were never taught to chat; the special tokens stand where those of
# other templates do: at the start, and at the end of every turn.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
)


def is_dialogue(value: Any) -> bool:
    """Whether it is messages, `[{"role": ..., "content": ...}, ...]`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def rendered(messages: list[Message], tokenizer: Any) -> str:
    """The dialogue as text, by the tokenizer's chat template."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer has no chat template to make text of dialogues; give one, "
            f"--chat_template={PLAIN} or a file"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def chat_template(given: str) -> str:
    """A template by name, or the text of a file."""
    if given == PLAIN:
        return PLAIN_TEMPLATE
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"chat_template={given!r} is no file with a Jinja template, nor {PLAIN!r}"
        )
    return path.read_text(encoding="utf-8")
