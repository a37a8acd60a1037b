"""SAEs of other libraries: read as they read them, written as they would."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from experiments import exchange
from sae_jax import RULES, SAE, TrainedSAE, fold_scale, load, to_dense
from sae_jax.binding import bind
from sae_jax.exchange import saelens, sparsify
from sae_jax.exchange.provenance import HOOKS, hook_of, site_of
from sae_jax.formats import FORMATS
from tests.contract import build, close, rows

RECORDED = Path(__file__).parent / "recorded"
CASES = sorted(path.parent for path in RECORDED.rglob("expected.npz"))
ABOUT = {
    "lm": "gpt2",
    "site": "resid_post.3",
    "text": {"dataset": "embedded"},
    "packing": {"length": 64},
    "scores": {"nmse": 0.2},
}


def name_of(case: Path) -> str:
    return str(case.relative_to(RECORDED))


def folder_of(case: Path) -> Path:
    """The folder below a case that holds the SAE's files."""
    (found,) = {
        path.parent
        for path in case.rglob("*")
        if path.suffix in {".safetensors", ".pt"} or path.name == "params.npz"
    }
    return found


def encoded(trained: TrainedSAE, x):
    x_hat, codes = trained.sae.apply(trained.variables, jnp.asarray(x))
    return np.asarray(x_hat), np.asarray(to_dense(codes))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_codes_are_those_of_the_library_that_wrote_it(case):
    with np.load(case / "expected.npz") as file:
        expected = dict(file)
    if case.parent.name in ("dictionary_learning", "openai"):
        pytest.importorskip("torch")
    read = load(str(folder_of(case)))
    x_hat, codes = encoded(read, expected["x"])
    assert (expected["codes"] > 0).any(1).mean() > 0.9
    np.testing.assert_allclose(codes, expected["codes"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_hat, expected["x_hat"], rtol=1e-5, atol=1e-5)
    assert ((codes > 0) == (expected["codes"] > 0)).all()
    assert read.about["format"] == case.parent.name


def test_every_class_of_every_library_is_recorded():
    """Of those that are read at all."""
    recorded = {name_of(case) for case in CASES}
    for name in sae_jax.exchange.layout.table("dictionary_learning"):
        assert f"dictionary_learning/{name}" in recorded
    known = sae_jax.exchange.layout.table("saelens")["architectures"]
    for name in (name for name, one in known.items() if "refused" not in one):
        assert any(case.startswith(f"saelens/{name}") for case in recorded), name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_file_stands_for_its_folder(case):
    folder = folder_of(case)
    (file,) = [
        path
        for path in folder.iterdir()
        if path.suffix in {".safetensors", ".pt"} or path.name == "params.npz"
    ]
    if file.suffix == ".pt":
        pytest.importorskip("torch")
    one, other = load(folder), load(file)
    assert one.sae == other.sae
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)


# Written ------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "not_centred": {"centre": False},
    "no_b_enc": {"encoder_bias": False},
    "scale": {"treatment": "scale", "b_dec_start": "mean"},
    "standardise": {"treatment": "standardise"},
    "transcoder": {"d_out": 16},
}


def made(rule, **options):
    bound = bind(RULES[rule], RULES[rule].example)
    return TrainedSAE(*build(bound, **options), ABOUT)


def writable():
    for rule in RULES:
        for name, options in OPTIONS.items():
            if "d_out" in options and "autoencoder" in RULES[rule].needs:
                continue
            yield pytest.param(rule, options, id=f"{rule}-{name}")


def lengths(sae, variables):
    return np.linalg.norm(sae.weights(variables).W_dec, axis=1)


@pytest.mark.parametrize("format", ["saelens", "sparsify"])
@pytest.mark.parametrize(("rule", "options"), list(writable()))
def test_what_is_written_is_read_as_the_same_sae(rule, options, format, tmp_path):
    """Or refused with the reason, and nothing is left."""
    one, known = made(rule, **options), RULES[rule]
    exact = callable(known.export) and known.fold is not None
    folder = None
    try:
        folder = one.save(tmp_path / "sae", format)
    except ValueError as error:
        reason = str(error)
    if folder is None:
        assert re.search("cannot be written for|cannot do without", reason)
        assert not list(tmp_path.iterdir())
        # A tied dictionary's b_dec is added there only if it was taken before.
        tied = "W_enc" not in one.variables.params and "centre" in options
        assert format == "sparsify" or not exact or "d_out" in options or tied
        return
    again = load(folder)
    before, after = encoded(one, rows()), encoded(again, rows())
    assert (before[1] > 0).any()
    close(before[0], after[0])
    # Codes count in units of decoder rows, which a counterpart may want of norm 1.
    plain = one.sae, one.variables
    if one.sae.treatment == "scale":
        plain = fold_scale(*plain)
    close(before[1] * lengths(*plain), after[1] * lengths(again.sae, again.variables))
    # A second time nothing moves any more, not by a bit.
    twice = load(again.save(tmp_path / "twice", format))
    assert twice.sae == again.sae
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if name in again.variables.params:
            pair = twice.variables.params[name], again.variables.params[name]
            np.testing.assert_array_equal(*pair)
    assert again.about == ABOUT | {"format": format}
    assert [f.name for f in tmp_path.iterdir() if "unfin" in f.name] == []


