"""`POST /explain`, as a client sees it."""

import importlib.util
import io
import json
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.page.models import CLASSES, SIDE, photo, served, write_model
from visformer.bundles.pixels import ImagePreprocessing
from visformer.pretrained import load
from visformer.serving import heatmaps
from visformer.verbs.predictor import Predictor


def post(url: str, body: bytes, path: str = "explain", **query):
    """The status and the JSON of an answer."""
    request = urllib.request.Request(f"{url}/{path}?{urllib.parse.urlencode(query)}", data=body)
    request.add_header("Content-Type", "application/octet-stream")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def wide(photos):
    return photos[0].read_bytes()


def test_activation_is_of_the_best_class_and_sums_to_its_logit(server, checkpoint, photos, wide):
    status, answer = post(server, wide)
    assert status == 200
    assert (answer["model"], answer["version"], answer["method"], answer["unit"]) == (
        "pets",
        "1",
        "activation",
        "logit",
    )
    assert answer["methods"] == ["activation", "attention", "occlusion"]
    best = Predictor(checkpoint, device="cpu").predict([photos[0]])[0]["predictions"][0]
    assert answer["label"] == best["label"]
    model = load(checkpoint)
    pixels = model.preprocessing.normalize(model.preprocessing(Image.open(photos[0]))[None])
    logit = model(pixels)[0, answer["index"]].item()
    assert answer["scale"] * np.sum(answer["values"]) == pytest.approx(logit, rel=1e-3, abs=1e-2)
    assert np.abs(answer["values"]).max() == 1


def test_a_class_can_be_chosen(server, wide):
    answers = [post(server, wide, index=index)[1] for index in range(len(CLASSES))]
    assert [answer["label"] for answer in answers] == CLASSES
    assert answers[0]["description"] == "golden retriever"
    assert "description" not in answers[1]
    assert answers[1]["values"] != answers[2]["values"]


def test_attention_sums_to_one(server, wide):
    _, answer = post(server, wide, method="attention")
    assert (answer["method"], answer["unit"]) == ("attention", "share")
    assert answer["scale"] * np.sum(answer["values"]) == pytest.approx(1, abs=1e-3)
    assert np.min(answer["values"]) > 0


def test_occlusion_is_what_covering_does(server, checkpoint, photos, wide):
    _, answer = post(server, wide, method="occlusion", index=3)
    model = load(checkpoint)
    row = model.preprocessing.normalize(model.preprocessing(Image.open(photos[0]))[None])[0].numpy()
    grid = heatmaps.occlusion_grid(SIDE, SIDE)
    covered = np.stack(list(heatmaps.occluded(row, grid)))
    import torch

    with torch.no_grad():
        logits = model(torch.from_numpy(np.concatenate([row[None], covered]))).numpy()
    fall = heatmaps.log_odds(logits[0], 3) - heatmaps.log_odds(logits[1:], 3).reshape(grid)
    np.testing.assert_allclose(answer["scale"] * np.array(answer["values"]), fall, atol=1e-3 * np.abs(fall).max())


