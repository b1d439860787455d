"""PRM, GKD, RFT and ILQL beside slow definitions by hand, and as commands."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

import rlhf
from rlhf import cli, rollouts, tasks
from rlhf.models import classifier_head, huggingface
from rlhf.models.safetensors_files import find
from rlhf.recipes import gkd, ilql, prm, rft
from rlhf.training import loading, q_heads, runs, supervised
from rlhf.training.options import ModelOptions
from rlhf.training.policy import Policy

import steps as tiny  # isort: skip

KEY, SIZE = jax.random.key(0), tiny.HIDDEN


def lm_and_rows(number=4):
    """A model with one layer, and rows of one sequence each: two tokens of a prompt, then trained ones."""
    return tiny.models()[0], tiny.rows(np.random.default_rng(0), number)


@functools.cache
def jitted(fn):
    return jax.jit(fn)


def hidden_of(lm, params, batch):
    found = jitted(lm.hidden)(
        params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    return np.asarray(found[0], float)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_like(seed, tree, scale=0.5):
    """Parameters without zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


def same_in_parts(loss_fn, prepared, params, context=None):
    """One step in one part and in two: the same metrics and parameters.  Returns the metrics."""
    made = []
    for parts in (1, 2):
        optimizer = optax.sgd(0.1)  # in proportion to the gradient, unlike Adam at its first step
        state = rlhf.init_state(
            rlhf.train.reference(params), optimizer, KEY, rlhf.train.reference(context or {})
        )
        made.append(
            jax.jit(rlhf.train_step(loss_fn, optimizer, micro_batches=parts))(state, prepared)
        )
    (whole, metrics), (parted, same) = made
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole.params, params)))
        > 1e-4
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (whole.params, metrics),
        (parted.params, same),
    )
    return jax.device_get(metrics)


# --- process reward models ----------------------------------------------------------------------------------------------


def stepwise():
    task = tasks.find("task:sums:2")
    return task.tokenizer(), tasks.stepwise(task, 8), task.step_separator


@pytest.mark.exhaustive
def test_prm_is_the_cross_entropy_at_the_ends_of_steps():
    tokenizer, rows, separator = stepwise()
    lm = rlhf.models.transformer(rlhf.models.TransformerConfig(len(tokenizer), SIZE, 1, 2, 32))
    head = classifier_head(SIZE, 2, bias=True, reads="every")
    params = {"lm": lm.init(KEY), "head": random_like(0, head.init(KEY))}
    batch = prm.lay_out(tokenizer, rows, separator, "none", 64, print)
    logits = hidden_of(lm, params["lm"], batch) @ np.asarray(params["head"]["weight"]) + np.asarray(
        params["head"]["bias"]
    )
    end, losses, right, last = tokenizer.convert_tokens_to_ids(separator), [], [], []
    for b, row in enumerate(rows):
        ends = [t for t in range(batch.tokens.shape[1]) if batch.tokens[b, t] == end]
        assert len(ends) == len(row["labels"])  # one separator a step, behind it
        for t, label in zip(ends, row["labels"], strict=True):
            losses.append(-log_softmax(logits[b, t])[int(label)])
            right.append((logits[b, t, 1] > logits[b, t, 0]) == label)
        last.append(losses[-1])
    metrics = same_in_parts(prm.make_loss(Policy(lm, head)), prm.with_weights(batch), params)
    np.testing.assert_allclose(
        [metrics["loss"], metrics["accuracy"]], [np.mean(losses), np.mean(right)], rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["right"], np.mean([label for row in rows for label in row["labels"]]), rtol=1e-5
    )
    assert 0.2 < metrics["right"] < 0.8
    loss_fn = jax.jit(prm.make_loss(Policy(lm, head)))
    of_last, _ = loss_fn(params, {}, prm.with_weights(batch, last_step_only=True), None)
    np.testing.assert_allclose(of_last, np.mean(last), rtol=1e-5)
    packed = prm.lay_out(tokenizer, rows, separator, "bfd", 64, print)
    assert len(packed.tokens) < len(rows)
    np.testing.assert_allclose(
        loss_fn(params, {}, prm.with_weights(packed), None)[0], metrics["loss"], rtol=1e-5
    )


