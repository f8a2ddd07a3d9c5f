"""The models. Importing this package also registers them with timm (see `timm_models.py`)."""

from visformer.models.architecture import Architecture, StageConfig
from visformer.models.timm_models import register
from visformer.models.variants import VARIANTS, architecture, change, create_model, list_models, variant
from visformer.models.visformer import Visformer

__all__ = [
    "VARIANTS",
    "Architecture",
    "StageConfig",
    "Visformer",
    "architecture",
    "change",
    "create_model",
    "list_models",
    "variant",
]

register()
