"""Tasks for language models, as templates whose attributes vary independently.

`close` and `assign` are for models of Python text; the names in them are one token of
the embedded model's tokenizer, and among those the ones on which it is right most
often. `ioi` is indirect object identification (Wang et al. 2022, arXiv:2211.00593),
for GPT-2: five stories in the manner of its fifteen. Whether a model does a task is for
whoever uses it to measure, and to print.

    close    if data in key["root   ->   "]   by the kinds of bracket and quotation mark
    assign   def f(self, path, name): ... self.name =   ->   name
    ioi      When Mary and John went to the shop, John gave a book to   ->   Mary
"""

from typing import NamedTuple

from sae_jax.analysis.prompts import Task

WORDS = tuple(
    "offset index root width day year indent prefix size value end length level frame "
    "left group line count string args".split()
)
KEYS = tuple(
    "root length data offset timeout response height value size line errors target "
    "other func group day font tag key first".split()
)
ASSIGNED = tuple(
    "width value url text target stream result response path name message line font "
    "filename file code address parser root source".split()
)
METHODS = tuple("run read write close update load save start send open".split())
PEOPLE = tuple(
    "Mary John Tom James Martin Amy Scott Sarah David Michael Robert Anna Paul Kevin "
    "Laura Lisa Mark Emily Peter Alice".split()
)
SHOPS = tuple("store garden restaurant school hospital office house station".split())
OBJECTS = tuple("ring kiss bone basketball computer necklace drink snack".split())

# A pair of values, what it opens and closes with, and then the other one's.
QUOTES = ("'\"", "\"'")
KINDS = ("()[]", "[]()")

CLOSE = Task(
    forms={
        "one": (
            "    if {arg} in {word}{kind[0]}{quote[0]}{key}",
            "    {arg} = self.{word}{kind[0]}{quote[0]}{key}",
            "    {arg} = {word}{kind[0]}{quote[0]}{key}",
        )
    },
    pools={"quote": QUOTES, "kind": KINDS, "key": KEYS, "word": WORDS, "arg": WORDS},
    answer="{quote[0]}{kind[1]}",
    wrong="{quote[1]}{kind[3]}",
)

_THEN = (
    "        if {name} is None:\n            {name} = []\n        self.{name} =",
    "        if {name} is not None:\n            self.{name} =",
)
ASSIGN = Task(
    forms={
        "first": tuple(
            f"    def {{func}}(self, {{name}}, {{other}}):\n{t}" for t in _THEN
        ),
        "second": tuple(
            f"    def {{func}}(self, {{other}}, {{name}}):\n{t}" for t in _THEN
        ),
    },
    pools={"name": ASSIGNED, "other": ASSIGNED, "func": METHODS},
    answer=" {name}",
    wrong=" {other}",
    differ=("name", "other"),
    form="order",
)

_STORIES = (
    "When {0} and {1} went to the {{place}}, {{s}} gave a {{object}} to",
    "Then, {0} and {1} went to the {{place}}. {{s}} gave a {{object}} to",
    "After {0} and {1} went to the {{place}}, {{s}} gave a {{object}} to",
    "While {0} and {1} were working at the {{place}}, {{s}} gave a {{object}} to",
    "Then, {0} and {1} had a long argument at the {{place}}, and {{s}} said to",
)
IOI = Task(
    forms={
        "abb": tuple(story.format("{io}", "{s}") for story in _STORIES),
        "bab": tuple(story.format("{s}", "{io}") for story in _STORIES),
    },
    pools={"io": PEOPLE, "s": PEOPLE, "place": SHOPS, "object": OBJECTS},
    answer=" {io}",
    wrong=" {s}",
    differ=("io", "s"),
    form="pos",
)


class Known(NamedTuple):
    """A task, and what is looked at in it.

    Attributes:
      attributes: those that one asks about; the rest is there for variety.
      places: where the model keeps them, in the model that the task is for.
    """

    task: Task
    attributes: tuple[str, ...]
    places: tuple[str, ...]


# Of IOI the outputs of the heads that move the name, in GPT-2 small (Wang et al.). Of
# the others what, patched together from another prompt, gives that prompt's answer.
TASKS = {
    "close": Known(CLOSE, ("quote", "kind", "key"), ("resid_post.2@end",)),
    "assign": Known(
        ASSIGN, ("name", "other", "order"), ("resid_post.2@end", "attn_out.3@end")
    ),
    "ioi": Known(
        IOI,
        ("io", "s", "pos"),
        ("head_out.9/6@end", "head_out.9/9@end", "head_out.10/0@end"),
    ),
}
