"""Our checkpoints as files that the other projects' own loaders take.

What the other project cannot express is refused, or with `allow_loss` left out; what its code computes otherwise (the
form of GELU) is measured on the spot and said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from visformer.checkpoint import Checkpoint, write_safetensors
from visformer.conversion.layouts import LAYOUTS, Layout
from visformer.conversion.mindspore import write_ckpt
from visformer.conversion.pickles import write_pth
from visformer.conversion.reading import COUNTER, in_memory
from visformer.errors import UsageError
from visformer.models import Architecture
from visformer.models.attention import Windows

SUFFIXES = {"mindcv": (".ckpt",), "authors": (".pth", ".pt"), "timm": (".safetensors", ".pth", ".pt", ".bin")}
BLOCKED = -100.0  # what the authors' masks add to the logits of a pair that is not to meet


@dataclass
class Written:
    """What `write_as` did: our names with the file's, tensors added for the other's loader, and what to know."""

    taken: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_as(path: str | Path, checkpoint: Checkpoint, to: str, *, allow_loss: bool = False) -> Written:
    """Write `checkpoint` in the layout of mindcv, authors or timm to `path`, whole or not at all.

    Raises `UsageError` when that project has no such model, when something would be lost and `allow_loss` is not set,
    or when the file's suffix is none of the project's.
    """
    path, layout = Path(path), LAYOUTS[to]
    check_suffix(path, to)
    written = Written()
    checkpoint = _PREPARE[to](checkpoint, written, allow_loss)
    tensors = _renamed(checkpoint, layout, written)
    if to == "authors":
        added = _buffers(checkpoint.architecture)
        written.added += [name for name in added if name not in tensors]
        tensors |= added
    _note_gelu(checkpoint, layout, written)
    if to == "mindcv":
        write_ckpt(path, tensors)
    elif path.suffix == ".safetensors":
        write_safetensors(path, tensors, {"format": "pt"})
    else:
        write_pth(path, {"model": tensors} if to == "authors" else tensors)
    return written


def check_suffix(path: Path, to: str) -> None:
    """Raise `UsageError` unless `path` ends as the project's loader expects."""
    if path.suffix not in SUFFIXES[to]:
        raise UsageError(f"{path}: a file for {LAYOUTS[to].project} must end in {' or '.join(SUFFIXES[to])}")


def _renamed(checkpoint: Checkpoint, layout: Layout, written: Written) -> dict[str, Tensor]:
    """The tensors under the other project's names, in our order."""
    names, tensors = layout.names(checkpoint.architecture, checkpoint.state_dict), {}
    for ours, tensor in checkpoint.state_dict.items():
        name = names[ours]
        if ours.endswith(COUNTER) and layout.name == "mindcv":
            if not tensor.item():
                continue  # MindCV keeps none, and reading its file gives 0
            tensor = tensor.reshape(1)
        tensors[name.theirs] = tensor.reshape((*tensor.shape, *(1,) * name.trailing_axes))
        written.taken[ours] = name.theirs
    return tensors


# --- what each project can express ------------------------------------------------------------------------------------


def _for_timm(checkpoint: Checkpoint, written: Written, allow_loss: bool) -> Checkpoint:
    architecture = checkpoint.architecture
    if not (len(architecture.stages) == 3 and _is_pyramid(architecture)):
        raise UsageError(
            f"timm's Visformer is V1, with three stages: visformer_tiny and visformer_small; it has no "
            f"{checkpoint.model_name}. `import visformer.models` makes timm.create_model know ours"
        )
    if architecture.qk_scale_power != -0.25:
        raise UsageError(
            f"timm scales q and k by head_dim^-0.25 each, this model by head_dim^{architecture.qk_scale_power:g}; "
            "its logits there would be wrong"
        )
    return _note_size(checkpoint, written, "img_size")


