"""Flax models as `LM`s and `Head`s."""

from rlhf.models.config import EncoderDecoderConfig as EncoderDecoderConfig
from rlhf.models.config import Experts as Experts
from rlhf.models.config import LayerKind as LayerKind
from rlhf.models.config import TransformerConfig as TransformerConfig
from rlhf.models.encoder_decoder import encoder_decoder as encoder_decoder
from rlhf.models.heads import classifier_head as classifier_head
from rlhf.models.heads import q_head as q_head
from rlhf.models.heads import scalar_head as scalar_head
from rlhf.models.rotary import Rope as Rope
from rlhf.models.stacks import matrices as matrices
from rlhf.models.transformer import Transformer as Transformer
from rlhf.models.transformer import transformer as transformer
