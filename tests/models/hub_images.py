"""Models of transformers that see, listen, or do both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .hub_text import IDS, SEEN, SIZES
from .libraries import classified, hidden, hub, predicted
from .zoo import Row, ids, named, normal

F = nn.functional

TALL: dict[str, Any] = SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 2, **SEEN}
SPEECH: dict[str, Any] = SIZES | {
    "conv_dim": [4, 4],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
IMAGE = normal(2, 8, 8)


def seen(model: str, name: str, image: Any = IMAGE, **sizes: Any) -> Row:
    return Row(name, hub(f"{model}ForImageClassification", f"{model}Config", **sizes), image, ids(3), classified)


def segmented(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, y)


def matched(output: Any, y: Tensor) -> Tensor:
    """How well each image goes with its own text: the product of the two embeddings."""
    return F.mse_loss((output.image_embeds * output.text_embeds).sum(-1), y)


PAIR = named(input_ids=ids(10, 4), pixel_values=IMAGE)
CLIP: dict[str, Any] = {
    "text_config": SIZES,
    "vision_config": SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 2},
    "projection_dim": 6,
}
ROWS = (
    seen("ViT", "ViT", **TALL),
    seen("DeiT", "DeiT", **TALL),
    seen("Beit", "BEiT", **TALL, use_relative_position_bias=True),
    seen("Dinov2", "DINOv2", **TALL),
    seen(
        "Swin",
        "Swin",
        image_size=8,
        patch_size=2,
        num_channels=2,
        embed_dim=4,
        depths=[2],
        num_heads=[2],
        window_size=2,
        **SEEN,
    ),
    seen(
        "ConvNext", "ConvNeXt", num_channels=2, patch_size=2, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, **SEEN
    ),
    seen(
        "ConvNextV2",
        "ConvNeXt V2",
        num_channels=2,
        patch_size=2,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        num_stages=2,
        **SEEN,
    ),
    seen(
        "ResNet",
        "ResNet",
        num_channels=2,
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
        **SEEN,
    ),
    seen(
        "RegNet",
        "RegNet",
        num_channels=2,
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        groups_width=2,
        **SEEN,
    ),
    seen(
        "PoolFormer",
        "PoolFormer",
        num_channels=2,
        depths=[1, 1],
        hidden_sizes=[4, 6],
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
        num_encoder_blocks=2,
        **SEEN,
    ),
    seen(
        "Levit",
        "LeViT",
        normal(2, 32, 32),
        image_size=32,
        num_channels=2,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[2, 2, 2],
        **SEEN,
    ),
    Row(
        "SegFormer",
        hub(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_channels=2,
            num_encoder_blocks=1,
            depths=[1],
            sr_ratios=[2],
            hidden_sizes=[4],
            patch_sizes=[3],
            strides=[2],
            num_attention_heads=[2],
            mlp_ratios=[2],
            decoder_hidden_size=4,
            **SEEN,
        ),
        IMAGE,
        ids(3, 4, 4),
        segmented,
    ),
    Row("CLIP, images", hub("CLIPVisionModel", "CLIPVisionConfig", **TALL), IMAGE, normal(5, 8), hidden),
    Row("CLIP, matched", hub("CLIPModel", "CLIPConfig", **CLIP), PAIR, normal(), matched, convex=False),
    Row(
        "wav2vec 2.0",
        hub("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SPEECH),
        normal(24),
        ids(2),
        classified,
    ),
    Row(
        "Whisper",
        hub(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **IDS,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            num_mel_bins=4,
            max_source_positions=6,
            max_target_positions=8,
            decoder_start_token_id=1,
        ),
        named(input_features=normal(4, 12), decoder_input_ids=ids(11, 3)),
        ids(11, 3),
        predicted,
    ),
    Row(
        "AST",
        hub(
            "ASTForAudioClassification",
            "ASTConfig",
            **SIZES,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
            max_length=8,
            num_mel_bins=8,
        ),
        normal(8, 8),
        ids(2),
        classified,
    ),
    Row(
        "ViLT",
        hub("ViltForQuestionAnswering", "ViltConfig", **TALL),
        named(input_ids=ids(10, 4), pixel_values=IMAGE),
        ids(3),
        classified,
    ),
    Row(
        "Decision transformer",
        hub(
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            vocab_size=11,
            bos_token_id=1,
            eos_token_id=2,
            state_dim=3,
            act_dim=2,
            hidden_size=8,
            n_layer=1,
            n_head=2,
            n_inner=12,
            max_ep_len=8,
        ),
        named(
            states=normal(4, 3),
            actions=normal(4, 2),
            rewards=normal(4, 1),
            returns_to_go=normal(4, 1),
            timesteps=ids(8, 4),
            attention_mask=lambda n: ids(1, 4)(n) + 1,
        ),
        normal(4, 2),
        lambda output, y: F.mse_loss(output.action_preds, y),
    ),
    Row(
        "PatchTST",
        hub(
            "PatchTSTForRegression",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=8,
            patch_length=2,
            patch_stride=2,
            d_model=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=12,
            num_targets=2,
        ),
        normal(8, 2),
        normal(2),
        lambda output, y: F.mse_loss(output.regression_outputs, y),
    ),
)
