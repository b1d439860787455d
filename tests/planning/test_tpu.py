"""Programs compiled for TPUs that are elsewhere, where libtpu is installed."""

import importlib.util

import pytest
from hlo import check_delta_rule

from rlhf import cli
from rlhf.planning import hlo, plan, topologies
from rlhf.recipes import grpo, sft
from rlhf.training import programs

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu compiles for TPUs: rlhf[plan-tpu]",
    ),
]
ROWS = {"dataset": "task:reverse", "dataset_size": 16, "batch_size": 8, "dtype": "bfloat16"}
MATRIX = 64 * 64 * 2 // 4  # bytes of the smallest one on a device


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("models") / "base")
    assert cli.main(["new", folder, "--hidden_size", "64", "--num_layers", "2"]) == 0
    return folder


def test_weights_move_by_all_gather(model):
    """And never by all-reduces of padded matrices."""
    pod = topologies.find("v5p:2x2x1")
    found = programs.of(sft.main, devices=pod.devices, model=model, remat="full", fsdp=4, **ROWS)
    moved = hlo.collectives(found["update"].compile().as_text())
    large = [one for one in moved if one.bytes >= MATRIX]
    # XLA names what moves one array; sums of several gradients at once it leaves nameless.
    forward = [one for one in large if one.op_name and "transpose(" not in one.op_name]
    assert forward
    assert {one.kind for one in forward} <= {"all-gather", "all-to-all", "collective-permute"}


def test_a_token_gathers_no_weights(model):
    found = plan.make(
        grpo.main, topologies.find("v5e:2x2"), model=model, fsdp=4, max_new_tokens=8, **ROWS
    )
    sample = next(row for row in found.rows if row.program == "sample")
    assert sample.fits
    assert sample.token is not None
    assert sample.token_bytes < MATRIX


@pytest.mark.parametrize("channels", [1, 128])
def test_the_delta_rule_is_a_loop_of_chunks(channels):
    check_delta_rule(topologies.find("v5p:2x2x1").devices[0], channels)
