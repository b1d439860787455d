"""The game of two turns: its environment against a solver and players without sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import rollouts
from rlhf.models import TransformerConfig, transformer
from rlhf.tasks import characters, number_game

ROWS = 200


def texts(batch, columns):
    tokens = np.where(columns, batch.tokens, 0)
    return ["".join(characters.VOCABULARY[i] for i in row if i) for row in tokens]


@pytest.mark.parametrize("level", [1, 3])
def test_conversations_say_what_is_true(level):
    game = number_game.game(level)
    batch = jax.device_get(game.conversations(jax.random.key(0), ROWS, 0.5))
    _, hidden = game.prompts(jax.random.split(jax.random.key(0), 3)[0], ROWS)
    found = 0
    for text, guesses, number in zip(
        texts(batch, batch.segment_ids != 0), texts(batch, batch.mask), hidden.tolist(), strict=True
    ):
        prompt, _, rest = text.removeprefix("<bos>").partition("=")
        lowest, highest = map(int, prompt.split(":"))
        assert highest == lowest + 2
        assert lowest <= number <= highest
        assert len(str(lowest)) == len(str(highest)) == level
        first, *others = rest.split("<eos>")
        assert lowest <= int(first) <= highest
        assert guesses.split("<eos>")[0] == first
        if int(first) == number:
            assert others == [""]
        else:
            sign, second = others[0].split("=")
            assert sign == ("+" if number > int(first) else "-")
            assert others[1:] == [""]
            assert guesses == f"{first}<eos>{second}<eos>"
        found += int((others[0] and others[0].split("=")[1]) or first) == number
    assert 0.5 < found / ROWS < 0.95


def play(game, speak, key):
    """Conversations of a player `speak(prompt tokens, hint, key) -> tokens`: the sum of rewards."""
    prompt_key, *turn_keys = jax.random.split(key, 1 + game.max_turns)
    prompts, states = game.prompts(prompt_key, ROWS)
    step = jax.vmap(game.step)
    mask = jnp.ones((ROWS, game.max_new_tokens), bool)
    total, going, hint = jnp.zeros(ROWS), jnp.ones(ROWS, bool), None
    for turn_key in turn_keys:
        reply = step(states, speak(prompts.tokens, hint, turn_key), mask)
        total += jnp.where(going, reply.reward, 0.0)
        going &= ~reply.done
        states, hint = reply.state, reply.tokens
    return total


def test_scores_of_the_solver_of_chance_and_of_nothing():
    game = number_game.game(2)

    def middle(prompt):
        return (prompt[:, 1] - 3) * 10 + prompt[:, 2] - 3 + 1

    def said(numbers):
        return jnp.stack([3 + numbers // 10, 3 + numbers % 10, jnp.full(ROWS, 2)], axis=1)

    def solver(prompt, hint, key):
        step = 0 if hint is None else jnp.where(hint[:, 0] == characters.IDS["+"], 1, -1)
        return said(middle(prompt) + step)

    def chance(prompt, hint, key):
        return said(middle(prompt) + jax.random.randint(key, (ROWS,), -1, 2))

    key = jax.random.key(3)
    assert play(game, solver, key).min() == 1
    # 1/3, and a third of the rest.
    assert abs(play(game, chance, key).mean() - 5 / 9) < 4 * np.sqrt(5 / 9 * 4 / 9 / ROWS)
    for silent in (0, 2, 44 - 1):
        assert (
            play(game, lambda *_, token=silent: jnp.full((ROWS, 3), token, jnp.int32), key).max()
            == 0
        )


def test_a_guess_without_an_end_is_none():
    game = number_game.game(1)
    _, hidden = game.prompts(jax.random.key(0), 1)
    right = jnp.array([3 + hidden[0], 2])
    for tokens, mask, expected in (
        (right, [True, True], 1.0),
        (right, [True, False], 0.0),
        (right.at[1].set(5), [True, True], 0.0),
    ):
        reply = game.step(hidden[0], tokens, jnp.array(mask))
        assert reply.reward == expected
        assert reply.done


def test_a_model_plays_inside_one_program():
    game = number_game.game(1)
    lm = transformer(
        TransformerConfig(len(characters.VOCABULARY), 8, num_layers=1, num_heads=1, mlp_size=8)
    )
    prompts, states = game.prompts(jax.random.key(1), 4)
    played = rollouts.simulate(
        lm, lm.init(jax.random.key(0)), game.step, prompts, states, jax.random.key(2),
        max_turns=game.max_turns, max_new_tokens=game.max_new_tokens, num_samples=32, eos_ids=(2,),
    )  # fmt: skip
    total = played.rewards.sum(axis=1)
    assert set(np.unique(total)) <= {0.0, 1.0}
    assert total.mean() < 0.2


def test_levels():
    with pytest.raises(ValueError, match="number_game has no level 5; it has 1 to 4"):
        number_game.game(5)
