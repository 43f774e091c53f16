from __future__ import annotations

import re
from pathlib import Path

import pytest
import tenacity

from meshlb import (
    Breaker,
    ClientWeightedRoundRobin,
    ConfigError,
    ConsistentHash,
    Cookie,
    Endpoint,
    ForwardedFor,
    Header,
    IPHash,
    LeastConnections,
    LeastResponseTime,
    Mesh,
    PathSegment,
    QueryParameter,
    Random,
    Retry,
    RetryBudget,
    RoundRobin,
    ServiceConfig,
    Status,
    StickyCookie,
    StickyKey,
)
from meshlb.config_file import read_settings
from meshlb.discovery import ConsulDiscovery, StaticDiscovery

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"


def write(folder: Path, text: str) -> Path:
    path = folder / "meshlb.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_sets_nothing(tmp_path: Path):
    assert read_settings(write(tmp_path, "")) == {}


def test_a_full_example(tmp_path: Path):
    (tmp_path / "token").write_text("secret", encoding="utf-8")
    settings = read_settings(
        write(
            tmp_path,
            """
            consul_domain = "mesh"
            endpoint_metrics = false

            [consul]
            address = "http://consul.example:8500"
            datacenter = "dc1"
            token_file = "token"
            consistency = "stale"
            headers = { X-Team = "shop" }
            tag = ["blue", "canary"]
            wait = 30
            last_known_good = "state/known.json"

            [defaults]
            policy = "least_connections"
            timeout = 2.5
            retry = { max_attempts = 2, per_try_timeout = 0.5 }
            breaker.consecutive_failures = 7

            [services.orders]
            policy = { name = "least_response_time", decay = 5, force_pick_after = false }
            timeout = false
            filter = 'Service.Meta.version == "2"'
            [services.orders.retry]
            max_attempts = 4
            idempotent_methods = ["POST"]
            wait = { name = "random_exponential", multiplier = 0.05, max = 1 }
            stop = { name = "after_delay", max_delay = 2 }
            budget = { ratio = 0.5, min_per_second = 1 }

            [services.reports]
            policy = "random"
            retry = false
            breaker = false

            [services."db.internal"]
            retry = { budget = false }
            breaker = true
            """,
        )
    )
    discovery = settings.pop("discovery")
    assert isinstance(discovery, ConsulDiscovery)
    consul = discovery.settings
    assert str(consul.address) == "http://consul.example:8500"
    assert (consul.datacenter, consul.consistency, consul.wait) == ("dc1", "stale", 30.0)
    assert consul.headers == (("X-Team", "shop"),)
    assert consul.tags == ("blue", "canary")
    assert consul.current_token() == "secret"  # beside the file, wherever the program runs
    assert consul.last_known_good == str(tmp_path / "state" / "known.json")

    orders, reports, db = (settings["services"].pop(name) for name in ("orders", "reports", "db.internal"))
    retry = orders.retry
    assert isinstance(retry.wait, tenacity.wait_random_exponential)
    assert isinstance(retry.stop, tenacity.stop_after_delay)
    assert orders == ServiceConfig(
        policy=LeastResponseTime(decay=5, force_pick_after=None),
        filter='Service.Meta.version == "2"',
        timeout=None,
        retry=Retry(
            max_attempts=4,
            per_try_timeout=0.5,  # from the defaults
            idempotent_methods=("POST",),
            wait=retry.wait,
            stop=retry.stop,
            budget=RetryBudget(ratio=0.5, min_per_second=1),
        ),
        breaker=Breaker(consecutive_failures=7),
    )
    assert reports == ServiceConfig(policy=Random(), timeout=2.5, retry=None, breaker=None)
    assert db == ServiceConfig(
        policy=LeastConnections(),
        timeout=2.5,
        retry=Retry(max_attempts=2, per_try_timeout=0.5, budget=None),
        breaker=Breaker(),
    )
    assert settings == {
        "consul_domain": "mesh",
        "endpoint_metrics": False,
        "defaults": ServiceConfig(
            policy=LeastConnections(),
            timeout=2.5,
            retry=Retry(max_attempts=2, per_try_timeout=0.5),
            breaker=Breaker(consecutive_failures=7),
        ),
        "services": {},
    }


