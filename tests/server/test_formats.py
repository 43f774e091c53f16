"""What the servers write, against protobuf's own reader and the reader of the clients."""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from meshlb.balancing.orca import LoadReport, parse_binary, parse_header, report_among, report_in
from meshlb.server.formats import FORMS, to_binary, to_header

REPORT = LoadReport(
    cpu_utilization=0.25,
    mem_utilization=0.5,
    application_utilization=1.25,
    rps_fractional=1234.5,
    eps=0.5,
    request_cost={"rows": 12.0},
    utilization={"disk": 0.75},
    named_metrics={"requests_in_flight": 0.0, "latency_seconds": 0.0125},
)


def published_message() -> Any:
    """``xds.data.orca.v3.OrcaLoadReport`` as cncf/xds publishes it: names, numbers and types."""
    kinds = descriptor_pb2.FieldDescriptorProto
    double, text, unsigned, message = kinds.TYPE_DOUBLE, kinds.TYPE_STRING, kinds.TYPE_UINT64, kinds.TYPE_MESSAGE
    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="orca_load_report.proto", package="test.orca", syntax="proto3")
    report = file.message_type.add(name="OrcaLoadReport")
    scalars = {"cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "eps": 7, "application_utilization": 9}
    for name, number in scalars.items():
        report.field.add(name=name, number=number, type=double, label=one)
    report.field.add(name="rps", number=3, type=unsigned, label=one)
    for name, number in {"request_cost": 4, "utilization": 5, "named_metrics": 8}.items():
        entry_name = "".join(part.title() for part in name.split("_")) + "Entry"
        entry = report.nested_type.add(name=entry_name)
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=text, label=one)
        entry.field.add(name="value", number=2, type=double, label=one)
        report.field.add(
            name=name, number=number, type=message, label=many, type_name=f".test.orca.OrcaLoadReport.{entry_name}"
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.orca.OrcaLoadReport"))


Published = published_message()


def as_published(report: LoadReport) -> Any:
    return Published(**{name: getattr(report, name) for name in LoadReport.__slots__})


def test_binary_is_what_protobuf_reads_and_writes():
    assert Published.FromString(to_binary(REPORT)) == as_published(REPORT)
    assert parse_binary(as_published(REPORT).SerializeToString()) == REPORT
    assert to_binary(LoadReport()) == b""


AMOUNTS = st.floats(0, 1e9, allow_nan=False)
METRICS = st.dictionaries(st.text("abcdefgh_é", min_size=1, max_size=200), AMOUNTS, max_size=3)
REPORTS = st.builds(
    LoadReport,
    cpu_utilization=AMOUNTS,
    mem_utilization=AMOUNTS,
    application_utilization=AMOUNTS,
    rps_fractional=AMOUNTS,
    eps=AMOUNTS,
    request_cost=METRICS,
    utilization=METRICS,
    named_metrics=METRICS,
)


@given(REPORTS)
def test_every_report_survives_the_wire(report: LoadReport):
    assert Published.FromString(to_binary(report)) == as_published(report)
    assert parse_binary(to_binary(report)) == report
    assert parse_header(to_header(report, "BIN")) == report
    assert parse_header(to_header(report, "JSON")) == report


def test_text_names_maps_by_a_dot():
    text = to_header(REPORT)
    assert text.startswith("TEXT cpu_utilization=0.25, mem_utilization=0.5, ")
    assert "named_metrics.requests_in_flight=0, named_metrics.latency_seconds=0.0125" in text
    assert parse_header(text) == REPORT


def test_json_has_the_names_of_the_message():
    body = json.loads(to_header(REPORT, "JSON").removeprefix("JSON "))
    assert body["rps_fractional"] == 1234.5
    assert body["utilization"] == {"disk": 0.75}
    assert "eps" in body


def test_zero_is_not_sent_but_a_metric_of_zero_is():
    idle = LoadReport(named_metrics={"requests_in_flight": 0.0})
    assert to_header(idle) == "TEXT named_metrics.requests_in_flight=0"
    assert to_header(idle, "JSON") == 'JSON {"named_metrics":{"requests_in_flight":0.0}}'
    assert Published.FromString(b64decode(to_header(idle, "BIN")[4:])).named_metrics == {"requests_in_flight": 0.0}


@pytest.mark.parametrize("form", FORMS)
def test_the_report_is_found_among_headers(form: Any):
    assert report_in({"endpoint-load-metrics": to_header(REPORT, form)}) == REPORT
    assert report_in({"content-type": "text/plain"}) is None
    assert report_in({"endpoint-load-metrics": "TEXT what"}) is None


def test_the_binary_header_of_envoy_is_base64():
    assert report_in({"endpoint-load-metrics-bin": to_header(REPORT, "BIN")[4:]}) == REPORT


def test_the_report_is_found_among_trailers():
    assert report_among([("x", "1"), ("endpoint-load-metrics", to_header(REPORT, "BIN"))]) == REPORT
    assert report_among([("x-bin", b"1"), ("endpoint-load-metrics", "BIN ?")]) is None
    assert report_among(None) is None
