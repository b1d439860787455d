"""Optimizers and schedules: the numbers of transformers and PyTorch; stacks matrix by matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf.models import TransformerConfig, matrices, transformer
from rlhf.sharding import make_mesh, shardings
from rlhf.training import optimizers
from rlhf.training.optimizers import OptimizerOptions, make_optimizer, make_schedule

ALL = ("adamw", "adam", "adafactor", "lion", "muon", "sgd", "rmsprop", "adagrad")
DECAYING = tuple(name for name in ALL if name != "adam")
STEPS = 3
SHAPES = {
    "embedding": (5, 4),
    "head": {"weight": (4,), "bias": ()},
    "layers": {"norm": (2, 4), "q": (2, 4, 3), "expert_up": (2, 3, 4, 6)},
}
# The layers are as many as a matrix is wide, so that only their names tell them from its axes.
WIDE_STACK = {"layers": {"q": (6, 4, 5), "expert_up": (2, 7, 5, 4), "norm": (6, 5)}}


def filled(shapes, seed):
    """Normal numbers in these shapes."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=is_shape)


def options_of(name, **given):
    """An optimizer with a constant learning rate and gradients as they are."""
    defaults = dict(learning_rate=0.1, schedule="constant", max_grad_norm=1e9)
    return OptimizerOptions(optimizer=name, **(defaults | given))


def trained(optimizer, params, gradients):
    """Parameters and state after a step on each gradient."""
    update = jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def named(tree):
    """Path -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def parts(tree):
    """Every matrix and vector of a file by itself: without the axes of layers and experts."""
    out = {}
    for name, leaf in named(tree).items():
        stacks = ("layers" in name) + ("expert" in name)
        for at in np.ndindex(leaf.shape[:stacks]):
            out[f"{name}{list(at)}"] = np.asarray(leaf)[at]
    return out


# --- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_each_lowers_a_quadratic(name):
    target = filled(SHAPES, 1)
    optimizer = make_optimizer(options_of(name, learning_rate=0.02, max_grad_norm=1.0), 40)

    def loss_fn(params):
        errors = jax.tree.map(lambda x, y: jnp.square(x - y).sum(), params, target)
        return sum(jax.tree.leaves(errors))

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = jax.tree.map(jnp.zeros_like, target)
    start = (params, optimizer.init(params))
    losses = np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, length=40)[1])(start))
    assert losses[-1] < 0.97 * losses[0]
    assert (np.diff(losses) < 0).all()


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_is_of_matrices_alone(name):
    params = filled(SHAPES, 0)
    nothing = jax.tree.map(np.zeros_like, params)
    after, _ = trained(make_optimizer(options_of(name, weight_decay=0.5), 10), params, [nothing])
    decays = {"embedding", "head.weight", "layers.q", "layers.expert_up"}
    for path, x in named(params).items():
        expected = x * (1 - 0.1 * 0.5) if path in decays else x
        np.testing.assert_allclose(named(after)[path], expected, rtol=1e-6, err_msg=path)


FIXED = {  # the numbers that AdamW in `rlhf.loop` gave before there were others
    "linear": [1.1112596, 1.1112596, 0.49164021, -1.1555307, 2.1354153, -0.079395987],
    "cosine": [1.1177415, 1.1177415, 0.4947128, -1.1600716, 2.1397135, -0.078834422],
    "constant": [1.1465318, 1.1465318, 0.51510936, -1.1621578, 2.1389558, -0.064725406],
}


@pytest.mark.parametrize("schedule", FIXED)
def test_adamw_gives_the_numbers_that_it_always_gave(schedule):
    over_time = dict(learning_rate=0.1, schedule=schedule, warmup_steps=2)
    options = OptimizerOptions(weight_decay=0.1, **over_time)
    params = {"layers": {"norm": np.ones((2, 1)), "q": np.array([[[0.5, -1.0]], [[2.0, 0.0]]])}}
    params = jax.tree.map(np.float32, params)
    gradients = [jax.tree.map(lambda x, i=i: np.cos(x + i), params) for i in range(5)]
    optimizer = make_optimizer(options, 6)
    after, state = trained(optimizer, params, gradients)
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(after)])
    np.testing.assert_allclose(found, FIXED[schedule], rtol=1e-6)
    plain = optax.adamw(make_schedule(options, 6), weight_decay=0.1, mask=matrices)
    expected = optax.chain(optax.clip_by_global_norm(1.0), plain).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)  # so that old runs resume


def torch_optimizers(torch, name, params, decay):
    """What transformers' Trainer makes of `optim`, with decay for matrices alone."""
    from transformers.optimization import Adafactor

    groups = [
        {"params": [x for x in params if x.ndim > 1], "weight_decay": decay},
        {"params": [x for x in params if x.ndim < 2], "weight_decay": 0.0},
    ]
    return {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
        "adam": lambda: torch.optim.Adam(groups, lr=0.1),
        "adafactor": lambda: Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1),
        "momentum": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=0.1),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=0.1),
    }[name]()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "adamw",
            dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3, weight_decay=0.1),
        ),
        ("adam", dict()),
        ("adafactor", dict(weight_decay=0.1)),
        ("sgd", dict(weight_decay=0.1)),
        ("momentum", dict(momentum=0.9)),
        ("rmsprop", dict()),
        ("adagrad", dict()),
    ],
)
def test_a_stack_is_trained_as_transformers_trains_its_matrices(name, options):
    torch = pytest.importorskip("torch")
    params = filled(WIDE_STACK, 0)
    # As small as those of a language model, so that an epsilon in another place is seen.  None is 0
    # nearly: there Adagrad's 1e-10 beside the root is more than ours under it.
    small = lambda x: 1e-3 * (x + 0.1 * np.sign(x))
    gradients = [jax.tree.map(small, filled(WIDE_STACK, 1 + i)) for i in range(STEPS)]
    chosen = options_of("sgd" if name == "momentum" else name, **options)
    after, _ = trained(make_optimizer(chosen, STEPS), params, gradients)
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in parts(params).items()}
    optimizer = torch_optimizers(torch, name, list(theirs.values()), chosen.weight_decay)
    for gradient in gradients:
        for path, x in parts(gradient).items():
            theirs[path].grad = torch.tensor(x)
        optimizer.step()
    for path, x in parts(after).items():
        np.testing.assert_allclose(x, theirs[path].detach(), atol=1e-5, err_msg=path)