def test_hash_policies_and_where_their_keys_come_from(tmp_path: Path):
    settings = read_settings(
        write(
            tmp_path,
            """
            [services.carts]
            policy = { name = "consistent_hash", table = "maglev", bounded_load = 1.25 }
            hash_on = [{ header = "x-user" }, { cookie = "sid" }, { query_parameter = "u" }, { path_segment = -1 }]
            [services.geo]
            policy = { name = "ip_hash", ipv4_prefix = 24, consistent_hash = { table = "ring" } }
            hash_on = { forwarded_for = true }
            [services.gpus]
            policy = { name = "client_weighted_round_robin", metric_names = ["named_metrics.queue"] }
            hash_on = { forwarded_for = "x-real-ip" }
            [services.plain]
            hash_on = false
            """,
        )
    )["services"]
    assert settings["carts"] == ServiceConfig(
        policy=ConsistentHash(table="maglev", bounded_load=1.25),
        hash_on=(Header("x-user"), Cookie("sid"), QueryParameter("u"), PathSegment(-1)),
    )
    assert settings["geo"] == ServiceConfig(
        policy=IPHash(ipv4_prefix=24, consistent_hash=ConsistentHash(table="ring")), hash_on=ForwardedFor()
    )
    assert settings["gpus"] == ServiceConfig(
        policy=ClientWeightedRoundRobin(metric_names=("named_metrics.queue",)), hash_on=ForwardedFor("x-real-ip")
    )
    assert settings["plain"] == ServiceConfig()


def test_static_services(tmp_path: Path):
    path = write(
        tmp_path,
        """
        [static.services]
        orders = [
            "127.0.0.1:8001",
            { host = "::1", port = 8002, weight = 3, zone = "b", tags = ["v2"], meta = { rack = "7" } },
            { address = "127.0.0.1:8003", status = "maintenance", status_reason = "disk" },
        ]
        stock = []
        """,
    )
    with Mesh.from_file(path) as mesh:
        assert isinstance(mesh.discovery, StaticDiscovery)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        assert [node.endpoint for node in cluster.nodes] == [
            Endpoint("127.0.0.1", 8001),
            Endpoint("::1", 8002, weight=3, zone="b", tags=("v2",), meta={"rack": "7"}),
            Endpoint("127.0.0.1", 8003, status=Status.MAINTENANCE, status_reason="disk"),
        ]
        assert mesh.discovery.knows("stock")


def test_arguments_win_over_the_file(tmp_path: Path):
    path = write(tmp_path, '[static.services]\norders = ["127.0.0.1:1"]\n[defaults]\ntimeout = 1')
    with Mesh.from_file(path, defaults=ServiceConfig(policy="round_robin")) as mesh:
        assert mesh.config_of("orders") == ServiceConfig(policy=RoundRobin())


