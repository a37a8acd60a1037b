"""Counts what JAX compiles.

Not by `_cache_size()`: one cache holds the calls of all functions of a process, and
once a long run of tests has filled it, new functions find no place in it.
"""

import contextlib

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations(name):
    """A list that grows by one whenever a jitted function of this name is compiled."""
    found = []

    def listener(event, _, fun_name="", **__):
        if event == COMPILED and fun_name == f"jit({name})":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
