"""A saved model that answers: a run's, with what the run samples by, or a folder's."""

from pathlib import Path
from typing import Any, NamedTuple

from rlhf import data, rollouts, yaml_files
from rlhf.fields import documented
from rlhf.lm import LM, Params
from rlhf.models import huggingface
from rlhf.ranges import Coefficient, mistake
from rlhf.recipes import online, q_heads
from rlhf.recipes.setup import Model
from rlhf.rollouts import Prompts, Rollout, Sampler
from rlhf.runs import model_of


@documented
class Saved(NamedTuple):
    """A model, and how it answers.

    Attributes:
      lm: the language model.
      params: its parameters.
      tokenizer: of the model.
      eos_ids: tokens that end an answer.
      seq2seq: how an encoder-decoder reads prompts.
      leans: transforms of its logits, before those of a sampler: ILQL's.
    """

    lm: LM
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...]
    seq2seq: data.Seq2Seq | None
    leans: tuple

    def answer(self, prompts: Prompts, key, sampler: Sampler, **how) -> Rollout:
        """`rollouts.generate`."""
        sampler = sampler._replace(transforms=(*self.leans, *sampler.transforms))
        return rollouts.generate(self.lm, self.params, prompts, key, sampler=sampler, eos_ids=self.eos_ids, **how)


def load(model: str, eos_token: str | None = None) -> Saved:
    """A run's model, or that of a folder or name; one of `rlhf ilql` answers by its values, with the run's beta.

    Args:
      model: a run's folder, or a model's folder or name.
      eos_token: the token that ends an answer in place of the one that the tokenizer's files name.

    Raises: as `rlhf.load` and `rlhf.models.huggingface.load_tokenizer`.
    """
    name, heads = model_of(model), Path(model) / q_heads.FILE
    tokenizer = huggingface.load_tokenizer(name, eos_token=eos_token)
    lm, params, _ = huggingface.load(name)
    leans: tuple = ()
    if heads.exists():
        beta = yaml_files.load(Path(model) / "config.yaml").get("beta")
        if wrong := mistake(f"{model}/config.yaml: beta", Coefficient, beta):
            raise ValueError(wrong)
        leans = (q_heads.shift(*q_heads.load(heads), beta),)
    seq2seq = Model(name).seq2seq(tokenizer)
    return Saved(lm, params, tokenizer, online.ends(name, tokenizer), seq2seq, leans)
