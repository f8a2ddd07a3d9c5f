"""`visformer convert SRC DST`: any published checkpoint as one of ours, and ours as one of another project's.

    visformer convert visformer_small-6c83b6db.ckpt visformer_small.safetensors
    visformer convert run/best.safetensors best.ckpt --to mindcv

Whose file it is and which model it holds are told from the tensors. Every tensor is accounted for, and what shapes
cannot tell is said with the reason; nothing is written unless all of it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visformer import console
from visformer.config import option
from visformer.errors import RunError, UsageError

if TYPE_CHECKING:
    from visformer.checkpoint import Checkpoint
    from visformer.conversion import Conversion, Written

SHOWN = 3  # names of each kind in the text report; --json has them all


@dataclass
class ConvertOptions:
    """Options of `visformer convert`; see each field's help."""

    src: str = option(
        "",
        "checkpoint to read: MindCV's .ckpt, the authors' .pth, timm's .safetensors or .pth, ours; also a URL, "
        "hf-hub:owner/name, or a published weight's name such as visformer_small.timm",
        group="Files",
        positional=True,
    )
    dst: str = option("", "file to write; its suffix must be the format's", positional=True)
    to: Literal["visformer", "mindcv", "authors", "timm"] = option(
        "visformer",
        "whose format to write: visformer .safetensors, mindcv .ckpt, authors .pth, timm .safetensors or .pth",
    )
    overwrite: bool = option(False, "replace DST if it is there")
    model: str = option(
        "",
        "model that the file holds; empty: told from its tensors. With .mindcv, .authors or .timm after it, as in "
        "visformer_small.mindcv, that project's GELU and preprocessing are taken",
        group="What the file does not say",
    )
    num_heads: tuple[int, ...] | None = option(
        None, "attention heads of each stage, for a network of no published shape; None: the published model's"
    )
    gelu: Literal["erf", "tanh"] | None = option(None, "form of GELU; None: MindCV's files tanh, all others erf")
    qk_scale_power: float | None = option(
        None, "q and k are each scaled by head_dim to this power; None: -0.25, and -0.5 for V2"
    )
    class_names: str = option(
        "", "text file with the classes' names, one a line; empty: ImageNet's for 1,000, else 0, 1, ..."
    )
    weights: Literal["ema", "model"] = option("ema", "ema: the weights' moving average where the file has one")
    image_size: int | tuple[int, int] | None = option(
        None,
        "side, or height and width, in pixels that position embeddings are resampled to; None: as in the file",
        group="Changes",
    )
    num_classes: int | None = option(None, "classes of the head; another number than the file's needs new_head")
    new_head: bool = option(False, "begin a new head for num_classes classes")
    allow_loss: bool = option(False, "write what the other project can express and leave out the rest")
    json: bool = option(False, "print the report as one JSON document on stdout", group="Output")

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 0:
            raise UsageError(f"num_classes: {self.num_classes} is out of range; it must be at least 0")


