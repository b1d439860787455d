"""One default an option, wherever an algorithm is started from, and where it comes from."""

import importlib
import inspect
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses, recipes, trl_tables
from rlhf.command_line import options_of
from rlhf.losses import preference, presets, reference_free
from rlhf.recipes import cpo, grpo, online_dpo, xpo
from rlhf.training import importance, options, pairs, policy_gradient

RECIPES = {name: importlib.import_module(f"rlhf.recipes.{name}") for name in recipes.__all__}

# --- make_update and main -------------------------------------------------------------------------

SAMPLED = {"epochs": "updates_per_batch", "num_minibatches": "mini_batches"}
NAMES: dict[str, dict[str, str]] = {  # recipe -> option of make_update -> the same one of main
    "grpo": {"algorithm": "loss", "mask_truncated": "mask_truncated_completions", **SAMPLED},
    "rloo": SAMPLED,
    "ppo": {"scale_scores": "scale_rewards", "score_clip": "reward_clip", **SAMPLED},
    "online_dpo": {"num_minibatches": "mini_batches"},
}
# Options of make_update that main makes of the data, the model and other options.
MADE = {
    "max_segments", "shared", "max_new_tokens", "vocab_size", "couples_rows", "reference_in_step",
    "importance",
}  # fmt: skip
OBJECTIVES: dict[str, dict[Any, Any]] = {  # main's name of an objective -> make_update's function
    "dpo": {None: pairs.LOSSES["sigmoid"]},
    "cpo": cpo.LOSSES,
    "online_dpo": online_dpo.LOSSES,
    "xpo": xpo.LOSSES,
}
# Functions whose defaults count, the first that has one, where an option of main is null for the
# objective's own.
OWN: dict[str, list[Any]] = {
    "dpo": [preference.sigmoid],
    "cpo": [reference_free.cpo, reference_free.simpo, reference_free.alphapo, cpo.make_update],
    "grpo": [presets.grpo],
}


def defaults_of(function: Any) -> dict[str, Any]:
    """The optional parameters of a function."""
    return {
        name: x.default
        for name, x in inspect.signature(function).parameters.items()
        if x.default is not inspect.Parameter.empty
    }


def of_main(recipe: str) -> dict[str, Any]:
    """Every option of a command; null for the objective's own is that of the default objective."""
    found = {
        name: option.default
        for name, option in options_of(RECIPES[recipe].main).items()
        if not option.needed
    }
    for function in OWN.get(recipe, []):
        own = defaults_of(function)
        found |= {name: own[name] for name in found.keys() & own.keys() if found[name] is None}
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_make_update_and_the_command_have_the_same_defaults(recipe):
    commands = of_main(recipe)
    for name, default in defaults_of(RECIPES[recipe].make_update).items():
        if name in MADE:
            continue
        theirs = commands[NAMES.get(recipe, {}).get(name, name)]
        if (recipe, name) == ("grpo", "algorithm"):
            assert (default, theirs) == (grpo.GRPO, "grpo")
        elif name == "loss":
            assert default is OBJECTIVES[recipe][theirs]
        else:
            assert default == theirs, name
            assert isinstance(default, bool) == isinstance(theirs, bool), name
    assert set(NAMES.get(recipe, {})) <= set(defaults_of(RECIPES[recipe].make_update))


@pytest.mark.parametrize("recipe", RECIPES)
def test_other_functions_of_a_recipe_have_the_same_defaults(recipe):
    module = RECIPES[recipe]
    mine = defaults_of(module.make_update)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and name not in ("main", "make_update"):
            for option, default in defaults_of(function).items():
                assert default == mine.get(option, default), f"{name} {option}"


def test_what_main_makes_changes_nothing_by_default():
    sampler = options.SamplingOptions().sampler()
    assert importance.ImportanceOptions().weigh(sampler) is None
    assert "sigmoid" not in pairs.COUPLED
    assert of_main("dpo")["sync_every"] == 0
    assert options_of(RECIPES["dpo"].main)["loss"].text.startswith("null for sigmoid")


