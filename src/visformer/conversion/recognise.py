"""What a file's tensors are: whose names they bear, and which network they make up.

The layout is told by the spelling of a norm's tensors, the architecture by shapes. Shapes do not tell everything: not
the number of attention heads (save where there is a table of position biases), not the form of GELU, not the scale of q
and k. Those come from the published model that has the same shapes, from the arguments that the authors' training
stores in its checkpoints, from what each project's code computes, or from the user.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from visformer.conversion.layouts import AUTHORS, AUTHORS_2021, MINDCV, OURS, TIMM, Layout
from visformer.conversion.shapes import read_shape
from visformer.errors import UsageError
from visformer.models import VARIANTS, Architecture, StageConfig, variant

CUSTOM = "custom"  # model_name of a network that is none of the published
V2_SCALE = -0.5
PROJECTS = ("mindcv", "authors", "timm")


def recognise_layout(names: Iterable[str]) -> Layout:
    """The project whose names these are. Raises `UsageError` for names of something else."""
    names = list(names)
    if any(name.startswith("stages.") for name in names) and any(".embed.proj." in name for name in names):
        return OURS
    if "patch_embed1.proj.weight" not in names:
        raise UsageError(
            f"its tensors are not a Visformer's: there is no 'patch_embed1.proj.weight'; it has {_some(names)}"
        )
    if any(name.endswith((".gamma", ".moving_mean")) for name in names):
        return MINDCV
    if any(".ln.weight" in name for name in names):
        return AUTHORS_2021
    if any(".bn.weight" in name for name in names) or not any(name.endswith(".running_mean") for name in names):
        return AUTHORS  # net1 has no batch norm at all
    return TIMM


@dataclass(frozen=True)
class Choices:
    """What the user says of a file, None where the file shall tell. `num_heads`: one for each stage, or one for all."""

    model: str | None = None
    gelu: Literal["erf", "tanh"] | None = None
    qk_scale_power: float | None = None
    num_heads: tuple[int, ...] | None = None


@dataclass
class Recognised:
    """A network told from a file: its name (`custom` if unpublished), architecture, and in `notes` why it is so."""

    name: str
    architecture: Architecture
    notes: list[str] = field(default_factory=list)


def name_and_source(text: str) -> tuple[str | None, str | None]:
    """visformer_small.mindcv -> (visformer_small, mindcv); either may be missing, and is None then."""
    name, _, source = text.partition(".")
    if source and source not in PROJECTS:
        raise UsageError(f"model: {source!r} in {text!r} is no project; there are {', '.join(PROJECTS)}")
    return name or None, source or None


def recognise_model(
    tensors: dict[str, Tensor], convention: Layout, facts: dict[str, Any], choices: Choices
) -> Recognised:
    """The network that the tensors make up.

    `convention` is the layout of the project whose code they were trained with, `facts` is what else the file says.
    Raises `UsageError` when they make up none, or not the model that `choices` name, or when heads are not known.
    """
    shape = read_shape(tensors)
    name = _name(shape, choices)
    notes: list[str] = []
    if name == CUSTOM:
        architecture, base = _with_heads(shape, choices.num_heads), None
        heads = "as you say" if choices.num_heads else "as its tables of position biases say"
        notes.append(f"no published model has these shapes; attention heads {heads}")
    else:
        base = variant(name).architecture
        architecture = _fill_in(shape, base)
    gelu, reason = _gelu(convention, base, choices)
    notes.append(f"GELU in the {gelu} form: {reason}")
    scale, reason = _scale(shape, base, facts, choices)
    notes.append(f"q and k scaled by head_dim^{scale:g}: {reason}")
    return Recognised(name, replace(architecture, gelu=gelu, qk_scale_power=scale), notes)


def _name(shape: Architecture, choices: Choices) -> str:
    """The published model of this shape, checked against what the user says."""
    fitting = [name for name, row in VARIANTS.items() if not difference(shape, row.architecture)]
    if choices.model and choices.model != CUSTOM:
        base = variant(choices.model).architecture
        if choices.model not in fitting:
            also = f"; the tensors are those of {fitting[0]}" if fitting else ""
            raise UsageError(f"it is no {choices.model}: {difference(shape, base)}{also}")
        return choices.model
    if fitting and choices.model != CUSTOM:
        return fitting[0]
    if choices.num_heads or not any(stage.attention and stage.window is None for stage in shape.stages):
        return CUSTOM
    near = min(VARIANTS, key=lambda name: _distance(shape, VARIANTS[name].architecture))
    raise UsageError(
        f"its shapes are those of no published model (nearest: {near}, but "
        f"{difference(shape, VARIANTS[near].architecture)}), and the number of attention heads is not in the file; "
        f"give it with --num_heads, one for each stage, as in --num_heads {','.join('2' for _ in shape.stages)}"
    )


def _gelu(convention: Layout, base: Architecture | None, choices: Choices) -> tuple[Literal["erf", "tanh"], str]:
    """The form of GELU, and why."""
    if choices.gelu:
        return choices.gelu, "as you say"
    if convention.gelu:
        return convention.gelu, f"that is what {convention.project} computes"
    return (base.gelu, "as this model is published") if base else ("erf", "the default; --gelu decides otherwise")


def _scale(
    shape: Architecture, base: Architecture | None, facts: dict[str, Any], choices: Choices
) -> tuple[float, str]:
    """The power of head_dim by which q and k are scaled, and why."""
    if choices.qk_scale_power is not None:
        return choices.qk_scale_power, "as you say"
    arguments = facts.get("args")
    recorded = arguments.get("qk_scale_factor") if isinstance(arguments, dict) else None
    if isinstance(recorded, (int, float)) and -2 <= recorded <= 0:
        return float(recorded), "the training's arguments in the file say so"
    if base is not None:
        return base.qk_scale_power, "as this model is published"
    if len(shape.stages) == 4 and shape.stages[0].depth:
        return V2_SCALE, "four stages with blocks in each are a V2; --qk_scale_power decides otherwise"
    return -0.25, "not the shape of a V2; --qk_scale_power decides otherwise"


def _with_heads(shape: Architecture, num_heads: tuple[int, ...] | None) -> Architecture:
    """`shape` with the number of heads in each stage, which must divide the attention's width."""
    given = num_heads or tuple(stage.num_heads for stage in shape.stages)
    if len(given) == 1:
        given *= len(shape.stages)
    if len(given) == len(shape.stages) + 1:
        given = given[1:]  # MindCV counts a stage 0 that is not there
    if len(given) != len(shape.stages):
        raise UsageError(f"num_heads: {len(given)} numbers, where the network has {len(shape.stages)} stages")
    stages = [_headed(stage, i, heads) for i, (stage, heads) in enumerate(zip(shape.stages, given, strict=True))]
    return replace(shape, stages=tuple(stages))


