"""The comparison of speed: its turns and statistics, our side of every job, exponents, and the page."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import peers
from benchmarks.speed import __main__ as command
from benchmarks.speed import (
    batching,
    jobs,
    machine,
    ours,
    page,
    protocol,
    results,
    scaling,
    sides,
    starts,
    turns,
)
from rlhf.models import transformer

ROOT = Path(__file__).parent.parent
TINY = jobs.SIZES["tiny"]
# A side that says how many seconds it took, more for its first steps, and reports a loss.
STAND_IN = """
import sys
from benchmarks.speed import protocol
turns = protocol.Turns()
seconds, loss = map(float, sys.argv[1:])
for step in range(1000):
    turns.wait()
    turns.seconds = seconds if step > 1 else 5 * seconds
    turns.reply(loss=loss)
"""
ENDS = """
import sys
sys.stdin.readline()
sys.exit(3)
"""
FAILS = """
import sys
from benchmarks.speed import protocol
def program(job, folder, turns):
    turns.wait()
    turns.stop()
    turns.reply(loss=1.0)
    raise ValueError("no such kernel\\non this device")
protocol.run(program, protocol.Turns())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed")
    jobs.write_folder(path, TINY)
    return path


def stand_in(program, *arguments):
    settings = {"env": sides.environment_variables(None), "stderr": -3}
    return peers.Process(sys.executable, program, *arguments, **settings)


# ---- turns and statistics ----------------------------------------------------------------------


def test_a_turn_is_timed_after_its_rest(monkeypatch):
    now = [10.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"rest": 7.0}\n'))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    one = protocol.Turns(memory=lambda: 1.0)
    one.wait()
    sleep(0.25)
    one.stop()
    one.reply(loss=2.0)
    reply = json.loads(one.replies.getvalue())
    assert (reply["seconds"], reply["loss"], reply["memory_mib"]) == (0.25, 2.0, 1.0)
    with pytest.raises(SystemExit):
        one.wait()


def test_a_slower_peer_has_the_ratio_of_its_time(monkeypatch):
    monkeypatch.setattr(turns, "REST", 0.0)
    processes = {
        "ours": stand_in(STAND_IN, "0.05", "2.0"),
        "trl": stand_in(STAND_IN, "0.15", "2.0"),
        "tunix": stand_in(STAND_IN, "0.1", "3.0"),
    }
    row = turns.compared("sft", turns.take_turns(processes, 5))
    assert row["ratios"]["trl"]["median"] == pytest.approx(3)
    assert row["ratios"]["tunix"]["median"] == pytest.approx(2)
    assert row["faster_peer"] == "tunix"
    assert len(row["sides"]["trl"]["all"]) == 5
    # The first steps, which are slow, do not count.
    assert row["sides"]["trl"]["highest"] == 0.15
    # Its loss is another.
    assert row["same"] is False


def test_a_side_that_fails_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(turns, "REST", 0.0)
    processes = {
        "ours": stand_in(STAND_IN, "0.01", "1.0"),
        "trl": stand_in(STAND_IN, "0.02", "1.0"),
        "tunix": stand_in(FAILS, "sft", "folder"),
    }
    row = turns.compared("sft", turns.take_turns(processes, 2))
    assert row["sides"]["tunix"] == {"error": "ValueError: no such kernel"}
    assert set(row["ratios"]) == {"trl"}
    assert row["same"] is True
    assert page.seconds(row, "tunix") == "–"
    assert "- Tunix, sft: did not run: ValueError: no such kernel\n" in page.text(one_job(row))


def test_a_side_that_ends_is_left_out_with_its_code(monkeypatch):
    monkeypatch.setattr(turns, "REST", 0.0)
    processes = {"ours": stand_in(STAND_IN, "0", "1.0"), "trl": stand_in(ENDS)}
    row = turns.compared("sft", turns.take_turns(processes, 2))
    assert row["sides"]["trl"] == {"error": "ended with code 3"}
    assert row["ratios"] == {}


def test_ratios_are_of_turns():
    found = turns.ratios([1.0, 2.0, 4.0], [3.0, 4.0, 4.0])
    assert found == {"median": 2.0, "lowest": 1.0, "highest": 3.0}


def test_our_side_must_not_fail():
    with pytest.raises(SystemExit, match="our side of sft failed: no memory"):
        turns.compared("sft", {"ours": [{"error": "no memory"}]})


