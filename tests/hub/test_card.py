"""The model card as `huggingface_hub` reads it back, and what it says of what is known."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.upstream import mini_architecture
from visformer.checkpoint import Checkpoint
from visformer.data import Preprocessing, imagenet
from visformer.hub import PUBLISHED, model_card
from visformer.models import Visformer, architecture

SUMMARY = {
    "epoch": 30,
    "epochs": 30,
    "step": 900,
    "train_loss": 0.5,
    "val_loss": 0.25,
    "top1": 91.23456,
    "top5": 99.5,
    "dataset": "cifar10",
    "train_images": 50_000,
    "val_images": 10_000,
    "skipped_images": 0,
    "seed": 42,
    "ema": True,
    "device": "cuda, NVIDIA H200",
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
}
TRAINED = {"kind": "trained", "from": "scratch"}


def made(names=None, training=None, source=None, name="visformer_tiny_v2", **changes) -> Checkpoint:
    names = [f"class {i}" for i in range(10)] if names is None else names
    network = mini_architecture("mindcv_mini_v2", num_classes=len(names), **changes)
    return Checkpoint(name, network, names, Preprocessing((64, 64)), {}, training or {}, source or {})


def read(text: str) -> ModelCard:
    card = ModelCard(text)
    assert str(card) == text, "what the hub's library writes back is what we wrote"
    return card


def test_a_trained_models_card():
    text = model_card(made(training=SUMMARY, source=TRAINED), repo_id="someone/net", license="apache-2.0")
    data = read(text).data
    assert data.library_name == "visformer" and data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0" and data.datasets == ["uoft-cs/cifar10"] and data.metrics == ["accuracy"]
    assert {"visformer", "visformer_tiny_v2"} <= set(data.tags) and data.model_name == "net"
    figures = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert figures == {
        ("uoft-cs/cifar10", "validation", "accuracy"): 91.2346,
        ("uoft-cs/cifar10", "validation", "top_5_accuracy"): 99.5,
    }
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Visformer(made().architecture).parameters())
    for fact in (
        f"| parameters | {parameters:,} |",
        "CIFAR-10, 10,000 images",
        "| top-1 accuracy, % | 91.23 |",
        'visformer.load("hf-hub:someone/net")',
        "visformer predict image.jpg --ckpt_path hf-hub:someone/net",
        "73 x 73 pixels",
        "| images to train on | 50,000 |",
        "| epochs | 30 of 30 |",
        "| validation loss | 0.2500 |",
        "| weights | their exponential moving average |",
        "| device | cuda, NVIDIA H200 |",
        "`class 0`, `class 1`",
    ):
        assert fact in text, fact


def test_what_is_not_known_is_left_out():
    text = model_card(made())
    data = read(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert not re.search(r"(?<!\[)None|nan|unknown|More Information|TODO|\[\]|\{\}", text)
    assert "custom" not in read(model_card(made(name="custom"))).data.tags
    for heading in ("Accuracy", "Training"):
        assert f"## {heading}" not in text
    assert 'visformer.load("model.safetensors")' in text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "high", True])
def test_figures_that_are_none_are_left_out(value):
    text = model_card(made(training=SUMMARY | {"top1": value, "top5": value, "val_loss": value}))
    assert (
        "## Accuracy" not in text and "validation loss" not in text and "model-index" not in read(text).data.to_dict()
    )


def test_the_report_goes_before_training():
    report = {"dataset": "imagenet", "split": "val (x/split.json)", "num_images": 1234, "top1": 50.0, "top5_k": 3}
    text = model_card(made(training=SUMMARY), report=report | {"top5": 75.0})
    results = read(text).data.eval_results
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("imagefolder", "val", "accuracy", 50.0),
        ("imagefolder", "val", "top_3_accuracy", 75.0),
    ]
    assert "1,234 images" in text and "split.json" not in text


def test_top_5_of_five_classes_is_no_figure():
    text = model_card(made(names=list("abcde"), training=SUMMARY))
    assert [r.metric_type for r in read(text).data.eval_results] == ["accuracy"]


@pytest.mark.parametrize(
    "dataset, identifier, words",
    [
        ("imagenet", None, "images in class folders"),
        ("digits", None, "scikit-learn's handwritten digits"),
        ("hfds/owner/birds", "owner/birds", "owner/birds"),
        ("fashion_mnist", "zalando-datasets/fashion_mnist", "Fashion-MNIST"),
        ("wds/shards", None, "shards"),
        ("torch/flowers102", None, "flowers102"),
    ],
)
def test_data_sets_have_the_hubs_names(dataset, identifier, words):
    text = model_card(made(training=SUMMARY | {"dataset": dataset}))
    assert read(text).data.datasets == ([identifier] if identifier else None)
    assert f"Measured with this package on {words.replace('_', chr(92) + '_')}, 10,000 images." in text


def test_a_published_checkpoint_quotes_its_publishers():
    row = PUBLISHED["visformer_tiny_v2.mindcv"]
    source = {"project": "MindCV", "file": row.filename, "sha256": row.sha256 + "0" * 56}
    network = architecture("visformer_tiny_v2")
    names = imagenet.class_names()
    checkpoint = Checkpoint("visformer_tiny_v2", network, names, Preprocessing((224, 224)), {}, {}, source)
    text = model_card(checkpoint)
    data = read(text).data
    assert data.datasets == ["ILSVRC/imagenet-1k"] and data.eval_results is None  # quoted, not measured here
    assert "Published by MindCV" in text and "top-1 78.82 % and top-5 94.41 %" in text
    assert "| parameters | 9,371,056 |" in text and "| SHA-256 of that file | `6711a758000" in text
    assert "<summary>All 1,000" in text and "207. `n02099601` (golden retriever)" in text


def test_a_model_of_features_has_no_classes():
    text = model_card(made(names=[]), repo_id="someone/net")
    assert read(text).data.pipeline_tag == "image-feature-extraction"
    assert "## Classes" not in text and "visformer predict" not in text and "| output | 64 features |" not in text
    assert "| output | 128 features |" in text


@pytest.mark.parametrize(
    "begun, said, base",
    [
        ("hf-hub:owner/base@v1", "hf-hub:owner/base@v1", "owner/base"),
        ("visformer_tiny_v2.mindcv", "visformer_tiny_v2.mindcv", None),
        ("/home/someone/private/best.safetensors", "best.safetensors", None),
        (r"C:\someone\private\best.safetensors", "best.safetensors", None),
    ],
)
def test_where_training_began_without_the_folders_names(begun, said, base):
    text = model_card(made(source={"kind": "trained", "from": begun}))
    assert f"| fine-tuned from | `{said}` |" in text and "private" not in text
    assert read(text).data.base_model == base


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=30, unique=True), device=st.text())
def test_no_name_breaks_the_page(names, device):
    text = model_card(made(names=names, training=SUMMARY | {"device": device, "dataset": "torch/" + device}))
    card = ModelCard(text)
    assert card.data.to_dict()["library_name"] == "visformer"
    body = card.text.split("## Classes")[1]
    assert "<script" not in re.sub(r"`+.*?`+", "", text)
    if len(names) > 20:
        assert len(re.findall(r"^\d+\. `", body, flags=re.MULTILINE)) == len(names)
    assert text.count("\n## ") == 5


def test_the_python_block_of_the_card_runs(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from visformer.checkpoint import write_checkpoint

    torch.manual_seed(0)
    checkpoint = made()
    checkpoint.state_dict = Visformer(checkpoint.architecture).state_dict()
    monkeypatch.chdir(tmp_path)
    write_checkpoint("model.safetensors", checkpoint)
    Image.new("RGB", (80, 70), "orange").save("image.jpg")
    exec(re.search(r"```python\n(.*?)```", model_card(checkpoint), flags=re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip() in checkpoint.class_names