def test_prm_says_what_it_cuts():
    tokenizer, rows, separator = stepwise()
    said = []
    prm.lay_out(tokenizer, rows, separator, "none", 8, said.append)
    assert "sequences lost" in said[0]


# --- distillation -------------------------------------------------------------------------------------------------------


def slow_jsd(student, teacher, beta):
    s, t = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    kl = lambda p, q: (p * np.log(p / q)).sum(-1)
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("beta", "temperature", "size"), [(0.3, 2.0, 13), (1.0, 1.0, None)])
def test_gkd_is_the_divergence_of_each_token(beta, temperature, size):
    lm, batch = lm_and_rows()
    wider = tiny.models(mlp_size=48)[0]
    params, taught = (random_like(i, x.init(KEY), 0.3) for i, x in enumerate((lm, wider)))
    logits = [
        np.asarray(x.unembed(p, hidden_of(x, p, batch).astype(np.float32)), float)[..., :size]
        / temperature
        for x, p in ((lm, params), (wider, taught))
    ]
    places = [(b, t - 1) for b, t in np.argwhere(batch.mask)]  # what is said before a trained token
    each = [slow_jsd(*(x[place] for x in logits), beta) for place in places]
    agree = [logits[0][place].argmax() == logits[1][place].argmax() for place in places]
    loss_fn = gkd.make_loss(
        Policy(lm), wider, vocab_size=size, beta=beta, loss_temperature=temperature
    )
    loss, metrics = jax.jit(loss_fn)(
        params, {"teacher": taught}, supervised.with_weights(batch), None
    )
    np.testing.assert_allclose(
        [loss, metrics["agreement"]], [np.mean(each), np.mean(agree)], rtol=1e-4
    )
    assert np.mean(each) > 1e-3
    if temperature != 1:
        assert same_in_parts(loss_fn, supervised.with_weights(batch), params, {"teacher": taught})[
            "loss"
        ] == pytest.approx(loss)


def test_gkd_never_holds_the_logits_of_all_positions():
    lm = rlhf.models.transformer(rlhf.models.TransformerConfig(24, SIZE, 1, 2, 32))
    params = jax.eval_shape(lm.init, KEY)
    whole = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    batch = rollouts.Batch(whole, jax.ShapeDtypeStruct((2, 256), bool), whole, whole)
    batch = batch._replace(weights=jax.ShapeDtypeStruct((2, 256), jnp.float32))
    loss_fn = gkd.make_loss(Policy(lm), lm)
    grad = jax.grad(lambda *args: loss_fn(*args, None)[0])
    shapes = str(jax.make_jaxpr(grad)(params, {"teacher": params}, batch))
    assert "[2,64,24]" in shapes
    assert "[2,256,24]" not in shapes


def test_gkd_samples_its_share_of_steps_by_seed_and_step():
    tokenizer = tasks.find("task:reverse").tokenizer()
    rows = gkd.lay_out(tokenizer, tasks.load("task:reverse", tasks.demonstrations, 8), 32, print)
    on_policy = [
        gkd.take(rows, seed, number, 4, 0.25).on_policy for seed in (0, 1) for number in range(200)
    ]
    assert 0.2 < np.mean(on_policy[:200]) < 0.3
    assert on_policy[:200] != on_policy[200:]
    a, b = gkd.take(rows, 0, 7, 4, 0.25), gkd.take(rows, 0, 7, 4, 0.25)
    assert (a.batch.tokens == b.batch.tokens).all()
    assert a.on_policy == b.on_policy
    for row, prompt in zip(a.batch.tokens, a.prompts.tokens, strict=True):  # the same rows
        written = prompt[prompt != 0]
        assert row[: len(written)].tolist() == written.tolist()


def test_gkd_cuts_what_only_one_model_has_and_refuses_other_tokens(base, tmp_path):
    model = ModelOptions(base)
    tokenizer = huggingface.load_tokenizer(base)
    lm = rlhf.models.transformer(
        rlhf.models.TransformerConfig(len(tokenizer) + 16, 8, 1, 2, 8, tied=True)
    )
    rlhf.save(tmp_path / "padded", lm, lm.init(KEY), tokenizer=tokenizer)
    assert gkd.common_vocabulary(tokenizer, model, str(tmp_path / "padded")) == len(tokenizer)
    with pytest.raises(
        ValueError, match=f"{len(tokenizer)} tokens, but .* has logits for {len(tokenizer) - 4}"
    ):
        gkd.common_vocabulary(
            huggingface.load_tokenizer(short(base, tmp_path)), model, str(tmp_path / "short")
        )


