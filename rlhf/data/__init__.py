"""Data on its way to the device: rows of text, their tokens, packed or not, and the order of
batches.

    rows = data.read_rows("gsm8k/train.jsonl")
    rows = [data.renamed(row, question="prompt", answer="completion") for row in rows]
    remaining = data.truncate(data.tokenize_completions(tokenizer, rows), length=512)
    batch = data.best_fit(remaining.sides[0], length=512)
"""

from rlhf.data.conversions import as_messages as as_messages
from rlhf.data.conversions import extract_prompt as extract_prompt
from rlhf.data.conversions import from_sharegpt as from_sharegpt
from rlhf.data.conversions import implicit_prompt as implicit_prompt
from rlhf.data.conversions import joined as joined
from rlhf.data.conversions import language_modelling as language_modelling
from rlhf.data.conversions import prompt_completion as prompt_completion
from rlhf.data.conversions import prompt_only as prompt_only
from rlhf.data.conversions import renamed as renamed
from rlhf.data.conversions import repeats_prompt as repeats_prompt
from rlhf.data.conversions import unpaired as unpaired
from rlhf.data.mixtures import Mixture as Mixture
from rlhf.data.mixtures import hold_out as hold_out
from rlhf.data.mixtures import mix as mix
from rlhf.data.order import batch_indices as batch_indices
from rlhf.data.packing import best_fit as best_fit
from rlhf.data.packing import best_fit_pairs as best_fit_pairs
from rlhf.data.packing import split as split
from rlhf.data.packing import wrapped as wrapped
from rlhf.data.read import read_lines as read_lines
from rlhf.data.read import read_rows as read_rows
from rlhf.data.read import stream_rows as stream_rows
from rlhf.data.rows import encode_rows as encode_rows
from rlhf.data.rows import preference_pairs as preference_pairs
from rlhf.data.seq2seq import Seq2Seq as Seq2Seq
from rlhf.data.template import contents as contents
from rlhf.data.template import tokenize_completions as tokenize_completions
from rlhf.data.template import tokenize_joined as tokenize_joined
from rlhf.data.template import tokenize_prompts as tokenize_prompts
from rlhf.data.template import tokenize_steps as tokenize_steps
from rlhf.data.template import tokenize_texts as tokenize_texts
from rlhf.data.tokenized import Steps as Steps
from rlhf.data.tokenized import Tokenized as Tokenized
from rlhf.data.tokenized import Truncated as Truncated
from rlhf.data.tokenized import aligned as aligned
from rlhf.data.tokenized import batch as batch
from rlhf.data.tokenized import fitted as fitted
from rlhf.data.tokenized import mismatched as mismatched
from rlhf.data.tokenized import pairs as pairs
from rlhf.data.tokenized import prompts as prompts
from rlhf.data.tokenized import step_batch as step_batch
from rlhf.data.tokenized import truncate as truncate
from rlhf.data.types import IMPLICIT_PREFERENCE as IMPLICIT_PREFERENCE
from rlhf.data.types import LANGUAGE_MODELLING as LANGUAGE_MODELLING
from rlhf.data.types import PREFERENCE as PREFERENCE
from rlhf.data.types import PROMPT_COMPLETION as PROMPT_COMPLETION
from rlhf.data.types import PROMPT_ONLY as PROMPT_ONLY
from rlhf.data.types import STEPWISE as STEPWISE
from rlhf.data.types import TRIPLE as TRIPLE
from rlhf.data.types import UNPAIRED_PREFERENCE as UNPAIRED_PREFERENCE
from rlhf.data.types import Row as Row
from rlhf.data.types import Type as Type
from rlhf.data.types import checked as checked
from rlhf.data.types import each as each
from rlhf.data.types import type_of as type_of
from rlhf.data.values import filled as filled
