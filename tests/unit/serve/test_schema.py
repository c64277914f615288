"""Cases made from the whole OpenAPI, with and without a token, right and wrong ones.

No answer is 500 or above, and each is one its schema names.
"""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CASES = int(os.environ.get("SCHEMA_CASES", "10"))
"""For each route, kind of case and token; 45 are more than 2,000 in all and take 42 s."""


@pytest.mark.parametrize("who", ["all", None])
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_case_breaks_it_and_every_answer_is_as_said(ask, mode, who):
    schema = schemathesis.openapi.from_dict(ask("GET", "/openapi.json").json())
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        def check(case) -> None:
            nonlocal checked
            given = case.as_transport_kwargs(base_url="http://127.0.0.1")
            given.pop("cookies", None)
            options = {key: given[key] for key in ("params", "json", "headers") if key in given}
            if "data" in given:
                options["content"] = given["data"]
            headers = {k: v for k, v in dict(options.pop("headers", {})).items()}
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            answer = ask(given["method"], given["url"], who=who, headers=headers, **options)
            case.validate_response(
                answer,
                checks=(
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ),
            )
            checked += 1

        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Exception as error:
            raise AssertionError(operation.label) from error
        from hypothesis import given as hypothesis_given

        hypothesis_given(case=strategy)(
            settings(
                max_examples=CASES, deadline=None, derandomize=True, database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(lambda case: check(case))
        )()  # fmt: skip
    assert checked >= 80
