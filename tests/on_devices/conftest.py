"""Eight simulated devices; in runs of their own, since all else is slower with them."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