def test_the_command_s_grpo_is_make_update_s():
    named = policy_gradient.named(of_main("grpo")["loss"], 4)
    ours = defaults_of(grpo.make_update)["algorithm"]
    rewards = jnp.array([[1.0, 0.0, 0.0], [2.0, 0.5, 0.0]])
    mask = jnp.array([[True] * n + [False] * (4 - n) for n in (1, 2, 3, 4, 2, 3)])
    old = jnp.linspace(-2.0, -0.5, 24).reshape(6, 4)
    new = old + jnp.linspace(-0.6, 0.6, 24).reshape(6, 4)
    advantages = ours.advantages(rewards, mask)
    np.testing.assert_array_equal(named.advantages(rewards, mask), advantages)
    np.testing.assert_array_equal(
        named.loss(new, old, advantages, mask), ours.loss(new, old, advantages, mask)
    )
    np.testing.assert_array_equal(named.weights(mask), ours.weights(mask))


PARTS = [  # recipe, what it is made of, the option there, the recipe's name of it
    ("reward", losses.bradley_terry, "center_coef", "center_coef"),
    ("orpo", reference_free.orpo, "beta", "beta"),
    ("dpo", preference.sigmoid, "beta", "beta"),
    ("kto", losses.unpaired.kto, "beta", "beta"),
    ("kto", losses.unpaired.kto, "desirable_weight", "desirable_weight"),
    ("kto", losses.unpaired.kto, "undesirable_weight", "undesirable_weight"),
    ("kto", losses.unpaired.apo_zero, "beta", "beta"),
    ("bco", losses.unpaired.bco, "beta", "beta"),
    ("gkd", losses.distillation.jsd, "beta", "beta"),
    ("ppo", losses.gae, "discount", "discount"),
    ("ppo", losses.gae, "lam", "lam"),
    ("ppo", losses.clipped_value_loss, "clip", "value_clip"),
    ("ppo", presets.ppo, "clip_low", "clip"),
    ("ppo", presets.ppo, "clip_high", "clip"),
    ("grpo", presets.grpo, "clip_low", "clip_low"),
    ("grpo", presets.grpo, "clip_high", "clip_high"),
    ("rloo", presets.rloo, "clip_low", "clip_low"),
    ("rloo", presets.rloo, "clip_high", "clip_high"),
    ("online_dpo", preference.sigmoid, "beta", "beta"),
    ("xpo", losses.online.xpo, "alpha", "alpha"),
    ("nash_md", losses.online.nash_md, "beta", "beta"),
    ("ilql", losses.offline.expectile_value_loss, "tau", "tau"),
    ("ilql", losses.offline.td_targets, "discount", "discount"),
    ("ilql", losses.offline.polyak, "rate", "target_rate"),
    ("rft", losses.offline.rft, "percentile", "start_percentile"),
]


def test_losses_have_the_defaults_of_their_recipes():
    for recipe, function, name, option in PARTS:
        assert defaults_of(function)[name] == of_main(recipe)[option], f"{recipe} {option}"


# --- TRL 1.16's -----------------------------------------------------------------------------------