def test_the_rules_that_other_libraries_know():
    """Losing one of these would go unseen, since rules may refuse."""
    kinds = {}
    for name in RULES:
        export, one = RULES[name].export, made(name)
        if isinstance(export, str):
            assert export.endswith(".")
            continue
        variables = one.variables
        said = one.sae.bound.call(export, variables.params, variables.state)
        kinds[name] = said.kind
    known = {
        "relu": "positive",
        "topk": "largest",
        "batch_topk": "above",
        "matryoshka": "above",
        "jump_relu": "above",
        "gated": "gate",
        "gradient_topk": "largest",
        "mutual_choice": "above",
        "feature_choice": "above",
        "matching_pursuit": "pursuit",
        "group_bias": "gate",
    }
    assert known.items() <= kinds.items()
    assert not {"top_afa", "variational"} & kinds.keys()


def test_top_afa_says_why_it_has_no_counterpart(tmp_path):
    with pytest.raises(ValueError, match="norm of its input") as caught:
        made("top_afa").save(tmp_path / "sae", "saelens")
    assert "save(folder) without a format" in str(caught.value)


def test_a_rule_without_a_word_on_it_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="declares no counterpart"):
        made("toy_scaled").save(tmp_path / "sae", "saelens")


def test_sparsify_knows_only_the_largest(tmp_path):
    for rule, reason in {"relu": "k largest", "gated": "k largest"}.items():
        with pytest.raises(ValueError, match=reason):
            made(rule).save(tmp_path / "sae", "sparsify")
    with pytest.raises(ValueError, match="nothing like 'standardise'"):
        made("topk", treatment="standardise").save(tmp_path / "sae", "sparsify")
    wide = SAE(16, 64, rule="topk(k=4)", d_out=12)
    one = TrainedSAE(wide, wide.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="as wide behind as before"):
        one.save(tmp_path / "sae", "sparsify")


def test_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown format 'saelen'\. Did you mean"):
        made("topk").save(tmp_path / "sae", "saelen")
    with pytest.raises(ValueError, match=r"'openai' is read, not written; take one of"):
        made("topk").save(tmp_path / "sae", "openai")


def test_exports_carry_where_they_come_from(tmp_path):
    one = made("topk")
    for format, module in {"saelens": saelens, "sparsify": sparsify}.items():
        folder = one.save(tmp_path / format, format)
        found = json.loads((folder / module.CONFIG).read_text())
        known = found["metadata"] if format == "saelens" else found
        assert known["sae_jax"] == one.provenance()
        assert known["sae_jax"]["sae_jax"] == "0.1.0"
        assert known["model_name"] == "gpt2"
        assert known["hook_name"] == "blocks.3.hook_resid_post"
        assert known["dataset_path"] == "embedded"
        assert known["context_size"] == 64
        assert known["training_architecture"] == "topk(k=4)"
    assert found["k"] == 4
    assert found["d_in"] == 16
    metadata = json.loads((tmp_path / "saelens" / "cfg.json").read_text())["metadata"]
    assert metadata["sae_lens_version"] == "6.54.12"


def test_a_configuration_has_a_checksum_of_its_own():
    one = made("topk")
    checksum = one.provenance()["configuration"]
    scored = TrainedSAE(one.sae, one.variables, ABOUT | {"scores": {"nmse": 0.1}})
    assert scored.provenance()["configuration"] == checksum
    longer = TrainedSAE(one.sae, one.variables, ABOUT | {"steps": 9})
    assert longer.provenance()["configuration"] != checksum


def test_only_the_same_format_is_replaced(tmp_path):
    made("topk").save(tmp_path / "sae", "saelens")
    made("relu").save(tmp_path / "sae", "saelens")
    with pytest.raises(ValueError, match="something other than an SAE in this format"):
        made("topk").save(tmp_path / "sae")
    assert load(tmp_path / "sae").sae.bound.rule.name == "relu"


def test_hooks_and_sites():
    for place in HOOKS:
        assert site_of(hook_of(f"{place}.7")) == f"{place}.7"
    for site in (None, "transformer.h.3.ln_1:out", "resid_post", "resid_post.x"):
        assert hook_of(site) is None
    for hook in (None, "hook_embed", "blocks.3.hook_resid_post.x", 7):
        assert site_of(hook) is None
    assert sparsify.site_of("layers.11.mlp") == "mlp_out.11"
    assert sparsify.site_of("transformer.h.2") == "resid_post.2"
    assert sparsify.site_of("embed_tokens") is None


def test_every_format_has_a_record_and_reads_only_its_own():
    assert {"sae_jax", "saelens", "sparsify", "dictionary_learning"} <= {*FORMATS}
    for case in CASES:
        where = sae_jax.exchange.place(folder_of(case))
        found = [name for name in FORMATS if FORMATS[name].recognises(where)]
        assert found == [case.parent.name]


def test_the_comparison_counts_whatever_differs():
    """The libraries are for `make exchange`; here is what needs none of them."""
    assert len(list(exchange.Config(saelens="/no/such").faults())) >= 1
    same = np.ones((2, 3))
    assert exchange.relative(same + 1e-7, same) < 1e-6
    for other in (same[:1], np.full_like(same, np.nan)):
        row = exchange.Row("a", "b", "c", exchange.relative(other, same), 0.0, "")
        assert not exchange.within(row, 1e-5)
    assert not exchange.within(exchange.Row("a", "b", "c", 0.0, 2e-5, ""), 1e-5)
    assert exchange.within(exchange.Row("a", "b", "c", None, None, "refused"), 1e-5)
    found = list(exchange.read_theirs("sparsify", RECORDED / "sparsify"))
    assert len(found) == 4
    assert all(exchange.within(row, 1e-5) for row in found)
