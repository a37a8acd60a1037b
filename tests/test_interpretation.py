"""Explanations of features that are known by heart, and judges that are."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.analysis.interpretation import by_model
from sae_jax.analysis.interpretation.asking import (
    AskedExplainer,
    AskedJudge,
    numbers,
    written,
)
from sae_jax.analysis.interpretation.chat import Endpoint, LocalModel, Recorded
from sae_jax.analysis.interpretation.scores import marks, score, shuffled, truth
from sae_jax.analysis.interpretation.token_rules import (
    Explanation,
    RuleJudge,
    TokenRule,
    TokenRules,
)
from sae_jax.analysis.interpretation.windows import Examples, Sampler, Windows, choose
from sae_jax.analysis.ranking import auroc
from sae_jax.evaluation.firings import Firings
from sae_jax.lm.edits import add, scale
from tests.toys import toy_lm

N, T, L, V = 80, 64, 16, 30
TEXTS = [f" w{i}" for i in range(V)]
HERE, BEFORE, PAIR, SECOND, SILENT = range(5)  # the features below


def tokens_of_text():
    return np.random.default_rng(0).integers(1, V, (N, T))


def firings_of(active, tokens=None):
    """Firings from dense codes [N * T, F]."""
    tokens = tokens_of_text() if tokens is None else tokens
    features, rows = np.nonzero(active.T)
    starts = np.searchsorted(features, np.arange(active.shape[1] + 1))
    norms = np.ones(tokens.size, np.float32)
    return Firings(
        tokens,
        np.ones(tokens.shape, bool),
        active.shape[1],
        starts.astype(np.int64),
        rows.astype(np.int32),
        active.T[features, rows].astype(np.float32),
        norms,
        norms,
    )


def by_heart():
    """On token 3; after token 4; on 6 after 5; on the second 7 of a context; never."""
    tokens = tokens_of_text()
    before = np.concatenate([np.zeros((N, 1), int), tokens[:, :-1]], 1)
    seventh = tokens == 7
    second = seventh & (np.cumsum(seventh, 1) == 2)
    on = np.stack(
        [
            tokens == 3,
            before == 4,
            (before == 5) & (tokens == 6),
            second,
            np.zeros_like(seventh),
        ],
        2,
    ).reshape(N * T, 5)
    sizes = np.random.default_rng(1).uniform(0.5, 2, on.shape)
    return firings_of(on * sizes)


def sampler(**changes):
    return Sampler(by_heart(), **{"length": L} | changes)


# Windows ------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", [HERE, BEFORE, PAIR, SECOND])
@pytest.mark.parametrize("others", ["random", "similar", "neighbours"])
def test_windows_hold_what_the_feature_did(feature, others):
    sample, found = sampler(), by_heart()
    dense = np.zeros(N * T)
    rows, values = found.of(feature)
    dense[rows] = values
    windows = {
        tuple(t): v
        for t, v in zip(
            found.tokens.reshape(-1, L).tolist(), dense.reshape(-1, L), strict=True
        )
    }
    one = sample(feature, others=others, near=[HERE])
    for on, off in (one[2:4], one[4:6]):
        assert len(on.tokens)
        assert (on.values > 0).any(1).all()
        assert not off.values.any()
        for part in (on, off):
            for tokens, held in zip(part.tokens.tolist(), part.values, strict=True):
                np.testing.assert_array_equal(windows[tuple(tokens)], held)
    if others == "similar" and feature == PAIR:
        assert (one.off.tokens == 6).any(1).all()
    if others == "neighbours":
        assert (one.off.tokens == 3).any(1).all()


def test_what_is_tested_on_was_never_shown():
    sample = sampler()
    contexts = [part // (T // L) for part in (sample.explaining, sample.testing)]
    assert set(contexts[0]).isdisjoint(contexts[1])
    assert len(np.unique(np.concatenate(contexts))) == N
    one = sample(HERE, n_shown=1000, n_tested=1000)
    shown, tested = (set(map(tuple, one[i].tokens.tolist())) for i in (2, 4))
    assert shown.isdisjoint(tested)
    again = sampler()(HERE, n_shown=1000, n_tested=1000)
    for ours, theirs in zip(one[2:], again[2:], strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_deciles_give_a_tenth_from_each_tenth():
    strongest = np.random.default_rng(3).permutation(200).astype(float)
    taken = choose(strongest, 50, "deciles", np.random.default_rng(0))
    assert len(set(taken)) == 50
    tenth = (199 - strongest[taken]) // 20
    np.testing.assert_array_equal(np.bincount(tenth.astype(int)), [5] * 10)
    top = choose(strongest, 50, "top", np.random.default_rng(0))
    assert sorted(strongest[top]) == list(range(150, 200))
    assert len(choose(strongest[:7], 50, "deciles", np.random.default_rng(0))) == 7


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="length=65 must be from 1 to the context, 64"):
        sampler(length=65)


# Rules of tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "kind", "key", "label", "least"),
    [
        (HERE, "on", [-1, 3], 'on " w3"', 0.9),
        (BEFORE, "after", [4, -1], 'after " w4"', 0.9),
        (PAIR, "pair", [5, 6], 'on " w6" after " w5"', 0.4),  # three hits prove no more
    ],
)
def test_rules_known_by_heart_are_found(feature, kind, key, label, least):
    sample = sampler()
    found = TokenRules(sample, TEXTS)(sample(feature))
    assert found.rule.kind == kind
    assert found.rule.keys.tolist()[0] == key
    assert found.rule.f1 > least
    assert found.text.startswith(label)


def slow_f1(kind, keys, tokens, dense, here):
    """F1 of a set of keys, position by position, of what their hits prove."""
    hits, occurs, fired = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0), 0
    for context, place in np.argwhere(here).tolist():
        token = tokens[context, place]
        before = tokens[context, place - 1] if place else None
        key = {"on": (-1, token), "after": (before, -1), "pair": (before, token)}[kind]
        on = dense[context, place] > 0
        fired += on
        if key in occurs:
            occurs[key] += 1
            hits[key] += on
    proved = sum(proven(hits[k], n) * n for k, n in occurs.items() if n)
    return 2 * proved / (sum(occurs.values()) + fired)


def proven(hits, n):
    """The least share q from which hits / n is two standard errors of q away."""
    low, high = 0.0, hits / n
    for _ in range(60):
        q = (low + high) / 2
        if hits / n - q > 2 * math.sqrt(q * (1 - q) / n):
            low = q
        else:
            high = q
    return high


def test_the_best_set_of_keys_is_that_of_all_subsets():
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 5, (8, 16))
    chance = np.array([0.9, 0.6, 0.3, 0.1, 0.0])[tokens]
    dense = (rng.random(tokens.shape) < chance).astype(float)
    found = firings_of(dense.reshape(-1, 1), tokens)
    sample = Sampler(found, length=16)
    rule = TokenRules(sample, TEXTS)(sample(0)).rule
    here = np.zeros(tokens.shape, bool)
    here[sample.explaining] = True
    keys = {tuple(key) for key in rule.keys.tolist()}
    assert rule.f1 == pytest.approx(slow_f1(rule.kind, keys, tokens, dense, here))
    for subset in range(1, 32):
        others = {(-1, t) for t in range(5) if subset >> t & 1}
        assert slow_f1("on", others, tokens, dense, here) <= rule.f1 + 1e-12


def test_a_feature_that_never_fires_is_said_to():
    sample = sampler()
    found = TokenRules(sample, TEXTS)(sample(SILENT))
    assert found.rule is None
    assert "does not fire" in found.text
    assert not RuleJudge().simulate(found, np.ones((2, 3), int)).any()


# Scores -------------------------------------------------------------------------------


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    right, wrong = rng.integers(0, 5, 30) / 4, rng.integers(0, 4, 20) / 4
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    assert auroc(right, wrong) == pytest.approx(np.mean(pairs))


def test_what_is_not_answered_does_not_count():
    found = truth([1.0, None, 0.9], [0.0, 0.2, None, None])
    assert found == (1.0, 1.0, 2, 2, 3)
    assert math.isnan(truth([None], [0.3]).auroc)


def test_a_perfect_rule_scores_one_and_another_features_half():
    sample = sampler()
    explain, features = TokenRules(sample, TEXTS), [HERE, BEFORE, PAIR]
    examples = [sample(feature, n_tested=100) for feature in features]
    explanations = [explain(one) for one in examples]
    for one, explanation in zip(examples, explanations, strict=True):
        found = score(RuleJudge(), explanation, one)
        # What a window's first token follows is not seen there.
        assert found.detection.auroc > 0.95
        assert found.fuzzing.auroc > 0.95
        assert found.simulation > 0.8
    for found in shuffled(RuleJudge(), explanations, examples):
        assert abs(found.detection.auroc - 0.5) < 0.12
        assert abs(found.simulation) < 0.1


def test_a_coarse_explanation_is_found_out_by_similar_windows():
    """The second 7 of a context, explained as any 7: right marks, too many windows."""
    any_seven = Explanation("", TokenRule("on", np.array([[-1, 7]]), np.ones(1), 1.0))
    easy = sampler()(SECOND, n_tested=200)
    hard = sampler()(SECOND, n_tested=200, others="similar")
    found = [score(RuleJudge(), any_seven, one) for one in (easy, hard)]
    assert min(one.fuzzing.auroc for one in found) > 0.9
    assert found[0].detection.auroc > 0.65
    assert found[1].detection.auroc == 0.5


def test_wrong_marks_are_wrong_and_as_many():
    one = sampler()(HERE, n_tested=200)
    right, wrong = marks(one)
    threshold = 0.3 * one.highest
    values = {
        tuple(t): v for t, v in zip(one.on.tokens.tolist(), one.on.values, strict=True)
    }
    assert len(right.tokens) > 10
    assert len(wrong.tokens) > 10
    for tokens, marked in zip(*right, strict=True):
        np.testing.assert_array_equal(marked > 0, values[tuple(tokens)] >= threshold)
    for tokens, marked in zip(*wrong, strict=True):
        assert not (values[tuple(tokens)][marked > 0] >= threshold).any()
    per_window = math.ceil((right.values > 0).sum(1).mean())
    assert set((wrong.values > 0).sum(1)) == {per_window}


# Asking -------------------------------------------------------------------------------


class Stub:
    """Answers from a list, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, messages):
        self.asked.append(messages)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