_MAX_LENGTH = {"max_length": 1024}
_SAMPLES = {
    "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None,
    "repetition_penalty": 1.0, "num_iterations": 1, "epsilon": 0.2, "epsilon_high": None,
    "reward_weights": None,
}  # fmt: skip
_ONLINE_DPO = {
    "learning_rate": 5e-7, "max_new_tokens": 64, "temperature": 0.9, "top_p": 1.0, "top_k": 0,
    "min_p": None, "repetition_penalty": 1.0, "beta": 0.1, "loss_type": "sigmoid",
    "missing_eos_penalty": None, "reward_weights": None,
}  # fmt: skip
# Recipe -> the class and version of TRL, and its fields.  PPO was last in 1.12; PRM, BCO, XPO and
# Nash-MD in 1.13.
TRL: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": (
        "SFTConfig 1.16",
        {
            "learning_rate": 2e-5, "packing": False, "completion_only_loss": None,
            "assistant_only_loss": False, **_MAX_LENGTH,
        },
    ),
    "reward": (
        "RewardConfig 1.16",
        {"learning_rate": 1e-4, "center_rewards_coefficient": None, **_MAX_LENGTH},
    ),
    "prm": (
        "PRMConfig 1.13",
        {
            "learning_rate": 1e-5, "step_separator": "\n", "train_on_last_step_only": False,
            **_MAX_LENGTH,
        },
    ),
    "dpo": (
        "DPOConfig 1.16",
        {
            "learning_rate": 1e-6, "loss_type": ["sigmoid"], "loss_weights": None, "beta": 0.1,
            "label_smoothing": 0.0, "sync_ref_model": False,
            "ref_model_mixup_alpha": 0.6, **_MAX_LENGTH,
        },
    ),
    "cpo": (
        "CPOConfig 1.16",
        {
            "learning_rate": 1e-6, "loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0,
            "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0, **_MAX_LENGTH,
        },
    ),
    "orpo": ("ORPOConfig 1.16", {"learning_rate": 1e-6, "beta": 0.1, **_MAX_LENGTH}),
    "kto": (
        "KTOConfig 1.16",
        {
            "learning_rate": 1e-6, "loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0,
            "undesirable_weight": 1.0, **_MAX_LENGTH,
        },
    ),
    "bco": ("BCOConfig 1.13", {"learning_rate": 5e-7, "beta": 0.1, **_MAX_LENGTH}),
    "gkd": (
        "GKDConfig 1.16",
        {
            "learning_rate": 2e-5, "temperature": 0.9, "lmbda": 0.5, "beta": 0.5,
            "max_new_tokens": 128, "seq_kd": False, **_MAX_LENGTH,
        },
    ),
    "ppo": (
        "PPOConfig 1.12",
        {
            "learning_rate": 3e-6, "num_ppo_epochs": 4, "num_mini_batches": 1, "kl_coef": 0.05,
            "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95,
            "whiten_rewards": False, "missing_eos_penalty": None, "response_length": 53,
            "temperature": 0.7,
        },
    ),
    "grpo": (
        "GRPOConfig 1.16",
        {
            "learning_rate": 1e-6, "beta": 0.0, "num_generations": 8, "loss_type": "dapo",
            "delta": None, "scale_rewards": "group", "mask_truncated_completions": False,
            "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "sync_ref_model": False,
            "ref_model_mixup_alpha": 0.6, "vllm_importance_sampling_mode": "sequence_mask",
            "vllm_importance_sampling_clip_max": 3.0, "vllm_importance_sampling_clip_min": None,
            **_SAMPLES,
        },
    ),
    "rloo": (
        "RLOOConfig 1.16",
        {
            "learning_rate": 1e-6, "beta": 0.05, "num_generations": 2,
            "normalize_advantages": False, "reward_clip_range": None, **_SAMPLES,
        },
    ),
    "online_dpo": ("OnlineDPOConfig 1.16", _ONLINE_DPO),
    "xpo": ("XPOConfig 1.13", {"alpha": 1e-5, **_ONLINE_DPO}),
    "nash_md": ("NashMDConfig 1.13", {"mixture_coef": 0.5, **_ONLINE_DPO}),
}  # fmt: skip
OF_TRL: dict[str, str] = {  # our name of an option -> theirs, whatever the recipe
    "assistant_only": "assistant_only_loss", "center_coef": "center_rewards_coefficient",
    "clip": "cliprange", "clip_high": "epsilon_high", "clip_low": "epsilon",
    "completion_only": "completion_only_loss", "discount": "gamma", "gamma": "simpo_gamma",
    "importance": "vllm_importance_sampling_mode", "last_step_only": "train_on_last_step_only",
    "importance_max": "vllm_importance_sampling_clip_max", "loss": "loss_type",
    "importance_min": "vllm_importance_sampling_clip_min", "max_ratio": "delta",
    "mini_batches": "num_mini_batches", "missing_end_penalty": "missing_eos_penalty",
    "nll_coef": "cpo_alpha", "num_samples": "num_generations", "reward_clip": "reward_clip_range",
    "sync_every": "sync_ref_model", "sync_share": "ref_model_mixup_alpha",
    "top_entropy": "top_entropy_quantile", "value_clip": "cliprange_value",
    "value_coef": "vf_coef",
}  # fmt: skip
OTHERS = {  # (recipe, our name) -> theirs, where that is not the one above
    ("grpo", "kl_coef"): "beta", ("rloo", "kl_coef"): "beta",
    ("grpo", "max_new_tokens"): "max_completion_length",
    ("rloo", "max_new_tokens"): "max_completion_length",
    ("ppo", "max_new_tokens"): "response_length",
    ("grpo", "updates_per_batch"): "num_iterations",
    ("rloo", "updates_per_batch"): "num_iterations",
    ("ppo", "updates_per_batch"): "num_ppo_epochs",
}  # fmt: skip
# A default of TRL's in our words: what it does is the same.
WRITTEN: dict[tuple[str, Any], Any] = {
    ("packing", False): "none",
    ("completion_only_loss", None): True,  # null: where rows have a prompt, which is all it is of
    ("center_rewards_coefficient", None): 0.0,
    ("step_separator", "\n"): None,  # null: a new line
    ("loss_type", "['sigmoid']"): None,  # null: sigmoid
    ("sync_ref_model", False): 0,
    ("scale_rewards", "group"): None,  # null: the loss's own, which is grpo's
    ("epsilon_high", None): 0.2,  # as epsilon
    ("min_p", None): 0.0,
    ("missing_eos_penalty", None): 0.0,
    ("vllm_importance_sampling_clip_min", None): 0.0,
}
# Option -> what it is in the recipes where it is not TRL's, and why.
EXCEPTIONS: dict[str, tuple[Any, str]] = {
    "cpo.alpha": (0.25, "of alphapo alone, where 0 is simpo; AlphaPO's paper has it, table 3"),
    "grpo.loss": ("grpo", "the paper's, arXiv:2402.03300; TRL's is --loss dapo"),
    "grpo.importance": (
        "token_truncate",
        "of completions that a filter made; TRL's would leave long ones nothing to train",
    ),
}
_PACKING = {"packing": ("none", "as in sft")}
_MINI_BATCHES = {"mini_batches": (1, "as TRL's steps_per_generation, null")}
# Options that TRL's class has no field for: the default, and where it is from.
OURS: dict[str, dict[str, tuple[Any, str]]] = {
    "reward": _PACKING,
    "prm": _PACKING,
    "dpo": _PACKING,
    "cpo": _PACKING,
    "orpo": _PACKING,
    "gkd": {"loss_temperature": (1.0, "GKDTrainer gives its loss none")},
    "ppo": {
        "num_samples": (1, "TRL's PPOTrainer samples one"),
        "kl_target": (None, "the coefficient stays, as TRL's"),
        "kl_horizon": (10_000, "of the adaptive controller of TRL 0.11"),
        "target_kl": (None, "TRL's passes do not stop early"),
        "scale_rewards": (False, "TRL's does not scale scores"),
    },
    "grpo": _MINI_BATCHES,
    "rloo": _MINI_BATCHES,
    "online_dpo": {"num_samples": (2, "OnlineDPOTrainer samples 2"), **_MINI_BATCHES},
    "rft": {
        "start_percentile": (0.7, "trlX's RFTConfig"),
        "end_percentile": (0.95, "trlX's RFTConfig"),
        "improve_steps": (4, "trlX's RFTConfig"),
        "mini_batches": (1, "one optimizer step a pass"),
        "best_only": (False, "trlX takes all above the percentile"),
    },
    "ilql": {
        "tau": (0.7, "trlX's default_ilql_config"),
        "discount": (0.99, "trlX's gamma"),
        "cql_coef": (0.1, "trlX's cql_scale"),
        "awac_coef": (1.0, "trlX's awac_scale"),
        "awac_beta": (0.0, "trlX's beta"),
        "target_rate": (0.001, "trlX's alpha"),
        "target_every": (5, "trlX's steps_for_target_q_sync"),
        "beta": (1.0, "trlX's, of gen_kwargs"),
        "max_length": (1024, "as in sft"),
    },
}


