"""The functions of `rlhf.losses` under the contract: compiled once with their gradients, for all checks."""

import collections
import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np

from contracts import CASES
from rlhf import losses

# Most of the time is compilation: LLVM's optimisations are left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def public_functions():
    """Every public function where it is defined, by `module.name`."""
    for info in pkgutil.iter_modules(losses.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"rlhf.losses.{info.name}")
            for name, fn in inspect.getmembers(module, inspect.isfunction):
                if fn.__module__ == module.__name__ and not name.startswith("_"):
                    yield f"{info.name}.{name}", fn


FUNCTIONS = dict(public_functions())


def inputs_of(name, seed=0, **changes):
    """A case's arrays in single precision, floats as float32."""
    arrays = CASES[name].inputs(np.random.default_rng(seed)) | changes
    return {key: x.astype(np.float32) if x.dtype == np.float64 else x for key, x in arrays.items()}


HAS_MASK = [name for name in CASES if "mask" in inputs_of(name)]
IGNORES = [*HAS_MASK, "weights.weighted_sum"]  # what is not trained on is not looked at
PACKS = [
    name
    for name in HAS_MASK
    if "segment_ids" in inspect.signature(FUNCTIONS[name]).parameters
    and name != "segments.ids_or_ones"
]


def split_floats(arrays):
    floats = {key for key, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {key: arrays[key] for key in floats}, {
        key: x for key, x in arrays.items() if key not in floats
    }


TRACES: collections.Counter[str] = collections.Counter()


@functools.cache
def differentiated(name, **static):
    """The function, and jitted `(arrays, knobs, weights) -> (output, gradients of its weighted sum, that sum)`."""
    case = CASES[name]
    fn = functools.partial(case.fn or FUNCTIONS[name], **(case.static | static))

    def run(arrays, knobs, weights):
        TRACES[name] += 1
        floats, rest = split_floats(arrays)

        def loss(floats):
            out = fn(**floats, **rest, **knobs)
            return sum(
                map(losses.weighted_sum, jax.tree.leaves(out), jax.tree.leaves(weights))
            ), out

        (total, out), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
        return out, gradients, total

    return jit(run), fn


def weights_for(name, arrays, dtype=np.float32, **static):
    """A weight for every output, none of them 0."""
    shapes = tuple((key, x.shape, x.dtype) for key, x in arrays.items())
    return weights_of_shapes(name, shapes, dtype, **static)


@functools.cache
def weights_of_shapes(name, shapes, dtype, **static):
    arrays = {key: jax.ShapeDtypeStruct(shape, kind) for key, shape, kind in shapes}
    out = jax.eval_shape(
        lambda arrays: differentiated(name, **static)[1](**arrays, **CASES[name].knobs), arrays
    )
    leaves, structure = jax.tree.flatten(
        out
    )  # every leaf has weights of its own, so that no two gradients cancel
    of_leaf = lambda i, x: (
        (2 + np.cos(i + np.arange(np.prod(x.shape)))).reshape(x.shape).astype(dtype)
    )
    return jax.tree.unflatten(structure, [of_leaf(i, x) for i, x in enumerate(leaves)])


def call(name, arrays, *, knobs=None, weights=None, dtype=np.float32, **static):
    weights = weights_for(name, arrays, dtype, **static) if weights is None else weights
    knobs = CASES[name].knobs if knobs is None else knobs
    return jax.tree.map(np.asarray, differentiated(name, **static)[0](arrays, knobs, weights))


def narrowing(jaxpr):
    """The steps of a program, and of the programs in it, that turn arrays of double precision into less."""
    small = lambda x: jnp.issubdtype(x.aval.dtype, jnp.floating) and x.aval.dtype != np.float64
    for eqn in jaxpr.eqns:
        inner = [
            getattr(x, "jaxpr", x)
            for x in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
        ]
        inner = [x for x in inner if hasattr(x, "eqns")]
        if inner:
            yield from (step for program in inner for step in narrowing(program))
        elif any(x.aval.dtype == np.float64 and x.aval.shape for x in eqn.invars) and any(
            map(small, eqn.outvars)
        ):
            yield eqn


def eager(name, arrays):
    return jax.tree.map(np.asarray, differentiated(name)[1](**arrays, **CASES[name].knobs))


def assert_close(got, want, tolerance=1e-5):
    """Within `tolerance` of each array's largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        assert np.abs(x.astype(float) - y).max(initial=0) <= tolerance * np.abs(y).max(initial=0)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def ignored(name, arrays):
    """Where the arrays may hold anything, by array."""
    if name == "weights.weighted_sum":
        return {"values": arrays["weights"] == 0}
    floats, _ = split_floats(arrays)
    everywhere = {1: ~arrays["mask"].any(-1), 2: ~arrays["mask"], 3: ~arrays["mask"][..., None]}
    return {key: np.broadcast_to(everywhere[x.ndim], x.shape) for key, x in floats.items()}
