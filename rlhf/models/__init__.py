"""Flax models as `LM`s and `Head`s."""

from rlhf.models.decoder import Decoder as Decoder
from rlhf.models.decoder import DecoderConfig as DecoderConfig
from rlhf.models.decoder import LayerKind as LayerKind
from rlhf.models.decoder import decoder as decoder
from rlhf.models.heads import scalar_head as scalar_head