def of_trl(recipe: str, option: str) -> str:
    """TRL's name of an option."""
    return OTHERS.get((recipe, option), OF_TRL.get(option, option))


def compared(recipe: str) -> dict[str, tuple[Any, Any]]:
    """Option -> our default and TRL's in our words, of what both have."""
    _, fields = TRL[recipe]
    found = {}
    for option, ours in of_main(recipe).items():
        name = of_trl(recipe, option)
        if name in fields:
            value = fields[name]
            key = (name, str(value) if isinstance(value, list) else value)
            found[option] = (ours, WRITTEN.get(key, value))
    return found


@pytest.mark.parametrize("recipe", TRL)
def test_a_default_is_trl_s_or_has_a_reason(recipe):
    for option, (ours, theirs) in compared(recipe).items():
        if ours != theirs:
            default, reason = EXCEPTIONS.get(f"{recipe}.{option}", (theirs, ""))
            assert ours == default, f"{option}, {of_trl(recipe, option)} of {TRL[recipe][0]}"
            assert reason


@pytest.mark.parametrize("recipe", TRL)
def test_every_field_of_the_table_is_an_option(recipe):
    theirs = {of_trl(recipe, option) for option in of_main(recipe)}
    # Nash-MD's config is that of online DPO, but it has no choice of losses.
    assert set(TRL[recipe][1]) - theirs == ({"loss_type"} if recipe == "nash_md" else set())


