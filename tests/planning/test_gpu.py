"""Programs compiled for GPUs that are elsewhere, where JAX's CUDA plugin is installed."""

import importlib.util

import pytest
from hlo import check_delta_rule

from rlhf import cli
from rlhf.planning import hlo, topologies
from rlhf.recipes import grpo, sft
from rlhf.training import programs

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(plugin) for plugin in PLUGINS),
        reason="JAX's CUDA plugin compiles for GPUs: rlhf[plan-gpu]",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("models") / "base")
    sizes = ["--hidden_size", "64", "--num_heads", "4", "--num_layers", "1"]
    assert cli.main(["new", folder, *sizes]) == 0
    return folder


def compiled(main, **options):
    cluster = topologies.find("h200:1x1x2")
    found = programs.of(
        main, devices=cluster.devices, dataset_size=16, dtype="bfloat16", fsdp=2, **options
    )
    return {name: program.compile().as_text() for name, program in found.items()}


def test_supervised_rows_have_no_scores(model):
    """Of 200 columns, which no width of the model is; both kernels are there, as rows may be packed."""
    rows = [{"text": "a" * 230} for _ in range(8)]
    text = compiled(sft.main, model=model, dataset=rows, batch_size=4, max_length=200)["update"]
    assert "fmhaSoftmaxBackward" in text
    assert "triton" in text
    assert not hlo.squares(text, 200, 200)


def test_rollouts_and_their_updates_have_no_scores(model):
    """Prompts and completions of 150 columns each, 300 together."""
    rows = [{"prompt": "a" * 149} for _ in range(8)]
    options = dict(reward="length", batch_size=4, num_samples=2, max_new_tokens=150)
    for text in compiled(grpo.main, model=model, dataset=rows, **options).values():
        assert "flash_forward" in text
        sizes = [(150, 150), (150, 300), (300, 300)]
        assert not [shape for size in sizes for shape in hlo.squares(text, *size)]


@pytest.mark.parametrize("channels", [1, 128])
def test_the_delta_rule_is_a_loop_of_chunks(channels):
    check_delta_rule(topologies.find("h200:1x1x2").devices[0], channels)
