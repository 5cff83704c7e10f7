"""Models of timm, torchvision, peft and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .hub_text import GPT2, SIZES
from .libraries import classified, hub, load, predicted, timm, vision
from .zoo import CE, Row, ids, named, normal, several

F = nn.functional

IMAGE = normal(2, 16, 16)


def image(name: str, build: Callable[[], nn.Module], x: Any = IMAGE) -> Row:
    return Row(name, build, x, ids(3), CE)


def large(row: Row) -> Row:
    """Without the curvature by its definition, which goes sample by sample: ResNet-18's is zero here, and for XCiT see
    `outcomes.individual`."""
    return replace(row, exact=False)


def adapted(base: Callable[[], nn.Module], config: str, **options: Any) -> Callable[[], nn.Module]:
    """What peft makes of a model."""

    def build() -> nn.Module:
        package = load("peft")
        found: nn.Module = package.get_peft_model(base(), getattr(package, config)(**options))
        return found

    return build


def diffusers(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(load("diffusers"), name)(**sizes)


def denoised(output: Any, y: Tensor) -> Tensor:
    return F.mse_loss(output.sample, y)


SMALL: dict[str, Any] = {"num_classes": 3, "in_chans": 2}
TIMM = (
    image("resnet18", timm("resnet18", **SMALL, layers=(1, 1, 1, 1), channels=(4, 4, 6, 8), stem_width=4)),
    image(
        "resnext",
        timm(
            "resnext50_32x4d",
            **SMALL,
            layers=(1, 1, 1, 1),
            channels=(4, 4, 4, 4),
            stem_width=4,
            cardinality=2,
            base_width=32,
        ),
    ),
    image("seresnet", timm("seresnet18", **SMALL, layers=(1, 1, 1, 1), channels=(4, 4, 4, 8), stem_width=4)),
    image(
        "vit_tiny",
        timm("vit_tiny_patch16_224", **SMALL, img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2),
    ),
    image(
        "eva02",
        timm("eva02_tiny_patch14_224", **SMALL, img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2),
    ),
    image(
        "cait",
        timm(
            "cait_xxs24_224", **SMALL, depth_token_only=1, img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2
        ),
    ),
    large(
        image(
            "xcit",
            timm("xcit_nano_12_p16_224", **SMALL, img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2),
        )
    ),
    image(
        "swin",
        timm(
            "swin_tiny_patch4_window7_224",
            **SMALL,
            img_size=16,
            patch_size=4,
            window_size=2,
            embed_dim=4,
            depths=(2,),
            num_heads=(2,),
        ),
    ),
    image("convnext", timm("convnext_atto", **SMALL, depths=(1, 1, 1, 1), dims=(4, 4, 4, 6)), normal(2, 32, 32)),
    image("mixer", timm("MlpMixer", **SMALL, img_size=16, patch_size=8, num_blocks=1, embed_dim=8)),
    image(
        "pit",
        timm("pit_ti_224", **SMALL, img_size=32, base_dims=[2, 2, 2], depth=[1, 1, 1], heads=[1, 1, 1]),
        normal(2, 32, 32),
    ),
    image(
        "tnt",
        timm(
            "tnt_s_patch16_224",
            **SMALL,
            img_size=16,
            patch_size=8,
            embed_dim=8,
            inner_dim=4,
            depth=1,
            num_heads_inner=2,
            num_heads_outer=2,
        ),
    ),
    image(
        "edgenext",
        timm("edgenext_xx_small", **SMALL, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), heads=(2, 2, 2, 2)),
        normal(2, 32, 32),
    ),
    image(
        "visformer",
        timm("visformer_tiny", **SMALL, img_size=32, init_channels=4, embed_dim=8, depth=(1, 1, 1), num_heads=2),
        normal(2, 32, 32),
    ),
    image("efficientnet", timm("test_efficientnet", **SMALL)),
    image("regnet", timm("test_byobnet", **SMALL)),
)
TORCHVISION = (
    large(image("ResNet-18", vision("resnet18", num_classes=3), normal(3, 8, 8))),
    image(
        "ViT",
        vision(
            "VisionTransformer",
            image_size=8,
            patch_size=4,
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=12,
            num_classes=3,
        ),
        normal(3, 8, 8),
    ),
    image(
        "Swin",
        vision(
            "SwinTransformer",
            patch_size=[2, 2],
            embed_dim=4,
            depths=[2],
            num_heads=[2],
            window_size=[2, 2],
            num_classes=3,
        ),
        normal(3, 8, 8),
    ),
    image(
        "DenseNet",
        vision("DenseNet", growth_rate=4, block_config=(1, 1), num_init_features=4, num_classes=3),
        normal(3, 16, 16),
    ),
    image(
        "MobileNetV2",
        vision("MobileNetV2", width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], num_classes=3),
        normal(3, 16, 16),
    ),
    image(
        "ShuffleNetV2",
        vision("ShuffleNetV2", stages_repeats=[1, 1, 1], stages_out_channels=[8, 8, 8, 8, 8], num_classes=3),
        normal(3, 32, 32),
    ),
)
GPT = hub("GPT2LMHeadModel", "GPT2Config", **GPT2)
BERT = hub("BertForSequenceClassification", "BertConfig", **SIZES)
PEFT = (
    Row(
        "LoRA, GPT-2",
        adapted(GPT, "LoraConfig", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        ids(11, 4),
        ids(11, 4),
        predicted,
    ),
    Row(
        "LoRA, BERT",
        adapted(BERT, "LoraConfig", r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
        ids(11, 4),
        ids(2),
        classified,
    ),
    Row(
        "DoRA, BERT",
        adapted(BERT, "LoraConfig", r=2, target_modules=["query", "value"], use_dora=True),
        ids(11, 4),
        ids(2),
        classified,
    ),
    Row(
        "IA3, GPT-2",
        adapted(GPT, "IA3Config", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        ids(11, 4),
        ids(11, 4),
        predicted,
    ),
    Row(
        "prompt tuning, GPT-2",
        adapted(GPT, "PromptTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"),
        ids(11, 4),
        ids(11, 6),
        predicted,
    ),
    Row(
        "prefix tuning, GPT-2",
        adapted(GPT, "PrefixTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"),
        ids(11, 4),
        ids(11, 4),
        predicted,
    ),
)
BLOCKS: dict[str, Any] = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
DIFFUSERS = (
    Row(
        "UNet2D",
        diffusers(
            "UNet2DModel",
            sample_size=4,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            **BLOCKS,
        ),
        several(normal(1, 4, 4), ids(10)),
        normal(1, 4, 4),
        denoised,
    ),
    Row(
        "UNet2D, conditional",
        diffusers(
            "UNet2DConditionModel",
            sample_size=4,
            in_channels=1,
            out_channels=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=2,
            cross_attention_dim=6,
            **(BLOCKS | {"block_out_channels": (4,)}),
        ),
        several(normal(1, 4, 4), ids(10), normal(3, 6)),
        normal(1, 4, 4),
        denoised,
    ),
    Row(
        "AutoencoderKL",
        diffusers(
            "AutoencoderKL",
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            norm_num_groups=2,
            latent_channels=2,
            sample_size=4,
        ),
        normal(1, 4, 4),
        normal(1, 4, 4),
        denoised,
    ),
    Row(
        "DiT",
        diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=2,
            num_layers=1,
            norm_num_groups=2,
            sample_size=8,
            patch_size=4,
            num_embeds_ada_norm=10,
        ),
        named(hidden_states=normal(2, 8, 8), timestep=ids(10), class_labels=ids(10)),
        normal(2, 8, 8),
        denoised,
    ),
    Row(
        "Transformer2D",
        diffusers(
            "Transformer2DModel",
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            num_layers=1,
            norm_num_groups=2,
            cross_attention_dim=6,
        ),
        named(hidden_states=normal(4, 4, 4), encoder_hidden_states=normal(3, 6)),
        normal(4, 4, 4),
        denoised,
    ),
)
ROWS = TIMM + TORCHVISION + PEFT + DIFFUSERS
