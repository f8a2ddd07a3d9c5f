"""Who may come in: keys, pages of other sites, and encryption."""

import asyncio
import hashlib
import shutil
import ssl
import subprocess
import urllib.request

import pytest

from tests.serving.fakes import picture
from visformer.errors import UsageError
from visformer.serving.server import listen
from visformer.verbs.serve import ServeOptions, _settings

KEYS = tuple(hashlib.sha256(key).hexdigest() for key in (b"first", b"second"))


def test_without_a_key_only_probes_and_the_page_are_answered(serving):
    async def main():
        async with serving(api_keys=KEYS) as (client, _):
            paths = ["/v2/health/live", "/v2/health/ready", "/", "/v2", "/metrics", "/docs", "/openapi.json"]
            open_to_all = [(await client.get(path)).status_code for path in paths]
            given = [
                {"Authorization": "Bearer first"},
                {"authorization": "bearer second"},
                {"X-API-Key": "second"},
                {"Authorization": "Bearer third"},
                {"Authorization": "Basic first"},
                {"X-API-Key": ""},
                {"X-API-Key": "fïrst".encode("latin-1")},
            ]
            keyed = [await client.post("/predict", content=picture(), headers=headers) for headers in given]
            return open_to_all, keyed

    open_to_all, keyed = asyncio.run(main())
    assert open_to_all == [200, 200, 200, 401, 401, 401, 401]
    assert [answer.status_code for answer in keyed] == [200, 200, 200, 401, 401, 401, 401]
    assert keyed[-1].headers["www-authenticate"] == "Bearer"
    assert list(keyed[-1].json()) == ["error"]


def test_pages_of_other_sites_are_kept_out_unless_they_are_named(serving):
    async def ask(origins, origin):
        async with serving(cors_origins=origins) as (client, _):
            answer = await client.post("/predict", content=picture(), headers={"Origin": origin})
            return answer.status_code, answer.headers.get("access-control-allow-origin")

    assert asyncio.run(ask((), "http://server")) == (200, None)
    assert asyncio.run(ask((), "https://evil.example")) == (403, None)
    assert asyncio.run(ask((), "null")) == (403, None)
    named = ("https://good.example",)
    assert asyncio.run(ask(named, "https://good.example")) == (200, "https://good.example")
    assert asyncio.run(ask(named, "https://evil.example")) == (403, None)
    assert asyncio.run(ask(("*",), "https://any.example")) == (200, "*")


def test_models_can_be_kept_as_they_are(serving):
    async def main():
        async with serving(model_control=False) as (client, _):
            return (await client.post("/v2/repository/models/pets/unload")).status_code

    async def sent():
        async with serving() as (client, _):
            body = {"parameters": {"file:1/model.onnx": "AAAA", "config": "{}"}}
            return (await client.post("/v2/repository/models/pets/load", json=body)).status_code

    assert asyncio.run(main()) == 403
    assert asyncio.run(sent()) == 400


@pytest.mark.parametrize(
    ("options", "control"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "api_keys": "keys.txt"}, True),
        ({"model_control": False}, False),
        ({"host": "0.0.0.0", "model_control": True}, True),
        ({"replicas": 2}, False),
    ],
)
def test_control_from_outside_is_for_those_who_may(options, control, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.txt").write_text("# of the team\nfirst\n\n  second\n")
    settings = _settings(ServeOptions(models=["x"], **options))
    assert settings.model_control is control
    assert settings.host == options.get("host", "127.0.0.1")
    assert settings.api_keys == (KEYS if "api_keys" in options else ())


def test_a_file_without_keys_does_not_open_the_door(tmp_path):
    (tmp_path / "keys.txt").write_text("# none yet\n")
    with pytest.raises(UsageError, match="has no key in it"):
        _settings(ServeOptions(models=["x"], api_keys=str(tmp_path / "keys.txt")))


def test_a_port_that_is_taken_is_said():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UsageError, match=r"can't listen on 127.* in use"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_connection_is_encrypted_with_a_certificate(listening, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)

    def client(port: int) -> int:
        trusting = ssl.create_default_context(cafile=str(certificate))
        request = urllib.request.Request(f"https://127.0.0.1:{port}/predict", picture())
        with urllib.request.urlopen(request, context=trusting, timeout=20) as answer:
            return answer.status

    assert listening(client, tls_cert=str(certificate), tls_key=str(key)) == 200