def test_windows_are_written_with_marks():
    marks_ = np.array([False, True, True, False, True])
    assert written(np.array([1, 2, 3, 4, 99]), marks_, TEXTS) == (
        " w1<< w2 w3>> w4<<[99]>>"
    )


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[1, 0]", [1, 0]),
        ("Sure: [1,0,1] no, [0.5, 1]", [0.5, 1]),
        ("[1]", None),
        ("yes", None),
        ("[1 0]", None),
    ],
)
def test_answers_are_lists_or_nothing(answer, found):
    assert numbers(answer, 2) == found


def test_a_model_is_asked_to_explain_and_to_judge():
    one = sampler()(HERE, n_shown=5, n_tested=7)
    stub = Stub("\n  It fires on w3.\nMore.")
    explanation = AskedExplainer(stub, TEXTS)(one)
    assert explanation.text == "It fires on w3."
    asked = stub.asked[0][1]["content"]
    assert "<< w3>>" in asked
    assert asked.count("Strengths:") == 5
    judge = AskedJudge(Stub("[1, 0, 1, 0, 1]", "[1, 1]"), TEXTS)
    answers = judge.detect(explanation, one.on.tokens)
    assert answers == [1, 0, 1, 0, 1, 1, 1]
    assert "It fires on w3." in judge.chat.asked[0][0]["content"]
    assert (
        AskedJudge(Stub("no"), TEXTS).detect(explanation, one.on.tokens) == [None] * 7
    )
    levels = AskedJudge(Stub(str(list(range(L)))), TEXTS).simulate(
        explanation, one.on.tokens
    )
    np.testing.assert_array_equal(levels, [list(range(L))] * 7)


