"""`rlhf demo`: supervised fine-tuning, a reward model, then PPO, GRPO or DPO, from nothing, on a
laptop's CPU.

A small grammar writes movie reviews, half of them positive.  A language model learns them from
scratch, a reward model learns from pairs which review is the better one, and the language model is
moved towards positive reviews, held close to where it started.  The grammar, not the reward model,
scores the outcome.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from rlhf import data, files, losses, rollouts
from rlhf.checkpoint import Checkpoints
from rlhf.fields import documented
from rlhf.lm import LM, Head
from rlhf.models import TransformerConfig, huggingface, scalar_head, transformer
from rlhf.ranges import Seed, Steps, checked
from rlhf.recipes import dpo, grpo, ppo, reward, sft
from rlhf.sharding import jit_step, shardings
from rlhf.tasks import reviews
from rlhf.train import TrainState, init_state, reference
from rlhf.training import meshes
from rlhf.training import preference as pair_losses
from rlhf.training.loading import one_device
from rlhf.training.loop import run_steps
from rlhf.training.options import MeshOptions
from rlhf.training.policy import Policy
from rlhf.training.runs import RunFolder

CORPUS = 8192
PAIRS = 4096
HELD_OUT = 512
# Samples that the grammar scores; of the first ones it is counted how many differ.
SAMPLES = 1024
DISTINCT_OF = 256
PROMPT_LENGTH = 7
NEW_TOKENS = 16
# Of every phase by default: minutes on a laptop's CPU in all.
STEPS = {"sft": 400, "reward": 60, "ppo": 20, "grpo": 18, "dpo": 50}


@documented
class Task(NamedTuple):
    """What the demo trains on.

    Attributes:
      tokenizer: of the grammar's words.
      corpus: whole reviews.
      pairs: positive against negative, and whole against garbled.
      held_out: pairs that are not trained on.
      prompts: starts of reviews, without sentiment.
    """

    tokenizer: Any
    corpus: rollouts.Batch
    pairs: rollouts.Pairs
    held_out: rollouts.Pairs
    prompts: rollouts.Prompts


@documented
class Models(NamedTuple):
    """A policy; a reward model and a critic are heads on trunks of the same shape.

    Attributes:
      config: of the language model.
      lm: the policy.
      value_head: of the critic.
      reward_head: of the reward model.
      mesh: where all parameters, states and batches are.
    """

    config: TransformerConfig
    lm: LM
    value_head: Head
    reward_head: Head
    mesh: Mesh


def make_task(
    seed: int, *, corpus: int = CORPUS, pairs: int = PAIRS, held_out: int = HELD_OUT
) -> Task:
    """Draws the corpus, the pairs and the prompts from the grammar."""
    rng = np.random.default_rng([seed, 0])
    tokenizer = reviews.tokenizer()
    texts = [
        f"{reviews.prompt(rng)} {reviews.completion(rng, positive=i % 2 == 0)}"
        for i in range(corpus)
    ]
    starts = []
    chosen = []
    rejected = []
    for i in range(pairs + held_out):
        starts.append(reviews.prompt(rng))
        chosen.append(reviews.completion(rng, positive=True))
        # Every fourth pair teaches grammar instead: the same review with a word out of place.  Else
        # the reward model would have no reason to prefer grammar.
        rejected.append(
            reviews.garbled(rng, chosen[-1])
            if i % 4 == 3
            else reviews.completion(rng, positive=False)
        )
    all_pairs = data.preference_pairs(tokenizer, starts, chosen, rejected, reviews.LONGEST)

    def part(cut):
        return jax.tree.map(lambda x: x[cut], all_pairs)

    return Task(
        tokenizer=tokenizer,
        corpus=data.encode_rows(tokenizer, [""] * corpus, texts, reviews.LONGEST),
        pairs=part(slice(None, pairs)),
        held_out=part(slice(pairs, None)),
        prompts=rollouts.text.encode(
            tokenizer, [reviews.prompt(rng) for _ in range(SAMPLES)], length=PROMPT_LENGTH
        ),
    )


def make_models(
    vocab_size: int,
    *,
    hidden_size: int = 192,
    num_layers: int = 2,
    mesh: Mesh | None = None,
) -> Models:
    """A Llama-shaped decoder of about a million parameters, and the heads; on one device without a mesh."""
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=4,
        mlp_size=3 * hidden_size,
        tied=True,
    )
    # A reward head with a random start: at 0 both sides of every pair would be equal, and the trunk
    # would get no gradient at first.  A value head starts at 0: it must say nothing yet.
    reward_head = scalar_head(hidden_size, scale=(hidden_size + 1) ** -0.5)
    mesh = one_device() if mesh is None else mesh
    return Models(config, transformer(config), scalar_head(hidden_size), reward_head, mesh)


def on_mesh(models: Models, state: TrainState, step: Callable) -> tuple[TrainState, Callable]:
    """The state with every array in its place on the mesh, and the step `(state, batch, …)` for it."""
    lm_axes = models.lm.axes()
    axes = {"lm": lm_axes, "head": models.value_head.axes(), **lm_axes}
    # A vocabulary of 90 words divides by few meshes: it is kept whole where it does not.
    where = shardings(state, axes, models.mesh, say=lambda text: None)
    state = jax.tree.map(jax.device_put, state, where)
    jitted = jit_step(step, models.mesh, state)

    def on_devices(state: TrainState, batch: Any, *more: Any) -> tuple[TrainState, dict]:
        return jitted(state, meshes.place(batch, models.mesh), *more)

    return state, on_devices


def batches(source: Any, seed: int, rows: int, total: int) -> Iterator[tuple]:
    """`total` batches of `rows` rows, as arguments of a step."""
    size = jax.tree.leaves(source)[0].shape[0]

    def take(order):
        return jax.tree.map(lambda x: x[order] if np.ndim(x) else x, source)

    return ((take(data.batch_indices(seed, step, size, rows)),) for step in range(total))


def train_lm(task: Task, models: Models, seed: int, steps: int, rows: int, show: Callable) -> Any:
    """Phase 1: a language model from scratch."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, min(20, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    update = sft.make_update(Policy(models.lm), optimizer)
    init_key, key = jax.random.split(jax.random.key(seed))
    state = init_state(models.lm.init(init_key), optimizer, key)
    state, step = on_mesh(models, state, update)
    return show("1 supervised", step, state, batches(task.corpus, seed, rows, steps), steps).params


