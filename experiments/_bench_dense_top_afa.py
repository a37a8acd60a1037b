"""Top-AFA as its authors' algorithm has it: dense, and by sorting. In PyTorch.

Lee et al. 2025, arXiv:2503.24277. Written from its description, as the baseline that
`bench` times our rule against; their auxiliary loss, off until a feature is dead, and
the matrix of all pairs of decoder rows that their code looks at are left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Terms(NamedTuple):
    """The loss, its parts before coefficients, and which features were kept."""

    loss: Tensor
    mse: Tensor
    kept: Tensor


class DenseTopAFA(nn.Module):
    """The four arrays of an SAE whose code is as long as its input.

    b_enc is there and unused, as in their code.
    """

    def __init__(self, W_dec: Tensor) -> None:
        super().__init__()
        n_features, width = W_dec.shape
        self.W_enc = nn.Parameter(W_dec.T.contiguous())
        self.b_enc = nn.Parameter(W_dec.new_zeros(n_features))
        self.W_dec = nn.Parameter(W_dec.clone())
        self.b_dec = nn.Parameter(W_dec.new_zeros(width))

    def forward(self, x: Tensor, coef: float) -> Terms:
        """`mean((x_hat - x)^2) + coef * mean_rows((||f|| - ||x||)^2)`."""
        centred = x - self.b_dec
        a = torch.relu(centred @ self.W_enc)
        kept = nearest(a.detach(), self.W_dec.detach(), centred.detach())
        f = a * kept
        mse = (f @ self.W_dec + self.b_dec - x).pow(2).mean()
        gap = f.norm(dim=1) - x.norm(dim=1)
        return Terms(mse + coef * gap.pow(2).mean(), mse, kept)


def nearest(a: Tensor, W_dec: Tensor, centred: Tensor) -> Tensor:
    """Which features stay on: a mask like `a`.

    With strengths `s = a ||d||` in falling order, `c_m` is the norm of the first m; the
    m with c_m nearest to ||x - b_dec|| stay. The last squared sum is overwritten by
    1e8, so that to keep all is never nearest.
    """
    squares = (a * W_dec.norm(dim=1)).square()
    ordered, order = squares.sort(dim=1, descending=True)
    sums = ordered.cumsum(dim=1)
    sums[:, -1] = 1e8
    off = (sums.sqrt() - centred.norm(dim=1, keepdim=True)).abs()
    last = off.argmin(dim=1, keepdim=True)
    rank = torch.arange(a.shape[1], device=a.device)
    mask = torch.zeros_like(a)
    return mask.scatter(1, order, (rank <= last).to(a.dtype))


@torch.no_grad()
def constrain(model: DenseTopAFA) -> None:
    """Rows of norm 1, and gradients without their part along them.

    Their code does this before the optimiser's step, which leaves rows off by one step.
    """
    unit = model.W_dec / model.W_dec.norm(dim=1, keepdim=True)
    grad = model.W_dec.grad
    assert grad is not None
    grad -= (grad * unit).sum(dim=1, keepdim=True) * unit
    model.W_dec.data = unit