def short(base, tmp_path):
    """A model with fewer logits than its tokenizer has tokens."""
    tokenizer = huggingface.load_tokenizer(base)
    lm = rlhf.models.transformer(
        rlhf.models.TransformerConfig(len(tokenizer) - 4, 8, 1, 2, 8, tied=True)
    )
    rlhf.save(tmp_path / "short", lm, lm.init(KEY), tokenizer=tokenizer)
    return str(tmp_path / "short")


# --- rejection sampling -------------------------------------------------------------------------------------------------


def test_rft_selects_what_is_at_its_prompts_percentile_and_not_the_worst():
    rewards = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 1.0, np.nan]])
    for percentile in (0.3, 0.7, 0.95):
        slow = np.zeros_like(rewards, bool)
        for p, row in enumerate(rewards):
            bar = np.quantile(row[~np.isnan(row)], percentile)
            slow[p] = (row >= bar) & (row > 0.0)
        np.testing.assert_array_equal(rft.selected(rewards, percentile), slow)
    best = rft.selected(rewards, 0.0, best_only=True)
    assert np.argwhere(best).tolist() == [[0, 3], [2, 0]]


def rollout_of(tokens):
    """A rollout of one prompt token and sampled ones."""
    tokens = np.asarray(tokens, np.int32)
    mask = np.arange(tokens.shape[1])[None, :].repeat(len(tokens), 0) > 0
    ones = np.ones_like(tokens)
    return rollouts.Rollout(tokens, mask, np.cumsum(ones, 1) - 1, ones, ones, ones, ones[:, 0], 1.0)


def test_rft_takes_each_completion_once_and_deals_all_of_them_out():
    rollout = rollout_of(
        [[5, 1, 2], [5, 1, 2], [6, 1, 2], [5, 3, 0], [5, 1, 2], [5, 3, 4], [7, 1, 1]]
    )
    rows = rft.distinct(rollout, np.array([1, 2, 3, 4, 5, 6]))
    assert rows.tolist() == [1, 2, 3, 5, 6]
    shorter = rollout._replace(
        mask=rollout.mask & (np.arange(7) != 4)[:, None]
    )  # the same tokens, others sampled
    assert rft.distinct(shorter, np.array([1, 4])).tolist() == [1, 4]
    for number, micro_batches, size in ((1, 1, 8), (2, 1, 4), (1, 2, 8), (2, 2, 4), (3, 1, 2)):
        batches = rft.dealt(rollout, rows, number, micro_batches)
        assert [batch.tokens.shape for batch in batches] == [(size, 3)] * number
        trained = [
            tuple(row)
            for batch in batches
            for row, real in zip(batch.tokens, batch.mask.any(1), strict=True)
            if real
        ]
        assert sorted(trained) == sorted(tuple(row) for row in rollout.tokens[rows])
    assert rft.dealt(rollout, rows[:0], 2) == []


# --- values of logged completions ---------------------------------------------------------------------------------------


def logged_rows():
    lm, batch = lm_and_rows()
    heads = q_heads.heads_of(SIZE, tiny.VOCAB)
    params = {"lm": lm.init(KEY), **random_like(0, heads.init(KEY))}
    target = random_like(5, params["q"])
    rewards = np.where(
        batch.mask, np.random.default_rng(1).normal(size=batch.mask.shape), 0.0
    ).astype(np.float32)
    return lm, heads, params, target, ilql.Trajectories(*batch[:4], rewards)


def slow_head(p, h):
    p = {name: np.asarray(x, float) for name, x in p.items()}
    return np.maximum(h @ p["inner"] + p["inner_bias"], 0) @ p["weight"] + p["bias"]


