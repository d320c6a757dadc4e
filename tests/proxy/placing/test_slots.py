"""Failures: remembered for a while, by model and by context, each load's once."""

from __future__ import annotations

from dataclasses import replace

from proxy.ollama.options import Delivery
from proxy.placing.inforce import InForce
from proxy.placing.slots import FAILURE_KEPT_S, Failures

FAILED = InForce(model="m", blob="b", digest="d", num_ctx=None, delivery=Delivery(text="solo CUDA1"), careful=0)


def test_a_failure_is_kept_for_its_model_and_context_for_a_while():
    now = [0.0]
    failures = Failures(lambda: now[0])
    assert failures.add(FAILED)
    assert failures.last("b", None).careful == 1
    assert failures.last("b", None).delivery is FAILED.delivery
    assert failures.last("b", 4096) is None
    assert failures.last("other", None) is None
    now[0] = FAILURE_KEPT_S
    assert failures.last("b", None)
    now[0] = FAILURE_KEPT_S + 1
    assert failures.last("b", None) is None


def test_two_requests_that_waited_for_the_same_load_are_one_failure():
    failures = Failures(lambda: 0.0)
    assert failures.add(FAILED)
    assert not failures.add(FAILED)
    assert failures.last("b", None).careful == 1
    assert failures.add(replace(FAILED, careful=1))
    assert failures.last("b", None).careful == 2
