"""TRL's names: the same numbers mean the same, or the difference is said; what is listed is what signatures say."""

import ast
import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
import types
from typing import Any

import pytest
import yaml
from marks import exhaustive

from rlhf import cli, trl_names, trl_tables
from rlhf.command_line import options_of

MAINS = {name: importlib.import_module(module).main for name, (module, _) in cli.COMMANDS.items()}
RECIPES = [name for name, (module, _) in cli.COMMANDS.items() if ".recipes." in module]
NEEDED = {"model": "m", "dataset": "d", "output": "o", "teacher": "t"}


def needed(command: str, theirs: str = "") -> list[str]:
    """What the command must be given, unless that is among what is typed."""
    names = [name for name in NEEDED if name in options_of(MAINS[command])]
    if "output_dir" in theirs or "resume_from_checkpoint runs" in theirs or "--output " in theirs:
        names.remove("output")
    return [f"--{name}={NEEDED[name]}" for name in names]


def printed(capsys, command: str, *words: str, theirs: str = "") -> tuple[dict, str]:
    """The options as resolved, and what was said."""
    with pytest.raises(SystemExit):
        assert cli.main([command, *needed(command, theirs), *words, "--print_config"]) == 0, (
            capsys.readouterr().err
        )
    said = capsys.readouterr()
    return yaml.safe_load(said.out), said.err


def as_file(words: list[str]) -> dict:
    """The same as a config file has it."""
    found: dict = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = [value] if value else []
        else:
            found[name].append(word)
    return {name: yaml.safe_load(f"[{', '.join(values)}]" if len(values) > 1 else (values or ["true"])[0])
            for name, values in found.items()}  # fmt: skip