def test_ilql_is_its_four_terms():
    lm, heads, params, target, batch = logged_rows()
    tau, discount, cql_coef, awac_coef, awac_beta = 0.8, 0.9, 0.3, 0.7, 0.5
    knobs = dict(
        tau=tau, discount=discount, cql_coef=cql_coef, awac_coef=awac_coef, awac_beta=awac_beta
    )
    hidden = hidden_of(lm, params["lm"], batch)
    logits = log_softmax(np.asarray(lm.unembed(params["lm"], hidden.astype(np.float32)), float))
    values = slow_head(params["v"], hidden)[..., 0]
    each = lambda tree: [
        slow_head(jax.tree.map(lambda x, i=i: x[i], tree), hidden) for i in range(2)
    ]
    qs, slow = each(params["q"]), each(target)
    terms = {"q_loss": [], "value_loss": [], "cql": [], "awac": []}
    for b, t in np.argwhere(batch.mask):
        action, s = batch.tokens[b, t], (b, t - 1)
        end = t + 1 == batch.mask.shape[1] or not batch.mask[b, t + 1]
        aim = batch.rewards[b, t] + (0 if end else discount * values[b, t])
        low = min(q[s][action] for q in slow)
        error = low - values[s]
        terms["q_loss"].append(sum((q[s][action] - aim) ** 2 for q in qs))
        terms["value_loss"].append((tau if error > 0 else 1 - tau) * error**2)
        terms["cql"].append(cql_coef * sum(-log_softmax(q[s])[action] for q in qs))
        terms["awac"].append(-awac_coef * np.exp(awac_beta * error) * logits[s][action])
    prepared, context = ilql.with_weights(batch), {"target": target}
    metrics = same_in_parts(ilql.make_loss(Policy(lm), heads, **knobs), prepared, params, context)
    for name, values in terms.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(
        metrics["loss"], sum(np.mean(values) for values in terms.values()), rtol=1e-4
    )


def test_ilql_samples_by_what_it_saved(tmp_path):
    lm, heads, params, target, _ = logged_rows()
    q_heads.save(
        tmp_path / "heads.safetensors", {"q": params["q"], "v": params["v"], "target": target}
    )
    loaded, leaves = q_heads.load(tmp_path / "heads.safetensors")
    assert loaded == heads
    np.testing.assert_array_equal(leaves["target"]["weight"], target["weight"])
    beta, temperature = 0.7, 0.5
    sampler = rollouts.sampler(q_heads.shift(loaded, leaves, beta), temperature=temperature)
    prompts = rollouts.Prompts(jnp.array([[3, 4], [6, 7]]), jnp.ones((2, 2), bool))
    r = jax.device_get(
        rollouts.generate(lm, params["lm"], prompts, KEY, max_new_tokens=4, sampler=sampler)
    )
    hidden = hidden_of(lm, params["lm"], r)
    q = np.minimum(
        *(slow_head(jax.tree.map(lambda x, i=i: x[i], target), hidden) for i in range(2))
    )
    logits = np.asarray(lm.unembed(params["lm"], hidden.astype(np.float32))) + beta * (
        q - slow_head(params["v"], hidden)
    )
    expected = log_softmax(logits / temperature)
    for b, t in np.argwhere(r.mask):
        np.testing.assert_allclose(
            r.sampling_logprobs[b, t], expected[b, t - 1, r.tokens[b, t]], atol=1e-4
        )


def test_ilql_puts_the_scaled_reward_on_the_last_token():
    tokenizer = tasks.find("task:walks").tokenizer()
    rows = [
        {"prompt": "c", "completion": text, "reward": reward}
        for text, reward in (("ua", 1), ("b", 0.0), ("uba", 0.5))
    ]
    batch = ilql.lay_out(tokenizer, rows, 8, print)
    deviation = np.std([1, 0, 0.5])
    np.testing.assert_allclose(batch.rewards.sum(1) * deviation, [0.5, -0.5, 0.0], atol=1e-6)
    assert np.argwhere(batch.rewards).tolist() == [
        [0, batch.mask[0].nonzero()[0][-1]],
        [1, batch.mask[1].nonzero()[0][-1]],
    ]


# --- commands -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline") / "teacher"
    assert (
        cli.main(
            [
                "new",
                str(folder),
                "--hidden_size",
                "8",
                "--num_heads",
                "2",
                "--num_layers",
                "1",
                "--seed",
                "1",
            ]
        )
        == 0
    )
    return str(folder)


