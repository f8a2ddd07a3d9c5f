"""Does this machine's runtime give the logits that the bundle says it must?

`visformer validate BUNDLE --self-test` runs the three sample images; docs/export.md has the same in ten lines without
this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visformer.bundles.bundle import Bundle
from visformer.errors import UsageError


@dataclass(frozen=True)
class SelfTest:
    """What came of it: for each sample its name, largest difference, best label and the label that was recorded."""

    bundle: Bundle
    samples: list[dict[str, Any]]
    changed_files: list[str]

    @property
    def passed(self) -> bool:
        return not self.changed_files and all(sample["passed"] for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "bundle": str(self.bundle.path),
            "engine": self.bundle.engine_name,
            "precision": self.bundle.precision,
            "passed": self.passed,
            "tolerance": self.bundle.tolerance,
            "samples": self.samples,
            "changed_files": self.changed_files,
        }


def self_test(bundle: Bundle, *, threads: int | None = None) -> SelfTest:
    """Run the samples. Raises `UsageError` for a sample that can't be read or a bundle without any."""
    if not bundle.samples:
        raise UsageError(f"{bundle.path}: has no sample images to test with")
    changed = bundle.changed_files()
    engine = bundle.engine(threads=threads)
    results = []
    for sample in bundle.samples:
        try:
            with Image.open(sample.path, formats=["PNG"]) as picture:
                array = np.asarray(picture)
        except OSError as error:
            raise UsageError(f"{sample.path}: can't be read as a PNG image ({error})") from None
        logits = engine.run_image(array if array.ndim == 3 else array[:, :, None])
        difference = float(np.abs(logits - sample.logits).max())
        results.append(
            {
                "file": sample.path.relative_to(bundle.path).as_posix(),
                "label": bundle.labels[int(logits.argmax())],
                "recorded_label": bundle.labels[int(sample.logits.argmax())],
                "largest_difference": difference if np.isfinite(difference) else None,
                "passed": bool(difference <= bundle.tolerance),
            }
        )
    return SelfTest(bundle, results, changed)
