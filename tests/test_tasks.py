"""Generated tasks: judges against definitions on text, the weak policy, and the rows made of it."""

import re
from collections import deque
from functools import cache
from itertools import accumulate, pairwise, permutations, product

import jax
import numpy as np
import pytest
from marks import exhaustive

from rlhf import rollouts, tasks
from rlhf.models import TransformerConfig, transformer
from rlhf.tasks import bandit, characters, reviews, walks
from rlhf.tasks.task import slip

NAMES = [
    "task:bandit:2",
    "task:countdown:2",
    "task:letters:3",
    "task:reverse:2",
    "task:reviews",
    "task:sort:2",
    "task:sums:2",
    "task:walks:4",
]
MORE = ["task:countdown:1", "task:countdown:3", "task:letters:8", "task:sums:8", "task:walks:1"]
ROWS = 400  # of every data set: one compilation a task
KINDS = {
    tasks.prompts: {"prompt"},
    tasks.demonstrations: {"prompt", "completion"},
    tasks.preferences: {"prompt", "chosen", "rejected"},
    tasks.unpaired: {"prompt", "completion", "label"},
    tasks.stepwise: {"prompt", "completions", "labels"},
    tasks.trajectories: {"prompt", "completion", "reward"},
}

# ---- definitions, of texts: a completion is a list of tokens ----------------------------------------------------------


def answer(name: str, prompt: str) -> str:
    question = prompt.removesuffix("=")
    if name == "reverse":
        return question[::-1]
    if name == "sort":
        return "".join(sorted(question))
    if name == "letters":
        word, letter = question.split(":")
        return str(word.count(letter))
    assert name == "sums"
    return "\n".join(
        str(total) for total in list(accumulate(map(int, re.findall(r"[+-]?\d+", question))))[1:]
    )


@cache
def expressions(prompt: str) -> dict[str, int]:
    """All of a problem of countdown, with what they are worth, from left to right."""
    digits = prompt.partition(":")[0]
    found = {}
    for order in permutations(digits):
        for signs in product("+-x", repeat=len(digits) - 1):
            value = int(order[0])
            for sign, digit in zip(signs, order[1:], strict=True):
                value = {"+": value + int(digit), "-": value - int(digit), "x": value * int(digit)}[
                    sign
                ]
            text = order[0] + "".join(map("".join, zip(signs, order[1:], strict=True)))
            found[text] = value
    return found


def right_expressions(prompt: str) -> list[str]:
    target = int(prompt.partition(":")[2].removesuffix("="))
    return [text for text, value in expressions(prompt).items() if value == target]


def reward_of_arm(level: int, prompt: str, arm: str) -> float:
    context = ord(prompt) - ord("a")
    return float(bandit.rewards(level)[context, characters.IDS[arm]])


def best_arm(level: int, prompt: str) -> str:
    return max(characters.VOCABULARY[3:], key=lambda arm: reward_of_arm(level, prompt, arm))


@cache
def shortest_walks(level: int, start: str) -> list[str]:
    """All of them, by breadth-first search over whole walks."""
    edges, _ = walks.graph(1 + 5 * level)
    queue, found = deque([start]), list[str]()
    while queue and not (found and len(queue[0]) >= len(found[0])):
        walk = queue.popleft()
        for node in np.flatnonzero(edges[ord(walk[-1]) - ord("a")]):
            queue.append(walk + chr(ord("a") + node))
            if node == 0:
                found.append(queue[-1])
    return found


def is_walk(level: int, nodes: list[str]) -> bool:
    edges, _ = walks.graph(1 + 5 * level)
    ids = [ord(node) - ord("a") if len(node) == 1 else -1 for node in nodes]
    return all(0 <= i < len(edges) for i in ids) and all(edges[a, b] for a, b in pairwise(ids))


ENDS = [
    f"is very great{second}{verdict} .".split()
    for second in ("", " and the film is very great")
    for verdict in ("", " , i loved it")
]


