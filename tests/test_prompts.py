"""Prompts from templates: what varies, where it stands, and counterfactuals."""

import numpy as np
import pytest

from sae_jax.analysis.prompts import END, TEXT, Task, changed, draw, written
from sae_jax.text.tokenizer import load_tokenizer

NAMES = ("name", "value", "path", "mode", "size")
PAIRS = ("()", "[]", "{}")
TASK = Task(
    forms={
        "first": ("def f({name}, {other}):\n    if {name} is", "f({name}, {other}"),
        "second": ("def f({other}, {name}):\n    if {name} is", "f({other}, {name}"),
    },
    pools={"name": NAMES, "other": NAMES},
    answer=" {name}",
    wrong=" {other}",
    differ=("name", "other"),
    form="order",
)
BRACKETS = Task(
    forms={"two": ("    {word} = {outer[0]}{a}, {inner[0]}{word}",)},
    pools={"word": NAMES, "a": NAMES, "outer": PAIRS, "inner": PAIRS},
    answer="{inner[1]}",
    wrong="{outer[1]}",
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def test_a_prompt_says_what_it_is_made_of(tokenizer):
    prompts = draw(TASK, tokenizer, 60)
    for i, text in enumerate(prompts.texts):
        said = {n: TASK.choices(n)[v[i]] for n, v in prompts.values.items()}
        assert said["name"] != said["other"]
        form = TASK.forms[said["order"]][int(said[TEXT])]
        assert text == form.format(**said)
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        n = len(ids)
        assert prompts.tokens[i, :n].tolist() == ids
        assert not prompts.tokens[i, n:].any()
        assert prompts.positions[END][i] == n - 1
        at = {name: int(where[i]) for name, where in prompts.positions.items()}
        for place, word in (("name", "name"), ("other", "other"), ("name.2", "name")):
            if said[TEXT] == "1" and place == "name.2":
                assert at[place] == -1  # that text has the name once
                continue
            before = tokenizer.decode(ids[1 : at[place] + 1])
            assert before.endswith(said[word])
            nth = 2 if place == "name.2" else 1
            assert before.count(said[word]) == nth
        assert tokenizer.decode(prompts.answer[i]) == f" {said['name']}"
        assert tokenizer.decode(prompts.wrong[i]) == f" {said['other']}"
    assert {*prompts.values["order"]} == {*prompts.values[TEXT]} == {0, 1}
    assert draw(TASK, tokenizer, 60).texts == prompts.texts
    assert draw(TASK, tokenizer, 60, seed=1).texts != prompts.texts


def test_fields_that_must_differ_are_drawn_evenly(tokenizer):
    values = draw(TASK, tokenizer, 4000).values
    counts = np.zeros((5, 5))
    np.add.at(counts, (values["name"], values["other"]), 1)
    assert not counts.diagonal().any()
    rest = counts[~np.eye(5, dtype=bool)]
    assert abs(rest - 200).max() < 5 * 200**0.5


def test_a_counterfactual_differs_in_one_attribute(tokenizer):
    prompts = draw(TASK, tokenizer, 60)
    for attribute in ("name", "order", TEXT):
        other = changed(prompts, tokenizer, attribute)
        for name, values in prompts.values.items():
            same = other.values[name] == values
            assert (~same if name == attribute else same).all()
        assert (other.values["name"] != other.values["other"]).all()
    brackets = draw(BRACKETS, tokenizer, 60)
    other = changed(brackets, tokenizer, "inner")
    assert (other.answer != brackets.answer).all()
    assert (other.wrong == brackets.wrong).all()
    assert (other.answer == other.wrong).any()  # they need not differ


def test_brackets_close_what_was_opened(tokenizer):
    prompts = draw(BRACKETS, tokenizer, 30)
    for i, text in enumerate(prompts.texts):
        inner = PAIRS[prompts.values["inner"][i]]
        opened = text.rindex(inner[0])
        at = prompts.positions["inner"][i]
        assert inner[0] in tokenizer.decode(prompts.tokens[i, at])
        assert text[opened + 1 :] == NAMES[prompts.values["word"][i]]
        assert tokenizer.decode(prompts.answer[i]) == inner[1]


def test_some_of_the_prompts(tokenizer):
    prompts = draw(TASK, tokenizer, 40)
    of_path = prompts.where("name", "path")
    assert len(of_path.texts) == (prompts.values["name"] == 2).sum() > 0
    assert all("path" in text for text in of_path.texts)
    again = written(TASK, tokenizer, of_path.values)
    assert again.texts == of_path.texts
    n = again.tokens.shape[1]
    np.testing.assert_array_equal(of_path.tokens[:, :n], again.tokens)
    for name, where in again.positions.items():
        np.testing.assert_array_equal(of_path.positions[name], where)
    assert prompts.take(np.array([3, 1])).texts == (prompts.texts[3], prompts.texts[1])


def test_what_no_prompt_can_be_made_of_is_said(tokenizer):
    for task, fault in (
        (TASK._replace(forms={"a": ("x",), "b": ()}), "as many texts each"),
        (TASK._replace(answer=" {nme}"), "Unknown field 'nme'. Did you mean 'name'?"),
        (TASK._replace(differ=("name", "other", "third")), "must have the same pool"),
        (BRACKETS._replace(pools=BRACKETS.pools | {"text": PAIRS}), "name that is tak"),
        (TASK._replace(pools={"name": NAMES[:2], "other": NAMES[:2]}), "a value more"),
        (TASK._replace(pools={"name": ("a", "a"), "other": NAMES}), "each once"),
    ):
        with pytest.raises(ValueError, match=fault.replace("?", r"\?")):
            draw(task, tokenizer, 3)
    with pytest.raises(ValueError, match="'un unlikely word' are several tokens"):
        draw(TASK._replace(answer="un unlikely word"), tokenizer, 3)
    prompts = draw(BRACKETS, tokenizer, 3)
    with pytest.raises(ValueError, match=r"Unknown attribute 'iner'\. Did you"):
        changed(prompts, tokenizer, "iner")
    with pytest.raises(ValueError, match="form has one value, 'two'"):
        changed(prompts, tokenizer, "form")
    with pytest.raises(ValueError, match="Unknown inner '<>'"):
        prompts.where("inner", "<>")
    with pytest.raises(TypeError, match="take"):
        prompts[0]