def test_recorded_answers_are_not_asked_for_again(tmp_path):
    path, asked = (
        tmp_path / "said" / "answers.jsonl",
        [{"role": "user", "content": "é"}],
    )
    stub = Stub("one")
    assert Recorded(path, stub)(asked) == "one"
    assert Recorded(path, stub)(asked) == Recorded(path)(asked) == "one"
    assert len(stub.asked) == 1
    with pytest.raises(ValueError, match="has no answer to a question that begins"):
        Recorded(path)([{"role": "user", "content": "another"}])
    path.write_text("{half")
    with pytest.raises(ValueError, match="line 1, is no recorded answer"):
        Recorded(path)


@pytest.fixture
def server():
    """A server whose replies the test sets."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Authorization"], json.loads(body)))
            status, text = replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", replies, asked
    http.shutdown()
    thread.join()
    http.server_close()


def test_an_endpoint_is_asked_as_openai_is(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    url, replies, asked = server
    good = json.dumps({"choices": [{"message": {"content": "[1]"}}]})
    replies += [(503, "busy"), (200, good)]
    chat = Endpoint(url, "some-model", key="secret")
    assert chat([{"role": "user", "content": "?"}]) == "[1]"
    path, key, body = asked[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["model"] == "some-model"
    assert body["messages"] == [{"role": "user", "content": "?"}]
    replies += [(401, "no such key")]
    with pytest.raises(ValueError, match="refused with 401: no such key"):
        chat([])
    replies += [(200, '{"choices": []}')]
    with pytest.raises(ValueError, match="something other than a chat completion"):
        chat([])
    with pytest.raises(ValueError, match="must begin with http"):
        Endpoint("localhost:8000", "some-model")


# By a model ---------------------------------------------------------------------------


class Numbers:
    """Words are numbers of tokens; no chat template."""

    bos_token_id, eos_token_id = 0, 63

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


def test_a_local_model_answers():
    answer = LocalModel(toy_lm(), Numbers(), n_new=3)([{"content": "5 6 7 8 9 10 11"}])
    assert len(answer.split()) == 3


def test_losses_after_a_text_are_those_of_the_rows():
    tokens = np.array([[4, 5, 6], [7, 8, 9]])
    found = by_model.losses_after(toy_lm(), Numbers(), "1 2", tokens)
    for row, loss in zip(tokens, found, strict=True):
        alone = toy_lm().run(np.array([[0, 1, 2, *row]]), losses=True).losses
        assert loss == pytest.approx(float(np.asarray(alone)[0, 2:].mean()), rel=1e-5)


def test_surprisal_and_embedding_tell_right_windows_from_wrong_ones():
    on = Windows(np.array([[4, 5], [4, 9]]), np.ones((2, 2)))
    off = Windows(np.array([[7, 8], [6, 8]]), np.zeros((2, 2)))
    one = Examples(0, 1.0, on, off, on, off)
    found = by_model.surprisal(toy_lm(), Numbers(), "4 5", one)
    assert 0 <= found <= 1

    def bags(texts):
        return np.array([[t.split().count(str(w)) for w in range(64)] for t in texts])

    decode = Numbers().decode
    assert by_model.embedding(bags, "4 5", one, decode) == 1
    assert by_model.embedding(bags, "7 8", one, decode) == 0
    none = one._replace(off=Windows(off.tokens[:0], off.values[:0]))
    assert math.isnan(by_model.embedding(bags, "4", none, decode))
    assert math.isnan(by_model.surprisal(toy_lm(), Numbers(), "4", none))


def test_an_edit_that_does_nothing_intervenes_by_zero():
    contexts, site = np.array([[0, 3], [0, 4]]), "resid_post.0"
    strong = add(50.0 * jnp.eye(16)[3])
    nothing, something = (
        by_model.intervention(
            toy_lm(), Numbers(), "9", edit, site, contexts, n_new=2, ask="2"
        )
        for edit in (scale(1.0), strong)
    )
    assert nothing == 0
    assert something != 0


def test_strengths_reach_the_divergence_that_was_asked_for():
    lm, site, contexts = toy_lm(), "resid_post.0", np.array([[0, 3, 9], [0, 4, 1]])
    direction = jnp.eye(16)[3]
    strength = by_model.strength_for(
        lm, lambda s: add(s * direction), site, contexts, divergence=0.001
    )
    clean = np.asarray(lm.run(contexts, logits=True).logits, np.float64)
    edit = {site: add(strength * direction)}
    edited = np.asarray(lm.run(contexts, write=edit, logits=True).logits, np.float64)
    log_p, log_q = (
        logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for logits in (clean, edited)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[:, :-1].mean()
    assert kl == pytest.approx(0.001, rel=0.01)
    with pytest.raises(ValueError, match="no strength up to"):
        by_model.strength_for(
            lm, lambda s: scale(1.0), site, contexts, divergence=0.001
        )