def _for_mindcv(checkpoint: Checkpoint, written: Written, allow_loss: bool) -> Checkpoint:
    architecture = checkpoint.architecture
    windowed = any(stage.window for stage in architecture.stages)
    plain = replace(architecture, stages=tuple(replace(stage, window=None) for stage in architecture.stages))
    if not _is_pyramid(plain):
        raise UsageError(
            "MindCV has visformer_tiny, visformer_tiny_v2, visformer_small and visformer_small_v2, and networks of "
            f"their build; it has no {checkpoint.model_name}"
        )
    checkpoint = _note_size(checkpoint, written, "img_size")
    if not windowed:
        return checkpoint
    tables = [name for name in checkpoint.state_dict if name.endswith(".position_bias.table")]
    rest = {name: tensor for name, tensor in checkpoint.state_dict.items() if name not in tables}
    lesser = replace(checkpoint, architecture=plain, state_dict=rest)
    if all(not checkpoint.state_dict[name].any() for name in tables) and _one_window(architecture):
        return lesser
    cost = logit_difference(checkpoint, lesser)
    loss = f"MindCV has no windows and no relative position bias ({len(tables)} tables); logits change by {cost:.1e}"
    if not allow_loss:
        raise UsageError(f"{loss}; --allow_loss writes the file without them")
    written.notes.append(loss)
    return lesser


def _for_authors(checkpoint: Checkpoint, written: Written, allow_loss: bool) -> Checkpoint:
    architecture = checkpoint.architecture
    if len(architecture.stages) == 4 and not any(stage.window for stage in architecture.stages):
        checkpoint = _with_zero_bias(checkpoint)
        architecture = checkpoint.architecture
        written.notes.append(
            "the authors' V2 has a relative position bias: it is written as zero, which changes nothing"
        )
    if architecture.qk_scale_power != -0.25:
        written.notes.append(f"start the authors' code with --qk-scale-factor={architecture.qk_scale_power:g}")
    for i, (stage, grid) in enumerate(zip(architecture.stages, architecture.grids, strict=True)):
        window = min(stage.window or 1, *grid)
        if stage.window and (grid[0] != grid[1] or grid[0] % window):
            raise UsageError(
                f"the authors' code cannot run at {architecture.image_size}: the map of stage {i}, {grid[0]}x{grid[1]},"
                f" is no square of whole {window}x{window} windows; --image_size 224 makes one that it can"
            )
    if any(
        stage.window and stage.window > min(g) for stage, g in zip(architecture.stages, architecture.grids, strict=True)
    ):
        checkpoint = _with_small_windows(checkpoint)
        written.notes.append("tables of position biases are cut to the windows that the authors' code has at this size")
    return checkpoint


_PREPARE: dict[str, Callable[[Checkpoint, Written, bool], Checkpoint]] = {
    "timm": _for_timm,
    "mindcv": _for_mindcv,
    "authors": _for_authors,
}


def _is_pyramid(architecture: Architecture) -> bool:
    """Whether a network is of the build that timm and MindCV have: spatial MLPs first, attention in two last stages."""
    stages, widths = architecture.stages, [stage.width for stage in architecture.stages]
    patches = {3: [4, 2, 2], 4: [2, 2, 2, 2]}.get(len(stages))
    return (
        patches == [stage.patch_size for stage in stages]
        and bool(architecture.stem_width)
        and architecture.norm == "batch"
        and architecture.embed_norm
        and architecture.pos_embed
        and all(2 * a == b for a, b in pairwise(widths))
        and all(stage.head_dim is None and stage.window is None and stage.depth for stage in stages)
        and all(stage.spatial_mlp and not stage.attention for stage in stages[:-2])
        and all(stage.attention and not stage.spatial_mlp for stage in stages[-2:])
    )


def _one_window(architecture: Architecture) -> bool:
    """Whether each stage's window holds its whole map, so that attention is global."""
    return all(
        not stage.window or stage.window >= max(grid)
        for stage, grid in zip(architecture.stages, architecture.grids, strict=True)
    )


def _note_size(checkpoint: Checkpoint, written: Written, name: str) -> Checkpoint:
    height, width = checkpoint.architecture.image_size
    if (height, width) != (224, 224):
        written.notes.append(f"create the model there for {height}x{width} pixels ({name})")
    return checkpoint