def test_adafactor_is_its_definition():
    params = filled(SHAPES, 0)
    gradients = [filled(SHAPES, 1 + i) for i in range(STEPS)]
    after, _ = trained(make_optimizer(options_of("adafactor"), STEPS), params, gradients)
    expected = parts(params)
    rows, columns = ({path: 0.0 for path in expected} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        kept = 1 - t**-0.8
        for path, g in parts(gradient).items():
            g = np.atleast_2d(g)  # of a vector the factored moments are the moments themselves
            rows[path] = kept * rows[path] + (1 - kept) * (g * g).mean(1)
            columns[path] = kept * columns[path] + (1 - kept) * (g * g).mean(0)
            u = g / np.sqrt(np.outer(rows[path], columns[path]) / rows[path].mean())
            u = u / max(1.0, np.sqrt((u * u).mean()))
            expected[path] = expected[path] - 0.1 * u.reshape(expected[path].shape)
    for path, x in parts(after).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)


def test_lion_is_its_definition():
    params = filled(SHAPES, 0)
    gradients = [filled(SHAPES, 1 + i) for i in range(STEPS)]
    options = options_of("lion", adam_beta1=0.8, adam_beta2=0.6)
    after, _ = trained(make_optimizer(options, STEPS), params, gradients)
    expected = named(params)
    moments = dict.fromkeys(expected, 0.0)
    for gradient in gradients:
        for path, g in named(gradient).items():
            expected[path] = expected[path] - 0.1 * np.sign(0.8 * moments[path] + 0.2 * g)
            moments[path] = 0.6 * moments[path] + 0.4 * g
    for path, x in named(after).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_muon_takes_each_matrix_of_a_layer_alone_and_leaves_the_rest_to_adamw(momentum):
    lm = {**WIDE_STACK, "embedding": (5, 4), "unembedding": (4, 5)}
    shapes = {"lm": lm, "head": {"inner": (4, 4), "bias": (4,)}}
    params = filled(shapes, 0)
    gradients = [filled(shapes, 1 + i) for i in range(STEPS)]
    both = dict(weight_decay=0.1, adam_epsilon=1e-3)
    muon = make_optimizer(options_of("muon", momentum=momentum, **both), STEPS)
    after, _ = trained(muon, params, gradients)
    adamw, _ = trained(make_optimizer(options_of("adamw", **both), STEPS), params, gradients)
    beta = momentum or 0.95
    alone = optax.contrib.muon(0.1, beta=beta, weight_decay=0.1, consistent_rms=0.2)
    by_muon = 0
    steps = [parts(gradient) for gradient in gradients]
    for path, x in parts(params).items():
        if "layers" in path and "norm" not in path:
            expected, _ = trained(alone, x, [step[path] for step in steps])
            by_muon += 1
        else:
            expected = parts(adamw)[path]
        np.testing.assert_allclose(parts(after)[path], expected, atol=1e-5, err_msg=path)
    assert by_muon == 6 + 2 * 7