def test_learning_rates_of_trlx():
    assert of_main("ilql")["learning_rate"] == 5e-5  # its default_ilql_config
    assert of_main("rft")["learning_rate"] == 3e-5  # its examples/rft_sentiments.py


def test_every_reason_is_needed():
    differ = {
        f"{recipe}.{option}"
        for recipe in TRL
        for option, (ours, theirs) in compared(recipe).items()
        if ours != theirs
    }
    assert differ == set(EXCEPTIONS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_of_a_recipe_has_a_source(recipe):
    commands = of_main(recipe)
    own = {
        name
        for name, option in options_of(RECIPES[recipe].main).items()
        if option.of is None and not option.needed and name != "resume"
    }
    known = set(compared(recipe)) if recipe in TRL else set()
    listed = OURS.get(recipe, {})
    assert own - known == set(listed)
    assert {name: commands[name] for name in listed} == {
        name: default for name, (default, _) in listed.items()
    }


def test_help_says_the_same_of_trl():
    for recipe, listed in trl_tables.DEFAULTS.items():
        for option, value in listed.items():
            name = of_trl(recipe, option)
            if name in TRL[recipe][1] and option != "batch_size":
                theirs = TRL[recipe][1][name]
                assert WRITTEN.get((name, theirs), theirs) == value, f"{recipe} {option}"


# Of all objectives of a command; TRL has one number for all of them.
NUMBERS = {"beta": 0.1, "label_smoothing": 0.0, "gamma": 0.5, "clip_low": 0.2, "clip_high": 0.2}
OF_OBJECTIVES: dict[str, tuple[dict[str, float], str]] = {  # where an objective has its own
    "dpo.exo": ({"label_smoothing": 1e-3}, "what TRL recommends; it has no value at 0"),
    "dpo.robust": ({"label_smoothing": 0.1}, "the paper's, section 6; at 0 it is sigmoid"),
    "cpo.simpo": ({"beta": 2.0}, "of SimPO's own code"),
    "cpo.alphapo": ({"beta": 2.0}, "simpo's, which it is at an alpha of 0"),
    "cpo.tpo": ({"beta": 0.01}, "TPOConfig 1.16"),
    "cpo.tpo_l": ({"beta": 0.01}, "TPOConfig 1.16"),
    "grpo.dapo": ({"clip_high": 0.28}, "the paper's, section 4.1"),
    "grpo.gspo": ({"clip_low": 3e-4, "clip_high": 4e-4}, "the paper's, section 5.1"),
    "grpo.luspo": ({"clip_low": 3e-4, "clip_high": 4e-4}, "gspo's, of which it is a variant"),
    "grpo.gmpo": ({"clip_low": 0.4, "clip_high": 0.4}, "GMPOConfig 1.16"),
}


def test_an_objective_s_own_defaults_are_trl_s_or_have_a_reason():
    objectives = {
        "dpo": pairs.LOSSES,
        "cpo": cpo.LOSSES,
        "grpo": policy_gradient.ALGORITHMS,
    }
    differ = {
        f"{recipe}.{name}": {
            option: default
            for option, default in defaults_of(objective).items()
            if default != NUMBERS.get(option, default)
        }
        for recipe, known in objectives.items()
        for name, objective in known.items()
    }
    assert {name: own for name, own in differ.items() if own} == {
        name: own for name, (own, _) in OF_OBJECTIVES.items()
    }
    # GRPOConfig 1.16: sapo_temperature_pos and _neg, vespo_k_pos and its kin.
    sapo = {"tau_pos": 1.0, "tau_neg": 1.05}
    vespo = {"k_pos": 2.0, "lam_pos": 3.0, "k_neg": 3.0, "lam_neg": 2.0}
    assert sapo.items() <= defaults_of(presets.sapo).items()
    assert vespo.items() <= defaults_of(presets.vespo).items()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_docstring_names_the_source(recipe):
    module = RECIPES[recipe]
    texts = " ".join(f"{module.make_update.__doc__} {module.main.__doc__}".split())
    source = f"TRL {TRL[recipe][0].split()[1]}" if recipe in TRL else "trlX"
    sentences = [part for part in texts.split(". ") if "efault" in part]
    assert any(source in part for part in sentences), texts
