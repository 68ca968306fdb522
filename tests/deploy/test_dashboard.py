"""The dashboard, the alert rules and the autoscaler in deploy/ speak of metrics, labels and label values that the daemons really have."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import daemons
import promql_parser as promql
import pytest
import yaml
from daemons import Daemon, free_port
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[2] / "deploy"
DAEMONS = ("usocksd", "transocks")
CONFIGS = {
    # (Nobody answers there; metrics of DNSBLs are exported nevertheless.)
    "usocksd": '[incoming]\nport = 0\naddresses = ["127.0.0.1"]\nmetrics_port = {metrics}\n'
    '[outgoing]\naddresses = ["127.0.0.1"]\ndnsbl_domain = "bl.test"\n[dns]\nservers = ["127.0.0.1:1"]\n',
    "transocks": 'listen = "127.0.0.1:0"\nproxy_url = "socks5://127.0.0.1:1080"\nmetrics_port = {metrics}\n',
}
# Metrics that Prometheus adds to every target.
OF_PROMETHEUS = {"up": {}}
TARGET = {"instance", "job"}


class Expression(NamedTuple):
    """One expression, for which daemon, and the text that may show labels of its result."""

    place: str
    text: str
    shows: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class Exported(NamedTuple):
    """One series that Prometheus would have: what kind its metric is, and the values of its labels."""

    kind: str
    labels: dict[str, set[str]]


def scrape(port: int) -> list[Metric]:
    connection = HTTPConnection("127.0.0.1", port, timeout=daemons.PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return list(text_string_to_metric_families(text))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The metrics that both daemons export just after the start, by name."""
    found = {name: Exported("gauge", {}) for name in OF_PROMETHEUS}
    for name in DAEMONS:
        port = free_port()
        folder = tmp_path_factory.mktemp(name)
        control = f'control = "{folder}/control.sock"\n'
        with Daemon(name, control + CONFIGS[name].format(metrics=port), folder):
            # Workers tell the master of theirs a moment after they are ready.
            daemons.wait_until(
                lambda: {f"{name}_connections", f"{name}_workers"} <= {metric.name for metric in scrape(port)},
                "all metrics are there",
            )
            for metric in scrape(port):
                for sample in metric.samples:
                    known = found.setdefault(sample.name, Exported(metric.type, {}))
                    for label, value in sample.labels.items():
                        known.labels.setdefault(label, set()).add(value)
    return found


def for_each_daemon(place: str, text: str, shows: str = "") -> Iterator[Expression]:
    for daemon in DAEMONS if "${daemon}" in text else ("",):
        yield Expression(
            f"{place} ({daemon})" if daemon else place,
            string.Template(text).substitute(daemon=daemon, __rate_interval="5m", instance=".*"),
            shows,
        )


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana/transocks.json").read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[Expression]:
    found = dashboard()
    for panel in found["panels"]:
        for target in panel.get("targets", ()):
            yield from for_each_daemon(panel["title"], target["expr"], target["legendFormat"])
    for annotation in found["annotations"]["list"]:
        yield from for_each_daemon(annotation["name"], annotation["expr"])
    for variable in found["templating"]["list"]:
        if (query := re.fullmatch(r"label_values\((.*), (\w+)\)", variable.get("definition", ""))) is not None:
            yield from for_each_daemon(variable["name"], query[1])
    (patch,) = yaml.safe_load((DEPLOY / "kubernetes/usocksd/monitored/kustomization.yaml").read_text())["patches"]
    for change in yaml.safe_load(patch["patch"]):
        yield Expression("HorizontalPodAutoscaler", change["value"]["pods"]["metric"]["name"], "")
    for rule in rules():
        yield from for_each_daemon(rule["alert"], rule["expr"], " ".join(rule["annotations"].values()))


EXPRESSIONS = list(expressions())


