"""Language models that are asked: an endpoint, a local model, or recorded answers.

A chat is a callable: messages in, the answer out. Whatever answers is told nothing but
its messages, and nothing of its answer is ever run.
"""

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sae_jax.lm.generate import generate
from sae_jax.lm.source import Source

Message = Mapping[str, str]  # "role" and "content"
Chat = Callable[[Sequence[Message]], str]

TRIES, TIMEOUT = 3, 120.0  # seconds
MOST_BYTES = 2**22  # of an answer


class Endpoint:
    """Any server with OpenAI's `/chat/completions`.

    Args:
      url: up to and without `/chat/completions`, such as `http://localhost:8000/v1`.
      model: its name for the model.
      key: what it wants as a bearer token, if anything.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(
                f"url={url!r} must begin with http:// or https://, and end before "
                f"/chat/completions"
            )
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer; what fails for the moment is tried again."""
        asked = {"model": self.model, "messages": list(messages), "temperature": 0}
        request = urllib.request.Request(
            self.url, json.dumps(asked).encode(), self._headers
        )
        for left in reversed(range(TRIES)):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                    found = json.loads(reply.read(MOST_BYTES))
                return str(found["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503, 504) or not left:
                    said = error.read(500).decode("utf-8", "replace")
                    raise ValueError(
                        f"{self.url} refused with {error.code}: {said}"
                    ) from None
            except (urllib.error.URLError, TimeoutError) as error:
                if not left:
                    raise ValueError(f"{self.url} does not answer: {error}") from None
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{self.url} answered something other than a chat completion: "
                    f"{error!r}"
                ) from None
            time.sleep(2 ** (TRIES - left - 1))
        raise AssertionError("every round of the loop returns, raises or goes on")


class LocalModel:
    """A language model of this package answers, greedily.

    The tokenizer's chat template is used where it has one.
    """

    def __init__(self, lm: Source, tokenizer: Any, *, n_new: int = 128):
        self.lm, self.tokenizer, self.n_new = lm, tokenizer, n_new

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer. Of a prompt that is too long, the beginning is cut off."""
        if getattr(self.tokenizer, "chat_template", None):
            tokens = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True
            )
        else:
            text = "\n\n".join(message["content"] for message in messages)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = tokens[-(self.lm.context - self.n_new) :]
        stop = self.tokenizer.eos_token_id
        new = generate(self.lm, [tokens], self.n_new, stop_token=stop)[0]
        return self.tokenizer.decode(new, skip_special_tokens=True)


class Recorded:
    """Answers kept in a file of JSON lines, so that no question is asked twice.

    Without a `chat` to ask, a question that the file does not have is an error.
    """

    def __init__(self, path: str | Path, chat: Chat | None = None):
        self.path, self.chat = Path(path), chat
        self._answers: dict[str, str] = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_text().splitlines(), 1):
                try:
                    known = json.loads(line)
                    self._answers[known["asked"]] = str(known["answer"])
                except (ValueError, LookupError, TypeError):
                    if chat is None:  # a line half written is asked again
                        raise ValueError(
                            f"{self.path}, line {number}, is no recorded answer."
                        ) from None

    def __call__(self, messages: Sequence[Message]) -> str:
        """The recorded answer, or the chat's own, which is then recorded."""
        asked = json.dumps([dict(message) for message in messages], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        if key not in self._answers:
            if self.chat is None:
                raise ValueError(
                    f"{self.path} has no answer to a question that begins "
                    f"{asked[:80]!r}; give a model to ask."
                )
            self._answers[key] = self.chat(messages)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                line = {"asked": key, "answer": self._answers[key]}
                file.write(f"{json.dumps(line)}\n")
        return self._answers[key]