# --- the authors' windows ---------------------------------------------------------------------------------------------


def _with_zero_bias(checkpoint: Checkpoint) -> Checkpoint:
    """The same network with windows that hold each whole map, and tables of zeros."""
    architecture, tensors = checkpoint.architecture, dict(checkpoint.state_dict)
    stages = []
    for i, (stage, grid) in enumerate(zip(architecture.stages, architecture.grids, strict=True)):
        window = max(grid) if stage.attention else None
        stages.append(replace(stage, window=window))
        for block in range(stage.depth if window else 0):
            tensors[_table(i, block)] = torch.zeros((2 * max(grid) - 1) ** 2, stage.num_heads)
    return replace(checkpoint, architecture=replace(architecture, stages=tuple(stages)), state_dict=tensors)


def _with_small_windows(checkpoint: Checkpoint) -> Checkpoint:
    """The same network with windows no larger than the maps, and the middle of each table."""
    architecture, tensors = checkpoint.architecture, dict(checkpoint.state_dict)
    stages = []
    for i, (stage, grid) in enumerate(zip(architecture.stages, architecture.grids, strict=True)):
        window = stage.window and min(stage.window, *grid)
        stages.append(replace(stage, window=window))
        for block in range(stage.depth if stage.window else 0):
            table, side = tensors[_table(i, block)], 2 * (stage.window or 0) - 1
            cut = (stage.window or 0) - (window or 0)
            middle = table.unflatten(0, (side, side))[cut : side - cut, cut : side - cut]
            tensors[_table(i, block)] = middle.flatten(0, 1).contiguous()
    return replace(checkpoint, architecture=replace(architecture, stages=tuple(stages)), state_dict=tensors)


def _table(stage: int, block: int) -> str:
    return f"stages.{stage}.blocks.{block}.attn.branch.position_bias.table"


def _buffers(architecture: Architecture) -> dict[str, Tensor]:
    """What the authors' windowed models keep beside their weights: index into the table, mask of shifted windows."""
    tensors, number = {}, 0
    for i, (stage, grid) in enumerate(zip(architecture.stages, architecture.grids, strict=True)):
        for block in range(stage.depth):
            if stage.window:
                name = f"stage{i}.{block}"
                tensors[f"{name}.attn.relative_position_index"] = relative_position_index(stage.window)
                if number % 2 and min(grid) > stage.window:
                    windows = Windows.over(grid, stage.window, shifted=True)
                    apart = windows.mask(torch.zeros(1, stage.window**2, stage.window**2))[0]
                    tensors[f"{name}.attn_mask"] = apart.clamp(min=BLOCKED)
            number += 1
    return tensors


def relative_position_index(window: int) -> Tensor:
    """(N, N) int64 with N = window ** 2: the row of the bias table for each pair of query and key."""
    places = torch.arange(window**2)
    rows, columns = places // window, places % window
    apart = (axis[:, None] - axis[None] + window - 1 for axis in (rows, columns))
    down, right = apart
    return down * (2 * window - 1) + right


# --- what a difference costs ------------------------------------------------------------------------------------------


def _note_gelu(checkpoint: Checkpoint, layout: Layout, written: Written) -> None:
    gelu = checkpoint.architecture.gelu
    if layout.gelu and gelu != layout.gelu:
        other = replace(checkpoint, architecture=replace(checkpoint.architecture, gelu=layout.gelu))
        cost = logit_difference(checkpoint, other)
        written.notes.append(
            f"{layout.project} computes GELU in the {layout.gelu} form, this model was made with {gelu}: its logits "
            f"there differ by {cost:.1e}, and reading the file back takes --gelu {gelu}"
        )


@torch.no_grad()
def logit_difference(one: Checkpoint, other: Checkpoint) -> float:
    """Largest difference of the logits for one image of noise, normalised."""
    image = torch.randn(
        1, one.architecture.in_channels, *one.architecture.image_size, generator=torch.Generator().manual_seed(0)
    )
    first, second = (replace(c, state_dict=in_memory(c.state_dict)).build()(image) for c in (one, other))
    return (first - second).abs().max().item()