def score(task, prompt: str, completion: list[str]) -> float:
    if task.name == "reviews":
        return float(reviews.sentiment(" ".join([prompt, *completion])) is True)
    if task.name == "walks":
        nodes = [prompt, *completion]
        if "a" not in nodes or not is_walk(task.level, nodes := nodes[: nodes.index("a") + 1]):
            return 0.0
        return max(10 - len(nodes), 0) / (10 - len(shortest_walks(task.level, prompt)[0]))
    if task.name == "countdown":
        text = "".join(completion)
        return 1.0 if text in right_expressions(prompt) else 0.1 * (text in expressions(prompt))
    if task.name == "bandit":
        return reward_of_arm(task.level, prompt, completion[0]) if len(completion) == 1 else 0.0
    truth = answer(task.name, prompt)
    return sum(a == b for a, b in zip(truth, completion, strict=False)) / max(
        len(truth), len(completion)
    )


def can_become_right(task, prompt: str, completion: list[str]) -> bool:
    if task.name == "reviews":
        tails = [[prompt, *completion, *end[i:]] for end in ENDS for i in range(len(end) + 1)]
        return any(reviews.sentiment(" ".join(tail)) for tail in tails)
    text = prompt + "".join(completion)
    if task.name == "walks":
        return any(
            walk.startswith(text) or text.startswith(walk)
            for walk in shortest_walks(task.level, prompt)
        )
    if task.name == "countdown":
        return any((prompt + right).startswith(text) for right in right_expressions(prompt))
    if task.name == "bandit":
        return completion == [best_arm(task.level, prompt)]
    return (prompt + answer(task.name, prompt)).startswith(text)


# ---- judges -----------------------------------------------------------------------------------------------------------


def some_completion(
    task, vocabulary: list[str], prompt: str, rng: np.random.Generator
) -> list[str]:
    """Right, nearly right or wrong tokens."""
    if task.name == "reviews":
        tokens = reviews.completion(rng, positive=bool(rng.integers(4))).split()
    elif task.name == "walks":
        edges, _ = walks.graph(1 + 5 * task.level)
        tokens, node = [], ord(prompt) - ord("a")
        while node != 0 and len(tokens) < 10:
            node = rng.choice(np.flatnonzero(edges[node]))
            tokens.append(chr(ord("a") + node))
        if rng.random() < 0.3:
            tokens = list(shortest_walks(task.level, prompt)[-1][1:])
    elif task.name == "countdown":
        tokens = list(rng.choice(right_expressions(prompt)))
        if rng.random() < 0.3:
            tokens = list(rng.choice(list(expressions(prompt))))
    elif task.name == "bandit":
        tokens = [best_arm(task.level, prompt)]
    else:
        tokens = list(answer(task.name, prompt))
    anything = lambda: vocabulary[
        rng.integers(3) if rng.random() < 0.3 else rng.integers(len(vocabulary))
    ]
    place = rng.integers(len(tokens))
    match rng.integers(6):
        case 0:
            tokens = tokens[:place]
        case 1:
            tokens = [*tokens, anything()]
        case 2:
            tokens[place] = anything()
        case 3:
            tokens[place], tokens[-1] = tokens[-1], tokens[place]
        case 4:
            tokens.insert(place, anything())
    return tokens


