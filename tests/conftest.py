import importlib.util
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

import sae_jax

# A user's own rules, from a file outside the package: from here on every test that
# runs over the registered rules runs over these as well.
USER_RULES = Path(__file__).parent / "user_rules.py"
sae_jax.load_file(USER_RULES)


def pytest_configure(config):
    """Lets workers and later runs share what was compiled, which is most of the time.

    A worker that finds an entry half written compiles for itself. Programs compiled for
    another number of threads, which comes with that of devices, would crash it.
    """
    name = f"xla-{jax.config.jax_num_cpu_devices}"
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir(name)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Says in the last lines what was not tested."""
    result = yield
    if importlib.util.find_spec("torch") is None:
        terminalreporter.section("NOT TESTED: the PyTorch source, sae_jax.lm.torch_lm")
        terminalreporter.write_line(
            "To test it: .venv/bin/pip install -c requirements.lock torch==2.13.0"
        )
    return result


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Drops compiled programs after each file.

    Each holds about ten mappings of memory, and a process has no more than 65,530
    (Linux's vm.max_map_count): a compilation that gets none crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_users():
    """Without the run-time type checks of the tests, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def planted(d: int, n: int, p: float, rows: int, seed: int = 0):
    """Sparse mixtures of n known unit directions: (activations, directions, codes)."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = (rng.random((rows, n)) < p) * rng.uniform(0.5, 1.5, (rows, n))
    return (codes @ directions).astype(np.float32), directions, codes