def _headed(stage: StageConfig, number: int, heads: int) -> StageConfig:
    if not stage.attention:
        return replace(stage, num_heads=max(heads, 1))
    if stage.window is not None and heads != stage.num_heads:
        raise UsageError(
            f"num_heads: {heads} in stage {number}, whose table of position biases is for {stage.num_heads}"
        )
    inner = stage.head_dim or 0  # until now the width of all heads
    if heads < 1 or inner % heads:
        raise UsageError(f"num_heads: {heads} does not divide the {inner} channels of the attention in stage {number}")
    head_dim = inner // heads
    return replace(stage, num_heads=heads, head_dim=None if head_dim == stage.width // heads else head_dim)


def _fill_in(shape: Architecture, base: Architecture) -> Architecture:
    """A published architecture for the file's image, head and windows."""
    stages = tuple(replace(ours, window=file.window) for ours, file in zip(base.stages, shape.stages, strict=True))
    return replace(
        base,
        stages=stages,
        num_classes=shape.num_classes,
        in_channels=shape.in_channels,
        image_size=shape.image_size,
        pos_embed=shape.pos_embed,
    )


def difference(shape: Architecture, base: Architecture) -> str | None:
    """The first thing in which a file's network differs from a published one, in words; None: it is that one.

    `shape` comes from `read_shape`. Image size, input channels and classes may differ.
    """
    if len(shape.stages) != len(base.stages):
        return f"it has {len(base.stages)} stages, the file {len(shape.stages)}"
    pairs: list[tuple[str, Any, Any]] = [("the stem's channels", base.stem_width, shape.stem_width)]
    pairs.append(("norms", f"{base.norm} norm", f"{shape.norm} norm"))
    for i, (ours, file) in enumerate(zip(base.stages, shape.stages, strict=True)):
        inner = ours.num_heads * (ours.head_dim or ours.width // ours.num_heads) if ours.attention else None
        grid = min(shape.grids[i])
        window = None if ours.window is None else min(ours.window, grid) if file.window != ours.window else ours.window
        pairs += [
            (f"channels of stage {i}", ours.width, file.width),
            (f"blocks in stage {i}", ours.depth, file.depth),
            (f"the patches' side in stage {i}", ours.patch_size, file.patch_size),
        ]
        if ours.depth:
            pairs += [
                (f"attention in stage {i}", ours.attention, file.attention),
                (f"3x3 convolutions in stage {i}", ours.spatial_mlp, file.spatial_mlp),
                (f"the attention's channels in stage {i}", inner, file.head_dim),
                (f"the windows' side in stage {i}", window, file.window),
            ]
            if file.window is not None:
                pairs.append((f"heads in stage {i}", ours.num_heads, file.num_heads))
    if any(stage.spatial_mlp for stage in base.stages):
        pairs.append(("groups of the 3x3 convolutions", base.groups, shape.groups))
    pairs.append(("norms of patch embeddings", base.embed_norm, shape.embed_norm))
    windowed = any(stage.window for stage in base.stages)
    if not windowed:  # the authors' windowed models may go without
        pairs.append(("position embeddings", base.pos_embed, shape.pos_embed))
    if any(stage.depth and not stage.spatial_mlp for stage in base.stages):
        pairs.append(("the MLP's ratio", base.mlp_ratio, shape.mlp_ratio))
    for what, ours, theirs in pairs:
        if ours != theirs:
            return f"{what}: {_word(ours)}, in the file {_word(theirs)}"
    return None


def _word(value: Any) -> str:
    words: dict[Any, str] = {None: "none"} if not isinstance(value, bool) else {True: "yes", False: "no"}
    return words.get(value, str(value))


def _distance(shape: Architecture, base: Architecture) -> tuple[int, int]:
    """How far a network is from a published one, to name the nearest."""
    widths, others = ([stage.width for stage in a.stages] for a in (shape, base))
    return abs(len(widths) - len(others)), sum(abs(a - b) for a, b in zip(widths, others, strict=False))


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
