"""A checkpoint as what a `Predictor` asks, computed by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from visformer.data.decode import Box
from visformer.data.preprocessing import Preprocessing
from visformer.distributed import select_device
from visformer.fusion.fused import for_inference
from visformer.pretrained import load


class TorchClassifier:
    """A model that carries its `class_names` and `preprocessing`, or the path or name of one; on a CPU and on CUDA it
    is fused. See `Predictor` for the options."""

    def __init__(self, model: str | Path | nn.Module, device: str, amp_level: str, amp_dtype: str) -> None:
        self._device = select_device(device)
        loaded: Any = model if isinstance(model, nn.Module) else load(model)
        self.class_names: list[str] = loaded.class_names
        self._preprocessing: Preprocessing = loaded.preprocessing
        self.in_channels, self.reduces = self._preprocessing.in_channels, self._preprocessing.reduces
        self._network = for_inference(loaded, self._device, amp_level, amp_dtype)

    def pixels(self, image: Image.Image, box: Box | None) -> np.ndarray:
        """See `Classifier`."""
        return self._preprocessing(image, box).permute(1, 2, 0).numpy()

    @torch.no_grad()
    def best(self, batch: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Classifier`."""
        images = torch.from_numpy(batch).permute(0, 3, 1, 2).to(self._device)  # channels_last as it is
        logits = self._network(self._preprocessing.normalize(images))
        finite = logits.isfinite().all(dim=1)
        # A stable sort, so that equal classes come in their order on every device.
        probabilities, order = logits.float().softmax(dim=1).sort(dim=1, descending=True, stable=True)
        return finite.cpu().numpy(), probabilities[:, :count].cpu().numpy(), order[:, :count].cpu().numpy()
