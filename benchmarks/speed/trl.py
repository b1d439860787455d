"""TRL's side: its trainers, and transformers' `generate` with torch; PPO's trainer is TRL 1.12's.

Gradient checkpointing is off; steps are timed from `on_step_begin` to `on_step_end`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks.speed import protocol

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class InTurns(transformers.TrainerCallback):
    """Steps of a trainer wait for their turn."""

    def __init__(self, turns: protocol.Turns):
        self.turns = turns

    def on_step_begin(self, args, state, control, **kwargs):
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.turns.stop()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            shown = {name: logs[name] for name in ("loss", "entropy") if name in logs}
            self.turns.reply(**shown)


class InTurnsOfPPO(transformers.TrainerCallback):
    """The same of PPO's trainer, which says neither when a step begins nor what its loss is."""

    def __init__(self, turns: protocol.Turns, size: SimpleNamespace):
        self.turns = turns
        self.size = size
        self.metrics: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.wait()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.metrics = {
            "loss": logs["loss/policy_avg"] + args.vf_coef * logs["loss/value_avg"],
            "entropy": logs["objective/entropy"] / self.size.new,
        }

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.turns.stop()
        self.turns.reply(**self.metrics)
        self.turns.wait()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory_mib() -> float:
    if DEVICE == "cpu":
        return protocol.peak_mib()
    return torch.cuda.max_memory_allocated() / 2**20


def common(folder: str, size: SimpleNamespace, rows: int) -> dict[str, Any]:
    """Arguments of all trainers."""
    return dict(
        output_dir=str(Path(folder) / "trl"),
        learning_rate=size.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=size.clip_norm,
        per_device_train_batch_size=rows,
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


# There is no last step: a process ends when no more lines come.
ENDLESS = 1_000_000


def trainer(job: str, folder: str, turns: protocol.Turns, model: Any) -> Any:
    size = protocol.spec(folder)
    rows = protocol.rows(folder, job)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    parts = dict(
        model=model,
        train_dataset=datasets.Dataset.from_list([columns(job, row) for row in rows]),
        processing_class=tokenizer,
        callbacks=[InTurns(turns)],
    )
    if job == "sft":
        options = common(folder, size, size.rows) | {"max_steps": ENDLESS}
        return trl.SFTTrainer(args=trl.SFTConfig(**options, max_length=None), **parts)
    if job == "dpo":
        options = common(folder, size, size.pairs) | {"max_steps": ENDLESS}
        args = trl.DPOConfig(**options, beta=size.dpo_beta, max_length=None)
        return trl.DPOTrainer(args=args, **parts)
    args = trl.GRPOConfig(
        **common(folder, size, size.prompts * size.samples),
        max_steps=ENDLESS,
        logging_first_step=True,
        shuffle_dataset=False,
        num_generations=size.samples,
        max_completion_length=size.new,
        beta=size.grpo_beta,
        generation_kwargs={"min_new_tokens": size.new},
        temperature=1.0,
    )
    return trl.GRPOTrainer(args=args, reward_funcs=reward_of_ids, **parts)


def columns(job: str, row: dict[str, Any]) -> dict[str, Any]:
    names = {"sft": ["input_ids"], "dpo": ["prompt", "chosen", "rejected"]}
    return {name: row[name] for name in names.get(job, ["prompt"])}


def reward_of_ids(completions, completion_ids, **kwargs):
    return [protocol.reward(ids) for ids in completion_ids]


class Counting(torch.nn.Module):
    """The reward in the form of a reward model: at every position that of the tokens up to it."""

    base_model_prefix = "trunk"

    def __init__(self, prompt: int):
        super().__init__()
        self.prompt = prompt

    def trunk(self, input_ids, **kwargs):
        even = 1.0 - (input_ids % 2).float()
        even[:, : self.prompt] = 0.0
        return SimpleNamespace(hidden_states=[even.cumsum(1)[..., None]])

    def score(self, hidden):
        return hidden


def ppo_trainer(folder: str, turns: protocol.Turns, model: Any) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    size = protocol.spec(folder)
    rows = protocol.rows(folder, "ppo")
    repeated = [{"input_ids": row["prompt_ids"]} for row in rows for _ in range(size.samples)]
    value_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )
    # Values start at 0 on every side.
    torch.nn.init.zeros_(value_model.score.weight)
    args = PPOConfig(
        **common(folder, size, len(repeated)),
        total_episodes=ENDLESS,
        num_sample_generations=0,
        response_length=size.new,
        temperature=1.0,
        kl_coef=size.ppo_kl,
        num_ppo_epochs=size.ppo_epochs,
        local_rollout_forward_batch_size=len(repeated),
    )
    return PPOTrainer(
        args=args,
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, padding_side="left"
        ),
        model=model,
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_model=Counting(size.prompt),
        value_model=value_model,
        train_dataset=datasets.Dataset.from_list(repeated),
        # Its data loader leaves out a last batch that is not full, and an evaluation has one.
        eval_dataset=datasets.Dataset.from_list(repeated),
        callbacks=[InTurnsOfPPO(turns, size)],
    )


@torch.no_grad()
def decode(folder: str, turns: protocol.Turns, model: Any) -> None:
    size = protocol.spec(folder)
    ids = [row["prompt_ids"] for row in protocol.rows(folder, "decode")]
    prompts = torch.tensor(ids).to(DEVICE)
    while True:
        turns.wait()
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            max_new_tokens=size.new,
            min_new_tokens=size.new,
            eos_token_id=None,
        )
        synchronize()
        turns.stop()
        loss = nats(model, tokens, size)
        turns.reply(loss=loss, entropy=loss)


def nats(model: Any, tokens: torch.Tensor, size: SimpleNamespace) -> float:
    """Of a sampled token, the mean."""
    logprobs = model(tokens).logits[:, size.prompt - 1 : -1].log_softmax(-1)
    return -float(logprobs.gather(-1, tokens[:, size.prompt :, None]).mean())


def load(folder: str) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(DEVICE)


def loading(folder: str, turns: protocol.Turns) -> None:
    while True:
        turns.wait()
        model = load(folder)
        synchronize()
        turns.stop()
        turns.reply(loss=float(sum(x.numel() for x in model.parameters())))


def main(job: str, folder: str, turns: protocol.Turns) -> None:
    if job == "load":
        loading(folder, turns)
    elif job == "decode":
        decode(folder, turns, load(folder))
    elif job == "ppo":
        ppo_trainer(folder, turns, load(folder)).train()
    else:
        trainer(job, folder, turns, load(folder)).train()


if __name__ == "__main__":
    protocol.run(main, protocol.Turns(memory_mib))
