"""How a visit reaches PyTorch's modules: hooks, taken off again whatever happens."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers.utils import ModelOutput

from sae_jax.lm.sites import Visit


class Complete(Exception):
    """Ends a pass from which nothing more is needed."""


@contextmanager
def hooked(
    modules: Mapping[str, torch.nn.Module], visit: Visit, *, stop: bool
) -> Iterator[dict[str, int]]:
    """Brings the visit to the modules; gives PyTorch's versions of what was read."""
    versions: dict[str, int] = {}

    def go_by(call: Callable, path: str, old: Any) -> Any:
        new = call(path, old)
        for site in visit.values.keys() - versions.keys():
            versions[site] = visit.values[site]._version
        if stop and visit.complete:
            raise Complete
        # What an edit returned may be memory of JAX, where nothing may write in place.
        return new if new is old else new.clone()

    def enter(path: str, module: Any, args: tuple, kwargs: dict) -> Any:
        if args:
            return (go_by(visit.enter, path, args[0]), *args[1:]), kwargs
        for name in inspect.signature(module.forward).parameters:
            if name in kwargs:  # the first argument may come by its name
                return args, {**kwargs, name: go_by(visit.enter, path, kwargs[name])}
        return None

    def leave(path: str, module: Any, args: tuple, result: Any) -> Any:
        if isinstance(result, tuple):
            return (go_by(visit.leave, path, result[0]), *result[1:])
        if isinstance(result, ModelOutput):
            first = next(iter(result))
            result[first] = go_by(visit.leave, path, result[first])
            return result
        return go_by(visit.leave, path, result)

    with ExitStack() as stack:  # takes the hooks off again whatever happens
        for path in visit.modules:
            before, after = partial(enter, path), partial(leave, path)
            module = modules[path]
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.enter_context(hook)
            stack.enter_context(module.register_forward_hook(after))
        yield versions
