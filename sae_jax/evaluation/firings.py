"""All that an SAE's features did on held-out text: which fired where, how strongly.

    firings = record(lm, sae, variables, "resid_post.2", heldout)
    rows, values = firings.of(123)
    firings.tokens.reshape(-1)[rows]  # the tokens that feature 123 fired on

Position t of context n is row `n * T + t`. A firing is a code that is not zero, at a
used position. They are kept feature by feature, 8 bytes each, and nothing as large as
rows times features is held but for the codes of one pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64
from scipy.sparse import csr_array

from sae_jax import checks, codes
from sae_jax.codes import Codes
from sae_jax.evaluation.heldout import HeldOut, require_target
from sae_jax.lm.source import Source
from sae_jax.model import SAE
from sae_jax.quasi_orthogonality import scaled_norm
from sae_jax.variables import Variables

LIMIT = 2**28  # firings; 4.3 GB while they are recorded
BYTES = 16  # for each, while they are recorded


class Firings(NamedTuple):
    """The firings of every feature.

    Attributes:
      tokens: the contexts.
      use: the positions that were looked at.
      n_features: size F of the dictionary.
      starts: feature j owns the firings `starts[j]` to `starts[j + 1]`, `[F + 1]`.
      rows: where each firing was, ascending within a feature.
      values: the codes f_j, never 0; below 0 only for rules whose codes are signed.
      norm_z: norm of each row in the treated space (of its target, for a transcoder),
        NaN where not used.
      norm_f: norm of its code, with decoder norms and bias, as in `measures`.
    """

    tokens: Int[np.ndarray, "N T"]
    use: Bool[np.ndarray, "N T"]
    n_features: int
    starts: Int64[np.ndarray, " F+1"]
    rows: Int32[np.ndarray, " E"]
    values: Float32[np.ndarray, " E"]
    norm_z: Float32[np.ndarray, " N*T"]
    norm_f: Float32[np.ndarray, " N*T"]

    def of(
        self, feature: int
    ) -> tuple[Int32[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
        """The rows on which a feature fired, and its codes there."""
        part = slice(self.starts[feature], self.starts[feature + 1])
        return self.rows[part], self.values[part]


def record(
    lm: Source,
    sae: SAE,
    variables: Variables,
    site: str,
    heldout: HeldOut,
    *,
    target_site: str | None = None,
    contexts_per_pass: int = 16,
    limit: int = LIMIT,
) -> Firings:
    """Runs the model over the contexts and encodes its activations at `site`.

    A transcoder needs `target_site`, whose rows are its `norm_z`. Codes are those of
    `SAE.encode`: each row on its own, whatever shares a pass with it. More firings
    than `limit` are refused before they fill the memory.
    """
    checks.raise_all(heldout.faults(contexts_per_pass))
    require_target(sae, target_site)
    aim = site if target_site is None else target_site
    counts, features, values, norms = [], [], [], []
    n_firings = 0
    for n, part in enumerate(heldout.passes(contexts_per_pass), 1):
        read = lm.run(part.tokens, read=(site, aim)).values
        x, aimed_at = (read[s].reshape(-1, read[s].shape[-1]) for s in (site, aim))
        target = aimed_at if sae.is_transcoder else None
        used = part.use.reshape(-1)
        checks.rows("x", x, sae.d_in, mask=used)
        checks.beside("target", target, sae.width_out, x, mask=used)
        active, *pair = _encode(sae, variables, x, target)
        count, which, value = _row_by_row(active, used)
        if not np.isfinite(value).all():
            raise ValueError(f"{sae!r} has codes that are not finite: it diverged.")
        counts.append(count)
        features.append(which)
        values.append(value)
        norms.append(np.where(used, np.asarray(pair, np.float32), np.nan))
        n_firings += len(which)
        if n_firings > limit:
            done = min(n * contexts_per_pass, len(heldout.tokens))
            raise ValueError(_too_many(n_firings, limit, done, len(heldout.tokens)))
    starts, rows, by_feature = _turned(
        np.concatenate(counts), features, values, sae.n_features
    )
    norm_z, norm_f = np.concatenate(norms, 1)[:, : heldout.use.size]
    return Firings(
        heldout.tokens,
        heldout.use,
        sae.n_features,
        starts,
        rows,
        by_feature,
        norm_z,
        norm_f,
    )


@partial(jax.jit, static_argnums=0)
def _encode(
    sae: SAE,
    variables: Variables,
    x: Float[Array, "B D_in"],
    target: Float[Array, "B D_out"] | None,
) -> tuple[Codes, Array, Array]:
    """Codes, `norm_z` and `norm_f` of the rows of one pass."""
    out = sae.forward(variables, x, target=target)
    assert out.target is not None  # a transcoder was given one
    norm_f = scaled_norm(out.codes, out.weights.W_dec, out.weights.b_dec)
    return out.codes, jnp.linalg.norm(out.target, axis=1), norm_f


def _row_by_row(
    active: Codes, used: Bool[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, " B"], Int32[np.ndarray, " E"], Float32[np.ndarray, " E"]]:
    """How many firings each row has; their features and values, row after row."""
    strengths = np.asarray(codes.strengths(active))
    on = (strengths != 0) & used[:, None]
    if isinstance(active, codes.Sparse):
        features = np.asarray(active.indices)[on]
    else:
        features = np.nonzero(on)[1]
    return on.sum(1), features.astype(np.int32), strengths[on].astype(np.float32)


def _turned(
    counts: Int[np.ndarray, " R"],
    features: list[np.ndarray],
    values: list[np.ndarray],
    n_features: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From row after row to feature after feature: a matrix turned, in linear time."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    shape = (len(counts), n_features)
    data, indices = np.concatenate(values), np.concatenate(features)
    values.clear()
    features.clear()
    by_feature = csr_array((data, indices, starts), shape).tocsc()
    return (
        by_feature.indptr.astype(np.int64),
        by_feature.indices.astype(np.int32, copy=False),
        by_feature.data,
    )


def _too_many(n_firings: int, limit: int, done: int, n_contexts: int) -> str:
    expected = n_firings * n_contexts // done
    fitting = n_contexts * limit // expected
    return (
        f"{n_firings:,} firings in {done:,} of {n_contexts:,} contexts; the limit is "
        f"{limit:,}. All of them may be {expected:,}, and take "
        f"{expected * BYTES / 1e9:.2g} GB: give {fitting:,} contexts, a sparser SAE, "
        f"or limit={expected}."
    )