SAME = [  # command, TRL's, ours, what is said
    ("sft", "--per_device_train_batch_size 4", dict(batch_size=4, micro_batches=1), ""),
    ("sft", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2", dict(batch_size=8, micro_batches=2), ""),
    ("sft", "--gradient_accumulation_steps 4", dict(batch_size=32, micro_batches=4), ""),
    ("sft", "--batch_size 6 --micro_batches 3", dict(batch_size=6, micro_batches=3), ""),
    ("dpo", "--per-device-train-batch-size=2 --micro_batches 2", dict(batch_size=2, micro_batches=2), ""),
    ("grpo", "--per_device_train_batch_size 16", dict(batch_size=2), "16 completions a step are 2 prompts here"),
    ("grpo", "--per_device_train_batch_size 6 --gradient_accumulation_steps 2 --num_generations 4",
     dict(batch_size=3, micro_batches=1, num_samples=4), "taken in 1 parts, not 2, to the same end"),
    ("rloo", "--per_device_train_batch_size 6", dict(batch_size=3), "6 completions a step are 3 prompts here"),
    ("rloo", "--per_device_train_batch_size 6 --num_samples 3", dict(batch_size=2), ""),
    ("grpo", "--per_device_train_batch_size 8 --steps_per_generation 4", dict(batch_size=4, mini_batches=4), "32 completions"),
    ("grpo", "--per_device_train_batch_size 8 --generation_batch_size 16", dict(batch_size=2, mini_batches=2), ""),
    ("grpo", "--max_steps 12 --num_iterations 3", dict(steps=4, updates_per_batch=3), "are 4 steps here, each of 3 updates"),
    ("ppo", "--per_device_train_batch_size 4 --num_ppo_epochs 2", dict(batch_size=4, updates_per_batch=2), ""),
    ("online_dpo", "--per_device_train_batch_size 4", dict(batch_size=4), ""),
    ("sft", "--max_steps -1", dict(steps=None), ""),
    ("sft", "--max_steps 7", dict(steps=7), ""),
    ("sft", "--report_to none", dict(track=[]), ""),
    ("sft", "--report_to all", dict(), ""),
    ("sft", "--lr_scheduler_type constant_with_warmup --warmup_steps 5", dict(schedule="constant", warmup_steps=5), ""),
    ("sft", "--lr_scheduler_type cosine_with_restarts", dict(schedule="cosine"), ""),
    ("sft", "--lr_scheduler_type constant", dict(schedule="constant"), ""),
    ("sft", "--warmup_steps 0.1", dict(warmup_steps=0, warmup_ratio=0.1), ""),
    ("sft", "--warmup_steps 3.0", dict(warmup_steps=3), ""),
    ("sft", "--warmup_ratio 0.1", dict(warmup_ratio=0.1), ""),
    ("sft", "--resume_from_checkpoint true", dict(resume=True), ""),
    ("sft", "--resume_from_checkpoint", dict(resume=True), ""),
    ("sft", "--resume_from_checkpoint false", dict(resume=False), ""),
    ("sft", "--resume_from_checkpoint runs/a", dict(resume=True, output="runs/a"), ""),
    ("sft", "--output_dir runs/a --resume_from_checkpoint runs/a/checkpoint-500", dict(resume=True, output="runs/a"),
     "goes on from its newest checkpoint"),
    ("sft", "--bf16", dict(dtype="bfloat16"), ""),
    ("sft", "--bf16 false", dict(dtype="float32"), ""),
    ("sft", "--torch_dtype bfloat16", dict(dtype="bfloat16"), ""),
    ("sft", "--dtype torch.bfloat16", dict(dtype="bfloat16"), ""),
    ("sft", "--fp16 false", dict(dtype="float32"), ""),
    ("sft", "--gradient_checkpointing", dict(remat="full"), ""),
    ("sft", "--gradient_checkpointing false", dict(remat="none"), ""),
    ("sft", "--use_peft", dict(lora_rank=16, lora_alpha=32.0), ""),
    ("sft", "--use_peft --lora_r 4 --lora_dropout 0", dict(lora_rank=4), ""),
    ("sft", "--use_peft --lora_dropout 0.05", dict(lora_rank=16, lora_dropout=0.05), ""),
    ("sft", "--use_peft false --lora_r 4", dict(lora_rank=0), ""),
    ("sft", "--lora_r 4 --use_dora", dict(lora_rank=4, dora=True), "trains adapters here, without --use_peft too"),
    ("sft", "--packing", dict(packing="bfd"), ""),
    ("sft", "--packing true --packing_strategy bfd_split", dict(packing="split"), ""),
    ("sft", "--packing wrapped", dict(packing="wrapped"), ""),
    ("sft", "--eval_strategy steps --eval_steps 5 --logging_steps 2 --save_steps 3 --save_total_limit 1",
     dict(eval_every=5, log_every=2, save_every=3, keep=1), ""),
    ("sft", "--save_strategy no", dict(save_every=0), ""),
    ("sft", "--optim adamw_torch", dict(optimizer="adamw"), ""),
    ("sft", "--optim paged_lion_32bit", dict(optimizer="lion"), ""),
    ("sft", "--optim sgd --weight_decay 0.1", dict(optimizer="sgd", weight_decay=0.1), "adds it to the gradient in TRL"),
    ("sft", '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs={"min_lr_rate":0.1}',
     dict(schedule="cosine_with_min_lr", min_learning_rate_ratio=0.1), ""),
    ("sft", '--lr_scheduler_type cosine_with_min_lr --learning_rate 0.5 --lr_scheduler_kwargs={"min_lr":0.125}',
     dict(min_learning_rate_ratio=0.25), ""),
    ("sft", '--lr_scheduler_type warmup_stable_decay --max_steps 100 --lr_scheduler_kwargs={"num_decay_steps":20}',
     dict(schedule="warmup_stable_decay", decay_ratio=0.2), ""),
    ("sft", '--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs={"num_cycles":1}', dict(schedule="cosine"), ""),
    ("sft", "--lr_scheduler_type inverse_sqrt", dict(schedule="inverse_sqrt"), ""),
    ("sft", "--use_peft --load_in_4bit --use_rslora --lora_target_modules q_proj v_proj",
     dict(quantize="nf4", rslora=True, lora_targets=["q_proj", "v_proj"]), ""),
    ("sft", "--use_peft --load_in_8bit true --load_in_4bit false", dict(quantize="int8"), ""),
    ("sft", "--activation_checkpointing", dict(remat="full"), ""),
    ("sft", "--load_best_model_at_end --metric_for_best_model eval_loss --greater_is_better false", dict(keep_best=True), ""),
    ("sft", "--fsdp full_shard auto_wrap", dict(fsdp=-1), "all devices are under fsdp here"),
    ("sft", "--fsdp 4 --data 2", dict(fsdp=4, data=2), ""),
    ("sft", "--dataset_text_field content", dict(columns={"content": "text"}), ""),
    ("sft", "--loss_type nll --data_seed 7 --seed 7", dict(seed=7), ""),
    ("grpo", "--log_completions", dict(log_completions=1), ""),
    ("grpo", "--log_completions 5", dict(log_completions=5), ""),
    ("grpo", "--top_entropy_quantile 0.2", dict(top_entropy=0.2), ""),
    ("grpo", "--scale_rewards false", dict(scale_rewards="none"), ""),
    ("grpo", "--delta 3", dict(max_ratio=3.0), ""),
    ("grpo", "--loss_type cispo --epsilon 0.2 --epsilon_high 5", dict(loss="cispo", max_ratio=5.0, clip_low=None), ""),
    ("grpo", "--loss_type luspo --importance_sampling_level sequence", dict(loss="luspo"), ""),
    ("grpo", "--vllm_importance_sampling_correction false", dict(importance="none"), ""),
    ("grpo", '--generation_kwargs={"stop_strings":["x"],"min_new_tokens":2}', dict(stop=["x"], min_new_tokens=2), ""),
    ("grpo", "--sync_ref_model", dict(sync_every=512), ""),
    ("dpo", "--sync_ref_model --ref_model_sync_steps 64", dict(sync_every=64), ""),
    ("dpo", "--sync_ref_model false --ref_model_sync_steps 64", dict(sync_every=0), ""),
    ("dpo", "--ref_model_sync_steps 64", dict(sync_every=64), "moves the reference here, without --sync_ref_model too"),
    ("grpo", "--reward_funcs accuracy_reward mine.rewards.closeness", dict(reward=["math", "mine.rewards:closeness"]), ""),
    ("rloo", "--reward_clip_range -5 5", dict(reward_clip=5.0), ""),
    ("grpo", "--use_vllm --num_generations 4", dict(num_samples=4), "use_vllm changes nothing here"),
    ("grpo", "--epsilon 0.1", dict(clip_low=0.1, clip_high=0.1), ""),
    ("grpo", "--epsilon 0.1 --epsilon_high 0.3", dict(clip_low=0.1, clip_high=0.3), ""),
    ("grpo", "--loss_type dapo", dict(loss="dapo"), "--clip_high 0.2 is TRL's"),
    ("grpo", "--beta 0.04", dict(kl_coef=0.04), ""),
    ("rloo", "--beta 0.04", dict(kl_coef=0.04), ""),
    ("dpo", "--beta 0.04", dict(beta=0.04), ""),
    ("grpo", "--loss_type dapo --epsilon 0.2", dict(loss="dapo", clip_high=0.2), ""),
    ("grpo", "--importance_sampling_level token --scale_rewards group", dict(), ""),
    ("grpo", "--scale_rewards none", dict(scale_rewards="none"), ""),
    ("dpo", "--loss_type exo_pair", dict(loss=["exo"]), ""),
    ("dpo", "--loss_type sigmoid bco_pair sft", dict(loss=["sigmoid", "bco_pair", "sft"]), ""),
    ("dpo", "--loss_type [sigmoid,nca_pair]", dict(loss=["sigmoid", "nca"]), ""),
    ("kto", "--loss_type apo_zero_unpaired", dict(loss="apo_zero"), ""),
    ("reward", "--center_rewards_coefficient 0.01", dict(center_coef=0.01), ""),
    ("ppo", "--gamma 0.9 --vf_coef 0.2", dict(discount=0.9, value_coef=0.2), ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "theirs", "ours", "note"), SAME, ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_same_numbers_mean_the_same(command, theirs, ours, note, capsys, tmp_path):
    found, said = printed(capsys, command, *theirs.split(), theirs=theirs)
    assert {name: found[name] for name in ours} == ours
    assert note in said
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(as_file(theirs.split())))
    again, said = printed(capsys, command, "--config", str(tmp_path / "run.yaml"), theirs=theirs)
    assert again == found
    assert note in said


REFUSED = [  # command, TRL's, what is said
    (
        "sft",
        "--batch_size 8 --gradient_accumulation_steps 2",
        "--batch_size is the whole batch; give --micro_batches 2",
    ),
    (
        "sft",
        "--batch_size 8 --per_device_train_batch_size 2",
        "are both the batch; give one of them",
    ),
    (
        "grpo",
        "--per_device_train_batch_size 12",
        "12 completions a step are no whole groups of num_generations 8",
    ),
    ("grpo", "--max_steps 5 --num_iterations 2", "give a multiple of 2, or --steps"),
    (
        "grpo",
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 4 --steps_per_generation 6",
        "give multiples",
    ),
    (
        "grpo",
        "--per_device_train_batch_size 0",
        "--per_device_train_batch_size must be a whole number, at least 1, but is 0",
    ),
    (
        "grpo",
        "--gradient_accumulation_steps x",
        "--gradient_accumulation_steps must be a whole number, at least 1, but is 'x'",
    ),
    (
        "sft",
        "--lr_scheduler_type polynomial",
        "--lr_scheduler_type 'polynomial' is not here; give one of linear, cosine",
    ),
    (
        "sft",
        "--lr_scheduler_type constant --warmup_steps 5",
        "constant has no warm-up in TRL; give constant_with_warmup",
    ),
    ("sft", "--warmup_steps 3 --warmup_ratio 0.5", "are one warm-up; give one of them"),
    (
        "sft",
        "--resume_from_checkpoint runs/b --output runs/a",
        "a run goes on in its own folder; give --output runs/b",
    ),
    ("sft", "--fp16", "nothing is computed in float16 here; give --dtype bfloat16"),
    (
        "sft",
        "--torch_dtype auto",
        "--torch_dtype (here dtype) must be one of float32, bfloat16, but is 'auto'",
    ),
    (
        "sft",
        "--lora_dropout 0.05",
        "lora_rank 0 with lora_dropout 0.05; that is of adapters, give --lora_rank 16",
    ),
    ("sft", "--report_to mlflow", "--report_to"),
    ("sft", "--optim adamw_8bit", "--moments bfloat16, or --optimizer adafactor"),
    ("sft", "--optim galore_adamw", "is not here; give one of adamw_torch"),
    (
        "sft",
        '--lr_scheduler_kwargs={"num_decay_steps":20}',
        "give --decay_ratio, or --max_steps beside",
    ),
    ("sft", '--lr_scheduler_kwargs={"num_cycles":3}', "num_cycles 3 is not here"),
    ("sft", "--lr_scheduler_kwargs x", "must be names and values"),
    ("sft", "--fsdp hybrid_shard", "give --data and --fsdp, how many devices each"),
    ("sft", "--load_in_4bit --load_in_8bit", "are both --quantize"),
    (
        "sft",
        "--chat_template_path nowhere",
        "no such Jinja file, nor a folder with chat_template.jinja",
    ),
    ("sft", "--data_seed 7 --seed 8", "one seed is of everything random"),
    ("sft", "--metric_for_best_model accuracy", "evaluations are compared by their loss"),
    ("sft", "--neftune_noise_alpha 5", "embeddings get no noise here"),
    ("grpo", "--loss_type cispo --delta 3", "cispo has one bound of its ratio, epsilon_high"),
    ("grpo", '--generation_kwargs={"num_beams":2}', "num_beams is not here"),
    ("grpo", "--num_generations_eval 2", "evaluations sample as many as steps do, 8 a prompt"),
    ("grpo", "--use_bias_correction_kl", "the KL is not weighted by the ratio here"),
    ("rloo", "--reward_clip_range -1 5", "give --reward_clip"),
    ("sft", "--push_to_hub", "rlhf export RUN --push NAME"),
    ("sft", "--overwrite_output_dir", "a run is never written over"),
    ("sft", "--packing_strategy bfd", "TRL packs with packing true alone"),
    ("sft", "--save_strategy epoch", "--save_strategy 'epoch' is not here"),
    ("grpo", "--importance_sampling_level sequence", "--loss gspo here"),
    (
        "sft",
        "--num_generations 8",
        "--num_generations (here --num_samples) is no option of rlhf sft",
    ),
    ("sft", "--epsilon 0.2", "--epsilon (here --clip_low) is no option of rlhf sft"),
    ("sft", "--reward_funcs exact", "--reward_funcs (here --reward) is no option of rlhf sft"),
    ("grpo", "--reward_funcs a --reward b", "are both --reward; give one of them"),
    ("sft", "--bf16 --dtype float32", "are both --dtype; give one of them"),
]


@pytest.mark.parametrize(("command", "theirs", "message"), REFUSED, ids=lambda x: x)
def test_what_does_not_carry_over_is_refused_with_the_cure(
    command, theirs, message, capsys, tmp_path
):
    assert cli.main([command, *needed(command, theirs), *theirs.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert all(line.startswith(f"rlhf {command}: ") for line in said)


NUMBERS: list[Any] = [-1, 0, 1.5, 1e300, float("nan"), float("inf"), "1" * 40]
GARBAGE: list[Any] = [*NUMBERS, None, True, "", "x", [], ["a", "b"], [[]], {}, {"a": 1}]


def test_values_that_cannot_be_are_one_line(capsys, tmp_path):
    for name in (*trl_names.RULES, "num_generations", "save_total_limit"):
        for value in GARBAGE:
            (tmp_path / "run.yaml").write_text(yaml.safe_dump({name: value}))
            with contextlib.suppress(SystemExit):  # after --print_config
                assert (
                    cli.main(
                        [
                            "grpo",
                            *needed("grpo"),
                            "--config",
                            str(tmp_path / "run.yaml"),
                            "--print_config",
                        ]
                    )
                    == 2
                )
            assert "Traceback" not in capsys.readouterr().err


def test_what_is_typed_wins_over_a_file_by_whichever_name(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2\nmax_steps: 9\n"
    )
    config = ["--config", str(tmp_path / "run.yaml")]
    for words, ours in (
        ([], dict(batch_size=8, micro_batches=2, steps=9)),
        (["--batch_size", "3"], dict(batch_size=3, micro_batches=1, steps=9)),
        (["--per_device_train_batch_size", "5"], dict(batch_size=10, micro_batches=2, steps=9)),
        (["--gradient_accumulation_steps", "1"], dict(batch_size=4, micro_batches=1, steps=9)),
        (["--micro_batches", "4"], dict(batch_size=8, micro_batches=4, steps=9)),
        (["--steps", "2"], dict(batch_size=8, steps=2)),
    ):
        found, _ = printed(capsys, "sft", *config, *words)
        assert {name: found[name] for name in ours} == ours


def test_a_suggestion_is_another_option_that_the_command_has(capsys):
    everywhere = set().union(*(options_of(main) for main in MAINS.values())) | set(
        trl_names.known({}) or trl_tables.RENAMED
    )
    for command, main in MAINS.items():
        has = options_of(main)
        for name in sorted(
            everywhere
            - set(has)
            - set(trl_names.known(has))
            - set(trl_tables.IDLE)
            - set(trl_names.RULES)
        ):
            assert cli.main([command, f"--{name}", "1"]) == 2
            said = capsys.readouterr().err
            assert f"--{name}" in said
            for suggested in re.findall(r"did you mean --(\w+)", said):
                assert suggested != name
                assert suggested in {*has, *trl_names.known(has)}, (command, name)


# --- rlhf help trl -------------------------------------------------------------------------------------------------------


def test_the_table_of_defaults_is_what_the_signatures_say(capsys):
    assert cli.main(["help", "trl"]) == 0
    shown = capsys.readouterr().out
    assert "--per_device_train_batch_size" in shown
    tables = dict(
        re.findall(
            r"^  (?:rlhf )?(\w+)[^\n]*\n((?:    --.*\n)*)",
            shown.split("and TRL 1.16's:")[1],
            re.MULTILINE,
        )
    )
    alike = re.search(r"No other in ([\w, ]+)\.", shown)
    assert alike
    tables |= dict.fromkeys(alike[1].split(", "), "")
    assert set(tables) == {"every", *trl_tables.DEFAULTS}
    for name, rows in tables.items():
        defaults = {
            option: x.default
            for option, x in options_of(MAINS["sft" if name == "every" else name]).items()
        }
        theirs = trl_tables.TRAINER if name == "every" else trl_tables.DEFAULTS[name]
        listed = dict(re.findall(r"--(\w+) +(\S+)", rows))
        for option, value in theirs.items():
            if option in defaults and defaults[option] != value:
                assert yaml.safe_load(listed.pop(option).replace("e-0", ".0e-0")) == pytest.approx(
                    defaults[option]
                )
        assert not listed


def test_every_command_of_trl_has_its_defaults_listed_by_our_names():
    assert set(trl_tables.DEFAULTS) == set(RECIPES) - {"rft", "ilql"}  # trlX's
    for command, theirs in trl_tables.DEFAULTS.items():
        unknown = set(theirs) - set(options_of(MAINS[command]))
        assert unknown <= {"loss", "top_k"}, command  # has no choice of them


# --- options are read ----------------------------------------------------------------------------------------------------


def reached(fn) -> list:
    """A function, and those of ours that it names, and so on; with methods of the classes named, and functions in dicts."""
    found, left = [], [inspect.unwrap(fn)]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.append(one)
        for node in ast.walk(tree_of(one)):
            named = resolved(node, one)
            parts = [named]
            if inspect.isclass(named):
                parts = [part for kind in named.__mro__ for part in vars(kind).values()]
            elif isinstance(named, dict):
                parts = list(named.values())
            of_ours = [inspect.unwrap(part.fget or bool if isinstance(part, property) else part) for part in parts
                       if isinstance(part, types.FunctionType | property)]  # fmt: skip
            left += [part for part in of_ours if is_written(part)]
    return found


def tree_of(fn) -> ast.AST:
    """Of a function's own text; a lambda's begins within a line."""
    if fn.__name__ != "<lambda>":
        return ast.parse(textwrap.dedent(inspect.getsource(fn)))
    nodes = ast.walk(ast.parse(inspect.getsource(sys.modules[fn.__module__])))
    of_line = [
        ast.Expr(node)
        for node in nodes
        if isinstance(node, ast.Lambda) and node.lineno == fn.__code__.co_firstlineno
    ]
    return ast.Module(list(of_line), [])


def is_written(fn) -> bool:
    """Whether a function is ours, and no dataclass made it or checks itself in it."""
    return (
        (fn.__module__ or "").startswith("rlhf")
        and fn.__code__.co_filename[0] != "<"
        and fn.__name__ != "__post_init__"
    )


def resolved(node, fn):
    if isinstance(node, ast.Name):
        return fn.__globals__.get(node.id)
    if isinstance(node, ast.Attribute):
        return (
            getattr(resolved(node.value, fn), node.attr, None)
            if isinstance(node.value, ast.Name | ast.Attribute)
            else None
        )
    return None


@pytest.mark.parametrize("command", exhaustive(MAINS, quick=["sft", "dpo", "grpo"]))
def test_every_option_of_every_command_is_read(command):
    trees = [tree_of(f) for f in reached(MAINS[command])]
    attributes = {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    names = {
        node.id
        for node in ast.walk(trees[0])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    for name, option in options_of(MAINS[command]).items():
        if name == "resume":  # through `locals()`, in RunFolder
            continue
        assert name in (names if option.of is None else attributes), (
            f"--{name} of rlhf {command} is read nowhere"
        )


def test_a_reader_that_has_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ran = subprocess.run(
            [sys.executable, "-m", "rlhf", "help", "trl"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 1
    assert ran.stderr == ""