def train_reward(
    task: Task, models: Models, lm_params: Any, seed: int, steps: int, rows: int, show: Callable
) -> Any:
    """Phase 2: a reward model, grown from the language model."""
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(10, steps // 2), steps)
    )
    update = reward.make_update(Policy(models.lm, models.reward_head), optimizer, center_coef=0.01)
    init_key, key = jax.random.split(jax.random.key(seed))
    # A copy: the state is donated, and the language model is needed again in phase 3.
    params = {"lm": reference(lm_params), "head": models.reward_head.init(init_key)}
    state = init_state(params, optimizer, key)
    state, step = on_mesh(models, state, update)
    inputs = batches(task.pairs, seed, rows, steps)
    return show(
        "2 reward model",
        step,
        state,
        inputs,
        steps,
        shown=("loss", "accuracy"),
    ).params


def reward_accuracy(task: Task, models: Models, params: Any) -> float:
    """The share of held-out pairs whose chosen side gets the higher reward."""
    pairs = pair_losses.with_weights(task.held_out)
    loss_fn = reward.make_loss(Policy(models.lm, models.reward_head))
    _, metrics = loss_fn(params, (), pairs, None)
    return float(metrics["accuracy"])


def align_online(
    algorithm: str,
    task: Task,
    models: Models,
    lm_params: Any,
    reward_params: Any,
    seed: int,
    steps: int,
    rows: int,
    control: str,
    show: Callable,
) -> TrainState:
    """Phase 3 by PPO or GRPO: samples, the learned reward, and a KL penalty towards the language
    model of phase 1.
    """
    mean, std = _reward_moments(task, models, lm_params, reward_params)

    def reward_fn(context, rollout, key):
        scores = (
            reward.scores(models.lm, models.reward_head, context["reward"], rollout) - mean
        ) / std
        # The control: the same rewards, dealt out to other completions.  What is still learned from
        # them would be a flaw of the demo.
        return jax.random.permutation(key, scores) if control == "shuffled" else scores

    run_key, init_key, key = jax.random.split(jax.random.key(seed), 3)
    lm = models.lm
    # The reward model is in the state's context: as a closure it would be compiled into the step.
    context = {"reference": reference(lm_params), "reward": reward_params}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))
    params: Any
    if algorithm == "ppo":
        policy = Policy(lm, models.value_head)
        params = {"lm": reference(lm_params), "head": models.value_head.init(init_key)}
        num_samples = 1
        update = ppo.make_update(policy, optimizer, kl_coef=0.1, epochs=2, num_minibatches=2)
    else:
        policy = Policy(lm)
        params = reference(lm_params)
        num_samples = 8
        update = grpo.make_update(
            policy,
            optimizer,
            num_samples=num_samples,
            kl_coef=0.2,
            num_minibatches=2,
            max_new_tokens=NEW_TOKENS,
        )

    # Sampling, rewards and update in one program: the reward model reads tokens, so that nothing
    # has to leave the device.
    def iterate(state, prompts, key):
        sample_key, reward_key, update_key = jax.random.split(key, 3)
        rollout = rollouts.generate(
            lm,
            policy.lm_params(state.params, state.context),
            prompts,
            sample_key,
            max_new_tokens=NEW_TOKENS,
            num_samples=num_samples,
            eos_ids=(task.tokenizer.eos_token_id,),
        )
        rewards = reward_fn(state.context, rollout, reward_key)
        return update(state, rollout, rewards, update_key)

    def prompts():
        for step, (batch,) in enumerate(batches(task.prompts, seed, rows // num_samples, steps)):
            yield batch, jax.random.fold_in(run_key, step)

    state, step = on_mesh(models, init_state(params, optimizer, key, context), iterate)
    shown = ("reward", "objective/kl")
    return show(
        f"3 {algorithm.upper()}",
        step,
        state,
        prompts(),
        steps,
        shown=shown,
    )


def align_dpo(
    task: Task,
    models: Models,
    lm_params: Any,
    seed: int,
    steps: int,
    rows: int,
    control: str,
    show: Callable,
) -> TrainState:
    """Phase 3 by DPO, on the preference pairs themselves."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(3e-4, 0.0, steps))
    )
    update = dpo.make_update(Policy(models.lm), optimizer, beta=0.3, reference_in_step=True)
    pairs = task.pairs
    # The control: which side is called the better one is a coin's toss.
    if control == "shuffled":
        swap = np.random.default_rng([seed, 1]).integers(2, size=len(pairs.tokens)).astype(bool)
        pairs = jax.tree.map(lambda x: np.where(swap[:, None, None], x[:, ::-1], x), pairs)

    state = init_state(
        reference(lm_params), optimizer, jax.random.key(seed), {"reference": reference(lm_params)}
    )
    state, step = on_mesh(models, state, update)
    inputs = batches(pairs, seed, rows, steps)
    return show(
        "3 DPO",
        step,
        state,
        inputs,
        steps,
        shown=("loss", "rewards/accuracies", "rewards/margins"),
    )


def evaluate(
    task: Task, models: Models, params: Any, ref_params: Any, seed: int
) -> tuple[dict[str, float], list[str]]:
    """Fresh samples at temperature 1, scored by the grammar: the share of positive ones among the
    grammatical, and so on.
    """
    # A key that no phase of training uses, and the same before and after: the same prompts are
    # sampled with the same random numbers.
    key = jax.random.key(seed + 10_000)
    eos = (task.tokenizer.eos_token_id,)
    rollout = rollouts.generate(
        models.lm, params, task.prompts, key, max_new_tokens=NEW_TOKENS, eos_ids=eos
    )
    ref_logprobs = rollouts.score_batch(models.lm, ref_params, rollout).logprobs
    kl = losses.segment_sum(
        losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask), rollout.mask
    )
    starts = rollouts.text.prompts(task.tokenizer, rollout)
    ends = rollouts.text.completions(task.tokenizer, rollout)
    texts = [f"{start} {end}" for start, end in zip(starts, ends, strict=True)]
    found = [reviews.sentiment(text) for text in texts]
    # The grammar scores, and not the reward model, which the policy may have learned to fool.
    grammatical = [x for x in found if x is not None]
    metrics = {
        "positive": sum(grammatical) / max(len(grammatical), 1),
        "grammatical": len(grammatical) / len(texts),
        "distinct": len(set(texts[:DISTINCT_OF])),
        "objective/kl": float(kl.mean()),
    }
    return metrics, texts


def run(
    *,
    algorithm: str,
    seed: int,
    output: str,
    steps: int | None,
    control: str,
    console: Console | None = None,
    hidden_size: int = 192,
    rows: int = 128,
    corpus: int = CORPUS,
    pairs: int = PAIRS,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The whole demo; returns what `summary.json` holds.

    Args:
      algorithm: "ppo", "grpo" or "dpo".
      output: a folder that does not exist yet, or is empty.
      steps: of every phase; None: each phase's own number.
      control: "none", or "shuffled": rewards (or preferences) dealt out at random, so that nothing
        can be learned.
      mesh: where it runs; None: on one device.

    Raises: ValueError for an output folder in use.
    """
    start = time.monotonic()
    console = console or Console()
    folder = RunFolder(output)

    def length(phase: str) -> int:
        return STEPS[phase] if steps is None else steps

    show = partial(run_steps, log=folder.log, console=console)
    task = make_task(seed, corpus=corpus, pairs=pairs)
    models = make_models(len(task.tokenizer), hidden_size=hidden_size, mesh=mesh)

    lm_params = train_lm(task, models, seed, length("sft"), rows // 4, show)
    console.print(f"{sum(x.size for x in jax.tree.leaves(lm_params)):,} parameters")
    before, texts_before = evaluate(task, models, lm_params, lm_params, seed)
    console.print(_table("after supervised fine-tuning", before))

    reward_params = train_reward(task, models, lm_params, seed, length("reward"), rows // 4, show)
    accuracy = reward_accuracy(task, models, reward_params)
    console.print(_table("after reward modelling", {"held-out accuracy": accuracy}))

    if algorithm == "dpo":
        state = align_dpo(task, models, lm_params, seed, length("dpo"), rows // 2, control, show)
    else:
        state = align_online(
            algorithm,
            task,
            models,
            lm_params,
            reward_params,
            seed,
            length(algorithm),
            rows,
            control,
            show,
        )
    params = state.params["lm"] if algorithm == "ppo" else state.params
    after, texts_after = evaluate(task, models, params, lm_params, seed)
    console.print(_table(f"after {algorithm.upper()}", after))
    console.print(_side_by_side(texts_before[:8], texts_after[:8]))

    for first, second in zip(texts_before, texts_after, strict=True):
        folder.append(
            "samples.jsonl",
            {"before": first, "after": second, "positive": reviews.sentiment(second)},
        )
    with Checkpoints(folder.path / "checkpoint") as checkpoint:
        checkpoint.save(state)
    huggingface.save(folder.path / "model", models.lm, params, tokenizer=task.tokenizer)
    _check_export(folder, models, params, task)
    _plot(folder, algorithm)
    summary = {
        "algorithm": algorithm,
        "seed": seed,
        "control": control,
        "positive_before": before["positive"],
        "positive_after": after["positive"],
        "grammatical_before": before["grammatical"],
        "grammatical_after": after["grammatical"],
        "distinct_before": before["distinct"],
        "distinct_after": after["distinct"],
        "objective/kl": after["objective/kl"],
        "reward_accuracy": accuracy,
        "seconds": round(time.monotonic() - start, 1),
    }
    folder.write("summary.json", summary)
    console.print(f"{summary['seconds']} s; everything is in {folder.path}")
    return summary


def _reward_moments(task, models, lm_params, reward_params):
    """Mean and spread of the reward on samples of the reference, so that one KL coefficient fits
    any reward model.
    """
    eos = (task.tokenizer.eos_token_id,)
    sample = rollouts.generate(
        models.lm,
        lm_params,
        task.prompts,
        jax.random.key(0),
        max_new_tokens=NEW_TOKENS,
        eos_ids=eos,
    )
    scores = reward.scores(models.lm, models.reward_head, reward_params, sample)
    # 1e-6: a reward model that was not trained may give all the same number.
    return float(scores.mean()), float(scores.std()) + 1e-6


def _check_export(folder, models, params, task):
    """The exported model, loaded back, gives the same log-probs."""
    lm, loaded, tokenizer = huggingface.load(folder.path / "model")
    batch = jax.tree.map(lambda x: x[:4] if np.ndim(x) else x, task.corpus)

    def logprobs(lm, params):
        return rollouts.score_batch(lm, params, batch).logprobs

    # Both are float32, computed by one function: only rounding may differ.
    difference = float(jnp.abs(logprobs(models.lm, params) - logprobs(lm, loaded)).max())
    if difference > 1e-5 or tokenizer.get_vocab() != task.tokenizer.get_vocab():
        raise RuntimeError(
            f"the exported model does not load back: log-probs differ by {difference}"
        )


def _table(title: str, metrics: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left", min_width=36)
    for name in metrics:
        table.add_column(name, justify="right")
    table.add_row(
        *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in metrics.values())
    )
    return table


def _side_by_side(before: list[str], after: list[str]) -> Table:
    table = Table(title="the same prompts", title_justify="left", show_lines=True)
    for name in ("before", "after"):
        table.add_column(name, ratio=1)
    for pair in zip(before, after, strict=True):
        table.add_row(*pair)
    return table


def _plot(folder: RunFolder, algorithm: str) -> None:
    """`curves.png`: the loss of phases 1 and 2, and what phase 3 is about."""
    from matplotlib.figure import Figure

    rows = folder.read("metrics.jsonl")
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    last = (
        ("rewards/margins", "rewards/accuracies")
        if algorithm == "dpo"
        else ("reward", "objective/kl")
    )
    panels = [(phases[0], "loss"), (phases[1], "accuracy"), *((phases[2], name) for name in last)]
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axis, (phase, name) in zip(figure.subplots(1, 4), panels, strict=True):
        points = [(row["step"], row[name]) for row in rows if row["phase"] == phase]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=f"{phase}: {name.replace('_', ' ')}", xlabel="step")
    with files.replacing(folder.path / "curves.png") as part:
        figure.savefig(part, dpi=120)


@checked
def main(
    mesh: MeshOptions,
    *,
    algorithm: Literal["ppo", "grpo", "dpo"] = "ppo",
    seed: Seed = 0,
    output: str | None = None,
    steps: Steps | None = None,
    control: Literal["none", "shuffled"] = "none",
) -> None:
    """Trains a small language model and a reward model on generated movie reviews, then moves it
    towards positive ones.

    Args:
      algorithm: of the last phase.
      seed: of everything random.
      output: a new folder; null: runs/demo-ALGORITHM-SEED.
      steps: of every phase; null: each phase's own number.
      control: shuffled: rewards are dealt out at random, and nothing can be learned.
    """
    suffix = "" if control == "none" else f"-{control}"
    output = output or f"runs/demo-{algorithm}-{seed}{suffix}"
    devices = meshes.make(mesh, rows=32)  # the fewest rows of a step
    run(algorithm=algorithm, seed=seed, output=output, steps=steps, control=control, mesh=devices)
