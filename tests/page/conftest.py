"""A server of a small model, and Chromium to look at its page; without Chromium the page's own tests are skipped."""

import shutil

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from tests.page.models import photo, served, write_model


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "pets.safetensors")


@pytest.fixture(scope="package")
def server(checkpoint):
    """The URL of a server of one model called `pets`."""
    with served([str(checkpoint)]) as url:
        yield url


@pytest.fixture(scope="package")
def photos(tmp_path_factory):
    """Three pictures: wide, tall, and a PNG of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = {"wide.jpg": (300, 200), "it's tall.jpg": (200, 320), "tiny.png": (8, 8)}
    return [photo(folder / name, size, seed) for seed, (name, size) in enumerate(sizes.items())]


@pytest.fixture(scope="module")
def chromium():
    """Chromium, for one module: while it is there, its driver's event loop is in the way of other tests'."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--use-fake-device-for-media-stream"]
        launched = driver.chromium.launch(executable_path=program, args=options)
        yield launched
        launched.close()