def rollout_of(tokenizer, prompts: list[str], completions: list[list[str]]) -> rollouts.Rollout:
    """As an engine would give it: prompts on the left; half of the rows with an end token, some of these with more behind."""
    starts = rollouts.text.encode(tokenizer, prompts)
    tokens = np.zeros((len(prompts), max(map(len, completions)) + 2), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, completion in enumerate(completions):
        ids = tokenizer.convert_tokens_to_ids(completion) + [[], [2], [], [2, 5]][i % 4]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    batch = rollouts.unpacked_rows(
        np.concatenate([starts.tokens, tokens], axis=1),
        np.concatenate([starts.mask, mask], axis=1),
        np.concatenate([np.zeros_like(starts.mask), mask], axis=1),
    )
    return rollouts.Rollout(*batch[:4], *(None,) * 4)


@pytest.mark.parametrize("name", exhaustive(NAMES + MORE, quick=NAMES[:6]))
def test_judges_agree_with_definitions_on_text(name):
    task, rng = tasks.find(name), np.random.default_rng(0)
    prompts = [row["prompt"] for row in tasks.prompts(task, ROWS, seed=3)]
    tokenizer = task.tokenizer()
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    completions = [some_completion(task, vocabulary, prompt, rng) for prompt in prompts]
    rollout = rollout_of(tokenizer, prompts, completions)
    judge = jax.jit(lambda r: (task.score(r), task.exact(r), task.right_so_far(r)))
    scores, exact, right = jax.device_get(judge(rollout))
    assert scores.dtype == exact.dtype == np.float32
    assert right.shape == rollout.tokens.shape
    read = [c[: [*c, "<eos>"].index("<eos>")] for c in completions]
    expected = np.array([score(task, *row) for row in zip(prompts, read, strict=True)])
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(exact, expected == 1)
    assert 0.1 < np.mean(expected == 1) < 0.9
    assert len(set(expected)) > 2 or task.name in ("reviews", "letters")
    for i, (prompt, completion) in enumerate(zip(prompts, read, strict=True)):
        so_far = [
            can_become_right(task, prompt, completion[: k + 1]) for k in range(len(completion))
        ]
        np.testing.assert_array_equal(
            right[i, rollout.mask[i]], so_far + [False] * (rollout.mask[i].sum() - len(so_far))
        )
        assert not right[i, ~rollout.mask[i]].any()


@pytest.mark.parametrize("name", exhaustive(NAMES, quick=NAMES[1:2]))
def test_a_whole_run_jits_and_vmaps_over_seeds(name):
    task = tasks.find(name)

    def run(key):
        prompt_key, answer_key = jax.random.split(key)
        prompts = task.prompts(prompt_key, 7)
        rollout = tasks.as_rollout(prompts, task.attempts(answer_key, prompts, 0.5))
        return prompts, rollout, task.score(rollout)

    keys = jax.random.split(jax.random.key(0), 3)
    together, one = jax.jit(jax.vmap(run))(keys), jax.jit(run)
    for i, key in enumerate(keys):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), together, one(key))
    prompts, rollout, _ = one(keys[0])
    assert prompts.tokens.shape == prompts.mask.shape == (7, prompts.tokens.shape[1])
    assert prompts.tokens.dtype == np.int32
    # The bandit alone has no end token.
    assert rollout.tokens.shape[1] - prompts.tokens.shape[1] < task.max_new_tokens + (
        task.name == "bandit"
    )
    assert (np.diff(prompts.mask.astype(int), axis=1) >= 0).all()  # padded on the left
    texts = rollouts.text.prompts(task.tokenizer(), rollout)
    encoded = rollouts.text.encode(task.tokenizer(), texts, length=prompts.tokens.shape[1])
    np.testing.assert_array_equal(encoded.tokens, prompts.tokens)
    np.testing.assert_array_equal(encoded.mask, prompts.mask)


@pytest.mark.exhaustive
def test_rewards_of_a_model_that_samples():
    task = tasks.find("task:sort")
    lm = transformer(
        TransformerConfig(len(characters.VOCABULARY), 8, num_layers=1, num_heads=1, mlp_size=8)
    )
    prompts = jax.jit(task.prompts, static_argnums=1)(jax.random.key(1), 4)
    rollout = rollouts.generate(
        lm, lm.init(jax.random.key(0)), prompts, jax.random.key(2),
        max_new_tokens=task.max_new_tokens, num_samples=16, eos_ids=(2,),
    )  # fmt: skip
    tokenizer = task.tokenizer()
    ids = rollouts.rewards.token_columns(rollout)["completion_ids"]
    completions = [tokenizer.convert_ids_to_tokens([i for i in row if i != 2]) for row in ids]
    expected = [
        score(task, *row)
        for row in zip(rollouts.text.prompts(tokenizer, rollout), completions, strict=True)
    ]
    assert len(set(expected)) > 1
    np.testing.assert_allclose(jax.jit(task.score)(rollout), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"tokens are \[B, T\], but these are \[9\]"):
        task.score(rollout._replace(tokens=np.zeros(9, np.int32)))


