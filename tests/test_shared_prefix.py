"""A prefix read once for all rows of a group: the numbers are those of every row read by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive

from rlhf import data, rollouts, sharding
from rlhf.data import Tokenized
from rlhf.models import TransformerConfig, scalar_head, transformer
from rlhf.models.config import Experts, LayerKind
from rlhf.models.rotary import Dynamic, Rope
from rlhf.rollouts import Pairs
from rlhf.shared_prefix import SharedPrefix
from rlhf.tasks import reviews
from rlhf.training import pairs
from rlhf.training import preference as pair_losses
from rlhf.training.policy import Policy

SIZES = dict(vocab_size=24, hidden_size=16, num_layers=2, num_heads=4, mlp_size=16)
CONFIGS = {
    "rotary, grouped queries, windows": dict(
        num_kv_heads=2, kinds=(LayerKind(), LayerKind(window=3))
    ),
    "alibi": dict(kinds=(LayerKind(rope=None),), alibi=True),
    "learned distances": dict(
        kinds=(LayerKind(rope=None),), relative_buckets=4, relative_distance=8
    ),
    "learned positions, projected embeddings": dict(
        kinds=(LayerKind(rope=None),), max_positions=16, embed_size=8
    ),
    "experts": dict(
        kinds=(LayerKind(sparse=True),),
        experts=Experts(4, 2, 8),
    ),
}
SHARED = SharedPrefix(group_size=3, suffix=5)
PREFIX = 6


def sampled(rng, prompts=2):
    """Prompts padded on the left, completions padded on the right, three of each prompt."""
    rows, columns = prompts * SHARED.group_size, PREFIX + SHARED.suffix
    tokens = rng.integers(1, SIZES["vocab_size"], (rows, columns))
    tokens[:, :PREFIX] = np.repeat(tokens[:: SHARED.group_size, :PREFIX], SHARED.group_size, axis=0)
    first = np.repeat(rng.integers(0, PREFIX, prompts), SHARED.group_size)[:, None]
    last = rng.integers(PREFIX + 1, columns + 1, rows)[:, None]
    real = (np.arange(columns) >= first) & (np.arange(columns) < last)
    return rollouts.unpacked_rows(
        *map(jnp.asarray, (tokens, real, real & (np.arange(columns) >= PREFIX)))
    )


@pytest.mark.parametrize("name", exhaustive(CONFIGS, quick=["rotary, grouped queries, windows"]))
def test_values_and_gradients_are_those_of_rows_by_themselves(name):
    lm = transformer(TransformerConfig(**SIZES, **CONFIGS[name]))
    assert lm.shares
    params, head = lm.init(jax.random.key(0)), scalar_head(CONFIGS[name].get("embed_size", 16))
    batch = sampled(np.random.default_rng(0))
    heads = {"value": (head, jax.tree.map(jnp.ones_like, head.init(jax.random.key(1))))}

    @jax.jit
    def both(params):
        def total(params, shared):
            s = rollouts.score_batch(lm, params, batch, heads=heads, shared=shared)._replace(aux={})
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(s)), s

        return [
            jax.value_and_grad(total, has_aux=True)(params, shared) for shared in (None, SHARED)
        ]

    alone, together = both(params)
    equal = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=2e-4, atol=max(2e-5, 1e-5 * float(jnp.abs(b).max()))
    )
    jax.tree.map(equal, alone, together)


def test_routing_counts_a_prefix_once():
    lm = transformer(TransformerConfig(**SIZES, **CONFIGS["experts"]))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    routing = rollouts.score_batch(lm, params, batch, shared=SHARED).aux["routing"]
    real = SHARED.deduplicate(batch.segment_ids != 0).sum(1)
    np.testing.assert_array_equal(routing.tokens, SIZES["num_layers"] * real)


def test_the_trunk_reads_a_prefix_once():
    lm = transformer(TransformerConfig(**SIZES))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    cost = lambda shared: (
        jax.jit(lambda params: rollouts.score_batch(lm, params, batch, shared=shared).logprobs)
        .lower(params)
        .as_text()
        .count("tensor<2x21x16xf32>")
    )  # 2 prompts, 6 + 3 × 5 columns, hidden states of 16
    assert cost(None) == 0 < cost(SHARED)


def test_a_mesh_leaves_every_device_a_group():
    """6 rows, 3 to a prompt, on 2 devices: a prompt each; on 6 devices nothing is shared, or five would wait for one."""
    lm = transformer(TransformerConfig(**SIZES))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    score = jax.jit(
        lambda params, batch: rollouts.score_batch(lm, params, batch, shared=SHARED).logprobs
    )
    alone = score(params, batch)
    for devices, shares in ((2, True), (6, False)):
        mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
        score.clear_cache()
        with jax.set_mesh(mesh):
            assert (score.lower(params, batch).as_text().count("tensor<2x21x16xf32>") > 0) == shares
            np.testing.assert_allclose(
                score(params, sharding.shard_batch(batch, mesh)), alone, rtol=1e-4, atol=1e-5
            )


def test_models_that_cannot_share_read_rows_by_themselves():
    stretched = LayerKind(
        rope=Rope(scaling=Dynamic(factor=2.0, original=4))
    )  # its prompts turn by how long the completion is
    lm = transformer(TransformerConfig(**SIZES, kinds=(stretched,)))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    assert not lm.shares
    alone, together = (
        rollouts.score_batch(lm, params, batch, shared=shared).logprobs for shared in (None, SHARED)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


def test_groups_that_do_not_share_are_not_passed_over():
    lm = transformer(TransformerConfig(**SIZES))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    wrong = batch._replace(tokens=batch.tokens.at[1, PREFIX - 1].add(1))
    found = rollouts.score_batch(lm, params, wrong, shared=SHARED).logprobs
    assert jnp.isnan(found[1][batch.mask[1]]).all()
    assert not jnp.isnan(found[3:]).any()
    for shared in (SharedPrefix(4, 5), SharedPrefix(3, 11), SharedPrefix(3, 0)):
        with pytest.raises(ValueError, match="are not groups of"):
            rollouts.score_batch(lm, params, batch, shared=shared)


def test_samples_stay_together_as_far_as_cuts_allow():
    assert SharedPrefix(4, 7).fitting(12, 6) == SharedPrefix(2, 7)
    assert SharedPrefix(4, 7).fitting(12, 5) == SharedPrefix(1, 7)


ROWS = [
    {"prompt": "the film", "chosen": " is great .", "rejected": " is dull ."},
    {
        "prompt": "the film is great and the plot",
        "chosen": " is great .",
        "rejected": " is dull and the film is dull .",
    },
    {"prompt": "the plot", "chosen": " is great .", "rejected": " is dull ."},
]


def test_pairs_are_laid_out_so_that_most_is_shared():
    laid = pairs.lay_out(reviews.tokenizer(), ROWS, "none", 64, print)
    shared = pairs.shared_prefix(laid)
    ends = laid.mask.argmax(-1)
    assert (ends == ends[0, 0]).all()  # prompts end together
    assert laid.tokens.shape[2] - shared.suffix >= ends[0, 0]

    long = f" {ROWS[1]['prompt']} is dull and the film is great ."  # to align it would make all rows wider than sharing spares
    rows = [{**ROWS[0], "chosen": long}, ROWS[1]]
    begun = pairs.lay_out(reviews.tokenizer(), rows, "none", 64, print)
    assert (begun.segment_ids[..., 0] == 1).all()
    packed = pairs.lay_out(reviews.tokenizer(), ROWS, "bfd", 64, print)
    assert pairs.shared_prefix(packed) is None

    even = [Tokenized([5, 6, 7 + side, 8], [False, False, True, True]) for side in (0, 1)]
    rows = data.batch(even)
    alike = Pairs(*(x[None] for x in (rows.tokens, rows.mask, rows.positions, rows.segment_ids)))
    assert pairs.shared_prefix(alike) == SharedPrefix(2, 2)
    assert (
        pairs.shared_prefix(alike, None, alike._replace(tokens=alike.tokens + np.array([[0], [1]])))
        is None
    )


def test_a_pair_that_shares_its_prompt_has_the_same_loss():
    laid = pairs.lay_out(reviews.tokenizer(), ROWS, "none", 64, print)
    lm = transformer(TransformerConfig(**{**SIZES, "vocab_size": len(reviews.tokenizer())}))
    params, reference = map(lm.init, jax.random.split(jax.random.key(0)))
    policy, context = Policy(lm), {"reference": reference}

    def loss(shared):
        batch = pair_losses.with_weights(
            pair_losses.with_reference(policy, context, laid, shared=shared)
        )
        return pair_losses.make_loss(policy, shared=shared)(params, context, batch, None)[0]

    alone, together = loss(None), loss(pairs.shared_prefix(laid))
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    assert abs(float(alone) - float(jnp.log(2))) > 1e-3


def test_aligned_rows_need_something_trained():
    with pytest.raises(ValueError, match="row 1 has no trained token"):
        data.aligned([Tokenized([5], [True]), Tokenized([5, 6], [False, False])])


def test_losses_see_what_is_asked_alone():
    """A chunk holds columns of completions or of prompts, never of both: prompts that nobody asks for cost no logits."""
    lm = transformer(TransformerConfig(**SIZES))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    seen = []

    def unembed(params, hidden):
        jax.debug.callback(lambda: seen.append(hidden.shape[1]))
        return lm.unembed(params, hidden)

    jax.block_until_ready(
        rollouts.score_batch(lm._replace(unembed=unembed), params, batch, shared=SHARED)
    )
    jax.effects_barrier()
    assert seen == [SHARED.suffix]


def test_a_loss_in_one_pass_makes_no_logits_of_prefixes_and_refuses_to_train_them():
    lm = transformer(TransformerConfig(**SIZES))
    batch, params = sampled(np.random.default_rng(0)), lm.init(jax.random.key(0))
    batch = batch._replace(weights=batch.mask.astype(jnp.float32))
    seen = []

    def unembed(params, hidden):
        seen.append(hidden.shape[1])
        return lm.unembed(params, hidden)

    def loss(batch, shared):
        per_token = lambda logprobs, entropy, batch: jnp.where(batch.mask, logprobs**2, 0.0)
        one = lm._replace(unembed=unembed)
        return rollouts.score_loss(one, params, batch, per_token, shared=shared)

    alone, scored = loss(batch, None)
    seen.clear()
    value, found = loss(batch, SHARED)
    assert set(seen) == {SHARED.suffix}
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    np.testing.assert_allclose(found.logprobs, scored.logprobs, atol=1e-5)
    trained = batch._replace(mask=batch.mask.at[0, PREFIX - 1].set(True))
    assert jnp.isnan(loss(trained, SHARED)[0])
    assert jnp.isfinite(loss(trained, None)[0])