SMALL = [
    "--dataset",
    "task:reverse",
    "--dataset_size",
    "32",
    "--batch_size",
    "4",
    "--learning_rate",
    "1e-3",
    "--steps",
    "2",
]
SAMPLED = ["--num_samples", "4", "--max_new_tokens", "4", "--eval_dataset", "task:reverse"]


def rows_of(folder, phase="train"):
    return [row for row in runs.metrics_of(folder) if row["phase"] == phase]


@pytest.mark.exhaustive
def test_prm_writes_what_transformers_calls_a_token_classifier(base, tmp_path):
    ask = [
        "prm",
        "--model",
        base,
        *SMALL,
        "--eval_dataset",
        "task:reverse",
        "--packing",
        "bfd",
        "--max_length",
        "32",
    ]
    assert cli.main([*ask, "--output", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert 0 < rows_of(tmp_path / "run", "eval")[0]["eval_accuracy"] < 1
    lm, head, params, tokenizer = huggingface.load_classifier(tmp_path / "run" / "model")
    assert head.reads == "every"
    assert params["head"]["weight"].shape == (16, 2)
    assert {"score.weight", "score.bias"} == {
        name for name in find(tmp_path / "run" / "model") if not name.startswith("model.")
    }
    assert huggingface.configs.transformers_config(tmp_path / "run" / "model").architectures == [
        "LlamaForTokenClassification"
    ]
    tokens = jnp.asarray([tokenizer.encode("abc=cba")])
    where = dict(positions=jnp.arange(tokens.shape[1])[None], segment_ids=jnp.ones_like(tokens))
    assert rollouts.classify(lm, head, params, tokens, **where).shape == (*tokens.shape, 2)


@pytest.mark.exhaustive
def test_gkd_learns_on_rows_and_on_what_is_sampled(base, teacher, tmp_path):
    ask = [
        "gkd",
        "--model",
        base,
        "--teacher",
        teacher,
        *SMALL,
        "--max_new_tokens",
        "4",
        "--eval_dataset",
        "task:reverse",
    ]
    assert (
        cli.main(
            [*ask, "--steps", "4", "--seq_kd", "--lmbda", "0.5", "--output", str(tmp_path / "run")]
        )
        == 0
    )
    rows = rows_of(tmp_path / "run")
    assert {row["on_policy"] for row in rows} == {0.0, 1.0}
    assert rows_of(tmp_path / "run", "eval")[0]["eval_loss"] > 0
    saved = sum(
        file.stat().st_size
        for file in (tmp_path / "run" / "checkpoints").rglob("*")
        if file.is_file()
    )
    assert saved < 200_000
    before, after = (
        huggingface.load(folder)[1]["embedding"] for folder in (base, tmp_path / "run" / "model")
    )
    assert np.abs(before - after).max() > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", exhaustive(["rft", "ilql"], quick=["rft"]))
def test_a_resumed_run_ends_with_the_same_bits(name, base, tmp_path):
    extra = {
        "rft": ["--improve_steps", "2", "--mini_batches", "4", "--start_percentile", "0.5"],
        "ilql": [
            "--target_rate",
            "0.5",
            "--target_every",
            "1",
            "--dataset",
            "task:walks:2",
            "--eval_dataset",
            "task:walks:2",
        ],
    }[name]
    ask = [name, "--model", base, *SMALL, *SAMPLED, *extra, "--save_every", "1"]
    whole, files = (
        tmp_path / "whole",
        ["model/model.safetensors"] + ["heads.safetensors"] * (name == "ilql"),
    )
    assert cli.main([*ask, "--output", str(whole)]) == 0
    written, rows = [(whole / file).read_bytes() for file in files], rows_of(whole)
    assert len(rows) == 2
    shutil.rmtree(whole / "model")  # as if it had ended after the first step
    shutil.rmtree(max((whole / "checkpoints").iterdir(), key=lambda folder: int(folder.name)))
    assert cli.main([*ask, "--output", str(whole), "--resume"]) == 0
    assert [(whole / file).read_bytes() for file in files] == written
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows]
    assert huggingface.load(whole / "model")[1]["embedding"].shape[1] == 16
    if name == "ilql":
        assert rows_of(whole, "eval")[0]["eval_reward"] >= 0
        _, leaves = q_heads.load(whole / "heads.safetensors")
        fresh = q_heads.heads_of(16, leaves["q"]["weight"].shape[-1]).init(jax.random.key(0))
        of = lambda a, b: float(jnp.abs(a["weight"] - b["weight"]).max())
        assert (
            0 < of(leaves["target"], fresh["q"]) < of(leaves["q"], fresh["q"])
        )  # the slow Qs follow


def test_rft_counts_steps_where_nothing_is_selected(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rft, "selected", lambda rewards, percentile, best_only: np.zeros(rewards.shape, bool)
    )
    ask = [
        "rft",
        "--model",
        base,
        *SMALL,
        "--num_samples",
        "4",
        "--max_new_tokens",
        "4",
        "--output",
        str(tmp_path / "run"),
    ]
    assert cli.main(ask) == 0
    assert [row["selected"] for row in rows_of(tmp_path / "run")] == [0.0, 0.0]
    assert (tmp_path / "run" / "checkpoints" / "8").exists()
    before, after = (
        huggingface.load(folder)[1]["embedding"] for folder in (base, tmp_path / "run" / "model")
    )
    np.testing.assert_array_equal(before, after)


MISTAKES = [
    ("prm", ["--packing", "tight"], "--packing must be one of none, bfd, but is 'tight'"),
    ("prm", ["--dataset", "FINE"], "labels missing"),
    ("prm", ["--max_length", "1"], "has a trained token among its first 1"),
    ("gkd", [], "--teacher is missing"),
    ("gkd", ["--teacher", "no/such-model"], "no/such-model is no folder"),
    ("gkd", ["--teacher", "OTHER"], "has another vocabulary than"),
    (
        "gkd",
        ["--teacher", "BASE", "--lmbda", "2"],
        "--lmbda must be a number at least 0 and at most 1, but is 2.0",
    ),
    (
        "gkd",
        ["--teacher", "BASE", "--temperature", "0"],
        "--temperature must be a number above 0 and at most 100, but is 0.0",
    ),
    (
        "rft",
        ["--start_percentile", "0.9", "--end_percentile", "0.5"],
        "percentiles must rise, but go from 0.9 to 0.5",
    ),
    (
        "rft",
        ["--num_samples", "1"],
        "num_samples 1: a completion is chosen among others; give at least 2",
    ),
    ("rft", ["--dataset", "FINE"], "reward is not given"),
    ("ilql", ["--tau", "1"], "--tau must be a number above 0 and below 1"),
    (
        "ilql",
        ["--target_rate", "0"],
        "--target_rate must be a number above 0 and at most 1, but is 0.0",
    ),
    ("ilql", ["--dataset", "FINE"], "row 0: reward must be a number, but is None"),
    (
        "ilql",
        ["--dataset", "FINE", "--columns", "{prompt: reward, completion: prompt}"],
        "row 0: reward must be a number",
    ),
]


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    MISTAKES,
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "",
)
def test_a_mistake_is_said_before_the_model_is_loaded(
    name, extra, message, base, tmp_path, capsys, monkeypatch
):
    for name_of_loader in ("load", "load_for_classification"):
        monkeypatch.setattr(huggingface, name_of_loader, None)
    monkeypatch.setattr(loading.Loaded, "init_state", None)
    fine = tmp_path / "fine.jsonl"
    fine.write_text('{"prompt": "ab=", "completion": "ba"}\n' * 8)
    other = shutil.copytree(base, tmp_path / "other")
    for file in (Path(__file__).parent / "checkpoints" / "tokenizer").glob("tokenizer*"):
        shutil.copy(file, other)
    filled = [
        {"BASE": base, "FINE": str(fine), "OTHER": str(other)}.get(word, word) for word in extra
    ]
    assert (
        cli.main([name, "--model", base, *SMALL, "--output", str(tmp_path / "out"), *filled]) == 2
    )
    error = capsys.readouterr().err.strip("\n")
    assert message in error
    assert "\n" not in error
