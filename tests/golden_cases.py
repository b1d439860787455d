"""Values and gradients of published implementations (`tests/golden`): the cases, and the comparison that every family shares.

A family is reproduced by a composition of public functions, `fn(inputs, config, name) -> {role: array}`, jitted once for all
its cases: what differs between cases is an array.  It may return `"metrics"` as well, under the reference's names.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from marks import exhaustive

from rlhf import losses

# Most of the time is compilation: LLVM's optimisations are left out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}
FAMILIES = {  # by the test file that reproduces them
    "supervised": ("logprob", "sft", "reward", "prm"),
    "preference": ("dpo", "cpo", "orpo", "tpo", "kto", "bco", "online_dpo", "xpo", "nash_md"),
    "distillation": ("distill", "minillm", "a2po"),
    "policy": ("grpo", "gspo_token", "verl_policy"),
    "advantages": ("grpo_adv", "rloo", "verl_advantage", "verl_misc"),
    "ppo": ("ppo", "ppo_classic"),
}
assert sorted(sum(FAMILIES.values(), ())) == sorted({name.split("/")[0] for name in CASES})


@functools.cache
def arrays(file):
    with np.load(GOLDEN / file) as data:
        return {key: data[key] for key in data.files}


def shifted(logits, tokens):
    """Log-probs of `tokens[:, 1:]`, which `logits[:, :-1]` predict."""
    return losses.logits.token_logprob(logits[:, :-1], tokens[:, 1:])


def completion(logits, tokens):
    """Logits of the completion tokens, which stand at the end."""
    length = tokens.shape[1]
    return logits[:, -length - 1 : -1]


def value_and_gradient(fn, name="logits"):
    """`{"loss": …, "grad_logits": …}` of a jitted `fn(x, **inputs) -> scalar`, or `-> (scalar, more)` with `more` added."""

    def with_more(x, **inputs):
        out = fn(x, **inputs)
        return out if isinstance(out, tuple) else (out, {})

    differentiate = jit(jax.value_and_grad(with_more, has_aux=True))

    def run(x, **inputs):
        (value, more), gradient = differentiate(x, **inputs)
        return {"loss": value, f"grad_{name}": gradient, **more}

    return run


def each_case(topic):
    """Runs a test of `(name, precision)` for every case of the topic's families."""
    names = [name for name in CASES if name.split("/")[0] in FAMILIES[topic]]
    both = pytest.mark.parametrize(
        "precision", exhaustive(["float64", "float32"], quick=["float64"])
    )
    return lambda test: both(pytest.mark.parametrize("name", names)(test))


def check(fn, name, precision, *, given=(), where=None, leave_out=(), tolerance=1e-9):
    """Compares a case with `fn(inputs, config, name)`.

    Args:
      given: outputs that `fn` starts from.
      where: `inputs -> {role: where its numbers are compared}`; elsewhere ours are 0 and theirs are anything.
      leave_out: outputs that are not compared (`golden/DEVIATIONS.md` says why).
      tolerance: in float64, of an array's largest entry; in float32 it is 1e-5, or the reference's own rounding.
    """
    case = CASES[name]
    data = arrays(case["file"])
    inputs = {role: data[key] for role, key in case["inputs"].items()}
    inputs |= {role: data[case["outputs"][role]] for role in given}
    expected = {
        role: data[key] for role, key in case["outputs"].items() if role not in (*given, *leave_out)
    }
    cast = lambda x: x.astype(precision) if x.dtype == np.float64 else x
    inputs = {role: cast(x) for role, x in inputs.items()}
    with jax.enable_x64(precision == "float64"):
        got = jax.tree.map(np.asarray, fn(inputs, case["config"], name))
    if precision == "float32":
        tolerance = max(1e-5, case["float32_deviation"], tolerance)
    metrics = got.pop("metrics", {})
    assert got.keys() == expected.keys()
    assert got or metrics
    mask = where(inputs) if where else {}
    for role, want in expected.items():
        assert got[role].shape == want.shape, role
        assert got[role].dtype in (precision, want.dtype), role
        ours, theirs = (np.where(mask.get(role, True), x, 0.0) for x in (got[role], want))
        error = np.abs(ours - theirs).max(initial=0)
        largest = np.abs(theirs).max(initial=0)
        assert error <= tolerance * largest, (
            f"{role}: off by {error:.1e}, largest entry {largest:.1e}"
        )
    for metric, value in metrics.items():
        want = float(case["metrics"][metric])
        assert abs(value - want) <= tolerance * max(1.0, abs(want)), f"{metric}: {value} but {want}"
