"""Running an objective beside its slow definition: jitted, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Most of the time is compilation: LLVM's optimisations are left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def jitted(fn, **static):
    return jit(functools.partial(fn, **static))


def run(fn, *arrays, static=(), **knobs):
    """`fn`, jitted, in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jitted(fn, **dict(static))(*arrays, **knobs))


def gradients(fn, *arrays, **knobs):
    """Of the sum of `fn`, with respect to its arrays."""
    with jax.enable_x64(True):
        return gradient_of(fn, len(arrays))(*map(jnp.asarray, arrays), **knobs)


@functools.cache
def gradient_of(fn, arrays):
    return jit(jax.grad(lambda *x, **knobs: fn(*x, **knobs).sum(), argnums=tuple(range(arrays))))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def finite_differences(fn, x, *rest, step=1e-6, **knobs):
    """The gradient of the sum of `fn` with respect to its first array, by central differences."""
    x = np.asarray(x, float)
    total = lambda x: float(run(fn, x, *rest, **knobs).sum())
    slopes = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[i] = step
        slopes[i] = (total(x + move) - total(x - move)) / (2 * step)
    return slopes
