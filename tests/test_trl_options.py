"""The tables of `docs/trl.md`: every option of TRL has its row, and every row says what is so."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rlhf import cli, trl_names, trl_tables
from rlhf.command_line import options_of
from rlhf.recipes import dpo, grpo, kto, reward, rloo, sft
from rlhf.trl_names import Given

ROOT = Path(__file__).parent.parent
MAINS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (sft, dpo, grpo, rloo, kto, reward)
}
NAMES = json.loads((ROOT / "tests/data/trl_options.json").read_text())
PAGE = (ROOT / "docs/trl.md").read_text()
NEEDED = ["--model=m", "--dataset=d", "--output=o"]

VALUES: dict[str, Any] = {  # what people give; of others True
    "chat_template_path": "TEMPLATE", "optim": "adamw_torch", "lr_scheduler_type": "cosine",
    "report_to": "none", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "generation_kwargs": '{"stop": ["x"]}', "eval_strategy": "no", "save_strategy": "no",
    "logging_strategy": "steps", "metric_for_best_model": "loss", "greater_is_better": False,
    "data_seed": 7, "dataset_text_field": "content", "num_generations_eval": None,
    "truncation_mode": "keep_start", "packing_strategy": "bfd",
    "importance_sampling_level": "token", "fsdp": "full_shard", "bnb_4bit_quant_type": "nf4",
    "multi_objective_aggregation": "sum_then_normalize", "train_sampling_strategy": "random",
    "entropy_coef_max": 0.5, "sapo_temperature_pos": 2.0, "f_divergence_type": "forward_kl",
    "vllm_importance_sampling_correction": False, "model_revision": "v2", "hub_strategy": "end",
    "run_name": "mine", "neftune_noise_alpha": 5, "router_aux_loss_coef": 0.01,
    "label_smoothing_factor": 0.1, "ld_alpha": 0.0, "off_policy_mask_threshold": 0.5,
    "discopop_tau": 0.1, "max_steps": 12, "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2, "generation_batch_size": 16, "steps_per_generation": 2,
    "warmup_steps": 5, "epsilon": 0.1, "epsilon_high": 0.1, "delta": 3.0,
    "ref_model_sync_steps": 64, "beta": 0.04, "vllm_server_port": 8000, "entropy_coef_min": 0.1,
    "entropy_coef_delta": 0.01, "reward_clip_range": [-5, 5], "entropy_target": 1.0,
    "model_init_kwargs": {"revision": "v2"}, "lora_r": 4,
}  # fmt: skip
OF_LOSSES = {"sft": "nll", "dpo": ["sigmoid"], "grpo": "dapo", "kto": "kto"}
BESIDE = {  # what another option must say for it to count
    "packing_strategy": {"packing": True},
    "steps_per_generation": {"per_device_train_batch_size": 8},
    "warmup_ratio": {"warmup_steps": 0},
}  # fmt: skip


class Row(NamedTuple):
    kind: str
    commands: list[str]
    name: str
    here: str
    note: str


def rows_of_page() -> list[Row]:
    found = []
    for heading, table in re.findall(r"^## `(\w+)`.*?\n((?:(?!^## ).*\n?)*)", PAGE, re.MULTILINE):
        of = re.search(rf"^## `{heading}`, of `rlhf (\w+)`$", PAGE, re.MULTILINE)
        for name, here, note in re.findall(r"^\| `(\w+)` \| (.*?) \|(.*)\|$", table, re.MULTILINE):
            found.append(Row(heading, [of[1]] if of else list(MAINS), name, here, note))
    return found


ROWS = rows_of_page()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text("{{ messages }}")
    return str(file)


def value_of(row: Row, command: str, template: str) -> Any:
    if row.name == "loss_type":
        return OF_LOSSES[command]
    if row.name in ("metric_for_best_model", "greater_is_better") and command in ("grpo", "rloo"):
        return {"metric_for_best_model": "reward", "greater_is_better": True}[row.name]
    value = VALUES.get(row.name, True)
    return template if value == "TEMPLATE" else value


def asked(tmp_path, capsys, command: str, options: dict) -> tuple[int, str]:
    """The exit status of the command with these options and `--print_config`, and what it says."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    try:
        status = cli.main(
            [command, *NEEDED, "--config", str(tmp_path / "run.yaml"), "--print_config"]
        )
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().err


def test_every_option_of_trl_has_one_row():
    assert {row.kind for row in ROWS} == set(NAMES)
    for kind, names in NAMES.items():
        listed = [row.name for row in ROWS if row.kind == kind]
        assert len(names) == len(set(names))
        assert sorted(listed) == sorted(names), kind
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE))


def test_every_option_named_is_one():
    everywhere = set().union(
        *(options_of(main) for main in MAINS.values()), trl_names.RULES, trl_tables.RENAMED
    )
    for named in re.findall(r"`--(\w+)", PAGE):
        assert named in everywhere | {"print_config", "config", "push"}, named


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "--" in row.here], ids=lambda row: f"{row.kind}-{row.name}"
)
def test_what_is_here_by_another_name_comes_out_by_it(row, template):
    ours = re.fullmatch(r"`--(\w+)`", row.here)[1]
    for command in row.commands:
        options = options_of(MAINS[command])
        assert ours in options, command
        defaults = {
            name: None if option.needed else option.default for name, option in options.items()
        }
        value = value_of(row, command, template)
        given = {**BESIDE.get(row.name, {}), row.name: value}
        found, _ = trl_names.translated(
            command, defaults, {name: Given(f"--{name}", one) for name, one in given.items()}
        )
        assert found.keys() <= options.keys()
        assert ours in found
        if row.name != ours and row.name not in BESIDE:
            assert found[ours].written == f"--{row.name}"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.here == "not here"], ids=lambda row: f"{row.kind}-{row.name}"
)
def test_what_is_not_here_is_refused(row, template, tmp_path, capsys):
    assert row.note.strip(), "no reason"
    for command in row.commands:
        status, said = asked(
            tmp_path, capsys, command, {row.name: value_of(row, command, template)}
        )
        assert status == 2, command
        assert row.name in said.splitlines()[-1]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.here.endswith(".")], ids=lambda row: f"{row.kind}-{row.name}"
)
def test_what_is_always_so_is_taken(row, template, tmp_path, capsys):
    for command in row.commands:
        given = {"seed": 7, row.name: value_of(row, command, template)}
        status, said = asked(tmp_path, capsys, command, given)
        assert status == 0, said
        if row.here == "Changes nothing.":
            assert f"{row.name} changes nothing here" in said


def test_every_row_is_of_a_kind():
    for row in ROWS:
        assert "--" in row.here or row.here == "not here" or row.here.endswith("."), row


def test_the_example_is_what_the_command_prints(capsys):
    typed, printed = re.findall(r"```(?:sh|yaml)\n(.*?)```", PAGE, re.DOTALL)[:2]
    words = typed.replace("\\\n", " ").split()
    with pytest.raises(SystemExit):
        cli.main(words[1:])
    out = yaml.safe_load(capsys.readouterr().out)
    for name, value in yaml.safe_load(printed).items():
        assert out[name] == value, name
