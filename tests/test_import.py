"""`import visformer` is instant, and its names appear when they are used."""

import subprocess
import sys
import types

import pytest

import visformer

HEAVY = ("torch", "timm", "torchvision", "numpy", "matplotlib", "jsonargparse", "yaml", "rich")


def loaded_after(code: str) -> str:
    report = f"; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import visformer",
        "import visformer; dir(visformer); visformer.__version__; visformer.train",
        "import visformer.cli",
    ],
)
def test_the_import_loads_nothing_heavy(code):
    assert loaded_after(code) == "[]"


@pytest.mark.parametrize("module", ["config", "errors", "console", "schedule", "options", "helptext"])
def test_the_lower_modules_load_no_torch(module):
    loaded = loaded_after(f"import visformer.{module}")
    assert not {"'torch'", "'timm'", "'numpy'"} & set(loaded.strip("[]").split(", "))


def test_every_public_name_is_there():
    for name in visformer.__all__:
        assert getattr(visformer, name) is not None, name
    assert set(dir(visformer)) == {*visformer.__all__, "__version__"}


def test_models_is_the_subpackage_and_the_verbs_are_functions():
    assert isinstance(visformer.models, types.ModuleType)
    for name in ("train", "validate", "predict", "bench", "quickstart"):
        assert isinstance(getattr(visformer, name), types.FunctionType)
        assert getattr(visformer, name) is getattr(visformer, name)


def test_the_version_is_a_text():
    assert isinstance(visformer.__version__, str)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'visformer' has no attribute 'trian'"):
        _ = visformer.trian
