"""Rollouts: a language model in, batches of tokens out; and what models say of tokens."""

from rlhf.rollouts import samplers as samplers
from rlhf.rollouts import text as text
from rlhf.rollouts.generate import generate as generate
from rlhf.rollouts.generate import generate_many as generate_many
from rlhf.rollouts.samplers import greedy as greedy
from rlhf.rollouts.samplers import min_p as min_p
from rlhf.rollouts.samplers import sampler as sampler
from rlhf.rollouts.samplers import top_k as top_k
from rlhf.rollouts.samplers import top_p as top_p
from rlhf.rollouts.score import Scored as Scored
from rlhf.rollouts.score import classify as classify
from rlhf.rollouts.score import score as score
from rlhf.rollouts.score import token_logprobs as token_logprobs
from rlhf.rollouts.stopping import stop_strings as stop_strings
from rlhf.rollouts.types import Batch as Batch
from rlhf.rollouts.types import Pairs as Pairs
from rlhf.rollouts.types import Prompts as Prompts
from rlhf.rollouts.types import Rollout as Rollout
from rlhf.rollouts.types import batch_of as batch_of
from rlhf.rollouts.types import pair_rows as pair_rows
from rlhf.rollouts.types import whole_rows as whole_rows