def test_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = characters.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(characters.VOCABULARY[3:])
    for each in (tokenizer, loaded):
        assert each.encode(text) == [1, *range(3, len(characters.VOCABULARY))]
        assert each.decode(each.encode(text), skip_special_tokens=True) == text
        assert (each.pad_token_id, each.bos_token_id, each.eos_token_id) == (0, 1, 2)
        with pytest.raises(Exception, match="WordLevel"):
            each.encode("A")


# ---- the weak policy and its rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accuracy", [0.0, 0.3, 1.0])
def test_the_weak_policy_is_right_as_often_as_asked(name, accuracy):
    labels = [
        row["label"]
        for seed in range(4)
        for row in tasks.load(name, tasks.unpaired, ROWS, seed=seed, accuracy=accuracy)
    ]
    assert abs(np.mean(labels) - accuracy) <= 4 * np.sqrt(accuracy * (1 - accuracy) / len(labels))


def test_slips_differ_and_write_the_alphabet_only():
    answers = np.repeat([[20, 5, 21, 0], [20, 20, 0, 0], [5, 0, 0, 0], [5, 6, 7, 8]], 50, axis=0)
    jitted = jax.jit(slip, static_argnums=2)
    write = lambda seed, answers: np.asarray(jitted(jax.random.key(seed), answers, range(5, 22)))
    slipped = write(0, answers)
    assert (slipped != answers).any(axis=1).all()
    assert ((slipped == 0) == (answers == 0)).all()
    assert {tuple(np.sort(row)) == (5, 6, 7, 8) for row in slipped[-50:]} == {
        True,
        False,
    }  # swaps and others
    answers[:50, 1] = answers[50:100, 0] = 30  # not of the alphabet
    assert ((write(1, answers) == 30) == (answers == 30)).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_say_what_is_true(name):
    task = tasks.find(name)
    rows = {kind: tasks.load(name, kind, ROWS, seed=5) for kind in KINDS}
    for kind, columns in KINDS.items():
        assert len(rows[kind]) == ROWS
        assert all(set(row) == columns for row in rows[kind])
        if kind is not tasks.preferences:
            assert [row["prompt"] for row in rows[kind]] == [
                row["prompt"] for row in rows[tasks.prompts]
            ]
    split = str.split if task.name == "reviews" else list
    value = lambda row, column: score(task, row["prompt"], split(row[column]))
    assert all(value(row, "completion") == 1 for row in rows[tasks.demonstrations])
    assert all(value(row, "chosen") > value(row, "rejected") for row in rows[tasks.preferences])
    assert all((value(row, "completion") == 1) is row["label"] for row in rows[tasks.unpaired])
    rewards = [row["reward"] for row in rows[tasks.trajectories]]
    np.testing.assert_allclose(
        rewards, [value(row, "completion") for row in rows[tasks.trajectories]], rtol=1e-6
    )
    for row, logged in zip(rows[tasks.stepwise], rows[tasks.trajectories], strict=True):
        steps, labels = row["completions"], row["labels"]
        assert task.step_separator.join(steps) == logged["completion"]
        assert len(labels) == len(steps)
        ended = lambda k, steps=steps: split(
            task.step_separator.join([*steps[: k + 1], *[""] * (k + 1 < len(steps))])
        )
        assert labels[:-1] == [
            can_become_right(task, row["prompt"], ended(k)) for k in range(len(steps) - 1)
        ]
        assert labels[-1] is (logged["reward"] == 1)
    assert {label for row in rows[tasks.stepwise] for label in row["labels"]} == {True, False}


def test_steps_of_sums_are_running_totals():
    for row in tasks.load("task:sums:2", tasks.stepwise, ROWS):
        truth = answer("sums", row["prompt"]).split("\n")
        assert row["labels"] == [
            row["completions"][: k + 1] == truth[: k + 1] for k in range(len(truth))
        ]


def test_an_answer_that_is_cut_is_wrong_in_its_last_step():
    task = tasks.find("task:reverse")
    cut = task._replace(
        attempts=lambda key, prompts, accuracy: task.attempts(key, prompts, accuracy)[:, :1]
    )
    assert all(row["labels"] == [False] for row in tasks.stepwise(cut, 20, accuracy=1.0))