def test_an_update_of_muon_is_nearly_orthogonal_and_of_the_size_of_adamws():
    params = {"layers": {"q": np.zeros((2, 8, 4), np.float32)}}
    gradient = filled({"layers": {"q": (2, 8, 4)}}, 0)
    after, _ = trained(make_optimizer(options_of("muon", learning_rate=1.0), 1), params, [gradient])
    for x in np.asarray(after["layers"]["q"]):
        sizes = np.linalg.svd(x, compute_uv=False) / (0.2 * math.sqrt(8))
        assert (sizes > 0.6).all()
        assert (sizes < 1.3).all()


def test_muon_trains_adapters():
    params = {"layers": {"q": {"a": (2, 4, 2), "b": (2, 2, 4), "magnitude": (2, 4)}, "norm": ()}}
    labels = optimizers._muon_or_adam(filled(params | {"unembedding": {"a": (4, 2)}}, 0))
    by_muon = [path for path, label in named(labels).items() if label == "muon"]
    assert by_muon == ["layers.q.a", "layers.q.b"]


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon", "sgd"])
def test_first_moments_in_half_precision(name):
    params = filled(SHAPES, 0)
    momentum = dict(momentum=0.9) if name == "sgd" else {}

    def run(moments):
        options = options_of(name, moments=moments, **momentum)
        return trained(make_optimizer(options, STEPS), params, gradients)

    gradients = [filled(SHAPES, 1 + i) for i in range(STEPS)]
    after, state = run("bfloat16")
    whole, state_of_whole = run(None)
    half = [path for path, x in named(state).items() if x.dtype == jnp.bfloat16]
    for leaf in named(params):
        assert len([path for path in half if path.endswith(leaf)]) == 1, leaf
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state_of_whole))
    for path, x in named(after).items():
        assert x.dtype == jnp.float32
        if name != "lion":  # whose signs turn where a moment is near 0
            np.testing.assert_allclose(x, named(whole)[path], atol=0.02, err_msg=path)


