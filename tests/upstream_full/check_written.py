"""What `visformer convert --to LAYOUT` wrote, read by the other project's own loader: its logits against upstream's.

    ENV/bin/python tests/upstream_full/check_written.py mindcv OUT FOLDER      # ENV: see write_mindcv.py
    python tests/upstream_full/check_written.py authors OUT FOLDER CHECKOUT    # CHECKOUT: see write_authors.py
    python tests/upstream_full/check_written.py timm OUT FOLDER

OUT is what the write_*.py scripts filled, FOLDER what `compare.py OUT --round-trips FOLDER` wrote. Loading is strict:
a missing tensor or one too many is an error, but for PyTorch's counters, which MindCV passes over. A file that has come
from MindCV to the others, or from them to MindCV, runs with the other form of GELU there; the difference that this
makes is shown, and judged at 2e-3 only.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIMIT = 5e-5
OTHER_GELU = 2e-3


def main(project: str, out: Path, folder: Path, checkout: str = "") -> int:
    logits_of = {"mindcv": with_mindcv, "authors": with_authors(checkout), "timm": with_timm}[project]
    files = sorted(folder.glob(f"*.to-{project}.*"))
    wrong = 0
    for path in files:
        source, model = path.name.split(".")[:2]
        expected = reference(out, path.name)
        try:
            logits = logits_of(model, path, expected["input"])
        except Exception as error:  # the next file is tried
            wrong += 1
            print(f"{path.name:62} REFUSED: {type(error).__name__}: {error}", flush=True)
            continue
        difference = min(np.abs(logits - expected[key]).max() for key in expected if key in ("logits", "logits_ema"))
        crossed = (source == "mindcv") != (project == "mindcv")
        bad = not difference <= (OTHER_GELU if crossed else LIMIT)
        wrong += bad
        remark = (" other GELU" if crossed else "") + (" TOO FAR" if bad else "")
        print(f"{path.name:62} {difference:8.1e}{remark}", flush=True)
    print(f"{len(files)} files, {wrong} wrong; the limit is {LIMIT:g}")
    return 1 if wrong or not files else 0


def reference(out: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of OUT whose name is the longest beginning of `name`."""
    while name:
        if (out / f"{name}.npz").exists():
            with np.load(out / f"{name}.npz") as arrays:
                return dict(arrays)
        name = name.rpartition(".")[0]
    raise FileNotFoundError(f"{out}: no .npz that goes with it")


def with_mindcv(name: str, path: Path, images: np.ndarray) -> np.ndarray:
    import mindcv
    import mindspore

    model = mindcv.create_model(name)
    missing, unused = mindspore.load_param_into_net(model, mindspore.load_checkpoint(str(path)), strict_load=True)
    unused = [key for key in unused if not key.endswith("num_batches_tracked")]  # PyTorch's counters; MindCV keeps none
    assert not missing and not unused, f"missing {missing[:3]}, unused {unused[:3]}"
    model.set_train(False)
    return model(mindspore.Tensor(images)).asnumpy()


def with_authors(checkout: str) -> Callable[[str, Path, np.ndarray], np.ndarray]:
    def logits_of(name: str, path: Path, images: np.ndarray) -> np.ndarray:
        import torch
        from write_authors import SHIFTED, ChannelNorm, shifted

        sys.path.insert(0, checkout)
        name = f"swin_{name}" if name.startswith("visformer") and name.endswith("v2") else name  # as they call V2
        module = importlib.import_module("swin_models" if name.startswith("swin") else "models")
        if not name.startswith("swin"):
            vars(module)["LayerNorm"] = ChannelNorm
        scale = {"qk_scale": -0.5} if name.endswith("v2") else {}
        model = shifted(module) if SHIFTED in path.name else getattr(module, name)(**scale)
        document = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(document.get("model", document))
        with torch.no_grad():
            return model.eval()(torch.from_numpy(images)).numpy()

    return logits_of


def with_timm(name: str, path: Path, images: np.ndarray) -> np.ndarray:
    import timm
    import torch

    model = timm.create_model(name, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: check_written.py mindcv|authors|timm OUT FOLDER [CHECKOUT]")
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:5]))
