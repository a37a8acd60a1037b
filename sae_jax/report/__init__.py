"""Report: what a training run found, as text, figures and one page."""

from sae_jax.report.figures import curves as curves
from sae_jax.report.figures import density as density
from sae_jax.report.figures import frontier as frontier
from sae_jax.report.figures import zf as zf
from sae_jax.report.layers import violins as violins
from sae_jax.report.page import write_page as write_page
from sae_jax.report.scores import gap_text as gap_text
from sae_jax.report.scores import scores_text as scores_text
from sae_jax.report.table import csv_text as csv_text
from sae_jax.report.table import table as table
