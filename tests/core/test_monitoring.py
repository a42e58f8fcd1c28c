"""What administrators are given in contrib/monitoring/ and docs/metrics.rst speaks of metrics that there are.

That Prometheus understands it, and that the alerts fire, is in tests/interop/test_metrics.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from iohang_fuse import config
from iohang_fuse.metrics import HISTOGRAM, METRICS
from iohang_fuse.tally import MOST_IMAGES, OTHERS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "contrib" / "monitoring"
PAGE = (ROOT / "docs" / "metrics.rst").read_text()
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "iohang-alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())

SERIES = {*METRICS} | {
    name + suffix
    for name, (kind, *_) in METRICS.items()
    if kind == HISTOGRAM
    for suffix in ("_bucket", "_sum", "_count")
}
FROM_OTHERS = {"instance", "mountpoint", "job", "le", "file"}
"""Labels of Prometheus, of the scrape configuration, of node_exporter."""


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """All that the rules and the dashboard ask Prometheus."""
    asked = [rule["expr"] for rule in RULES]
    asked += [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += [variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    return asked + [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_is_there(expression: str) -> None:
    """Issue: every metric named in the dashboard and the rules exists, and has the labels by which it is told apart."""
    names = re.findall(r"\biohang_\w+", expression)
    assert {*names} <= SERIES
    selectors = re.findall(r"\b(iohang_\w+)\{([^}]*)\}", expression)
    for name, matchers in selectors:
        known = METRICS[re.sub(r"_(bucket|sum|count)$", "", name)][1]
        assert {*re.findall(r"(\w+)=", matchers)} <= {*known} | FROM_OTHERS
    labels = {label for name in names for label in METRICS[re.sub(r"_(bucket|sum|count)$", "", name)][1]}
    for grouped in re.findall(r"\b(?:by|on|without) ?\(([^)]*)\)", expression):
        assert {*grouped.replace(" ", "").split(",")} <= labels | FROM_OTHERS


def test_each_metric_is_shown() -> None:
    """One that neither an alert nor the dashboard uses is one that nobody looks at."""
    used = {name for expression in expressions() for name in re.findall(r"\biohang_\w+", expression)}
    assert {*METRICS} <= {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}


def test_the_dashboard_is_one() -> None:
    """What Grafana's import needs: ids of their own, a place for each panel that no other has, a data source to choose."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == [*"ABCDEFGH"[: len(panel["targets"])]]
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "instance", "mountpoint"]


def test_each_alert_says_what_to_do() -> None:
    """Issue: alert rules with annotations that tell what to do; and those that the page lists, with their severity."""
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert len(rule["annotations"]["description"]) > 100, rule["alert"]
        assert rule["annotations"]["summary"]
    listed = re.findall(r"^(Iohang\w+) +(warning|critical) ", PAGE, re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]


def test_each_alert_has_a_test() -> None:
    """`promtool test rules` passes whatever is not in its file."""
    tested = (FOLDER / "iohang-alerts-test.yml").read_text()
    for rule in RULES:
        assert rule["alert"] in tested, rule["alert"]


def test_the_page_has_each_metric() -> None:
    """Issue: one table of metrics, which agrees with the code: names, kinds, labels and words."""
    rows: list[list[str]] = []
    table = PAGE.split("\n\n.. Kept in step", 1)[1].split("\n\n", 2)[1]
    edges = [match.span() for match in re.finditer("=+", table.splitlines()[0])]
    for line in table.splitlines()[3:-1]:
        cells = [line[start : end if number < 3 else None].strip() for number, (start, end) in enumerate(edges)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1][3] += f" {cells[3]}"
    assert rows == [[f"``{name}``", kind, ", ".join(labels), words] for name, (kind, labels, words) in METRICS.items()]


def test_the_page_has_the_bounds() -> None:
    """Of labels, and the label of those that have none."""
    assert f"\n{MOST_IMAGES} have a label of their own." in PAGE
    assert f'``image="{OTHERS}"``' in PAGE


def test_the_example_of_a_file_is_a_configuration() -> None:
    """contrib/monitoring/iohang-textfile.yaml is an iohang.yaml."""
    read = config.load("/srv/vm", "/mnt", file=str(FOLDER / "iohang-textfile.yaml"))
    assert read.metrics_where == Path("/var/lib/prometheus/node-exporter/iohang.prom")
