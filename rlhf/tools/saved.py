"""A saved model that generates: a run's, with what the run samples by, or a folder's."""

from pathlib import Path

from jax.sharding import Mesh

from rlhf import yaml_files
from rlhf.models import huggingface
from rlhf.ranges import Coefficient, mistake
from rlhf.training import loading, model_info, q_heads
from rlhf.training.options import ModelOptions
from rlhf.training.runs import model_of
from rlhf.training.trained import TrainedModel


def load(model: str, mesh: Mesh, eos_token: str | None = None) -> TrainedModel:
    """A run's model, or that of a folder or name; one of `rlhf ilql` samples by its values, with
    the run's beta.

    Args:
      model: a run's folder, or a model's folder or name.
      mesh: where its parameters go.
      eos_token: the token that ends a completion in place of the one that the tokenizer's files
        name.

    Raises: FileNotFoundError where the folder or name has no model or tokenizer; ValueError for a
    config, weights or an end token that cannot be used.
    """
    name = model_of(model)
    options = ModelOptions(name, eos_token=eos_token)
    # Apart from the model's own: an end token that is given takes the place of the file's.
    tokenizer = model_info.load_tokenizer(options)
    lm, params, _ = huggingface.load(name, mesh=mesh, say=loading.without_repeats(print))
    transforms: tuple = ()
    # Beside `model/` and not in it: other libraries read that folder.
    heads_file = Path(model) / q_heads.FILE
    if heads_file.exists():
        beta = yaml_files.load(Path(model) / "config.yaml").get("beta")
        # config.yaml may be edited by hand: a beta of the wrong type would fail inside a program.
        if wrong := mistake(f"{model}/config.yaml: beta", Coefficient, beta):
            raise ValueError(wrong)
        heads, heads_params = q_heads.load(heads_file)
        transforms = (q_heads.shift(heads, heads_params, beta),)
    return TrainedModel(
        lm,
        params,
        tokenizer,
        eos_ids=model_info.eos_ids(options, tokenizer),
        seq2seq=model_info.load_seq2seq(options, tokenizer),
        transforms=transforms,
        source=name,
        mesh=mesh,
    )
