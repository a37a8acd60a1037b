"""Prompts from templates: what varies among them is known, and where it stands.

    task = Task(
        forms={"first": ("f({name}, {other}); {name} =",),
               "second": ("f({other}, {name}); {name} =",)},
        pools={"name": NAMES, "other": NAMES},
        answer=" {name}", wrong=" {other}", differ=("name", "other"), form="order",
    )
    prompts = draw(task, tokenizer, 512)

The attributes of a prompt are its form and the values of the fields in it, each drawn
uniformly and, but for those that have to differ, independently. The positive and
negative prompts of a task are two forms of it. `changed` gives each prompt again with
another value of one attribute and everything else kept, its counterfactual.

Fields are those of `str.format`, so that of a pair of brackets, a value "()", the text
has `{kind[0]}` and the answer is `{kind[1]}`.
"""

import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_jax import checks

TEXT = "text"  # which of the texts of its form a prompt has
END = "end"
Values = Mapping[str, Int[np.ndarray, " N"]]


class Task(NamedTuple):
    """What prompts are made of.

    Attributes:
      forms: texts by the name of a form, as many of each: text i of one form
        corresponds to text i of another.
      pools: the values of each field.
      answer: the token that should follow, a text with fields.
      wrong: one that should not, and would if the prompt were misread.
      differ: fields whose values must differ within a prompt; they share a pool.
      form: the name of the attribute that the form is.
    """

    forms: Mapping[str, tuple[str, ...]]
    pools: Mapping[str, tuple[str, ...]]
    answer: str
    wrong: str
    differ: tuple[str, ...] = ()
    form: str = "form"

    @property
    def n_texts(self) -> int:
        """How many texts each form has."""
        return len(next(iter(self.forms.values()), ()))

    def choices(self, attribute: str) -> tuple[str, ...]:
        """The values that an attribute may have, in the order of their numbers."""
        if attribute == self.form:
            return tuple(self.forms)
        if attribute == TEXT:
            return tuple(map(str, range(self.n_texts)))
        if attribute not in self.pools:
            names = (self.form, TEXT, *self.pools)
            raise ValueError(checks.unknown("attribute", attribute, names))
        return self.pools[attribute]

    def faults(self) -> Iterator[str]:
        """What no prompt can be made of."""
        if not self.n_texts or len({len(t) for t in self.forms.values()}) > 1:
            yield "forms must have as many texts each, and at least one."
        for text in (self.answer, self.wrong, *sum(self.forms.values(), ())):
            for name in {field for _, field in _parts(text) if field}:
                if _name(name) not in self.pools:
                    yield checks.unknown("field", _name(name), self.pools)
        for name in {self.form, TEXT, END} & {*self.pools}:
            yield f"pools[{name!r}] has a name that is taken; give the field another."
        for name, pool in self.pools.items():
            if not pool or len(set(pool)) < len(pool):
                yield f"pools[{name!r}] must have one or more values, each once."
        if len({self.pools.get(name) for name in self.differ}) > 1:
            yield f"{', '.join(self.differ)} differ: they must have the same pool."
        elif self.differ and len(self.pools[self.differ[0]]) <= len(self.differ):
            yield f"{', '.join(self.differ)} differ: their pool needs a value more."


class Prompts(NamedTuple):
    """Prompts with all that is known of them.

    Attributes:
      texts: as they are written.
      tokens: BOS and the text, joined by zeros to one length.
      positions: by name, the index of a token in each prompt: `FIELD` where a field
        ends that stands there for the first time, `FIELD.2` for the second time and so
        on, and `end`, the last token, after which the answer comes. -1 in prompts that
        have no such place.
      values: by attribute, the number of its value in `Task.choices`.
      answer: the token that should follow.
      wrong: the one that should not; where it is the same, there is no such contrast.
    """

    task: Task
    texts: tuple[str, ...]
    tokens: Int[np.ndarray, "N T"]
    positions: dict[str, Int[np.ndarray, " N"]]
    values: dict[str, Int[np.ndarray, " N"]]
    answer: Int[np.ndarray, " N"]
    wrong: Int[np.ndarray, " N"]

    def __getitem__(self, index: Any) -> Any:
        """Refuses what a tuple would do with it: prompts are taken by `take`."""
        raise TypeError("Prompts are taken by take(...), their parts by name.")

    def take(self, index: Int[np.ndarray, " n"] | Bool[np.ndarray, " N"]) -> "Prompts":
        """Some of them, by number or by a mask."""
        chosen = np.arange(len(self.texts))[index]

        def taken(held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: array[chosen] for name, array in held.items()}

        return self._replace(
            texts=tuple(self.texts[i] for i in chosen),
            tokens=self.tokens[chosen],
            positions=taken(self.positions),
            values=taken(self.values),
            answer=self.answer[chosen],
            wrong=self.wrong[chosen],
        )

    def where(self, attribute: str, value: str) -> "Prompts":
        """Those whose attribute has this value."""
        choices = self.task.choices(attribute)
        if value not in choices:
            raise ValueError(checks.unknown(attribute, value, choices))
        return self.take(self.values[attribute] == choices.index(value))


