"""Requests with whatever the description of the API allows, and much that it does not: never a 500, always as described."""

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from serving import Served

requests = pytest.importorskip("requests", reason="requests comes with schemathesis")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
from schemathesis import GenerationMode, openapi  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LONGEST = 60_000  # signs of an address that HTTP/1.1 is read with here
REQUESTS = int(os.environ.get("E5V_FUZZ", "150"))  # of each kind
Noted = Callable[[str, object], None]
KEPT = {"deadline": None, "database": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_is_a_500(served: Served, mode: GenerationMode, record_testsuite_property: Noted) -> None:
    schema = openapi.from_url(f"{served.address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [operation for operation in operations if operation.path != "/api/events"]  # which goes on
    assert len(asked) > 12
    if mode is GenerationMode.NEGATIVE:  # nothing can be wrong about a request without parameters
        asked = [each for each in asked if each.body or any(True for _ in each.iter_parameters())]
    statuses: Counter[int] = Counter()
    turn = 0
    while statuses.total() < REQUESTS:
        turn += 1
        assert turn < 20, f"only {statuses.total()} requests were thought of"
        share = -(-(REQUESTS - statuses.total()) // len(asked))
        for operation in asked:

            @seed(turn)
            @settings(max_examples=share, **KEPT)
            @given(operation.as_strategy(generation_mode=mode))
            def one(case: schemathesis.Case) -> None:
                parts = {
                    name: part
                    for name, part in case.as_transport_kwargs(served.address).items()
                    if name in ("method", "url", "params")
                }
                if len(requests.Request(**parts).prepare().url or "") > LONGEST:
                    return  # refused by a closed connection
                answer = case.call(base_url=served.address)
                statuses[answer.status_code] += 1
                case.validate_response(answer, checks=CHECKS)

            with suppress(Unsatisfiable):
                one()
    record_testsuite_property(mode.value, json.dumps(dict(sorted(statuses.items()))))
    assert served.get("/healthz").status == 200
