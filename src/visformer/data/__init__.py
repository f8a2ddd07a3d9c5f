"""From files to batches: decoding, datasets, augmentation, loaders, and the preprocessing in a checkpoint.

The names below load their module when they are first used: preprocessing needs neither timm nor torchvision, which
take longer to import than an image takes to be classified.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visformer.data.arrays import ArraySource
    from visformer.data.batch import Batch
    from visformer.data.datasets import Data, class_mapping, open_data, open_evaluation
    from visformer.data.decode import IMAGE_SUFFIXES, MAX_PIXELS, ImageError, open_image, to_mode
    from visformer.data.folders import FolderSource
    from visformer.data.loader import (
        EvalLoader,
        TrainLoader,
        available_cores,
        make_eval_loader,
        make_train_loader,
    )
    from visformer.data.mixing import DeviceTransform
    from visformer.data.packed import PackedSource
    from visformer.data.policies import build_policy
    from visformer.data.preprocessing import Preprocessing
    from visformer.data.sampler import EpochSampler
    from visformer.data.shards import ShardSource
    from visformer.data.sources import ImageSource, Subset
    from visformer.data.timm_sets import TimmSource
    from visformer.data.transforms import TrainTransform, mix_seed, train_transform

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ArraySource",
    "Batch",
    "Data",
    "DeviceTransform",
    "EpochSampler",
    "EvalLoader",
    "FolderSource",
    "ImageError",
    "ImageSource",
    "PackedSource",
    "Preprocessing",
    "ShardSource",
    "Subset",
    "TimmSource",
    "TrainLoader",
    "TrainTransform",
    "available_cores",
    "build_policy",
    "class_mapping",
    "make_eval_loader",
    "make_train_loader",
    "mix_seed",
    "open_data",
    "open_evaluation",
    "open_image",
    "to_mode",
    "train_transform",
]

_MODULES = {  # name -> module that has it
    "ArraySource": "arrays",
    "Data": "datasets",
    "class_mapping": "datasets",
    "open_data": "datasets",
    "open_evaluation": "datasets",
    "IMAGE_SUFFIXES": "decode",
    "MAX_PIXELS": "decode",
    "ImageError": "decode",
    "open_image": "decode",
    "to_mode": "decode",
    "FolderSource": "folders",
    "Batch": "batch",
    "EvalLoader": "loader",
    "TrainLoader": "loader",
    "available_cores": "loader",
    "make_eval_loader": "loader",
    "make_train_loader": "loader",
    "DeviceTransform": "mixing",
    "PackedSource": "packed",
    "build_policy": "policies",
    "Preprocessing": "preprocessing",
    "EpochSampler": "sampler",
    "ShardSource": "shards",
    "ImageSource": "sources",
    "Subset": "sources",
    "TimmSource": "timm_sets",
    "TrainTransform": "transforms",
    "mix_seed": "transforms",
    "train_transform": "transforms",
}


def __getattr__(name: str) -> Any:
    """Import what a name stands for, once (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'visformer.data' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"visformer.data.{_MODULES[name]}"), name)
    return value
