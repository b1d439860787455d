"""A trained model that generates, scores and is saved: what recipes return, and what tools load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf import adapters, data, losses, rollouts
from rlhf.fields import documented
from rlhf.lm import LM, Head, Params
from rlhf.models import huggingface
from rlhf.rollouts import Batch, Prompts, Rollout, Sampler, reward_functions, samplers
from rlhf.train import TrainState
from rlhf.training import loading, meshes, model_info
from rlhf.training.loading import Loaded
from rlhf.training.options import ModelOptions
from rlhf.training.runs import RunFolder


@documented
class TrainedModel(NamedTuple):
    """A language model, or a reward model, with its tokenizer.

    Attributes:
      lm: the language model.
      params: of the language model; adapters are joined to it.
      tokenizer: of `transformers`.
      eos_ids: tokens that end a completion.
      seq2seq: how an encoder-decoder reads prompts; None: the model is none.
      head: of a reward model; None: there is none.
      head_params: of the head.
      transforms: of logits, before those of a sampler: ILQL's.
      source: the folder or name that it comes from; None: it was in memory.
      mesh: where the parameters are; None: on one device.
    """

    lm: LM
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...] = ()
    seq2seq: data.Seq2Seq | None = None
    head: Head | None = None
    head_params: Params | None = None
    transforms: tuple = ()
    source: str | None = None
    mesh: Mesh | None = None

    def sample(self, prompts: Prompts, key: Any, sampler: Sampler, **settings: Any) -> Rollout:
        """`rollouts.generate` by this model: `settings` are its `max_new_tokens`, `num_samples` and
        so on.
        """
        # ILQL's shift first: filters choose among the shifted logits.
        sampler = sampler._replace(transforms=(*self.transforms, *sampler.transforms))

        def generate(prompts):
            return rollouts.generate(
                self.lm,
                self.params,
                prompts,
                key,
                sampler=sampler,
                eos_ids=self.eos_ids,
                **settings,
            )

        if self.mesh is None:
            return generate(prompts)
        return meshes.on(self.mesh, generate)(meshes.place(prompts, self.mesh))

    def generate(
        self,
        prompts: Sequence[str | list],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[str]:
        """Completions of texts or conversations, those of a prompt one after another.

        Args:
          prompts: texts, or lists of messages.
          max_new_tokens: the most tokens of a completion.
          temperature: divides the logits; 0: the likeliest token each time.
          num_samples: completions of a prompt.
          seed: of what is sampled.
        """
        lay_out = data.prompts if self.seq2seq is None else self.seq2seq.prompts
        tokenized = lay_out(
            data.tokenize_prompts(self.tokenizer, [{"prompt": prompt} for prompt in prompts])
        )
        # A temperature of 0 would divide by 0: the likeliest token is another sampler.
        sampler = samplers.sampler(temperature=temperature) if temperature else rollouts.greedy()
        key = jax.random.key(seed)
        rollout = self.sample(
            tokenized, key, sampler, max_new_tokens=max_new_tokens, num_samples=num_samples
        )
        return rollouts.text.completions(self.tokenizer, rollout)

    def score(self, prompts: Sequence[str | list], completions: Sequence[str | list]) -> np.ndarray:
        """`[B]`: a reward model's rewards of completions; of a language model their log-probs, in
        nats.

        Args:
          prompts: texts, or lists of messages.
          completions: as many, of the same kind.
        """
        rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
        if self.head is not None:
            # An encoder's special tokens stand around prompt and completion, which are one text for
            # it.
            if loading.is_causal(self.lm):
                tokenized = data.tokenize_completions(self.tokenizer, rows)
            else:
                tokenized = data.tokenize_joined(self.tokenizer, rows)
            params = {"lm": self.params, "head": self.head_params}
            return reward_functions.score_rows(
                self.lm, self.head, params, [row.tokens for row in tokenized]
            )
        tokenized = data.tokenize_completions(self.tokenizer, rows)
        batch: Batch = (
            data.batch(tokenized) if self.seq2seq is None else self.seq2seq.batch(tokenized)
        )
        logprobs = rollouts.score_batch(
            self.lm, self.params, jax.tree.map(jnp.asarray, batch)
        ).logprobs
        return np.asarray(losses.segment_sum(logprobs, batch.mask, batch.segment_ids))

    def save(self, folder: str | Path) -> None:
        """Writes a new folder that `rlhf.load`, transformers and vLLM read.  Raises: as
        `rlhf.save`.
        """
        dtype = huggingface.stored_dtype(self.source) if self.source else None
        # Merged: what is written is a plain model.
        params = adapters.merge(self.params)
        like = self.source
        huggingface.save(
            folder,
            self.lm,
            params,
            head=self.head_params,
            like=like,
            tokenizer=self.tokenizer,
            dtype=dtype,
        )


@documented
class Trained(NamedTuple):
    """What a recipe returns.

    Attributes:
      policy: the trained model.
      metrics: name -> its column, one entry a line of metrics.jsonl; None where a line has no such
        metric.
      folder: of the run.
    """

    policy: TrainedModel
    metrics: dict[str, list]
    folder: Path

    def __repr__(self) -> str:
        # Without the arrays: a notebook shows what its last line returns.
        return f"Trained(folder={str(self.folder)!r}, metrics={list(self.metrics)})"


def result(
    run: RunFolder, model: ModelOptions, loaded: Loaded, tokenizer: Any, state: TrainState
) -> Trained:
    """What a recipe returns, of the last state of its run; a critic's head is not part of the
    policy.
    """
    full = loaded.policy.full_params(state.params, state.context)
    lm_params, head_params = (full, None) if loaded.head is None else (full["lm"], full["head"])
    # A reward model reads texts and writes none: its tokenizer may have no end token at all.
    is_generative = loaded.head is None
    policy = TrainedModel(
        loaded.lm,
        lm_params,
        tokenizer,
        eos_ids=model_info.eos_ids(model, tokenizer)
        if is_generative and tokenizer.eos_token_id is not None
        else (),
        seq2seq=model_info.load_seq2seq(model, tokenizer) if is_generative else None,
        head=loaded.head,
        head_params=head_params,
        source=loaded.source,
        mesh=loaded.mesh if is_generative else None,
    )
    return Trained(policy, run.columns(), run.path)
