"""Evaluation: what an SAE does to rows, and to the model that it is spliced into."""

from sae_jax.evaluation.gathering import Gathered as Gathered
from sae_jax.evaluation.gathering import Mean as Mean
from sae_jax.evaluation.gathering import Measurement as Measurement
from sae_jax.evaluation.heldout import Evaluator as Evaluator
from sae_jax.evaluation.heldout import HeldOut as HeldOut
from sae_jax.evaluation.measures import Evaluation as Evaluation
from sae_jax.evaluation.measures import density_histogram as density_histogram