def test_a_turned_photo_is_upright(server):
    """EXIF orientation 6: stored 300 x 200, seen 200 x 300."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200), (90, 120, 30)).save(file, "JPEG", exif=exif)
    _, answer = post(server, file.getvalue(), method="attention")
    assert answer["image"] == {"width": 200, "height": 300}
    preprocessing = ImagePreprocessing((SIDE, SIDE), 0.875, "bicubic", True, "round", (0.0,) * 3, (1.0,) * 3, 3)
    assert answer["crop"] == heatmaps.crop_box(preprocessing, 300, 200).to_dict()
    assert answer["grid"] == answer["crop"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"method": "guess"}, "'guess' is not possible"),
        ({"index": len(CLASSES)}, "the model has 5 classes"),
        ({"index": -1}, "index"),
        ({"model": "cats"}, "cats"),
    ],
)
def test_what_can_not_be_is_said(server, wide, query, words):
    status, answer = post(server, wide, **query)
    assert 400 <= status < 500
    assert words in answer["error"]


def test_what_is_no_image_is_refused(server):
    for method in ("activation", "occlusion"):
        status, answer = post(server, b"not an image", method=method)
        assert status == 400
        assert "can't be read" in answer["error"]


def test_maps_that_patches_fill_up_reach_over_the_crop(tmp_path):
    """56 pixels are three and a half patches of 16: the fourth row and column lie half outside."""
    from tests.page.models import small_model
    from visformer.checkpoint import Checkpoint, write_checkpoint
    from visformer.data.preprocessing import Preprocessing

    model, path = small_model(image_size=(56, 56)), tmp_path / "odd.safetensors"
    preprocessing = Preprocessing((56, 56), crop_pct=1.0)
    write_checkpoint(path, Checkpoint("visformer_tiny", model.config, CLASSES, preprocessing, model.state_dict()))
    with served([str(path)]) as url:
        body = photo(tmp_path / "square.png", (112, 112)).read_bytes()
        _, answer = post(url, body)
        assert np.shape(answer["values"]) == (4, 4)
        assert answer["crop"] == {"left": 0, "top": 0, "width": 112, "height": 112}
        assert answer["grid"] == {"left": 0, "top": 0, "width": 128, "height": 128}
        _, covered = post(url, body, method="occlusion")
        assert covered["grid"] == covered["crop"]


def test_the_browser_is_told_where_the_time_went(server, wide):
    request = urllib.request.Request(f"{server}/predict", data=wide, headers={"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=60) as response:
        header = response.headers["Server-Timing"]
    times = {name: float(duration) for name, duration in (part.split(";dur=") for part in header.split(", "))}
    assert set(times) == {"read", "decode", "queue", "compute", "total"}
    assert all(value >= 0 for value in times.values())
    assert times["decode"] + times["queue"] + times["compute"] <= times["total"]


@pytest.mark.parametrize("kind", ["onnx fp32 image", "onnx fp16 tensor", "openvino fp32 image"])
def test_a_bundle_is_explained_as_its_checkpoint_is(tmp_path, checkpoint, wide, kind):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino" if kind.startswith("openvino") else "onnxruntime")
    from visformer.bundles.build import Request, build

    build(load(checkpoint), Request(*kind.split(), checkpoint=str(checkpoint)), tmp_path / "bundle")
    with served([str(tmp_path / "bundle"), f"torch={checkpoint}"]) as url:
        for method in ("activation", "occlusion"):
            _, answer = post(url, wide, model="bundle", method=method, index=0)
            _, same = post(url, wide, model="torch", method=method, index=0)
            assert answer["methods"] == ["activation", "occlusion"]
            assert (answer["crop"], answer["grid"]) == (same["crop"], same["grid"])
            assert answer["scale"] == pytest.approx(same["scale"], rel=2e-2)
            np.testing.assert_allclose(answer["values"], same["values"], atol=3e-2)
        _, by_itself = post(url, wide, model="bundle")
        assert by_itself["method"] == "activation"


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_int8_bundle_is_explained_to_its_own_precision(tmp_path, checkpoint, wide, format):
    """Its logits are numbers of eight bits too, so places sum to them but roughly; the map is like its checkpoint's."""
    if importlib.util.find_spec("onnxruntime" if format == "onnx" else "nncf") is None:
        pytest.skip("the packages of visformer[export] are not installed")
    from visformer.bundles.build import Request, build
    from visformer.bundles.samples import generated

    calibration = [lambda seed=seed: generated((80, 90), 3, seed) for seed in range(16)]
    request = Request(format, "int8", "tensor", checkpoint=str(checkpoint), calibration=calibration)
    build(load(checkpoint), request, tmp_path / "bundle")
    with served([str(tmp_path / "bundle"), f"torch={checkpoint}"]) as url:
        _, answer = post(url, wide, model="bundle", index=3)
        _, same = post(url, wide, model="torch", index=3)
    assert answer["method"] == "activation"
    maps = [np.array(one["values"]) * one["scale"] for one in (answer, same)]
    assert np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1] > 0.9
    assert maps[0].sum() == pytest.approx(maps[1].sum(), abs=0.25 * np.abs(maps[1]).sum())


def test_a_bundle_without_a_way_in_is_occluded(tmp_path, checkpoint, wide):
    """A graph whose head is not what it seems: it is found out, and nothing false is shown."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from visformer.bundles.build import Request, _write_document, build

    build(load(checkpoint), Request("onnx", "fp32", "tensor", checkpoint=str(checkpoint)), tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.onnx"
    graph = onnx.load(path)
    head = graph.graph.node[-1]
    assert head.op_type == "Gemm"
    (alpha,) = (attribute for attribute in head.attribute if attribute.name == "alpha")
    alpha.f = 3.0
    onnx.save(graph, path)
    document = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    _write_document(tmp_path / "bundle", document)  # with the file's new size
    with served([str(tmp_path / "bundle")]) as url:
        _, answer = post(url, wide)
        assert answer["methods"] == ["occlusion"] == [answer["method"]]


def test_two_versions_are_told_apart(tmp_path, wide):
    for number, crop_pct in ((1, 1.0), (2, 0.5)):
        folder = tmp_path / "pets" / str(number)
        folder.mkdir(parents=True)
        write_model(folder / "best.safetensors", crop_pct)
    with served([str(tmp_path / "pets")], versions="all") as url:
        widths = [post(url, wide, version=version)[1]["crop"]["width"] for version in (1, 2, "")]
        assert widths == [200, 100, 100]