@pytest.mark.parametrize(
    ("job", "loss", "entropy", "is_same"),
    [
        ("sft", 8.0001, None, True),
        ("sft", 8.01, None, False),
        # Of other samples.
        ("ppo", 8.5, 7.01, True),
        ("ppo", 10.5, 7.01, False),
        ("ppo", 8.5, 7.5, False),
        ("grpo", 1e-6, 7.01, False),
    ],
)
def test_first_losses_are_those_of_one_computation(job, loss, entropy, is_same):
    found = {"first_loss": 8.0, "first_entropy": 7.0}
    assert turns.same(job, found, {"first_loss": loss, "first_entropy": entropy}) is is_same


def test_memory_is_the_process_s():
    grown = bytearray(64 << 20)
    before = protocol.peak_mib()
    process = stand_in(STAND_IN, "0", "0")
    assert 1 < process.ask(rest=0.0)["memory_mib"] < before - len(grown) / 2**20
    process.close()


# ---- our side ----------------------------------------------------------------------------------


class Turns(protocol.Turns):
    """Of the same process: so many steps, whose replies stay here."""

    def __init__(self, steps):
        super().__init__()
        sys.stdout = self.replies
        self.left = steps
        self.lines = []

    def wait(self):
        if not self.left:
            raise SystemExit
        self.left -= 1

    def write(self, line):
        self.lines.append(line)


# First losses on these rows: of SFT what TRL 1.16 and Tunix 0.1.7 have too (4.60006, 4.60006).
FIRST = {"sft": 4.60006, "dpo": math.log(2), "grpo": 0.0, "load": 3408.0}


@pytest.mark.parametrize("job", jobs.JOBS)
def test_our_side_of_every_job_takes_steps(job, folder):
    taken = Turns(2)
    with pytest.raises(SystemExit):
        ours.main(job, str(folder), taken)
    first, second = taken.lines
    assert math.isfinite(second["loss"])
    assert first["loss"] == pytest.approx(FIRST.get(job, first["loss"]), abs=1e-4)
    assert first["memory_mib"] > 10
    # On the same rows a step of training gives another loss.
    assert (first["loss"] == second["loss"]) == (job == "load")
    if job in ("grpo", "ppo", "decode"):
        assert 2 < first["entropy"] < 5


def test_rows_have_the_shapes_that_descriptions_say(folder):
    rows = {job: protocol.rows(folder, job) for job in jobs.JOBS}
    assert [len(row["input_ids"]) for row in rows["sft"]] == [TINY.length] * TINY.rows
    assert len(rows["dpo"]) == TINY.pairs
    assert len(rows["dpo"][0]["chosen_ids"]) + 1 == TINY.half
    assert rows["dpo"][0]["prompt"].split() == [f"w{i}" for i in rows["dpo"][0]["prompt_ids"]]
    assert len(rows["decode"]) == TINY.decode_rows
    assert rows["grpo"] == rows["ppo"]
    assert protocol.reward([2, 3, 4, 4]) == 3


# ---- what the machine can do -------------------------------------------------------------------


def test_operations_of_products_are_six_a_weight_and_token():
    size = jobs.SIZES["full"]
    params = transformer(jobs.config(size)).init(jax.random.key(0))
    matrices = sum(
        x.size
        for x in jax.tree.leaves(params)
        if x.shape[-1] > 1 and x.ndim - (x.shape[0] == 4) > 1
    )
    tokens = size.rows * size.length
    assert sum(product.flops for product in machine.products(size)) == 6 * matrices * tokens


def test_a_step_computes_no_less_than_its_model():
    size = TINY._replace(length=64)
    counted = machine.step_flops(scaling.prepared("sft", size))
    # What is computed again, and scores above the diagonal.
    assert 0.98 * machine.model_flops(size) < counted < 1.6 * machine.model_flops(size)


def test_the_matrix_rate_is_that_of_its_operations(monkeypatch):
    monkeypatch.setattr(machine, "timed", lambda fn, *args: 0.5)
    found = machine.matrix_rate(TINY, 2)
    times = 3 * sum(product.times for product in machine.products(TINY))
    assert found["median"] == pytest.approx(found["flops"] / (0.5 * times))


def test_the_busy_share_is_of_the_processor(monkeypatch):
    times = iter([(1000, 400), (1200, 450)])
    monkeypatch.setattr(machine, "processor_times", lambda: next(times))
    assert machine.busy_share(0.0) == pytest.approx(0.75)
    monkeypatch.undo()
    total, idle = machine.processor_times()
    assert 0 < idle < total


# ---- scaling -----------------------------------------------------------------------------------


