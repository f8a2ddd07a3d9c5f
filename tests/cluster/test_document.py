"""The Serve config file, and the options of `serve` that are for a cluster."""

import json

import pytest
import yaml

from visformer import cli
from visformer.errors import UsageError
from visformer.serving.settings import Settings


def printed(capsys, *arguments: str) -> dict:
    assert cli.main(["serve", *arguments, "--engine", "ray", "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_config_file_is_one_that_serve_takes(bundle, capsys, tmp_path):
    (tmp_path / "keys.txt").write_text("secret\n")
    document = printed(
        capsys, f"cats={bundle}", "--replicas", "2", "--max_replicas", "8", "--model_threads", "3",
        "--grpc_port", "9000", "--host", "0.0.0.0", "--api_keys", str(tmp_path / "keys.txt"), "--batch_size", "32",
        "--gpus_per_replica", "0.5",
    )  # fmt: skip
    (application,) = document["applications"]
    assert application["args"]["models"] == [f"cats={bundle}"]
    assert application["args"]["settings"]["batch_size"] == 32
    assert "secret" not in json.dumps(document)
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"]["min_replicas"] == 2
    assert deployment["autoscaling_config"]["max_replicas"] == 8
    assert deployment["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0.5}
    assert document["grpc_options"]["port"] == 9000

    schema = pytest.importorskip("ray.serve.schema")
    parsed = schema.ServeDeploySchema.model_validate(document)
    assert parsed.applications[0].deployments[0].max_ongoing_requests == Settings().max_in_flight


def test_what_build_is_given_means_something(bundle, capsys):
    deploy = pytest.importorskip("visformer.cluster.deploy", exc_type=ImportError)
    arguments = printed(capsys, str(bundle))["applications"][0]["args"]
    assert deploy.build(arguments)
    assert deploy.settings_of(arguments["settings"]).model_control
    for wrong, word in (
        ({}, "models: must be a list"),
        (arguments | {"model": []}, "model: no such argument; did you mean models"),
        (arguments | {"settings": {"batchsize": 1}}, "batchsize: no such setting; did you mean batch_size"),
    ):
        with pytest.raises(UsageError, match=word):
            deploy.build(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_replicas", "2"], "max_replicas: is for --engine ray"),
        (["--ray_address", "auto"], "ray_address: is for --engine ray"),
        (
            ["--engine", "ray", "--replicas", "3", "--max_replicas", "2"],
            "max_replicas: 2 is below replicas, which is 3",
        ),
        (["--engine", "ray", "--max_replicas", "2", "--model_control", "True"], "deploy again"),
        (["--engine", "ray", "--tls_cert", "setup.cfg", "--tls_key", "setup.cfg"], "tls_cert: "),
        (["--engine", "ray", "--gpus_per_replica", "-1"], "gpus_per_replica: -1.0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, message, capsys):
    assert cli.main(["serve", "models", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_address_of_the_client_is_refused(bundle, capsys):
    assert cli.main(["serve", str(bundle), "--engine", "ray", "--ray_address", "ray://head:10001"]) == 2
    assert "run the command on a node of the cluster" in capsys.readouterr().err