@pytest.mark.parametrize("name", ALL)
def test_a_state_can_be_sharded(name):
    # Shapes alone: large enough that a factored moment `[layers, in]` may not be whole anywhere.
    sizes = dict(vocab_size=16, hidden_size=512, num_layers=3, num_heads=2, mlp_size=1024)
    lm = transformer(TransformerConfig(**sizes))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    state = jax.eval_shape(make_optimizer(options_of(name), 10).init, params)
    where = shardings(state, lm.axes(), make_mesh(fsdp=4, tensor=2))
    split = [path for path, x in named(where).items() if path.endswith(".q") and any(x.spec)]
    moments = {"adamw": 2, "adam": 2, "adafactor": 2, "sgd": 0}
    assert len(split) == moments.get(name, 1)


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("schedule", "theirs", "options", "kwargs"),
    [
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("constant", "constant_with_warmup", {}, {}),
        (
            "cosine_with_min_lr",
            "cosine_with_min_lr",
            dict(min_learning_rate_ratio=0.2),
            dict(min_lr_rate=0.2),
        ),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            dict(decay_ratio=0.3),
            dict(num_decay_steps=6),
        ),
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            dict(decay_ratio=0.5, min_learning_rate_ratio=0.1),
            dict(num_decay_steps=10, min_lr_ratio=0.1),
        ),
        ("inverse_sqrt", "inverse_sqrt", {}, {}),
    ],
)
def test_schedules_are_those_of_transformers(schedule, theirs, options, kwargs, warmup):
    torch = pytest.importorskip("torch")
    from transformers.optimization import get_scheduler

    steps = 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    expected = get_scheduler(theirs, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    over_time = dict(learning_rate=0.3, schedule=schedule, warmup_steps=warmup)
    ours = make_schedule(OptimizerOptions(**over_time, **options), steps)
    rate = jax.vmap(ours)(jnp.arange(steps + 1))
    factors = [expected.lr_lambdas[0](step) for step in range(steps + 1)]
    np.testing.assert_allclose(rate, 0.3 * np.array(factors), rtol=2e-6, atol=1e-8)


def test_constant_without_a_warmup_is_constant():
    rate = make_schedule(OptimizerOptions(learning_rate=0.3, schedule="constant"), 5)
    assert [float(rate(step)) for step in range(7)] == [pytest.approx(0.3)] * 7


def test_a_share_of_the_steps_is_rounded_up_to_warmup_steps():
    shares = OptimizerOptions(learning_rate=1.0, warmup_ratio=0.21)
    steps = OptimizerOptions(learning_rate=1.0, warmup_steps=3)
    for step in range(10):
        assert float(make_schedule(shares, 10)(step)) == float(make_schedule(steps, 10)(step))


def test_the_optimizer_follows_its_schedule():
    options = OptimizerOptions(
        learning_rate=0.5,
        optimizer="sgd",
        schedule="warmup_stable_decay",
        warmup_steps=2,
        decay_ratio=0.25,
        max_grad_norm=1e9,
    )
    optimizer = make_optimizer(options, 8)
    one = jnp.ones(1)

    def step(state, _):
        updates, state = optimizer.update(one, state, one)
        return state, updates[0]

    _, updates = jax.lax.scan(step, optimizer.init(one), length=8)
    expected = jax.vmap(make_schedule(options, 8))(jnp.arange(8))
    np.testing.assert_allclose(-updates, expected, rtol=1e-6)
    assert expected.tolist()[:3] == [0.0, 0.25, 0.5]


# --- what is refused ---------------------------------------------------------------------------

WITHOUT = {  # what none of the other optimizers has
    "adam_beta1": ("adafactor", "sgd", "rmsprop", "adagrad"),
    "adam_beta2": ("adafactor", "sgd", "rmsprop", "adagrad"),
    "adam_epsilon": ("adafactor", "lion", "sgd", "rmsprop", "adagrad"),
    "momentum": ("adamw", "adam", "adafactor", "lion", "rmsprop", "adagrad"),
    "moments": ("adafactor", "rmsprop", "adagrad"),
    "weight_decay": ("adam",),
}


@pytest.mark.parametrize("option", WITHOUT)
def test_what_an_optimizer_has_not_is_refused(option):
    for name in ALL:
        value = "float32" if option == "moments" else 0.5
        given = {"optimizer": name, option: value}
        if name in WITHOUT[option]:
            message = f"^{option} {value} means nothing with optimizer {name}; .* --optimizer "
            with pytest.raises(ValueError, match=message):
                OptimizerOptions(**given)
        else:
            OptimizerOptions(**{"momentum": 0.9 if name == "sgd" else None, **given})


@pytest.mark.parametrize("option", ["min_learning_rate_ratio", "decay_ratio"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_what_a_schedule_has_not_is_refused(option, schedule):
    message = f"^{option} 0.2 means nothing with schedule {schedule}; .* --schedule .*stable_decay"
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**{"schedule": schedule, option: 0.2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(warmup_steps=3, warmup_ratio=0.1), "warmup_ratio 0.1 and warmup_steps 3 are one"),
        (
            dict(schedule="cosine_with_min_lr"),
            "ratio above 0; give --min_learning_rate_ratio 0.1, or --schedule cosine",
        ),
        (
            dict(schedule="cosine_with_min_lr", min_learning_rate_ratio=0.1, decay_ratio=0.2),
            "decay_ratio 0.2 means nothing with schedule cosine_with_min_lr",
        ),
        (
            dict(optimizer="sgd", moments="bfloat16"),
            "moments bfloat16 means nothing with optimizer sgd without momentum.* --momentum 0.9",
        ),
        (
            dict(optimizer="sgd", moments="bfloat16", momentum=0.0),
            "moments bfloat16 means nothing with optimizer sgd without momentum",
        ),
        (dict(optimizer="adamax"), "optimizer must be one of adamw, adam, "),
        (dict(schedule="polynomial"), "schedule must be one of linear, cosine, "),
        (dict(moments="int8"), "moments must be one of float32, bfloat16, or null"),
        (dict(adam_beta2=1.0), "adam_beta2 must be a number at least 0 and below 1"),
        (dict(adam_epsilon=0.0), "adam_epsilon must be a number above 0"),
        (dict(momentum=1.0, optimizer="sgd"), "momentum must be a number at least 0 and below 1"),
        (dict(learning_rate=0.0), "learning_rate must be a number above 0"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be a number above 0"),
        (dict(decay_ratio=0.0), "decay_ratio must be a number above 0"),
        (dict(min_learning_rate_ratio=1.1), "min_learning_rate_ratio must be a number at least 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**given)


def test_a_decay_longer_than_the_run_is_refused():
    options = OptimizerOptions(schedule="warmup_stable_decay", warmup_steps=6, decay_ratio=0.5)
    with pytest.raises(ValueError, match="of 6 steps and a decay of 5 .* all 10 steps; give"):
        make_optimizer(options, 10)
    make_optimizer(options, 12)
    with pytest.raises(ValueError, match="steps must be a whole number at least 1"):
        make_schedule(options, 0)


def test_muon_without_a_matrix_is_refused():
    optimizer = make_optimizer(options_of("muon"), 10)
    with pytest.raises(ValueError, match="under a key `layers`.* --optimizer adamw"):
        optimizer.init({"embedding": jnp.ones((4, 4)), "layers": {"norm": jnp.ones((4, 4))}})
