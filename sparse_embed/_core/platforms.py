"""For which platform the program at hand is made: where its arrays are, not the default backend."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array
from jax.core import Tracer

_TARGET: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """`"cpu"`, `"gpu"`, `"tpu"`: that of the `made_for` that this is in, else jax's default."""
    target = _TARGET.get()
    if target is not None:
        return target
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # made at run time
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def platform_of(tree: Any) -> str | None:
    """That of the arrays in a tree, or of shapes that have a sharding; `None`: not known."""
    for x in jax.tree.leaves(tree):
        known = isinstance(x, Array | jax.ShapeDtypeStruct) and not isinstance(x, Tracer)
        sharding = getattr(x, "sharding", None) if known else None
        mesh = getattr(sharding, "mesh", None)
        if sharding is not None and not isinstance(mesh, jax.sharding.AbstractMesh):
            return next(iter(sharding.device_set)).platform
    return None


def made_for(target: str, fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, which is traced for that platform."""

    @functools.wraps(fun)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _TARGET.set(target)
        try:
            return fun(*args, **kwargs)
        finally:
            _TARGET.reset(token)

    return traced
