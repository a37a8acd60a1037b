"""Activations: from blocks of text to shuffled batches, two modes, one interface.

`OnTheFly` runs the language model beside the SAE; `FromShards` reads what `harvest`
wrote. Both yield, for step t = start, start + 1, ..., a dictionary `{site: [B, D]}`
that depends on the configuration and on t alone. Gradients of the model's loss can
come beside the sites, by the name `sae_jax.gradient_of(site)`.
"""

from sae_jax.activations.from_shards import FromShards as FromShards
from sae_jax.activations.harvest import harvest as harvest
from sae_jax.activations.harvester import Harvester as Harvester
from sae_jax.activations.on_the_fly import OnTheFly as OnTheFly
from sae_jax.activations.shards import Shards as Shards
