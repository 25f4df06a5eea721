"""Bench results that calibration reads: damaged ones are refused in one line."""

import json

import pytest
from test_calibrate import BUDGET, MACHINE, MODEL, PROVENANCE, ROUTING, WORKLOAD, result_of

from fiddler_opt.insight.bench_result import Result
from fiddler_opt.solve.compiler import compile_plan
from fiddler_run.errors import FiddlerError


@pytest.fixture(scope="module")
def plan():
    return compile_plan(MODEL, MACHINE, ROUTING, WORKLOAD, BUDGET, PROVENANCE)


@pytest.mark.parametrize("value", [1.7e308, 5e-324, 10**400, -1, 0, "x", None])
@pytest.mark.parametrize("key", ["passes", "tokens_per_pass", "tokens_per_expert"])
def test_absurd_results_are_refused(plan, tmp_path, key, value):
    data = result_of(plan, {}, {}).model_dump()
    data["decode"][key] = value
    (tmp_path / "b.json").write_text(json.dumps(data))
    with pytest.raises(
        FiddlerError, match=rf"b.json: not a result of .*\((decode.{key}|no JSON)"
    ) as caught:
        Result.load(tmp_path / "b.json", plan)
    assert "\n" not in str(caught.value)


def test_byte_order_mark_is_read_and_deep_json_is_refused(plan, tmp_path):
    result = result_of(plan, {}, {})
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + result.model_dump_json().encode())
    assert Result.load(tmp_path / "b.json", plan) == result
    for text in ("[" * 100_000, '{"plan":' * 100_000):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(FiddlerError, match="b.json: not a result of"):
            Result.load(tmp_path / "b.json", plan)
