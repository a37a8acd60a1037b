"""Evaluation: what an SAE does to rows, and to the model that it is spliced into."""

from sae_jax.evaluation.heldout import Evaluator as Evaluator
from sae_jax.evaluation.heldout import HeldOut as HeldOut
from sae_jax.evaluation.measures import Evaluation as Evaluation
from sae_jax.evaluation.measures import Mean as Mean
from sae_jax.evaluation.measures import Measurement as Measurement
