"""Models of transformers that read tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .libraries import classified, hidden, hub, predicted
from .zoo import Row, ids, named, normal

F = nn.functional

IDS: dict[str, Any] = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = IDS | {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "head_dim": 4}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2, "experts_implementation": "eager"}
BATCHED: dict[str, Any] = EXPERTS | {"experts_implementation": "batched_mm"}
SEEN = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
SPLIT: dict[str, Any] = IDS | {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
}
T5: dict[str, Any] = IDS | {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
BOTH = named(input_ids=ids(11, 4), decoder_input_ids=ids(11, 3))


def masked(n: int) -> dict[str, Tensor]:
    """Two sentences of different lengths in each batch, padded at the end."""
    mask = (ids(5, 1)(n) + 1 > ids(1, 5)(n) + ids(5, 5)(1).argsort()).long()
    return {"input_ids": ids(11, 5)(n), "attention_mask": mask}


def spans(output: Any, y: dict[str, Tensor]) -> Tensor:
    """Where an answer begins and where it ends."""
    return (F.cross_entropy(output.start_logits, y["start"]) + F.cross_entropy(output.end_logits, y["end"])) / 2


def causal(model: str, config: str, name: str, **sizes: Any) -> Row:
    """Tokens to the next token."""
    return Row(name, hub(f"{model}ForCausalLM", f"{config}Config", **sizes), ids(11, 4), ids(11, 4), predicted)


def sentence(model: str, config: str, name: str, **sizes: Any) -> Row:
    """Tokens to a class."""
    build = hub(f"{model}ForSequenceClassification", f"{config}Config", **sizes)
    return Row(name, build, ids(10, 5), ids(2), classified)


def single(row: Row) -> Row:
    """A part of the model, as a norm, is in float32 whatever its dtype."""
    return replace(row, inside=torch.float32)


GPT2: dict[str, Any] = IDS | {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
ROWS = (
    Row("GPT-2", hub("GPT2LMHeadModel", "GPT2Config", **GPT2), ids(11, 4), ids(11, 4), predicted),
    causal("OPT", "OPT", "OPT", **SIZES, ffn_dim=12, word_embed_proj_dim=8),
    causal("GPTNeoX", "GPTNeoX", "GPT-NeoX", **SIZES),
    single(
        causal(
            "GPTNeo",
            "GPTNeo",
            "GPT-Neo",
            **IDS,
            hidden_size=8,
            num_layers=2,
            num_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            attention_types=[[["global", "local"], 1]],
            window_size=2,
        )
    ),
    causal("GPTJ", "GPTJ", "GPT-J", **GPT2, rotary_dim=2),
    causal("Bloom", "Bloom", "BLOOM", **IDS, hidden_size=8, n_layer=1, n_head=2),
    single(causal("Llama", "Llama", "Llama", **GROUPED)),
    single(causal("Mistral", "Mistral", "Mistral", **GROUPED, sliding_window=2)),
    single(causal("Qwen2", "Qwen2", "Qwen2", **GROUPED)),
    single(causal("Qwen3", "Qwen3", "Qwen3", **GROUPED)),
    single(causal("Gemma", "Gemma", "Gemma", **GROUPED)),
    single(causal("Gemma2", "Gemma2", "Gemma 2", **GROUPED, query_pre_attn_scalar=4, sliding_window=2)),
    causal("Phi", "Phi", "Phi", **SIZES),
    causal("Falcon", "Falcon", "Falcon", **IDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
    single(causal("Olmo2", "Olmo2", "OLMo 2", **SIZES)),
    single(causal("Cohere", "Cohere", "Cohere", **GROUPED)),
    single(causal("Mixtral", "Mixtral", "Mixtral", **BATCHED, num_local_experts=3)),
    single(causal("Mixtral", "Mixtral", "Mixtral, a loop over experts", **EXPERTS, num_local_experts=3)),
    single(causal("Olmoe", "Olmoe", "OLMoE", **BATCHED, num_experts=3)),
    single(
        causal(
            "Mamba",
            "Mamba",
            "Mamba",
            **IDS,
            hidden_size=8,
            num_hidden_layers=1,
            state_size=3,
            conv_kernel=2,
            time_step_rank=2,
        )
    ),
    Row("BERT, masked words", hub("BertForMaskedLM", "BertConfig", **SIZES), ids(11, 4), ids(11, 4), predicted),
    sentence("Bert", "Bert", "BERT, sentences", **SIZES),
    Row("BERT, padded", hub("BertForSequenceClassification", "BertConfig", **SIZES), masked, ids(2), classified),
    Row(
        "BERT, answers",
        hub("BertForQuestionAnswering", "BertConfig", **SIZES),
        ids(11, 4),
        named(start=ids(4), end=ids(4)),
        spans,
    ),
    Row(
        "RoBERTa, words",
        hub("RobertaForTokenClassification", "RobertaConfig", **SIZES),
        ids(11, 4),
        ids(2, 4),
        predicted,
    ),
    sentence(
        "DistilBert",
        "DistilBert",
        "DistilBERT",
        **IDS,
        dim=8,
        n_layers=1,
        n_heads=2,
        hidden_dim=12,
        max_position_embeddings=16,
    ),
    sentence("Albert", "Albert", "ALBERT", **SIZES, embedding_size=4),
    sentence("Electra", "Electra", "ELECTRA", **SIZES, embedding_size=4),
    sentence(
        "DebertaV2",
        "DebertaV2",
        "DeBERTa-v2",
        **SIZES,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
    ),
    sentence(
        "MobileBert",
        "MobileBert",
        "MobileBERT",
        **SIZES,
        embedding_size=4,
        true_hidden_size=8,
        intra_bottleneck_size=8,
        num_feedforward_networks=1,
    ),
    sentence(
        "ModernBert",
        "ModernBert",
        "ModernBERT",
        **SIZES,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=1,
        local_attention=2,
    ),
    sentence("XLNet", "XLNet", "XLNet", **IDS, d_model=8, n_layer=1, n_head=2, d_inner=12),
    sentence("FNet", "FNet", "FNet", **SIZES),
    sentence("Longformer", "Longformer", "Longformer", **SIZES, attention_window=4),
    single(
        Row(
            "T5",
            hub("T5ForConditionalGeneration", "T5Config", **T5, relative_attention_num_buckets=4),
            BOTH,
            ids(11, 3),
            predicted,
        )
    ),
    single(
        Row(
            "Switch",
            hub(
                "SwitchTransformersForConditionalGeneration",
                "SwitchTransformersConfig",
                **T5,
                num_experts=2,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            ),
            BOTH,
            ids(11, 3),
            predicted,
        )
    ),
    Row("BART", hub("BartForConditionalGeneration", "BartConfig", **SPLIT), BOTH, ids(11, 3), predicted),
    Row("CLIP, text", hub("CLIPTextModel", "CLIPTextConfig", **SIZES), ids(11, 4), normal(4, 8), hidden),
)
