"""Objectives as pure functions: arrays in, per-token or per-sequence arrays out; a loss is a
weighted sum of them.

Per-token arrays are `[B, T]` and column `t` speaks of `tokens[:, t]`.  `mask` is True on trained
tokens; where it is False, values and gradients are exactly 0, whatever the inputs hold there.
"""

from rlhf.losses import advantages as advantages
from rlhf.losses import controllers as controllers
from rlhf.losses import covariance as covariance
from rlhf.losses import distillation as distillation
from rlhf.losses import divergence as divergence
from rlhf.losses import groups as groups
from rlhf.losses import importance as importance
from rlhf.losses import kl as kl
from rlhf.losses import logits as logits
from rlhf.losses import masks as masks
from rlhf.losses import metrics as metrics
from rlhf.losses import moments as moments
from rlhf.losses import offline as offline
from rlhf.losses import online as online
from rlhf.losses import policy as policy
from rlhf.losses import preference as preference
from rlhf.losses import presets as presets
from rlhf.losses import ratios as ratios
from rlhf.losses import reference_free as reference_free
from rlhf.losses import reward_model as reward_model
from rlhf.losses import routing as routing
from rlhf.losses import segments as segments
from rlhf.losses import supervised as supervised
from rlhf.losses import unpaired as unpaired
from rlhf.losses import value as value
from rlhf.losses import weights as weights
from rlhf.losses.advantages import gae as gae
from rlhf.losses.advantages import token_rewards as token_rewards
from rlhf.losses.advantages import whiten as whiten
from rlhf.losses.chunks import chunked as chunked
from rlhf.losses.chunks import chunked_sum as chunked_sum
from rlhf.losses.groups import group_relative as group_relative
from rlhf.losses.policy import clipped_surrogate as clipped_surrogate
from rlhf.losses.reward_model import bradley_terry as bradley_terry
from rlhf.losses.segments import segment_sum as segment_sum
from rlhf.losses.supervised import cross_entropy as cross_entropy
from rlhf.losses.value import clipped_value_loss as clipped_value_loss
from rlhf.losses.weights import weighted_sum as weighted_sum
