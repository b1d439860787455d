"""Encoder-decoders: an encoder reads `inputs`, a decoder writes and attends to what was read."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf.from_flax import from_linen
from rlhf.lm import LM
from rlhf.models.block import Block
from rlhf.models.config import EncoderDecoderConfig
from rlhf.models.linear import or_zero
from rlhf.models.transformer import Stack, embed, empty_cache, ends, logits, unstacked
from rlhf.models.weights import Weights

Array = jax.Array
INPUTS = ("tokens", "positions", "segment_ids")


def encoder_decoder(config: EncoderDecoderConfig) -> LM:
    """The `LM` of a config.  Its `inputs` are the encoder's `tokens`, `positions` and
    `segment_ids`, `[B, S]` int32.

    A decoder's segment attends to the encoder's segment of the same number.
    """
    return from_linen(EncoderDecoder(config))


class EncoderDecoder(Weights):
    """Two stacks and one embedding."""

    config: EncoderDecoderConfig

    def setup(self):
        self.encoder = Stack(self.config.encoder)
        self.decoder = Stack(self.config.decoder)
        self.embedding, self.unembedding, self.unembedding_bias = ends(self, self.config.decoder)

    def encode(self, inputs) -> dict[str, Array]:
        """Every layer's keys and values of the inputs, `k` and `v` `[B, L, K, S, H]`, with
        `positions` and `segment_ids`.
        """
        if missing := [name for name in INPUTS if name not in (inputs or {})]:
            raise ValueError(
                f"the encoder reads inputs {list(INPUTS)}, but {missing} are missing; got "
                f"{sorted(inputs or {})}"
            )
        c = self.config.encoder
        x = embed(c, self.embedding, or_zero(inputs["tokens"], c.vocab_size, inputs["segment_ids"]))
        x, _, _ = self.encoder.run(x, inputs["positions"], inputs["segment_ids"])

        # `parent=None`: the block is applied to parameters that are passed in, not to its own.
        def cross_kv(layer) -> Any:
            block = Block(self.config.decoder, parent=None)
            return block.apply({"params": layer}, x, method="cross_kv")

        weights = {
            name: leaf for name, leaf in self.decoder.layers.items() if name.startswith("cross_")
        }
        # The batch stays on axis 0, as in every leaf of a cache, so that rows can be cut from it.
        kv: dict = jax.vmap(cross_kv, out_axes=1)(weights)
        return {
            **kv,
            "hidden": x,
            "positions": inputs["positions"],
            "segment_ids": inputs["segment_ids"],
        }

    def hidden(self, tokens, *, positions, segment_ids, cache=None, inputs=None):
        """Hidden states of the decoder `[B, T, D]`; `inputs` raw, or what `encode` returned."""
        if self.is_initializing():
            one = jnp.ones((1, 1), jnp.int32)
            inputs = dict(tokens=one, positions=one - 1, segment_ids=one)
        # While decoding, the encoder's keys and values are passed in; it runs once a prompt.
        encoded = inputs if "k" in (inputs or {}) else self.encode(inputs)
        c = self.config.decoder
        x = embed(c, self.embedding, or_zero(tokens, c.vocab_size, segment_ids))
        return self.decoder.run(x, positions, segment_ids, cache, encoded)

    def unembed(self, hidden):
        """Logits `[..., V]` in at least float32."""
        return logits(
            self.config.decoder, hidden, self.embedding, self.unembedding, self.unembedding_bias
        )

    def unstack(self, params):
        return {**params, "decoder": unstacked(params["decoder"], self.config.decoder)}

    def init_cache(self, batch, length):
        return empty_cache(self.config.decoder, batch, length)