@dataclass
class ConvertResult:
    """What was read, what was written, and each tensor's account. `written` is None where ours was written."""

    src: str
    dst: Path
    to: str
    conversion: Conversion
    written: Written | None
    params: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. `taken` pairs our names with those of SRC, `written` with those of DST."""
        checkpoint, written = self.conversion.checkpoint, self.written
        return {
            "src": self.src,
            "dst": str(self.dst),
            "to": self.to,
            "container": self.conversion.container,
            "layout": self.conversion.layout,
            "model": checkpoint.model_name,
            "params": self.params,
            "num_classes": checkpoint.architecture.num_classes,
            "architecture": checkpoint.architecture.to_dict(),
            "preprocessing": checkpoint.preprocessing.to_dict(),
            "taken": self.conversion.taken,
            "filled": self.conversion.filled,
            "left_out": [{"name": name, "reason": reason} for name, reason in self.conversion.left_out],
            "written": written.taken if written else {name: name for name in checkpoint.state_dict},
            "added": written.added if written else [],
            "notes": self.conversion.notes + (written.notes if written else []),
        }


def run(options: ConvertOptions) -> int:
    """Convert, print the report, and return the exit code."""
    result = convert(options)
    if options.json:
        console.print_json(result.to_dict())
    else:
        print("\n".join(_report(result)))
    return 0


def convert(options: ConvertOptions) -> ConvertResult:
    """Convert a checkpoint; DST appears whole or not at all, and nothing is printed on stdout.

    Raises `UsageError` for a file that is no Visformer's, that does not fit, or that would lose something.
    """
    from visformer.checkpoint import write_checkpoint
    from visformer.conversion import Choices, check_suffix, convert_file, name_and_source, write_as
    from visformer.hub import fetch

    destination = _destination(options)
    if options.to != "visformer":
        check_suffix(destination, options.to)
    name, source = name_and_source(options.model)
    if Path(options.src).is_symlink():
        raise UsageError(f"{options.src}: a symbolic link; give the file itself, {Path(options.src).resolve()}")
    fetched = fetch(options.src)
    if destination.exists() and destination.samefile(fetched.path):
        raise UsageError(f"{destination}: SRC and DST are the same file")
    conversion = convert_file(
        fetched.path,
        Choices(name or fetched.model, options.gelu, options.qk_scale_power, options.num_heads),
        source=source or fetched.source,
        class_names=None if options.new_head else _read_names(options.class_names),
        ema=options.weights == "ema",
    )
    checkpoint = conversion.checkpoint = _changed(conversion, options)
    written = None
    if options.to == "visformer":
        write_checkpoint(destination, checkpoint)
    else:
        written = write_as(destination, checkpoint, options.to, allow_loss=options.allow_loss)
    params = sum(t.numel() for n, t in checkpoint.state_dict.items() if "running_" not in n and "num_batches" not in n)
    return ConvertResult(options.src, destination, options.to, conversion, written, params)


def _destination(options: ConvertOptions) -> Path:
    if not options.src or not options.dst:
        missing = "DST is" if options.src else "SRC and DST are"
        raise UsageError(f"{missing} missing; as in: visformer convert visformer_small.ckpt small.safetensors")
    path = Path(options.dst)
    if path.is_dir():
        raise UsageError(f"{path}: DST is a folder; give the file's name, as in {path / 'visformer.safetensors'}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path}: DST is a link or a device; give an ordinary file's name")
    if path.exists() and not options.overwrite:
        raise UsageError(f"{path}: it is there already; --overwrite True replaces it")
    if options.to == "visformer" and path.suffix != ".safetensors":
        raise UsageError(f"{path}: our checkpoints end in .safetensors; --to writes another project's format")
    return path


def _read_names(path: str) -> list[str] | None:
    if not path:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"class_names: {path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"class_names: {path} is no text in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def _changed(conversion: Conversion, options: ConvertOptions) -> Checkpoint:
    """The checkpoint with the head and the image size that the options ask for."""
    from visformer.conversion import resized, with_new_head

    checkpoint = conversion.checkpoint
    num_classes = checkpoint.architecture.num_classes
    names = _read_names(options.class_names)
    wanted = (
        options.num_classes if options.num_classes is not None else len(names) if names is not None else num_classes
    )
    if wanted != num_classes and not options.new_head:
        raise UsageError(
            f"num_classes: {options.src} has {num_classes} classes, not {wanted}; --new_head True begins a new head"
        )
    if options.new_head:
        checkpoint = with_new_head(checkpoint, wanted, names)
        conversion.notes.append(f"a new head for {wanted} classes, not trained yet")
    elif names is not None and conversion.layout == "visformer":
        checkpoint = replace(checkpoint, class_names=names)
    if options.image_size is not None:
        checkpoint = resized(checkpoint, options.image_size)
        height, width = checkpoint.architecture.image_size
        how = ", position embeddings resampled" if checkpoint.architecture.pos_embed else ""
        conversion.notes.append(f"set to {height}x{width} pixels{how}")
    return checkpoint


def _report(result: ConvertResult) -> list[str]:
    """The account in lines for a person."""
    from visformer.conversion import CONTAINERS, LAYOUTS

    conversion, checkpoint = result.conversion, result.conversion.checkpoint
    architecture, preprocessing = checkpoint.architecture, checkpoint.preprocessing
    height, width = architecture.image_size
    lines = [
        f"{result.src}: {CONTAINERS[conversion.container]} with {LAYOUTS[conversion.layout].project}'s names",
        f"  model          {checkpoint.model_name}, {result.params:,} parameters, {height}x{width} pixels, "
        f"{architecture.num_classes:,} classes",
        f"  preprocessing  crop_pct {preprocessing.crop_pct:g}, {preprocessing.interpolation}, "
        f"{'antialiased' if preprocessing.antialias else 'not antialiased'}, "
        f"crop offset rounded {'down' if preprocessing.crop_rounding == 'floor' else 'to the nearest'}",
        f"  tensors        {len(conversion.taken):,} taken"
        + (f", {len(conversion.filled):,} counters begun at 0" if conversion.filled else "")
        + (f", {len(conversion.left_out):,} left out" if conversion.left_out else ""),
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in conversion.left_out:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        lines.append(f"  left out       {', '.join(names[:SHOWN])}{more}: {reason}")
    written = result.written
    if written and written.added:
        lines.append(
            f"  added          {len(written.added):,} tensors that {LAYOUTS[result.to].project}'s loader expects"
        )
    lines += [f"  note           {note}" for note in conversion.notes + (written.notes if written else [])]
    try:
        size = result.dst.stat().st_size
    except OSError as error:
        raise RunError(f"{result.dst}: {error.strerror}") from error
    return [*lines, f"written to {result.dst} ({size / 1e6:,.1f} MB, {LAYOUTS[result.to].project}'s format)"]