def test_exponents_of_synthetic_times():
    sizes = [8, 16, 32, 64]
    assert scaling.exponent(sizes, [3.0 * n for n in sizes]) == pytest.approx(1)
    assert scaling.exponent(sizes, [0.1 * n**2 for n in sizes]) == pytest.approx(2)
    assert scaling.exponent(sizes, [n**1.2 for n in sizes]) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("axis", "power", "is_held"),
    [
        ("batch", 1.0, True),
        ("batch", 1.2, False),
        ("vocabulary", 1.2, False),
        ("group size", 1.2, False),
        ("layers", 1.2, False),
        ("length", 1.2, True),
        ("length", 2.2, False),
    ],
)
def test_bars_of_exponents(axis, power, is_held):
    sizes = [8, 16, 32, 64]
    found = scaling.exponent(sizes, [n**power for n in sizes])
    assert scaling.is_held({"axis": axis, "exponent": found}) is is_held


def test_attention_s_share_is_of_what_grows_with_the_square():
    lengths = [64, 128, 256]
    flops = [1000 * n + 2 * n**2 for n in lengths]
    assert scaling.attention_share(lengths, flops) == pytest.approx(512 / 1512)


def test_an_axis_varies_one_field():
    for job, axes in scaling.FIELDS.items():
        for axis, field in axes.items():
            points = scaling.sizes("full", job, axis)
            assert len(points) >= 4
            for number, size in points:
                base = getattr(scaling.SMALLEST["full"], field)
                assert size._replace(**{field: base}) == scaling.SMALLEST["full"]
                assert getattr(size, field) == number


def test_axes_of_one_job():
    assert {job for job, _ in scaling.axes("grpo")} == {"grpo"}
    assert len(scaling.axes(None)) == len(scaling.axes("sft")) + len(scaling.axes("grpo"))
    assert scaling.axes("load") == []


def test_an_axis_is_measured(monkeypatch):
    monkeypatch.setitem(scaling.NUMBER, "tiny", 2)
    row = scaling.measure_axis("tiny", "sft", "length", 2)
    assert row["sizes"] == [16, 32]
    assert all(seconds > 0 for seconds in row["seconds"])
    assert row["exponent"] == pytest.approx(scaling.exponent(row["sizes"], row["seconds"]))
    assert 0.01 < row["attention"] < 0.9


def test_committed_exponents_hold_their_bars():
    for row in results.read(command.RESULTS / "speed.json").get("scaling", {}).values():
        assert scaling.is_held(row), row


def test_both_ways_of_batching_sample_the_same(monkeypatch):
    monkeypatch.setattr(batching, "REST", 0.0)
    slots, fixed = batching.measure(TINY, batching.LOADS["tiny"], 1)
    assert slots["tokens"] == fixed["tokens"] > 8
    assert fixed["ratio"]["median"] == 1


# ---- the page ----------------------------------------------------------------------------------

ABOUT = {"commit": "abc", "size": "full", "device": "1 × cpu", "processor": "x"}


def row_of(job, ours, trl, tunix):
    replies = {
        side: [{"seconds": s, "loss": 1.0, "memory_mib": 100.0, "parts": {}}] * 3
        for side, s in (("ours", ours), ("trl", trl), ("tunix", tunix))
    }
    return turns.compared(job, replies) | {"what": "rows"}


def one_job(row):
    return {"about": ABOUT, "jobs": {row["job"]: {"what": "rows", **row}}}


