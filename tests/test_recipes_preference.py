"""KTO, BCO, ORPO, CPO and AOT: blocks against slow definitions, micro-batches, commands from data to a model, mistakes."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import exhaustive

import rlhf
from rlhf import cli
from rlhf.losses import moments, preference, reference_free
from rlhf.models import huggingface
from rlhf.recipes import bco, cpo, dpo, kto, orpo
from rlhf.tasks import reverse
from rlhf.training import evaluation, loading, unpaired
from rlhf.training import preference as pair_losses
from rlhf.training import reference_free as reference_free_losses
from rlhf.training.policy import Policy
from rlhf.training.runs import metrics_of

import steps as tiny  # isort: skip

BAD = Path(__file__).parent / "bad_inputs"


@pytest.fixture(scope="module")
def tiny_lm():
    lm, _ = tiny.models()
    return lm, lm.init(jax.random.key(1)), lm.init(jax.random.key(0))  # with a KL above 0


@partial(jax.jit, static_argnums=0)
def logits_of(lm, params, tokens, positions, segment_ids):
    return lm.unembed(
        params, lm.hidden(params, tokens, positions=positions, segment_ids=segment_ids)[0]
    )


def by_hand(lm, params, tokens, mask, positions, segment_ids):
    """The log-prob of every token, one row and token after the other; and its sum over the mask."""
    logits = np.asarray(logits_of(lm, params, tokens, positions, segment_ids), np.float64)
    logprobs = np.zeros(tokens.shape)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if segment_ids[b, t]:
                logprobs[b, t] = logits[b, t - 1, tokens[b, t]] - np.log(
                    np.exp(logits[b, t - 1]).sum()
                )
    return logprobs, (logprobs * mask).sum(-1)


sigmoid = lambda x: 1 / (1 + np.exp(-x))


def completions_of(rng, mismatched=True):
    """Eight completions, three of them desirable."""
    pairs = tiny.pairs(rng)
    desirable = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    return unpaired.Unpaired(*(x[:, : 1 + mismatched] for x in pairs[:4]), desirable)


def referenced(lm, other, completions):
    return completions._replace(
        ref_logprobs=np.asarray(unpaired.sequence_logprobs(lm, other, completions))
    )


def sums_by_hand(lm, params, arrays):
    """`[R, K]` of the completions."""
    return np.stack(
        [
            by_hand(lm, params, *(x[:, k] for x in arrays[:4]))[1]
            for k in range(arrays.tokens.shape[1])
        ],
        -1,
    )


@pytest.mark.parametrize("mismatched", [True, False])
def test_kto_by_hand(tiny_lm, mismatched):
    lm, params, other = tiny_lm
    completions = referenced(lm, other, completions_of(np.random.default_rng(0), mismatched))
    compare = kto.objective(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    loss, metrics = compare(
        unpaired.make_scores(Policy(lm))(params, (), completions, None), (), completions
    )

    ratio = sums_by_hand(lm, params, completions) - sums_by_hand(lm, other, completions)
    kl = max(0.0, ratio[:, 1].mean()) if mismatched else 0.0
    assert (kl > 0.05) == mismatched
    expected = [
        1.5 * (1 - sigmoid(0.3 * (x - kl))) if good else 0.5 * (1 - sigmoid(0.3 * (kl - x)))
        for x, good in zip(ratio[:, 0], completions.desirable, strict=True)
    ]
    good, bad = (
        0.3 * ratio[mask, 0].mean() for mask in (completions.desirable, ~completions.desirable)
    )
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    found = [
        metrics[name] for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
    ]
    np.testing.assert_allclose(found, [kl, good, bad, good - bad], rtol=1e-4, atol=1e-6)


def test_bco_measures_rewards_from_the_mean_of_all_so_far(tiny_lm):
    lm, params, other = tiny_lm
    context, rewards = {"rewards": moments.running().init()}, []
    for seed in (0, 1):
        completions = referenced(
            lm, other, completions_of(np.random.default_rng(seed), mismatched=False)
        )
        x = (
            0.3
            * (sums_by_hand(lm, params, completions) - sums_by_hand(lm, other, completions))[:, 0]
        )
        rewards += x.tolist()
        delta = np.mean(rewards)
        scores = unpaired.make_scores(Policy(lm))(params, (), completions, None)
        loss, metrics = bco.objective(beta=0.3)(scores, context, completions)
        labelled = zip(x, completions.desirable, strict=True)
        expected = [-np.log(sigmoid(r - delta if good else delta - r)) for r, good in labelled]
        np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
        context = bco.move(context, params, metrics)
        np.testing.assert_allclose(
            context["rewards"], [len(rewards), delta, np.var(rewards, ddof=1)], rtol=1e-4
        )
    _, of_eval = bco.objective(beta=0.3, moving=False)(scores, context, completions)
    assert float(of_eval["delta"]) == float(
        metrics["delta"]
    )  # what is not trained on does not count


def test_completions_keep_their_labels_and_are_held_against_other_prompts():
    tokenizer = reverse.task().tokenizer()
    pairs = [{"prompt": f"{a}=", "chosen": a, "rejected": "zz"} for a in ("b", "c", "d")]
    single = [
        {"prompt": "abcdefg=", "completion": "a", "label": True},
        {"prompt": "b=", "completion": "e", "label": False},
    ]
    said = []
    completions = unpaired.lay_out(tokenizer, [*pairs, *single], 6, said.append, mismatched=True)
    assert said == [
        "5 rows were taken apart into 8 completions with a label",
        "0 sequences lost 0 tokens beyond 6; 1 rows with nothing left to train on were left out",
    ]
    text = lambda row, mask: tokenizer.decode(np.asarray(row)[mask], skip_special_tokens=True)
    prompts, own, others = [], [], []
    for tokens, mask, segments in zip(
        completions.tokens, completions.mask, completions.segment_ids, strict=True
    ):
        prompts.append([text(tokens[k], (segments[k] != 0) & ~mask[k]) for k in (0, 1)])
        own.append(text(tokens[0], mask[0]))
        others.append(text(tokens[1], mask[1]))
    assert (
        [p for p, _ in prompts]
        == [p for _, p in prompts]
        == ["b=", "c=", "d=", "b=", "c=", "d=", "b="]
    )
    assert list(zip(own, completions.desirable.tolist(), strict=True)) == [
        ("b", True), ("c", True), ("d", True), ("zz", False), ("zz", False), ("zz", False), ("e", False)
    ]  # fmt: skip
    assert others == ["c", "d", "zz", "zz", "zz", "e", "b"]  # the next row's


def test_advice_on_weights():
    labels = np.array([True] * 3 + [False] * 6)
    assert kto.advice(labels, 2.0, 1.0) is None
    assert kto.advice(labels, 2.6, 1.0) is None
    assert kto.advice(labels, 1.0, 1.0) == (
        "3 desirable rows weigh 0.50 times the 6 undesirable ones, and 1 to 1.33 is best: --desirable_weight 2 to 2.67"
    )
    assert kto.advice(labels[:3], 1.0, 1.0) == "all 3 rows are desirable; KTO learns from both"


def pairs_by_hand(lm, params, pairs):
    """Sums and lengths `[R, K]` of the completions, and of all but the first token."""
    whole = (pairs.segment_ids != 0) & (np.arange(pairs.tokens.shape[-1]) > 0)
    of = lambda mask: sums_by_hand(lm, params, pairs._replace(mask=mask))
    return of(pairs.mask), pairs.mask.sum(-1), of(whole), whole.sum(-1)


def in_numpy(name, sums, lengths):
    (c, r), (mean_c, mean_r) = sums.T[:2], (sums / lengths).T[:2]
    shape = lambda x: (1 - np.exp(-0.25 * x)) / 0.25
    odds = lambda x: x - np.log(1 - np.exp(x))
    return {
        "sigmoid": lambda: -np.log(sigmoid(0.1 * (c - r))),
        "hinge": lambda: np.maximum(0, 1 - 0.1 * (c - r)),
        "ipo": lambda: (mean_c - mean_r - 5.0) ** 2,
        "simpo": lambda: -np.log(sigmoid(2 * (mean_c - mean_r) - 0.5)),
        "alphapo": lambda: -np.log(sigmoid(2 * (shape(mean_c) - shape(mean_r)) - 0.5)),
        "tpo": lambda: -np.log(sigmoid(0.01 * (c - r))),
        "tpo_l": lambda: -np.log(sigmoid(0.01 * (mean_c - mean_r) - 0.5)),
        "orpo": lambda: -0.1 * np.log(sigmoid(odds(mean_c) - odds(mean_r))),
    }[name]()


@pytest.mark.parametrize("name", exhaustive([*cpo.LOSSES, "orpo"], quick=["sigmoid", "simpo"]))
def test_reference_free_objectives_by_hand_and_packed(tiny_lm, name):
    lm, params, _ = tiny_lm
    rng = np.random.default_rng(0)
    pairs, whole, gold = tiny.pairs(rng), name == "orpo", 2 if name in cpo.TRIPLES else 0
    if gold:
        third = tiny.rows(rng)
        extra = (third.tokens, third.mask, third.positions, third.segment_ids)
        pairs = pairs._replace(**{
            field: np.concatenate([x, np.asarray(y)[:, None]], 1)
            for field, x, y in zip(pairs._fields[:4], pairs[:4], extra, strict=True)
        })  # fmt: skip
    loss = reference_free.orpo if whole else cpo.chosen_loss(name)

    def run(pairs, most):
        options = dict(prompts_too=whole, max_segments=most)
        loss_fn = reference_free_losses.make_loss(Policy(lm), loss=loss, nll_coef=0.7, **options)
        return loss_fn(params, (), reference_free_losses.with_weights(pairs, **options), None)

    total, metrics = run(pairs, 1)

    sums, lengths, all_sums, all_lengths = pairs_by_hand(lm, params, pairs)
    imitated, number = (all_sums, all_lengths) if whole else (sums, lengths)
    nll = -imitated[:, gold].sum() / number[:, gold].sum()
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(total, in_numpy(name, sums, lengths).mean() + 0.7 * nll, rtol=1e-5)
    by_token = sums if name in ("sigmoid", "hinge", "tpo") else sums / lengths
    np.testing.assert_allclose(
        metrics["rewards/margins"], (by_token[:, 0] - by_token[:, 1]).mean(), atol=1e-5
    )
    np.testing.assert_allclose(
        metrics["rewards/accuracies"], (by_token[:, 0] > by_token[:, 1]).mean(), rtol=1e-6
    )
    if not gold:
        packed, sequences = tiny.packed(pairs)
        rest, others = run(packed, sequences)
        numbers = lambda loss, metrics: [loss, metrics["nll"], metrics["rewards/margins"]]
        np.testing.assert_allclose(
            numbers(rest, others), numbers(total, metrics), rtol=1e-5, atol=1e-5
        )


def recipes(lm, other):
    """name -> (`make_update` but for the optimizer and micro-batches, the batch, the context it starts from)."""
    rng = np.random.default_rng(0)
    completions = referenced(lm, other, completions_of(rng))
    alone = referenced(lm, other, completions_of(rng, mismatched=False))
    pairs = tiny.pairs(rng)
    pairs = pairs._replace(ref_logprobs=np.asarray(pair_losses.sequence_logprobs(lm, other, pairs)))
    sorts = partial(dpo.make_update, loss=preference.aot, beta=0.5, couples_rows=True)
    return {
        "kto": (partial(kto.make_update, beta=0.5), completions, {}),
        "bco": (partial(bco.make_update, beta=0.5), alone, bco.initial_context()),
        "orpo": (orpo.make_update, pairs, {}),
        "aot": (sorts, pairs, {}),
    }


@pytest.mark.parametrize("name", exhaustive(["kto", "bco", "orpo", "aot"], quick=["kto"]))
def test_micro_batches_change_nothing(tiny_lm, name):
    lm, params, other = tiny_lm
    make, batch, context = recipes(lm, other)[name]
    found = []
    for micro_batches in (1, 2):
        optimizer = optax.sgd(1.0)
        state = rlhf.init_state(
            rlhf.reference(params), optimizer, jax.random.key(0), rlhf.reference(context)
        )
        step = jax.jit(make(Policy(lm), optimizer, micro_batches=micro_batches))
        for _ in range(2):
            state, metrics = step(state, batch)
        found.append((state.params, state.context, metrics))
    largest = max(
        float(jnp.abs(x - y).max())
        for x, y in zip(*map(jax.tree.leaves, (found[0][0], params)), strict=True)
    )
    assert largest > 1e-3, "nothing was trained"
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *found)
    if name == "kto":
        assert found[0][2]["kl"] > 0.01


def test_an_evaluation_in_parts_is_that_of_all_rows(tiny_lm):
    """Eight rows, three at a time: what fills up the last part weighs nothing, in whichever of the weights."""
    lm, params, _ = tiny_lm
    # Of these the margins are no small difference of large sums.
    params = jax.tree.map(lambda x: 0.5 * x, params)
    weighted = reference_free_losses.with_weights(tiny.pairs(np.random.default_rng(0)))
    loss_fn = reference_free_losses.make_loss(Policy(lm), nll_coef=0.7)
    loss, metrics = loss_fn(params, (), weighted, None)
    evaluate = evaluation.of_loss(loss_fn, weighted, 3, loading.one_device())
    found = evaluate(rlhf.init_state(params, optax.sgd(1.0), jax.random.key(0)))
    assert found.keys() == {"loss", *metrics}
    for name, value in {"loss": loss, **metrics}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of rows: the reverse of a word, and the word itself as the wrong completion."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 6))) for _ in range(32)]
    pairs = [dict(prompt=f"{w}=", chosen=w[::-1], rejected=w) for w in words]
    triples = [row | {"reference": row["chosen"]} for row in pairs]
    completions = [dict(prompt=f"{w}=", completion=w[:: rng.choice([-1, 1])]) for w in words]
    labelled = [row | {"label": row["completion"] == row["prompt"][-2::-1]} for row in completions]
    for name, kind in (("pairs", pairs), ("triples", triples), ("completions", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    return folder


SMALL = ["--batch_size", "8", "--learning_rate", "1e-3", "--max_length", "16", "--steps", "2"]
COMMANDS = {  # name -> its data, its options, and metrics of its first step that are known
    "kto": ("pairs", ["--micro_batches", "2"], {"loss": 0.5, "kl": 0, "rewards/margins": 0}),
    "orpo": ("pairs", ["--packing", "bfd"], {}),
    "cpo": ("triples", ["--loss_type", "tpo"], {}),
    "dpo": ("pairs", ["--loss", "aot", "sft", "--micro_batches", "2"], {"rewards/margins": 0}),
}


@pytest.mark.parametrize("name", exhaustive(COMMANDS, quick=["dpo"]))
def test_a_command_from_data_to_a_model(name, base, rows, tmp_path):
    kind, options, known = COMMANDS[name]
    file = str(rows / f"{kind}.jsonl")
    ask = [name, "--model", base, "--dataset", file, *SMALL, *options, "--eval_dataset", file]
    assert cli.main([*ask, "--output", str(tmp_path / "run")]) == 0
    first, second = (row for row in metrics_of(tmp_path / "run") if row["phase"] == "train")
    np.testing.assert_allclose([first[key] for key in known], [*known.values()], atol=1e-6)
    assert first["grad_norm"] > 0
    assert first["tokens"] > 8
    assert second["step"] == 2
    last = metrics_of(tmp_path / "run")[-1]
    assert np.isfinite(last["eval_loss"])
    assert last["eval_rewards/margins"] != 0
    before, after = (
        huggingface.load(folder)[1]["layers"]["q"] for folder in (base, tmp_path / "run" / "model")
    )
    assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0


@pytest.mark.exhaustive
def test_bco_from_data_to_a_model_in_two_runs_with_one_mean(base, rows, tmp_path, monkeypatch):
    original = rlhf.training.runs.RunFolder.log

    def stop(self, phase, step, metrics):
        original(self, phase, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    ask = [
        "bco",
        "--model",
        base,
        "--dataset",
        str(rows / "completions.jsonl"),
        *SMALL,
        "--steps",
        "3",
        "--save_every",
        "1",
        "--export_every",
        "1",
    ]
    ask += ["--lora_rank", "2", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(rlhf.training.runs.RunFolder, "log", stop)
        assert cli.main(ask) == 130
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "model").exists()  # which is merged at the end
    before = metrics_of(tmp_path / "run")
    np.testing.assert_allclose(
        [before[0][x] for x in ("loss", "delta", "rewards_count")], [np.log(2), 0, 8], atol=1e-6
    )
    assert cli.main([*ask, "--resume"]) == 0
    after = metrics_of(tmp_path / "run")
    assert [row["rewards_count"] for row in after] == [8, 16, 24]
    assert after[2]["delta"] == before[2]["delta"] != 0  # step 3, taken again
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (Path(base), tmp_path / "run" / "model")
    ]
    assert weights[0] != weights[1]


TASK = ["--dataset", "task:reverse"]
MISTAKES = [
    (["kto", *TASK, "--loss", "dpo"], "--loss must be one of kto, apo_zero, but is 'dpo'"),
    (
        ["kto", *TASK, "--beta", "0"],
        "--beta must be a number above 0 and at most 1,000, but is 0.0",
    ),
    (
        ["kto", *TASK, "--desirable_weight", "-1"],
        "--desirable_weight must be a number above 0 and at most 1,000, but is -1.0",
    ),
    (
        ["kto", "--dataset", str(BAD / "fine.jsonl")],
        "cannot be converted to unpaired preference: it has no verdict",
    ),
    (["kto", "--dataset", str(BAD / "chat.jsonl")], "cannot be converted to unpaired preference"),
    (
        ["bco", *TASK, "--beta", "-1"],
        "--beta must be a number above 0 and at most 1,000, but is -1.0",
    ),
    (["bco", "--dataset", str(BAD / "questions.jsonl")], "fit no type"),
    (["bco", *TASK, "--desirable_weight", "1"], "--desirable_weight is not known"),
    (
        ["orpo", *TASK, "--beta", "0"],
        "--beta must be a number above 0 and at most 1,000, but is 0.0",
    ),
    (
        ["orpo", "--dataset", str(BAD / "fine.jsonl")],
        "need the columns chosen, rejected, but row 0 has prompt, completion",
    ),
    (["cpo", *TASK, "--loss", "simp"], "loss 'simp' is not known; did you mean simpo?"),
    (
        ["cpo", *TASK, "--loss", "hinge", "--simpo_gamma", "1"],
        "gamma means nothing to hinge; leave it out",
    ),
    (
        ["cpo", *TASK, "--label_smoothing", "0.5"],
        "label_smoothing is the share of pairs labelled the wrong way round",
    ),
    (
        ["cpo", *TASK, "--loss", "tpo", "--packing", "bfd"],
        "packing bfd is of pairs, but tpo has three completions a prompt",
    ),
    (
        ["cpo", "--dataset", str(BAD / "fine.jsonl"), "--loss", "tpo"],
        "triple rows need the columns prompt, chosen, rejected, reference",
    ),
    (["dpo", *TASK, "--loss", "aot", "--packing", "bfd"], "aot sorts the pairs of a batch"),
    (
        ["dpo", *TASK, "--beta", "0"],
        "--beta must be a number above 0 and at most 1,000, but is 0.0",
    ),
]


@pytest.mark.parametrize(
    ("argv", "message"),
    MISTAKES,
    ids=lambda x: " ".join(x[:1] + x[-2:]) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_before_the_model_loads(
    argv, message, base, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loading.huggingface, "load", None)
    monkeypatch.setattr(loading.huggingface, "load_for_classification", None)
    assert cli.main([*argv, "--model", base, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip("\n")
    assert message in error
    assert "\n" not in error
