"""What the dashboards are made of: panels that look alike, and the variables they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATA_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "$__rate_interval"
TAG = "meshserve"

# Units, as Grafana calls them.
SECONDS = "s"
SHARE = "percentunit"
PER_SECOND = "reqps"
TOKENS_PER_SECOND = "suffix: tok/s"
COUNT = "short"
BYTES = "bytes"
CORES = "suffix: cores"

# The grid is 24 wide.
HEIGHT = 8
THIRD, HALF, WHOLE = 8, 12, 24
STAT_HEIGHT = 4

GOOD, BAD = "green", "red"
WARN = "orange"


Panel = TypeVar("Panel", timeseries.Panel, stat.Panel)
Panels = tuple[timeseries.Panel | stat.Panel | table.Panel, ...]


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and what its series are called in the legend."""

    expression: str
    legend: str = ""
    exemplars: bool = False


def percentiles(
    metric: str,
    matchers: str,
    *,
    by: str = "",
    at: Sequence[float] = (0.5, 0.95, 0.99),
    exemplars: bool = False,
) -> list[Query]:
    """Queries of a histogram's percentiles, by a label if one is given."""
    labels = f"{by}, le" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    buckets = f"sum by ({labels}) (rate({metric}_bucket{{{matchers}}}[{RATE}]))"
    return [
        Query(
            f"histogram_quantile({q}, {buckets})",
            f"{name}p{q * 100:g}",
            # The dots belong to the histogram, not to a percentile: one query brings them all.
            exemplars and q == at[-1],
        )
        for q in at
    ]


def rate(metric: str, matchers: str, by: str, legend: str = "") -> Query:
    """Events a second, by labels."""
    return Query(f"sum by ({by}) (rate({metric}{{{matchers}}}[{RATE}]))", legend or f"{{{{{by}}}}}")


def present(metric: str, matchers: str, by: str, legend: str = "") -> Query:
    """The sum of a gauge, by labels."""
    return Query(f"sum by ({by}) ({metric}{{{matchers}}})", legend or f"{{{{{by}}}}}")


def share(
    part: str, whole: str, matchers: str, by: str, legend: str = "", *, whole_matchers: str = ""
) -> Query:
    """One counter's pace as a share of another's, by a label; nothing while neither moves."""
    of = f"rate({whole}{{{whole_matchers or matchers}}}[{RATE}]) > 0"
    return Query(
        f"sum by ({by}) (rate({part}{{{matchers}}}[{RATE}])) / sum by ({by}) ({of})",
        legend or f"{{{{{by}}}}}",
    )


def graph(
    title: str,
    queries: Query | Iterable[Query],
    meaning: str,
    *,
    unit: str = COUNT,
    width: int = HALF,
    stacked: bool = False,
    most: float | None = None,
) -> timeseries.Panel:
    """Lines over time, with a table of their last and largest values below."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(HEIGHT)
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(25 if stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
    )
    if most is not None:
        panel = panel.max(most)
    if stacked:
        panel = panel.stacking(
            common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A")
        )
    return _with(panel, queries)


def number(
    title: str,
    query: Query,
    meaning: str,
    *,
    unit: str = COUNT,
    width: int = 4,
    limits: tuple[float, float] | None = None,
    worse: Literal["above", "below"] = "above",
) -> stat.Panel:
    """One large number with its course behind it; from its limits on it is orange, and red."""
    steps = [models.Threshold(value=None, color=GOOD)]
    if limits is not None and worse == "above":
        steps += [
            models.Threshold(value=limits[0], color=WARN),
            models.Threshold(value=limits[1], color=BAD),
        ]
    elif limits is not None:
        steps = [
            models.Threshold(value=None, color=BAD),
            models.Threshold(value=limits[1], color=WARN),
            models.Threshold(value=limits[0], color=GOOD),
        ]
    panel = (
        stat.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(STAT_HEIGHT)
        .unit(unit)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    return _with(panel, query)


def rows(
    title: str, query: Query, meaning: str, *, unit: str = COUNT, width: int = HALF
) -> table.Panel:
    """The present values, one row for each series."""
    target = (
        prometheus.Dataquery()
        .ref_id("A")
        .expr(query.expression)
        .instant()
        .format(prometheus_models.PromQueryFormat.TABLE)
    )
    return (
        table.Panel()
        .title(title)
        .description(meaning)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(HEIGHT)
        .unit(unit)
        .with_target(target)
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize", options={"excludeByName": {"Time": True, "__name__": True}}
            )
        )
    )


def _with(panel: Panel, queries: Query | Iterable[Query]) -> Panel:
    for position, query in enumerate([queries] if isinstance(queries, Query) else queries):
        target = (
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + position))
            .expr(query.expression)
            .range()
            .legend_format(query.legend or "__auto")
        )
        if query.exemplars:
            target = target.exemplar(True)
        panel = panel.with_target(target)
    return panel


def board(uid: str, title: str, meaning: str, *variables: str) -> dashboard.Dashboard:
    """A dashboard that has no panels yet. `variables` are names of VARIABLES."""
    made = (
        dashboard.Dashboard(title)
        .uid(f"{TAG}-{uid}")
        .description(meaning)
        .tags([TAG])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("MeshServe")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
    )
    for name in variables:
        label, values = VARIABLES[name]
        made = made.with_variable(
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(DATA_SOURCE)
            .query(values)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
    return made


def laid_out(
    made: dashboard.Dashboard,
    *panels: dashboard.Row | timeseries.Panel | stat.Panel | table.Panel,
) -> dashboard.Dashboard:
    """The dashboard with panels from left to right, and with what begins a row of its own."""
    for panel in panels:
        made = made.with_row(panel) if isinstance(panel, dashboard.Row) else made.with_panel(panel)
    return made


# By name: what it is called, and where its values come from.
VARIABLES = {
    "model": ("Model", "label_values(meshserve_gateway_requests_total, model)"),
    "tenant": ("Tenant", "label_values(meshserve_gateway_requests_total, tenant)"),
    "engine": ("Replica", 'label_values(meshserve_healthy{job="engine"}, instance)'),
    "service": ("Service", "label_values(meshserve_healthy, job)"),
    "replica": ("Replica", 'label_values(meshserve_healthy{job=~"$service"}, instance)'),
}
