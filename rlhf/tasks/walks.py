"""Walks on a random directed graph to the node `a`: from `k`, `fa` where there are edges k → f and
f → a.

The task and its score are those of trlX's `randomwalks`, which took them from the Decision
Transformer's example (arXiv:2106.01345, section 3); level 4 is trlX's own graph.  What follows the
first `a` is not read.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.rollouts.types import Array, Prompts, Rollout
from rlhf.tasks import characters
from rlhf.tasks.characters import LETTERS, PAD
from rlhf.tasks.task import Task, check_level, problems, symbols

HARDEST = 5
LONGEST = 10  # nodes of a walk, its start included
SEED = 1002  # of the graphs: trlX's
EDGES = 2.1  # a node, about
GOAL = 0


@documented
class Walked(NamedTuple):
    """What became of walks; `[B]` but for the last.

    Attributes:
      reached: bool, by edges alone.
      length: int32, nodes up to the goal, the start included.
      shortest: int32, nodes of the shortest walk from the same start.
      direct: [B, T] bool, sampled, and every move so far leads nearer to the goal along an edge.
    """

    reached: Array
    length: Array
    shortest: Array
    direct: Array


@cache
def task(level: int = 1) -> Task:
    """Graphs of `1 + 5 · level` nodes; the score is
    `(10 - length) / (10 - length of the shortest)`, 0 without arrival.

    Lengths are in nodes.  The weak policy's wrong completions are random walks of up to 10 nodes.

    Raises: ValueError for a level outside 1 to 5.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(4), 1)
    [{'prompt': 'c', 'completion': 'ua'}]
    """
    check_level("walks", level, HARDEST)
    edges, distance = graph(1 + 5 * level)

    def prompts(key, number):
        starts = jax.random.randint(key, (number, 1), 1, len(edges), jnp.int32)
        return characters.as_prompts(LETTERS.start + starts, jnp.ones((number, 1), bool))

    def score(rollout):
        walked = _walk(rollout, edges, distance)
        optimality = (LONGEST - walked.length) / (LONGEST - walked.shortest)
        return jnp.where(walked.reached, jnp.maximum(optimality, 0.0), 0.0).astype(jnp.float32)

    def exact(rollout):
        walked = _walk(rollout, edges, distance)
        return (walked.reached & (walked.length == walked.shortest)).astype(jnp.float32)

    return Task(
        name="walks",
        level=level,
        max_new_tokens=LONGEST,
        tokenizer=characters.tokenizer,
        prompts=prompts,
        score=score,
        exact=exact,
        right_so_far=lambda rollout: _walk(rollout, edges, distance).direct,
        attempts=lambda key, prompts, accuracy: _attempts(key, prompts, accuracy, edges, distance),
    )


@cache
def graph(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first random graph of the seed in which every node has an edge, and a walk to node 0
    within `LONGEST` nodes.

    Returns: edges `[nodes, nodes]` bool, from row to column, none from the goal; and each node's
    distance to the goal in moves, `[nodes]` int32.

    >>> edges, distance = graph(21)
    >>> int(edges.sum()), distance.tolist()
    (42, [0, 1, 2, 2, 4, 4, 2, 3, 3, 3, 1, 2, 4, 2, 3, 3, 2, 4, 3, 2, 1])
    """
    # NumPy's older generator, with which trlX made its graph: another one would make another graph.
    rng = np.random.RandomState(SEED)
    while True:
        edges = rng.rand(nodes, nodes) > 1 - EDGES / nodes
        np.fill_diagonal(edges, False)
        every_node = edges.any(axis=1).all()
        # A walk ends at the goal.
        edges[GOAL] = False
        distance = _distances(edges)
        # `- 1`: the shortest walk from the farthest node must score above 0.
        if every_node and distance.max() < LONGEST - 1:
            return edges, distance


def _walk(rollout: Rollout, edges: np.ndarray, distance: np.ndarray) -> Walked:
    """Follows the walks of a rollout, whose prompts end in a start node."""
    place = symbols(rollout)
    node = rollout.tokens - LETTERS.start
    known = (node >= 0) & (node < len(edges))
    # An index that leaves the table would read another row; `known` says that it does not count.
    node = jnp.where(known, node, GOAL)
    # The column before: of the first sampled node the start, with which the prompt ends.
    previous = jnp.roll(node, 1, axis=1)
    was_known = jnp.roll(known, 1, axis=1)
    legal = known & was_known & jnp.asarray(edges)[previous, node]
    steps = jnp.asarray(distance)
    at_goal = place & known & (node == GOAL)
    arrived = jnp.cumsum(at_goal, axis=1)
    read = place & (arrived - at_goal == 0)  # up to the first goal

    def no_such(wrong):
        return jnp.cumsum(read & wrong, axis=1) == 0

    first = (place & (jnp.cumsum(place, axis=1) == 1)).argmax(axis=1)
    start = jnp.take_along_axis(previous, first[:, None], axis=1)[:, 0]
    return Walked(
        reached=(arrived[:, -1] > 0) & no_such(~legal)[:, -1],
        length=1 + read.sum(axis=1),
        shortest=1 + steps[start],
        direct=place & no_such(~legal | (steps[node] >= steps[previous])),
    )


def _attempts(key, prompts: Prompts, accuracy, edges: np.ndarray, distance: np.ndarray) -> Array:
    """Shortest walks, or random ones; a random one that is a shortest has its goal replaced by
    another node.
    """
    right_key, walk_key, slip_key = jax.random.split(key, 3)
    start = problems(prompts)[:, 0] - LETTERS.start
    is_right = jax.random.bernoulli(right_key, accuracy, start.shape)
    nearer = jnp.asarray(edges & (distance[None] < distance[:, None]))

    def move(node, key):
        allowed = jnp.where(is_right[:, None], nearer[node], jnp.asarray(edges)[node])
        to = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)
        # At the goal the walk stays and writes padding: a scan has as many steps for every row.
        to = jnp.where(node == GOAL, GOAL, to)
        return to, jnp.where(node == GOAL, PAD, LETTERS.start + to)

    _, tokens = jax.lax.scan(move, start, jax.random.split(walk_key, LONGEST - 1))
    tokens = tokens.T
    steps = (tokens != PAD).sum(axis=1)
    other = LETTERS.start + jax.random.randint(slip_key, steps.shape, 1, len(edges), jnp.int32)
    spoilt = tokens.at[jnp.arange(len(steps)), steps - 1].set(other)
    # A wrong walk must be wrong: a random one may happen to be a shortest.
    shortest = (tokens == LETTERS.start + GOAL).any(axis=1) & (
        steps == jnp.asarray(distance)[start]
    )
    return jnp.where((shortest & ~is_right)[:, None], spoilt, tokens)


def _distances(edges: np.ndarray) -> np.ndarray:
    """Moves from every node to the goal, by breadth-first search; as many as there are nodes where
    there is no way.
    """
    distance = np.full(len(edges), len(edges), np.int32)
    reached = np.arange(len(edges)) == GOAL
    for moves in range(len(edges)):
        distance[reached & (distance == len(edges))] = moves
        reached = reached | edges[:, reached].any(axis=1)
    return distance
