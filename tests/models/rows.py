"""Every row of the zoo, and what is known not to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import attention, fields, functions, habits, hub_images, hub_text, packages, sequences, vision
from .zoo import Row

FAMILIES = {
    "Images": vision.ROWS,
    "Attention": attention.ROWS,
    "Sequences": sequences.ROWS,
    "Functions, sets, graphs": functions.ROWS,
    "Fields of work": fields.ROWS,
    "As code is written": habits.ROWS,
}


def of(package: str, rows: Sequence[Row]) -> tuple[Row, ...]:
    """With the package in their names."""
    return tuple(replace(row, name=f"{row.name} ({package})") for row in rows)


PACKAGES = {
    "transformers: text": of("transformers", hub_text.ROWS),
    "transformers: images, speech, sequences": of("transformers", hub_images.ROWS),
    "timm": of("timm", packages.TIMM),
    "torchvision": of("torchvision", packages.TORCHVISION),
    "peft": of("peft", packages.PEFT),
    "diffusers": of("diffusers", packages.DIFFUSERS),
}
OWN, OTHERS = (tuple(row for rows in families.values() for row in rows) for families in (FAMILIES, PACKAGES))
ZOO = OWN + OTHERS

REFUSED = {
    "gradient reversal": r"autograd.Function 'Reversal' .* has a backward of its own",
    "binarised, straight-through": r"autograd.Function 'Sign' .* has a backward of its own",
    "BLOOM (transformers)": r"autograd.Function 'GeLUFunction' .* has a backward of its own",
    "Mixtral, a loop over experts (transformers)": r"depends on the data, .*MixtralExperts(?s:.*)for expert_idx in",
    "Switch (transformers)": r"the model writes to '.*router.classifier.weight' during forward",
    "Longformer (transformers)": r"depends on the data, .*LongformerSelfAttention(?s:.*)if is_global_attn",
    "ViLT (transformers)": r"depends on the data, .*ViltEmbeddings",
}
"""Models that do not compile at all, and what the refusal says."""

KNOWN = {(name, check): says for name, says in REFUSED.items() for check in ("first order", "KFAC", "DiagGGN")}
"""(row, check) -> what the refusal says. A test notices when one of them runs."""
