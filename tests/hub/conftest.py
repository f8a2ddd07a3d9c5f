"""Every test of this folder has caches of its own and waits for nothing, and none reaches beyond this machine."""

import sys

import pytest

import visformer.hub  # noqa: F401 (its modules are looked up by name)
from tests.hub.fake_hub import serving_hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of downloads."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VISFORMER_CACHE", str(folder))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between attempts, and little for a silent server."""
    monkeypatch.setattr(sys.modules["visformer.hub.download"], "BACKOFF_S", 0.01)
    monkeypatch.setattr(sys.modules["visformer.hub.https"], "TIMEOUT_S", 2.0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub on this machine that the client takes for the real one, with an empty cache and nobody logged in."""
    import huggingface_hub
    from huggingface_hub import constants

    with serving_hub() as fake:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()
        yield fake
        huggingface_hub.close_session()
