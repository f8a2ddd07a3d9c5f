"""The running server against its own description: `/openapi.json` says what may be sent and what comes back.

schemathesis makes requests from the description, such as it allows and such as it forbids, and sends them to a server
of the fake model. Whatever they are, no answer is a 5xx but 503, and each has a status, a type and a form that the
description names.
"""

from __future__ import annotations

import json
import urllib.request

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from visformer.serving import rest

EXAMPLES = 50  # of each operation, and as many that are wrong
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
CONTROL = "/v2/repository/models/"  # what is unloaded would be missing for the rest


def problems(port: int, only: str = "", examples: int = EXAMPLES) -> tuple[int, set[int], list[str]]:
    """How many requests were made, the statuses they were answered with, and what was wrong."""
    url = f"http://127.0.0.1:{port}"
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        schema = schemathesis.openapi.from_dict(json.load(answer))
    made, statuses, wrong = 0, set(), []

    def examine(operation, mode) -> None:
        names = {name: value for name, value in (("name", "pets"), ("version", "1")) if f"{{{name}}}" in operation.path}
        known = {"path_parameters": names} if names and mode is GenerationMode.POSITIVE else {}

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode, **known))
        def run(case) -> None:
            nonlocal made
            response = case.call(base_url=url)
            made += 1
            statuses.add(response.status_code)
            if response.status_code >= 500 and response.status_code != 503:
                raise AssertionError(f"{response.status_code}: {response.text[:300]}")
            case.validate_response(response, checks=CHECKS)

        try:
            run()
        except Unsatisfiable:  # nothing that could be wrong can be sent there
            return
        except BaseException as error:  # schemathesis raises groups of its failures
            wrong.append(f"{operation.label}, {mode}: {error}")

    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == only or not (only or operation.path.startswith(CONTROL)):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                examine(operation, mode)
    return made, statuses, wrong


def test_a_fault_is_found(listening, monkeypatch):
    monkeypatch.setattr(rest.documents, "server_metadata", lambda release: 1 / 0)
    made, statuses, wrong = listening(lambda port: problems(port, only="/v2", examples=2))
    assert made and 500 in statuses
    assert wrong and "GET /v2, " in wrong[0] and "500" in wrong[0]


@pytest.mark.slow
def test_the_server_does_what_its_description_says(listening):
    made, statuses, wrong = listening(problems)
    assert not wrong, "\n\n".join(wrong)
    assert made > 500
    assert {200, 400, 404} <= statuses <= {200, 400, 404, 405, 413, 503}
