"""Each query of the dashboard and of the autoscaler asks for metrics and labels that a running server has."""

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.client import Client
from tests.deploy.manifests import KUBERNETES, load, queries
from tests.service.conftest import DIRECTLY, Server
from tests.service.exports import pictures

DASHBOARD = KUBERNETES / "monitoring/dashboard.json"
# Prometheus adds these labels when it reads the metrics of a pod, and histograms have `le`.
ADDED_LABELS = {"namespace", "pod"}

Labels = dict[str, set[str]]


@pytest.fixture(scope="module")
def exported(server: Server) -> Labels:
    """The labels of each metric of a server that has answered a call, by the name of its samples."""
    with Client(server.target) as client:
        client.classify(pictures(2))
    address = str(server.wait_for("metrics at ")["message"]).removeprefix("metrics at ")
    with DIRECTLY.open(address, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def _selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """Name and labels of each metric that a query selects."""
    promql_parser.parse(query)  # raises ValueError if Prometheus would refuse the query
    for name, labels in re.findall(r"([a-z_]+)\{([^}]*)\}", query):
        yield name, set(re.findall(r"([a-z_]+)(?:=~|=|!=)", labels))


def _check(query: str, exported: Labels) -> None:
    selected = list(_selectors(query))
    assert selected, query
    for name, labels in selected:
        assert name in exported, f"the server has no metric {name}: {query}"
        assert labels <= exported[name] | ADDED_LABELS, query
        grouped = re.findall(r"by \(([^)]*)\)", query)
        for label in {each.strip() for group in grouped for each in group.split(",")}:
            assert label in exported[name] | ADDED_LABELS, f"{name} has no label {label}: {query}"


@pytest.mark.parametrize(("title", "query"), list(queries(DASHBOARD)))
def test_each_query_of_the_dashboard_finds_metrics_of_the_server(title, query, exported):
    _check(query, exported)


@pytest.mark.parametrize(
    "query",
    [
        'sum(rate(cifar_service_requests{namespace="production"}[1m]))',
        'sum by (pod) (cifar_service_admitted_images{worker="1"})',
        'sum by (outcome) (cifar_service_admitted_images{namespace="production"})',
    ],
)
def test_a_query_for_something_that_does_not_exist_is_found(query, exported):
    with pytest.raises(AssertionError):
        _check(query, exported)


def test_the_autoscaler_uses_a_gauge_that_the_adapter_supplies_and_the_server_has(exported):
    (rule,) = load(KUBERNETES / "monitoring/prometheus-adapter.yaml")["rules"]["custom"]
    metrics = load(KUBERNETES / "base/horizontal-pod-autoscaler.yaml")["spec"]["metrics"]
    (name,) = (metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods")
    assert rule["name"]["as"] == name
    assert set(rule["resources"]["overrides"]) == ADDED_LABELS
    replaced = {"<<.Series>>": name, "<<.LabelMatchers>>": 'namespace="production"', "<<.GroupBy>>": "pod"}
    query = rule["metricsQuery"]
    for placeholder, value in replaced.items():
        query = query.replace(placeholder, value)
    _check(query, exported)
    _check(rule["seriesQuery"], exported)


def test_the_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
