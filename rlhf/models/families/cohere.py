"""Command R7B and A (Cohere 2): attention and MLP from one norm, positions in layers with a window alone."""

import dataclasses

from rlhf.models.config import TransformerConfig
from rlhf.models.families.llama import read, tensors
from rlhf.models.families.table import Family, kinds, pattern, rope


def _read(hf) -> TransformerConfig:
    turning = rope(hf, interleaved=True)
    return read(
        hf,
        kinds=pattern(
            tuple(
                dataclasses.replace(kind, rope=turning if kind.window else None)
                for kind in kinds(hf, hf.layer_types)
            )
        ),
        norm="layer",
        norm_bias=False,
        norm_eps=hf.layer_norm_eps,
        parallel=1,
        logit_scale=hf.logit_scale,
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
    )


FAMILIES = {
    "cohere2": Family(
        "Cohere2ForCausalLM",
        "model.",
        tensors({"attention_norm": "input_layernorm"}),
        _read,
        only={
            "use_parallel_block": (True,),
            "use_gated_activation": (True,),
            "use_qk_norm": (False,),
        },
    )
}