def full_results():
    axes = [
        {"job": "sft", "axis": "batch", "sizes": [8, 16], "seconds": [0.1, 0.3], "exponent": 1.6, "bar": 1.05},
        {"job": "sft", "axis": "length", "sizes": [8, 16], "seconds": [0.1, 0.3], "exponent": 1.6, "bar": 2.0, "attention": 0.3},
    ]  # fmt: skip
    spread = {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    return {
        "about": ABOUT,
        "jobs": {"dpo": row_of("dpo", 1.0, 3.0, 1.4), "sft": row_of("sft", 2.0, 4.0, 5.0)},
        "starts": [
            {"job": "sft", "side": "ours", "cached": True, **spread, "compile": 0.5},
            {"job": "sft", "side": "tunix", "cached": False, "error": "ValueError: no"},
        ],
        "machine": {
            "rate": {"flops": 1.0, "median": 100e9, "lowest": 90e9, "highest": 110e9},
            "step_flops": 144e9,
            "model_flops": 120e9,
            "decode_bytes": 1e9,
            "peaks": {},
        },
        "scaling": {axis["axis"]: axis for axis in axes},
        "batching": [{"way": "slots", "tokens": 7, "tokens_per_second": spread, "ratio": spread}],
    }


def test_bars_are_said_plainly():
    assert page.bars(full_results()) == [
        "sft: 2.00 times as fast as TRL, the faster peer; the bar is 1.15: held.",
        "dpo: 1.40 times as fast as Tunix, the faster peer; the bar is 1.5: not held.",
        "sft: 72% of the machine's matrix rate; the bar is 70%: held.",
        "sft, batch: exponent 1.60; the bar is 1.05: not held.",
        "sft, length: exponent 1.60; the bar is 2.0: held.",
    ]


def test_a_comparison_on_a_busy_machine_says_so():
    row = row_of("sft", 1.0, 3.0, 4.0)
    of = lambda busy: page.bars(one_job(row | {"busy": busy}))[0]
    assert of(0.05).endswith("the bar is 1.15: held.")
    assert "held, but other programs used 60% of the processor" in of(0.6)


def test_the_page_has_what_was_measured():
    text = page.text(full_results())
    assert "| dpo: rows | 1.00 | 3.00 | 1.40 | 1.40 (1.40–1.40) | 100 | 100 | 100 |" in text
    assert "| step of sft | ours | filled | 2.00 | 1.00–3.00 | 0.5 |" in text
    assert "– (ValueError: no)" in text
    assert "a step of SFT | 72.0 GFLOP/s, 72% of the matrix rate |" in text
    assert "| sft | length | 8, 16 | 0.1, 0.3 | 1.60 | 2.0 | yes | 30% |" in text
    assert "commit abc" in text
    assert not [line for line in text.splitlines() if len(line) > 400]
    without = page.text({"about": ABOUT})
    assert "##" not in without.removeprefix("# Speed")


def test_on_an_accelerator_there_are_mfu_and_bandwidth():
    found = full_results()
    found["jobs"]["decode"] = row_of("decode", 0.5, 1.0, 1.0)
    found["machine"]["peaks"] = {"flops": 720e9, "memory_rate": 4e9}
    text = page.text(found)
    assert "72% of the matrix rate, 10.0% MFU (bfloat16)" in text
    assert "2.0 GB/s, 50.0% of the peak" in text


def test_a_short_table_for_the_readme():
    lines = page.short(full_results()).splitlines()
    assert lines[2] == "| sft: rows | 2.00 | 4.00 | 5.00 | 2.00 |"
    assert len(lines) == 4


# ---- the command -------------------------------------------------------------------------------


def test_results_of_one_commit_are_put_into_one():
    old = {"about": ABOUT, "jobs": {"sft": 1, "dpo": 1}, "scaling": {"x": 3}, "starts": [4]}
    found = results.merged(old, {"about": ABOUT, "jobs": {"sft": 2}, "scaling": {"y": 5}})
    assert found["jobs"] == {"sft": 2, "dpo": 1}
    assert found["scaling"] == {"x": 3, "y": 5}
    assert found["starts"] == [4]
    for name in ("commit", "size", "processor"):
        other = {"about": ABOUT | {name: "other"}, "jobs": {"sft": 2}}
        assert results.merged(old, other) == other


def test_environments_have_one_torch_and_ours_none():
    assert sides.requirements("trl", "ppo") == ["torch==2.13.0", "trl==1.12.0"]
    assert sides.requirements("trl", "sft") == ["torch==2.13.0", "trl==1.16.0"]
    names = [line.split("==")[0] for line in sides.requirements("ours", "sft")]
    assert {"jax", "transformers"} < set(names)
    assert "torch" not in names


def test_a_compilation_cache_is_a_side_s_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert "JAX_COMPILATION_CACHE_DIR" not in sides.environment_variables(None)
    assert sides.environment_variables(tmp_path)["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


def test_starts_of_a_side_are_put_into_a_row():
    lines = [{"since_start": s, "parts": {"compile": s / 2}} for s in (2.0, 4.0, 3.0)]
    row = starts.row_of("sft", "ours", True, lines)
    assert (row["median"], row["lowest"], row["compile"]) == (3.0, 2.0, 1.5)
    failed = starts.row_of("sft", "tunix", False, [{"error": "no"}])
    assert failed["error"] == "no"


def test_the_command_writes_its_page(tmp_path, capsys):
    argv = ["--only", "load", "--size", "tiny", "--sides", "ours", "--steps", "1"]
    text = command.main([*argv, "--output", str(tmp_path)])
    assert text == (tmp_path / "speed.md").read_text()
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["jobs"]["load"]["sides"]["ours"]["first_loss"] == FIRST["load"]
    assert found["about"]["size"] == "tiny"
    assert page.bars(found) == []


def test_a_comparison_needs_our_side(capsys):
    with pytest.raises(SystemExit):
        command.arguments(["--sides", "trl"])
    assert "needs ours" in capsys.readouterr().err


def test_scaling_is_of_steps(capsys):
    with pytest.raises(SystemExit):
        command.arguments(["--scaling", "--only", "load"])
    assert "of sft and grpo, not of load" in capsys.readouterr().err