def test_half_of_the_wrong_reviews_are_negative():
    wrong = tasks.load("task:reviews", tasks.unpaired, ROWS, accuracy=0.0)
    negative = [reviews.sentiment(f"{row['prompt']} {row['completion']}") is False for row in wrong]
    assert 0.4 < np.mean(negative) < 0.6
    words = {
        word
        for table in (reviews.DEGREES, reviews.ADJECTIVES, reviews.FEELINGS)
        for word in table[False]
    }
    words -= set(reviews.DEGREES[True])
    assert [bool(words & set(row["completion"].split())) for row in wrong] == negative


def test_the_seed_decides():
    for kind in KINDS:
        rows = tasks.load("task:reverse:2", kind, ROWS, seed=1)
        assert rows == tasks.load("task:reverse:2", kind, ROWS, seed=1)
        assert rows != tasks.load("task:reverse:2", kind, ROWS, seed=2)
    first, second = (
        tasks.load("task:sums", tasks.preferences, 20, accuracy=accuracy)
        for accuracy in (0.01, 0.99)
    )
    assert len(first) == len(second) == 20  # though few of a round's pairs differ


@pytest.mark.parametrize("level", range(1, 6))
def test_walks_distances_and_the_graph_of_trlx(level):
    edges, distance = walks.graph(1 + 5 * level)
    assert edges[1:].any(axis=1).all()
    assert not edges[0].any()
    assert not edges.diagonal().any()
    for node in range(1, len(edges)):
        assert distance[node] == len(shortest_walks(level, chr(ord("a") + node))[0]) - 1
    if level == 4:
        rng = np.random.RandomState(1002)
        theirs = np.zeros((21, 21), bool)
        while not theirs.sum(1).all():
            theirs = rng.rand(21, 21) > 0.9
            np.fill_diagonal(theirs, False)
        np.testing.assert_array_equal(edges[1:], theirs[1:])


def test_refusals_name_the_cure():
    for name, message in {
        "task:revers": "no task 'revers'; did you mean reverse\\?",
        "task:reverse:9": "reverse has no level 9; it has 1 to 8",
        "task:reviews:2": "reviews has no level 2; it has 1 to 1",
        "task:sums:0": "sums has no level 0",
        "task:reverse:x": "'task:reverse:x' names no task; write task:NAME or task:NAME:LEVEL",
        "reverse": "'reverse' names no task",
        "task:reverse:1:2": "names no task",
    }.items():
        with pytest.raises(ValueError, match=message):
            tasks.find(name)
    task = tasks.find("task:reverse")
    with pytest.raises(ValueError, match="0 rows is empty"):
        tasks.prompts(task, 0)
    with pytest.raises(ValueError, match=r"accuracy is a probability, but 1.5"):
        tasks.unpaired(task, 1, accuracy=1.5)
    with pytest.raises(ValueError, match=r"from 0.01 to 0.99, but it is 1.0"):
        tasks.preferences(task, 1, accuracy=1.0)
    with pytest.raises(ValueError, match="2 prompts but 3 completions"):
        tasks.as_rollout(task.prompts(jax.random.key(0), 2), np.ones((3, 1), np.int32))


def test_the_bandits_optimum_is_the_best_of_all_policies():
    logits, rewards = np.random.default_rng(0).normal(size=(2, 5))
    reference = jax.nn.log_softmax(logits)
    beta = 0.3

    def objective(logits):
        policy = jax.nn.log_softmax(logits)
        return (np.exp(policy) * (rewards - beta * (policy - reference))).sum()

    best = bandit.optimum(reference, rewards, beta)
    assert np.exp(best).sum() == pytest.approx(1.0, abs=1e-6)
    top = objective(best)
    for seed in range(100):
        assert objective(best + 0.1 * np.random.default_rng(seed).normal(size=5)) < top
    # At its maximum the objective is β log Z.
    normaliser = np.log((np.exp(reference) * np.exp(rewards / beta)).sum())
    assert top == pytest.approx(beta * normaliser, rel=1e-5)
