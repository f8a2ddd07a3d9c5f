"""From files to batches: decoding, datasets, augmentation, loaders, and the preprocessing in a checkpoint."""

from visformer.data.arrays import ArraySource
from visformer.data.datasets import Data, class_mapping, open_data, open_evaluation
from visformer.data.decode import IMAGE_SUFFIXES, MAX_PIXELS, ImageError, open_image, to_mode
from visformer.data.folders import FolderSource
from visformer.data.loader import Batch, EvalLoader, TrainLoader, available_cores, make_eval_loader, make_train_loader
from visformer.data.mixing import DeviceTransform
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