def selectors(expression: promql.Expr) -> list[tuple[promql.VectorSelector, list[promql.Expr]]]:
    """The selectors of an expression, each with what it is inside of, outermost first."""
    found: list[tuple[promql.VectorSelector, list[promql.Expr]]] = []
    around: list[promql.Expr] = []

    def enter(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append((node, [*around]))
        around.append(node)

    def leave(_: promql.Expr) -> None:
        around.pop()

    promql.walk(expression, enter, leave)
    return found


def labels_of(node: promql.Expr, exported: dict[str, Exported]) -> set[str]:
    """The labels that the result of an expression may have; fails where it groups by one that is not there."""
    match node:
        case promql.VectorSelector():
            return set(exported[node.name].labels) | TARGET
        case promql.MatrixSelector():
            return labels_of(node.vector_selector, exported)
        case promql.AggregateExpr():
            inner = labels_of(node.expr, exported)
            if node.modifier is None:
                return inner if str(node.op) in {"topk", "bottomk"} else set()
            assert set(node.modifier.labels) <= inner, f"{node.prettify()} groups by labels that are not there"
            return set(node.modifier.labels)
        case promql.Call():
            inner = set().union(*(labels_of(argument, exported) for argument in node.args))
            if node.func.name == "histogram_quantile":
                assert "le" in inner, f"{node.prettify()} has no buckets"
                inner -= {"le"}
            return inner
        case promql.BinaryExpr():
            return labels_of(node.lhs, exported) | labels_of(node.rhs, exported)
        case promql.ParenExpr() | promql.UnaryExpr():
            return labels_of(node.expr, exported)
        case promql.NumberLiteral() | promql.StringLiteral():
            return set()
    raise AssertionError(f"nobody thought of {type(node)} here")


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_an_expression_is_about_what_is_exported(expression: Expression, exported: dict[str, Exported]) -> None:
    tree = promql.parse(expression.text)
    found = selectors(tree)
    assert found
    for selector, inside in found:
        assert selector.name in exported, f"no daemon exports {selector.name}"
        series = exported[selector.name]
        for matcher in selector.matchers.matchers:
            if matcher.name in TARGET:
                continue
            assert matcher.name in series.labels, f"{selector.name} has no label {matcher.name}"
            alternatives = matcher.value.split("|") if matcher.op == promql.MatchOp.Re else [matcher.value]
            assert set(alternatives) <= series.labels[matcher.name], f"{matcher.name} of {selector.name}"
        cumulative = series.kind in {"counter", "histogram"}
        functions = [node.func.name for node in inside if isinstance(node, promql.Call)]
        rated = bool({"rate", "increase"} & set(functions)) and isinstance(inside[-1], promql.MatrixSelector)
        assert rated is cumulative or "changes" in functions, f"{selector.name} is a {series.kind}"
    labels = labels_of(tree, exported)
    shown = set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", expression.shows))
    assert shown <= labels | ({"instance"} if not labels else set()), "it shows labels that its result has not"


def test_the_dashboard_can_be_provisioned() -> None:
    found = dashboard()
    assert found["uid"]
    assert found["schemaVersion"] >= 36
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in found["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells), "no panel lies upon another"
    assert max(x for x, _ in cells) < 24
    variables = {variable["name"] for variable in found["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(found)))
    assert {name for name in used if not name.startswith("__")} == variables
    for panel in found["panels"]:
        for target in panel.get("targets", ()):
            assert "$instance" in target["expr"], f"{panel['title']} is about the chosen instances"


def test_every_metric_is_on_the_dashboard(exported: dict[str, Exported]) -> None:
    suffix = re.compile(r"_(bucket|count|sum)$")
    used = {suffix.sub("", selector.name) for e in EXPRESSIONS for selector, _ in selectors(promql.parse(e.text))}
    there = {suffix.sub("", name) if series.kind == "histogram" else name for name, series in exported.items()}
    assert there - used == set()


def test_rules_say_what_to_do() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_rules_are_the_same_for_both_daemons() -> None:
    """Metrics that both daemons export have alerts for both."""
    names = {name: {r["alert"].removeprefix(name.capitalize()) for r in rules()} for name in DAEMONS}
    own = {"NoEgress", "EgressListed", "LoginsFail"}
    own |= {"UpstreamFails", "UpstreamSlow", "UpstreamDown", "AllUpstreamsDown", "Loop"}
    shared = {
        name: {alert for alert in found if not alert.startswith(("Usocksd", "Transocks"))}
        for name, found in names.items()
    }
    assert shared["usocksd"] - own == shared["transocks"] - own


def test_the_sample_scrapes_the_ports_that_the_daemons_have() -> None:
    found = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in found["scrape_configs"]}
    assert targets == {"usocksd": ["127.0.0.1:1082"], "transocks": ["127.0.0.1:1083"]}
    assert found["rule_files"] == ["alerts.yml"]
