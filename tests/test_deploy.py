"""The files of deploy/, as far as they can be held against something without a cluster: schemas, metrics, options."""

import json
import re
from pathlib import Path

import pytest
import yaml

from visformer.options import parse
from visformer.verbs.serve import ServeOptions

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def metric_names():
    """Every name that the server gives to Prometheus."""
    pytest.importorskip("prometheus_client")
    from visformer.serving.metrics import Metrics

    metrics = Metrics()
    metrics.watch(lambda: 0, lambda: 0, lambda: True)
    described = re.findall(r"^# TYPE (\S+) (\S+)", metrics.text().decode(), re.MULTILINE)
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + suffix for name, kind in described for suffix in suffixes.get(kind, ("",))}


@pytest.mark.parametrize("path", ["grafana/visformer.json", "prometheus/alerts.yml"])
def test_every_metric_that_is_watched_is_one_that_the_server_has(path):
    text = (DEPLOY / path).read_text()
    used = set(re.findall(r"\bvisformer_[a-z_]+\b", text))
    assert used and used <= metric_names()


def test_every_stage_and_reason_that_is_watched_exists():
    serve = Path(__file__).parents[1] / "src/visformer/serving"
    source = "".join(path.read_text() for path in serve.glob("*.py"))
    text = (DEPLOY / "grafana/visformer.json").read_text() + (DEPLOY / "prometheus/alerts.yml").read_text()
    for name in set(re.findall(r'(?:stage|reason)=\\?"(\w+)\\?"', text)):
        assert f'"{name}"' in source, name


def test_the_dashboard_has_panels_that_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana/visformer.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_manifests_follow_the_schema(path):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if "kserve" not in document["apiVersion"]:
            validate.validate(document, "1.33", strict=True)


def commands():
    """(where, words after `visformer serve`) of every start that a file here writes down."""
    docker = (DEPLOY / "Dockerfile").read_text()
    yield "Dockerfile", json.loads(re.findall(r"^CMD (\[.*\])$", docker, re.MULTILINE)[-1])
    for path in KUBERNETES:
        for document in documents(path):
            spec = document.get("spec", {})
            pod = spec.get("predictor") or spec.get("template", {}).get("spec", {})
            for container in pod.get("containers", ()):
                yield path.name, container["args"]


def test_every_start_is_one_that_the_server_understands():
    found = list(commands())
    assert {where for where, _ in found} == {"Dockerfile", "visformer.yaml", "kserve.yaml"}
    for _, words in found:
        assert words[:2] == ["visformer", "serve"]
        options = parse(ServeOptions, words[2:], prog="visformer serve")
        assert options.models == ["/models"] and options.host == "0.0.0.0"


def test_a_pod_has_time_to_finish_what_it_has():
    for path in KUBERNETES:
        for document in documents(path):
            pod = document.get("spec", {}).get("template", {}).get("spec", {})
            for container in pod.get("containers", ()):
                options = parse(ServeOptions, container["args"][2:], prog="visformer serve")
                assert pod["terminationGracePeriodSeconds"] > options.drain_s + options.shutdown_s


def test_the_image_needs_no_torch():
    needed = [re.split(r"[>=;\[ ]", line)[0] for line in (DEPLOY / "requirements.txt").read_text().splitlines()]
    assert "onnxruntime" in needed and not {"torch", "torchvision", "timm"} & set(needed)


def test_what_compose_mounts_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
    assert (DEPLOY.parent / compose["services"]["visformer"]["build"]["dockerfile"]).exists()
