"""The standard gRPC service config: what it says of each method, and what is wrong with one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshlb import ConfigError, ServiceConfig
from meshlb.resilience.service_config import GrpcServiceConfig, HedgingPolicy, MethodConfig, RetryPolicy

RETRY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
HEDGING = {"maxAttempts": 3, "hedgingDelay": "0.5s", "nonFatalStatusCodes": ["unavailable", 10]}


def entry(**fields: Any) -> dict[str, Any]:
    return {"methodConfig": [{"name": [{"service": "shop.Orders"}], **fields}]}


def with_policy(**changes: Any) -> dict[str, Any]:
    return entry(retryPolicy={key: value for key, value in {**RETRY, **changes}.items() if value is not ...})


def test_the_most_precise_name_holds() -> None:
    config = GrpcServiceConfig(
        {
            "methodConfig": [
                {"name": [{}], "timeout": "9s"},
                {"name": [{"service": "shop.Orders"}], "timeout": "1.5s", "waitForReady": True},
                {"name": [{"service": "shop.Orders", "method": "Get"}, {"service": "shop.Stock"}], "timeout": "0.25s"},
            ]
        }
    )
    assert config.method("/shop.Orders/Get") == MethodConfig(timeout=0.25)
    assert config.method("/shop.Orders/List") == MethodConfig(timeout=1.5, wait_for_ready=True)
    assert config.method("/shop.Stock/Get") == MethodConfig(timeout=0.25)
    assert config.method("/other.Service/Get") == MethodConfig(timeout=9.0)
    assert GrpcServiceConfig({}).method("/shop.Orders/Get") == MethodConfig()


def test_policies() -> None:
    config = GrpcServiceConfig(
        {
            "methodConfig": [
                {"name": [{"service": "a"}], "retryPolicy": RETRY, "maxRequestMessageBytes": 1024},
                {"name": [{"service": "b"}], "hedgingPolicy": HEDGING, "maxResponseMessageBytes": "2048"},
            ],
            "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
            "loadBalancingConfig": [{"round_robin": {}}],
        }
    )
    a, b = config.method("/a/x"), config.method("/b/x")
    assert a.retry_policy == RetryPolicy(4, 0.1, 1.0, 2.0, frozenset({"UNAVAILABLE"}))
    assert b.hedging_policy == HedgingPolicy(3, 0.5, frozenset({"UNAVAILABLE", "ABORTED"}))
    assert (a.max_request_message_bytes, b.max_response_message_bytes) == (1024, 2048)
    assert config.retry_throttling is not None
    assert (config.retry_throttling.max_tokens, config.retry_throttling.token_ratio) == (10, 0.1)
    limits = json.loads(config.message_limits() or "")
    assert limits == {
        "methodConfig": [
            {"name": [{"service": "a"}], "maxRequestMessageBytes": 1024},
            {"name": [{"service": "b"}], "maxResponseMessageBytes": 2048},
        ]
    }
    assert GrpcServiceConfig(with_policy()).message_limits() is None


@pytest.mark.parametrize(("configured", "cap", "attempts"), [(9, 4, 4), (9, 7, 7), (3, 10, 3), (8, -1, 5), (3, 0, 3)])
def test_grpc_go_max_call_attempts(configured: int, cap: int, attempts: int) -> None:
    config = GrpcServiceConfig(with_policy(maxAttempts=configured), max_attempts_limit=cap)
    policy = config.method("/shop.Orders/Get").retry_policy
    assert policy is not None
    assert policy.max_attempts == attempts


def test_given_as_json_or_as_a_mapping_it_is_the_same() -> None:
    one, other = GrpcServiceConfig(json.dumps(with_policy())), GrpcServiceConfig(with_policy())
    assert one == other
    assert hash(one) == hash(other)
    assert one != GrpcServiceConfig({})
    config = ServiceConfig(service_config=with_policy())
    assert config.service_config == one
    assert config == ServiceConfig(service_config=json.dumps(with_policy()))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ("{", "service_config"),
        ("[]", "service_config"),
        (7, "service_config"),
        ({"methodConfigs": []}, r"service_config\.methodConfigs"),
        ({"methodConfig": {}}, r"service_config\.methodConfig"),
        ({"methodConfig": ["x"]}, r"methodConfig\[0\]"),
        ({"methodConfig": [{"timeout": "1s"}]}, r"methodConfig\[0\]\.name"),
        ({"methodConfig": [{"name": [{"method": "Get"}]}]}, r"methodConfig\[0\]\.name"),
        ({"methodConfig": [{"name": [{"service": "a"}]}, {"name": [{"service": "a"}]}]}, r"methodConfig\[1\]\.name"),
        ({"methodConfig": [{"name": [{"services": "a"}]}]}, "services"),
        (entry(timeouts="1s"), "timeouts"),
        (entry(timeout=1), "timeout"),
        (entry(timeout="1"), "timeout"),
        (entry(timeout="-1s"), "timeout"),
        (entry(timeout="1.0000000001s"), "timeout"),
        (entry(timeout="1e3s"), "timeout"),
        (entry(waitForReady="yes"), "waitForReady"),
        (entry(maxRequestMessageBytes=-1), "maxRequestMessageBytes"),
        (entry(maxResponseMessageBytes="1k"), "maxResponseMessageBytes"),
        (entry(retryPolicy=RETRY, hedgingPolicy=HEDGING), "hedgingPolicy"),
        (with_policy(maxAttempts=1), "maxAttempts"),
        (with_policy(maxAttempts=...), "maxAttempts"),
        (with_policy(maxAttempts="3"), "maxAttempts"),
        (with_policy(maxAttempts=2.5), "maxAttempts"),
        (with_policy(initialBackoff="0s"), "initialBackoff"),
        (with_policy(initialBackoff="soon"), "initialBackoff"),
        (with_policy(maxBackoff="0s"), "maxBackoff"),
        (with_policy(maxBackoff=...), "maxBackoff"),
        (with_policy(backoffMultiplier=0), "backoffMultiplier"),
        (with_policy(backoffMultiplier="2"), "backoffMultiplier"),
        (with_policy(retryableStatusCodes=[]), "retryableStatusCodes"),
        (with_policy(retryableStatusCodes=["NOPE"]), "retryableStatusCodes"),
        (with_policy(retryableStatusCodes=[17]), "retryableStatusCodes"),
        (with_policy(retryableStatusCodes="UNAVAILABLE"), "retryableStatusCodes"),
        (with_policy(maxAttempt=3), "maxAttempt"),
        (entry(hedgingPolicy={"hedgingDelay": "1s"}), "maxAttempts"),
        (entry(hedgingPolicy={**HEDGING, "hedgingDelay": "1"}), "hedgingDelay"),
        (entry(hedgingPolicy={**HEDGING, "nonFatalStatusCodes": ["x"]}), "nonFatalStatusCodes"),
        ({"retryThrottling": {"maxTokens": 0, "tokenRatio": 1}}, r"retryThrottling\.maxTokens"),
        ({"retryThrottling": {"maxTokens": 10}}, r"retryThrottling\.tokenRatio"),
        ({"retryThrottling": {"maxTokens": 10, "tokenRatio": -1}}, r"retryThrottling\.tokenRatio"),
        ({"retryThrottling": {"maxTokens": 10, "tokenRatio": 1, "x": 1}}, r"retryThrottling\.x"),
    ],
)
def test_what_is_wrong_is_named(config: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ServiceConfig(service_config=config)