def test_a_service_takes_its_whole_policy_from_one_place(tmp_path: Path):
    path = write(
        tmp_path,
        """
        [defaults.policy]
        name = "least_connections"
        full_scan = true
        [services.a]
        policy = "least_connections"
        [services.b]
        timeout = 1
        """,
    )
    services = read_settings(path)["services"]
    assert services["a"].policy == LeastConnections()
    assert services["b"].policy == LeastConnections(full_scan=True)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("timeout = ", "", "not a TOML file: "),
        ('service = "x"', "", "service: unknown; did you mean 'services'? Known: consul, static, defaults, services"),
        ("[defaults]\npolcy = 'random'", "defaults", "polcy: unknown; did you mean 'policy'? Known: policy, retry"),
        (
            "[services.orders.retry]\nmax_attempt = 3",
            "services.orders.retry",
            "max_attempt: unknown; did you mean 'max_attempts'?",
        ),
        ("[services.orders.breaker]\nzzz = 3", "services.orders.breaker", "zzz: unknown. Known: consecutive_failures"),
        ("[consul]\ntoken_fil = 'x'", "consul", "token_fil: unknown; did you mean 'token_file'?"),
        ("[consul]\nwait = -1", "consul", "ConsulDiscovery.wait: -1 "),
        ("[consul]\nca_file = 7\naddress='https://a:1'", "consul", ""),
        ("[static]\nservice = {}", "static", "service: unknown; did you mean 'services'?"),
        ("[static]\nservices = 3", "static", "services: 3 is not a table"),
        ("[static.services]\na = 'b:1'", "static.services.a", "'b:1' is not a list of addresses"),
        ("[static.services]\na = ['b']", "static.services.a", "address 'b' is not of the form"),
        ("[static.services]\na = [7]", "static.services.a", "address 7 is not of the form"),
        ("[static.services]\na = [{prt = 1}]", "static.services.a", "prt: unknown; did you mean 'port'?"),
        ("[static.services]\na = [{host = 'h'}]", "static.services.a", "port"),
        ("[static.services]\na = [{address = 'h:1', weight = -1}]", "static.services.a", "Endpoint.weight: -1"),
        ("[static.services]\na = [{address = 'h:1', tags = 'v'}]", "static.services.a", "tags: 'v' is not a list"),
        ("[static.services]\na = [{address = 'h:1', zone = 1}]", "static.services.a", "zone: 1 is not a text"),
        ("[static.services]\na = [{address = 'h:1', meta = 1}]", "static.services.a", "meta: 1 is not a table"),
        ("[static.services]\na = [{address = 'h:1', status = 'up'}]", "static.services.a", "status: 'up' is none of"),
        ("[consul]\n[static]", "", "[consul] and [static]: instances come from one or the other"),
        ("defaults = 1", "", "defaults: 1 is not a table"),
        ("[services]\norders = 1", "services", "orders: 1 is not a table"),
        ("[defaults]\ntimeout = '5s'", "defaults", "ServiceConfig.timeout: '5s' "),
        ("[defaults]\nconnect_timeout = false", "defaults", "ServiceConfig.connect_timeout: False "),
        ("[defaults]\nretry = 3", "defaults", "retry: 3 is not a table"),
        ("[defaults.retry]\nmax_attempts = 0", "defaults.retry", "Retry.max_attempts: 0 "),
        ("[defaults.retry.budget]\nratio = -1", "defaults.retry.budget", "RetryBudget.ratio: -1 "),
        ("[defaults.retry]\nwait = 1", "defaults.retry.wait", "1 is not a table with the 'name' of a strategy: fixed"),
        (
            "[defaults.retry.wait]\nname = 'exponentia'",
            "defaults.retry.wait",
            "name: 'exponentia' is unknown; did you mean 'exponential'?",
        ),
        ("[defaults.retry.wait]\nname = 'fixed'\nwat = 1", "defaults.retry.wait", "wat: unknown; did you mean 'wait'?"),
        ("[defaults.retry.wait]\nname = 'fixed'\nwait = 'x'", "defaults.retry.wait", "wait: 'x' is not a number"),
        ("[defaults.retry.wait]\nname = 'fixed'", "defaults.retry.wait", "wait"),
        ("[defaults]\npolicy = 'rondom'", "defaults", "policy 'rondom' is unknown; did you mean 'random'?"),
        ("[defaults]\npolicy = 1", "defaults", "policy: 1 is neither a name nor a table with a 'name'"),
        ("[defaults.policy]\nchoices = 2", "defaults.policy", "name: missing"),
        (
            "[defaults.policy]\nname = 'least_connections'\nchoises = 2",
            "defaults.policy",
            "choises: unknown; did you mean 'choices'?",
        ),
        (
            "[defaults.policy]\nname = 'least_connections'\nchoices = 99",
            "defaults.policy",
            "LeastConnections.choices: 99",
        ),
        (
            "[defaults.policy]\nname = 'ip_hash'\nconsistent_hash = { table = 'rign' }",
            "defaults.policy.consistent_hash",
            "ConsistentHash.table: 'rign'",
        ),
        ("[defaults]\nhash_on = 'x-user'", "defaults.hash_on", "'x-user' is not a table with one key: header, cookie"),
        ("[defaults]\nhash_on = {heder = 'x'}", "defaults.hash_on", "heder: unknown; did you mean 'header'?"),
        ("[defaults]\nhash_on = [{header = ''}]", "defaults.hash_on", "Header.name: ''"),
        ("[defaults]\nhash_on = {path_segment = 'x'}", "defaults.hash_on", "PathSegment.index: 'x'"),
        ("[defaults]\nhash_on = {header = 'x', cookie = 'y'}", "defaults.hash_on", "is not a table with one key"),
        (
            "[defaults]\nsticky = 'cookie'",
            "defaults",
            "sticky: 'cookie' is not a table with a 'type' out of cookie, key",
        ),
        (
            "[defaults]\nsticky = { type = 'ip' }",
            "defaults",
            "sticky: {'type': 'ip'} is not a table with a 'type' out of cookie, key",
        ),
        ("[defaults]\nsticky = { type = ['key'] }", "defaults", "is not a table with a 'type' out of cookie, key"),
        ("[defaults]\nsticky = { type = 'cookie', tll = 3 }", "defaults.sticky", "tll: unknown; did you mean 'ttl'?"),
        ("[defaults]\nsticky = { type = 'key', path = '/' }", "defaults.sticky", "path: unknown"),
        ("[defaults]\nsticky = { type = 'key', ttl = 0 }", "defaults.sticky", "StickyKey.ttl: 0"),
        ("[defaults]\nsticky = { type = 'cookie', secret = 'short' }", "defaults.sticky", "StickyCookie.secret: not a"),
        (
            "[defaults.failover]\nby = { name = 'planet', steps = [1] }",
            "defaults.failover",
            "by: {'name': 'planet'} is not a table with a 'name' out of rtt, region, distance",
        ),
        (
            "[defaults.failover]\nby = { name = ['rtt'] }",
            "defaults.failover",
            "is not a table with a 'name' out of rtt",
        ),
        ("[defaults]\nsubset = 3", "defaults", "subset: 3 is not a table with a 'name' out of rendezvous"),
        ("consul_domain = 3", "", "consul_domain: 3 is not a str"),
        ("endpoint_metrics = 'yes'", "", "endpoint_metrics: 'yes' is not a bool"),
    ],
)
def test_errors_name_the_file_the_table_and_the_key(tmp_path: Path, text: str, where: str, what: str):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_settings(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: [{where}] " if where else f"{path}: ")
    assert what in message


def test_sticky_sessions(tmp_path: Path):
    settings = read_settings(
        write(
            tmp_path,
            """
            [defaults.sticky]
            type = "cookie"
            name = "sid"
            ttl = 1800
            secret = "at least sixteen characters"
            when_gone = "fail"
            [services.plain]
            timeout = 3
            [services.shared]
            sticky = { type = "cookie", ttl = false, form = "address" }
            [services.carts]
            sticky = { type = "key", max_sessions = 10 }
            hash_on = { header = "x-user" }
            [services.none]
            sticky = false
            """,
        )
    )
    cookie = StickyCookie(name="sid", ttl=1800, secret="at least sixteen characters", when_gone="fail")
    assert settings["defaults"].sticky == cookie
    assert {name: config.sticky for name, config in settings["services"].items()} == {
        "plain": cookie,
        "shared": StickyCookie(form="address"),  # a table of its own replaces that of the defaults
        "carts": StickyKey(max_sessions=10),
        "none": None,
    }


def test_a_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "meshlb.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        read_settings(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        Mesh.from_file(tmp_path / "meshlb.toml")


def test_a_token_is_never_shown(tmp_path: Path):
    with pytest.raises(ConfigError) as raised:
        read_settings(write(tmp_path, '[consul]\ntoken = "s3cr\\u00e9t"'))
    assert "s3cr" not in str(raised.value)
    for sticky in (
        '{ secret = "s3cr" }',
        '{ type = "cokie", secret = "s3cr" }',
        '{ type = "cookie", secret = "s3cr" }',
    ):
        with pytest.raises(ConfigError) as raised:
            read_settings(write(tmp_path, f"[defaults]\nsticky = {sticky}"))
        assert "s3cr" not in str(raised.value)


def test_the_examples_of_the_documentation_can_be_read(tmp_path: Path):
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        read_settings(write(tmp_path, example))
