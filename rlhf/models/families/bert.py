"""Encoders: BERT, RoBERTa and DistilBERT."""

from rlhf.models.config import LayerKind, TransformerConfig
from rlhf.models.families.table import Family, Tensor, activation, matrices, vectors

BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
BERT_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
DISTILBERT = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
}
DISTILBERT_NORMS = {"attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"}
ENCODER: dict = dict(
    kinds=(LayerKind(rope=None),),
    causal=False,
    norm="layer",
    norm_place="sum",
    embed_norm=True,
    final_norm=False,
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    unembeds=False,
)


def _tensors(trunk: str, layer: str, projections, norms) -> tuple[Tensor, ...]:
    ends = {"word": "embedding", "position": "position_embedding", "token_type": "type_embedding"}
    return (
        *(
            Tensor(f"{trunk}.embeddings.{theirs}_embeddings.weight", ours)
            for theirs, ours in ends.items()
        ),
        *vectors(f"{trunk}.embeddings.", {"embed_norm": "LayerNorm"}, to=""),
        *vectors(f"{trunk}.{layer}.{{}}.", norms),
        *matrices(f"{trunk}.{layer}.{{}}.", projections),
    )


def _read_bert(hf, position_offset: int = 0) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        mlp_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings - position_offset,
        position_offset=position_offset,
        token_types=hf.type_vocab_size,
        norm_eps=hf.layer_norm_eps,
        activation=activation(hf.hidden_act),
        **ENCODER,
    )


def _read_roberta(hf) -> TransformerConfig:
    # RoBERTa counts positions from the padding's id on, and padding reads the row of that id.
    return _read_bert(hf, position_offset=hf.pad_token_id + 1)


def _read_distilbert(hf) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.dim,
        num_layers=hf.n_layers,
        num_heads=hf.n_heads,
        mlp_size=hf.hidden_dim,
        max_positions=hf.max_position_embeddings,
        norm_eps=1e-12,
        activation=activation(hf.activation),
        **ENCODER,
    )


def _head(inner: str, labels: str) -> tuple[Tensor, ...]:
    return (
        *matrices("", {"inner": inner}, to=""),
        Tensor(f"{labels}.weight", "weight", transpose=True),
        Tensor(f"{labels}.bias", "bias"),
    )


TOKEN_HEAD = (
    Tensor("classifier.weight", "weight", transpose=True),
    Tensor("classifier.bias", "bias"),
)
# Parts of masked language models, which a trunk does not have.
IGNORED = r"position_ids$|^(bert|roberta)\.pooler\.|^cls\.|^lm_head\.|^vocab_"
# BERT's pooler is the inner layer of its classifiers, so that pre-training reaches the head too.
FAMILIES = {
    "bert": Family(
        "BertModel",
        "bert.",
        _tensors("bert", "encoder.layer", BERT, BERT_NORMS),
        _read_bert,
        ignored=IGNORED,
        head=_head("bert.pooler.dense", "classifier"),
        head_inner="tanh",
        token_head=TOKEN_HEAD,
    ),
    "roberta": Family(
        "RobertaModel",
        "roberta.",
        _tensors("roberta", "encoder.layer", BERT, BERT_NORMS),
        _read_roberta,
        ignored=IGNORED,
        head=_head("classifier.dense", "classifier.out_proj"),
        head_inner="tanh",
        token_head=TOKEN_HEAD,
    ),
    "distilbert": Family(
        "DistilBertModel",
        "distilbert.",
        _tensors("distilbert", "transformer.layer", DISTILBERT, DISTILBERT_NORMS),
        _read_distilbert,
        ignored=IGNORED,
        head=_head("pre_classifier", "classifier"),
        head_inner="relu",
        token_head=TOKEN_HEAD,
    ),
}