def draw(task: Task, tokenizer: Any, n: int, *, seed: int = 0) -> Prompts:
    """`n` prompts, their attributes drawn at random."""
    checks.raise_all(task.faults())
    if n < 1:
        raise ValueError(f"n={n} prompts; at least one is needed.")
    rng = np.random.default_rng(seed)
    names = (task.form, TEXT, *task.pools)
    values = {name: rng.integers(len(task.choices(name)), size=n) for name in names}
    for i, name in enumerate(task.differ[1:], 1):
        before = [values[other] for other in task.differ[:i]]
        values[name] = _other_than(before, task.choices(name), rng)
    return written(task, tokenizer, values)


def changed(
    prompts: Prompts, tokenizer: Any, attribute: str, *, seed: int = 0
) -> Prompts:
    """Each prompt with another value of one attribute, and everything else kept."""
    choices = prompts.task.choices(attribute)
    if len(choices) < 2:
        raise ValueError(f"{attribute} has one value, {choices[0]!r}; none is another.")
    taken = {attribute}
    if attribute in prompts.task.differ:
        taken |= {*prompts.task.differ}
    rng = np.random.default_rng(seed)
    new = _other_than([prompts.values[name] for name in sorted(taken)], choices, rng)
    return written(prompts.task, tokenizer, {**prompts.values, attribute: new})


def written(task: Task, tokenizer: Any, values: Values) -> Prompts:
    """The prompts of these values."""
    n = len(next(iter(values.values())))
    texts, ends, answers = list[str](), list[dict[str, int]](), list[list[str]]()
    for i in range(n):
        said = {name: task.pools[name][values[name][i]] for name in task.pools}
        form = tuple(task.forms.values())[values[task.form][i]]
        text, end = _filled(form[values[TEXT][i]], said)
        texts.append(text)
        ends.append(end)
        answers.append([_filled(t, said)[0] for t in (task.answer, task.wrong)])
    found = tokenizer(texts, return_offsets_mapping=True)
    start = [tokenizer.bos_token_id]
    rows = [start + list(ids) for ids in found["input_ids"]]
    tokens = np.zeros((n, max(map(len, rows))), np.int32)
    places = dict.fromkeys([*(name for end in ends for name in end), END])
    positions = {name: np.full(n, -1) for name in places}
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        positions[END][i] = len(row) - 1
        offsets = np.array(found["offset_mapping"][i])
        for name, last in ends[i].items():
            # The token that holds the field's last character; BOS stands before.
            positions[name][i] = 1 + int(np.argmax(offsets[:, 1] > last))
    ids = _single_tokens(tokenizer, {said for pair in answers for said in pair})
    answer, wrong = (np.array([ids[a[j]] for a in answers], np.int32) for j in (0, 1))
    held = {name: np.asarray(array) for name, array in values.items()}
    return Prompts(task, tuple(texts), tokens, positions, held, answer, wrong)


def _other_than(
    taken: list[np.ndarray], choices: tuple[str, ...], rng: np.random.Generator
) -> np.ndarray:
    """For each prompt a value drawn from those that are not taken."""
    free = np.ones((len(taken[0]), len(choices)), bool)
    for values in taken:
        free[np.arange(len(free)), values] = False
    return np.where(free, rng.random(free.shape), -1).argmax(1)


def _parts(text: str) -> Iterator[tuple[str, str | None]]:
    for literal, field, _, _ in string.Formatter().parse(text):
        yield literal, field


def _name(field: str) -> str:
    """The name in `name[0]`."""
    return field.partition("[")[0]


def _filled(text: str, values: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """The text with values in its fields; the last character of each of these."""
    written, ends, seen = "", dict[str, int](), dict[str, int]()
    for literal, field in _parts(text):
        written += literal
        if field:
            written += str(string.Formatter().get_field(field, (), values)[0])
            name = _name(field)
            seen[name] = seen.get(name, 0) + 1
            nth = f".{seen[name]}" if seen[name] > 1 else ""
            ends[f"{name}{nth}"] = len(written) - 1
    return written, ends


def _single_tokens(tokenizer: Any, answers: Iterable[str]) -> dict[str, int]:
    found = {said: tokenizer(said)["input_ids"] for said in sorted(answers)}
    several = [repr(said) for said, ids in found.items() if len(ids) != 1]
    if several:
        raise ValueError(
            f"{', '.join(several[:10])} are several tokens to this model each; what "
            f"follows a prompt has to be one. Leave these values out of the pools."
        )
    return {said: ids[0] for said, ids in found.items()}
