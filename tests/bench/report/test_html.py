import html
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from bench.report import format_gain, write_report
from bench.report.format import (
    axes_of,
    axis_label,
    format_compute,
    format_error,
    format_interval,
    format_p,
    format_slope,
    gain_parts,
    printable,
)

VOID = {"meta", "br", "img", "link", "input", "hr", "wbr", "source", "base", "col"}


class Page(HTMLParser):
    """A report read back: every tag and attribute, tables by section, texts by tag, and whether tags nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.tags = [], [], []
        self.tables, self.scripts, self.notes, self.words = {}, [], [], []
        self.section = None
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")
        elif tag == "li":
            self.notes.append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        assert "svg" in self.open, f"<{tag}/> outside svg"

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
            return
        if "style" in self.open:
            return
        self.words.append(data)
        if ("td" in self.open or "th" in self.open) and "svg" not in self.open:
            cells = self.tables[self.section][-1][-1]
            cells[-1] = f"{cells[-1]}{data}" if data.strip() else f"{cells[-1]} "
        if "li" in self.open:
            self.notes[-1] += data

    @property
    def text(self):
        """All that is read, spaces joined."""
        return " ".join(" ".join(self.words).split())

    def rows(self, section, table=0):
        """Cells of a table's body, spaces joined."""
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[section][table][1:]]


@pytest.fixture
def read(tmp_path):
    """Writes the report of a gains dict and reads it back."""

    def write_and_parse(gains):
        path = write_report(gains, tmp_path / "report.html")
        assert path == tmp_path / "report.html"
        return Page(path.read_text(encoding="utf-8"))

    return write_and_parse


@pytest.fixture(autouse=True)
def small_plotly(request, monkeypatch):
    """Plotly's five megabytes are written in one test; the others get a stand-in."""
    if request.node.name != "test_the_file_is_whole_and_asks_nothing_of_a_network":
        monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")


def shown(gain):
    return format_gain(gain, typographic=True)


def test_the_file_is_whole_and_asks_nothing_of_a_network(make_gains, tmp_path):
    path = write_report(make_gains(), tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert len(text) > 1_000_000
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not [a for a in page.attributes if a[1] in ("src", "href", "srcset", "action", "data", "poster")]
    assert not {"link", "img", "iframe", "base", "object", "embed"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"url\(|@import", style)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "Plotly" in page.scripts[1]
    assert len(page.scripts) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_headline_table_holds_the_gains(make_gains, read):
    gains = make_gains(scales=("compact", "full"))
    page = read(gains)
    for number, scale in enumerate(("compact", "full")):
        entries = [e for e in gains["gains"] if e["scale"] == scale and e["axis"] == "model_flops"]
        rows = page.rows("headline", number)
        assert [row[0] for row in rows] == [entry["variant"] for entry in entries]
        for row, entry in zip(rows, entries, strict=True):
            value, interval = gain_parts(entry, typographic=True)
            assert row[1:3] == [value, interval or "\u2014"]
            assert row[5:7] == ["independent", "inconclusive"]
            assert row[7] == ("0.002 untuned: edge of grid" if entry["untuned"] else "0.002")
            assert row[8] == "3"
        assert [row[4] for row in rows] == ["gain", "bound only", "bound only", "contains 1", "gain"]


def test_readers_see_bounds_and_intervals_that_contain_1(make_gains, read):
    page = read(make_gains())
    classes = [value for tag, name, value in page.attributes if (tag, name) == ("tr", "class")]
    assert classes[:5] == ["is-gain", "is-bound-only is-bound", "is-bound-only is-bound", "is-contains-1", "is-gain"]
    text = " ".join(" ".join(page.words).split())
    assert "5 variants: 2 gain, 1 cannot be told from no change, 2 known only as a bound." in text


def test_a_bound_with_an_interval_says_both(make_gains, make_gain, read):
    bounds = {
        "rope": make_gain(ceg=None, lower_bound=64.00000000000003, interval=[64.00000000000003, None]),
        "flash_attention": make_gain(ceg=None, upper_bound=1.0, interval=[None, 1.1592]),
        "layer_norm": make_gain(),
    }
    page = read(make_gains(points=bounds))
    rope, flash_attention, _ = page.rows("headline")
    assert rope[1:5] == ["\u2265 64", "[64.0, \u221e)", "", "gain, a bound"]
    assert flash_attention[1:5] == ["\u2264 1.0", "(0, 1.16]", "", "contains 1, a bound"]
    classes = [value for tag, name, value in page.attributes if (tag, name) == ("tr", "class")]
    assert classes[:3] == ["is-gain is-bound", "is-contains-1 is-bound", "is-gain"]
    text = " ".join(" ".join(page.words).split())
    assert "3 variants: 2 gain (1 of them only a bound), 1 cannot be told from no change (only a bound)." in text


def test_every_axis_has_every_gain(make_gains, read):
    gains = make_gains(scales=("compact", "full"))
    page = read(gains)
    for number, scale in enumerate(("compact", "full")):
        header, *rows = page.tables["axes"][number]
        assert header == ["Innovation", *(axis_label(axis) for axis in axes_of(gains))]
        for row in rows:
            for axis, cell in zip(axes_of(gains), row[1:], strict=True):
                where = {"scale": scale, "variant": row[0].strip(), "axis": axis}
                entry = next(e for e in gains["gains"] if where.items() <= e.items())
                assert " ".join(cell.split()) == shown(entry)


def test_an_axis_without_a_variant_shows_a_dash(make_gains, read):
    gains = make_gains()
    gains["gains"] = [e for e in gains["gains"] if not (e["variant"] == "mqa" and e["axis"] == "seconds")]
    row = next(row for row in read(gains).rows("axes") if row[0] == "mqa")
    assert row == ["mqa", "\u2264 0.5", "\u2264 0.5", "\u2014", "\u2264 0.5"]


def test_numbers_beneath_the_figures(make_gains, read):
    gains = make_gains()
    page = read(gains)
    points = [
        (frontier, point)
        for frontier in gains["frontiers"]
        if frontier["axis"] == "model_flops"
        for point in frontier["points"]
    ]
    assert page.rows("loss") == [
        [
            frontier["scale"],
            frontier["variant"],
            format_compute(point["budget"], typographic=True),
            format_compute(point["compute"], typographic=True),
            f"{point['loss']:.4f}",
            "0.0123",
            "0.0045",
            "3",
            "0.001",
        ]
        for frontier, point in points
    ]
    curve = [(e, p) for e in gains["gains"] if e["axis"] == "model_flops" for p in e["curve"]]
    for row, (entry, point) in zip(page.rows("curves"), curve, strict=True):
        assert row[:2] == [entry["scale"], entry["variant"]]
        assert row[2] == format_compute(point["baseline_compute"], typographic=True)
        assert row[3] == f"{point['target_loss']:.4f}"
        assert f"{row[4]} {row[5]}".removesuffix(" \u2014") == shown(point)
        assert row[6] == (format_interval(point["interval_90"], typographic=True) or "\u2014")
        assert row[7] == format_p(point["p_value"], typographic=True)
        assert row[8:] == [
            format_error(point["seed_error"], typographic=True),
            "\u2014" if point["evaluation_error"] is None else "\u2264 0.0040",
        ]


def test_classes_with_their_numbers(make_gains, read):
    gains = make_gains()
    gains["classes"][3]["sign"] |= {"p_value": 0.0123, "interval_90": [1.02, 1.03]}
    gains["classes"][1]["slope"] |= {"value": None, "interval": None}
    gains["classes"][2]["sign"]["scale"] = None
    for row, entry in zip(read(gains).rows("classes"), gains["classes"], strict=True):
        assert row == [
            entry["variant"],
            entry["sign"]["verdict"],
            format_interval(entry["sign"]["interval"], typographic=True) or "\u2014",
            entry["sign"]["scale"] or "\u2014",
            format_p(entry["sign"]["p_adjusted"], typographic=True),
            entry["slope"]["verdict"],
            format_slope(entry["slope"], typographic=True),
            "compact",
            "0.84",
        ]


def test_the_class_says_how_its_p_values_are_adjusted_and_what_they_were_before(make_gains, read):
    gains = make_gains()
    gains["classes"][3]["sign"] |= {"p_value": 0.0123, "interval_90": [1.02, 1.03]}
    page = read(gains)
    titles = {value for tag, name, value in page.attributes if (tag, name) == ("td", "title")}
    slope = "90 %: \u22120.12 [\u22120.29, +0.05]"
    assert {"unadjusted: 0.012", "unadjusted: 0.21", "90 %: [1.02, 1.03]", slope} <= titles
    assert f"for the number of innovations tested: {gains['correction']}. So an interval" in page.text
    gains["correction"] = ""
    assert "adjusted for" not in read(gains).text


def test_figures_for_each_panel_and_axis(make_gains, read):
    gains = make_gains(scales=("compact", "full"))
    page = read(gains)
    figures = json.loads(page.scripts[0])
    panels = [value for _, name, value in page.attributes if name == "data-panel"]
    assert panels == list(figures) == ["loss-0", "loss-1", *(f"gain-{index}" for index in range(5))]
    options = [value for tag, name, value in page.attributes if (tag, name) == ("option", "value")]
    choices = axes_of(gains)
    assert options == 2 * choices
    assert all(list(figure) == choices for figure in figures.values())


def test_interactions_and_contributions_on_every_axis(make_gains, read):
    gains = make_gains(combinations=True, scales=("compact", "full"))
    page = read(gains)
    assert page.rows("combinations", 0) == [
        [
            entry["variant"],
            entry["scale"],
            "3.48",
            "4.25",
            "0.82",
            "[0.71, 0.95]",
            "[0.73, 0.93]",
            "0.008",
            "less than the product",
        ]
        for axis in axes_of(gains)
        for entry in gains["interactions"]
        if entry["axis"] == axis
    ]
    entries = [e for axis in axes_of(gains) for e in gains["contributions"] if e["axis"] == axis]
    for row, entry in zip(page.rows("combinations", 1), entries, strict=True):
        assert row[:3] == [entry["variant"], entry["innovation"], entry["scale"]]
        assert row[3:5] == [*gain_parts(entry)]
        assert row[6:] == [format_p(entry["p_value"]), "Shapley" if entry["method"] == "shapley" else "leave one out"]
    axes = [value for tag, name, value in page.attributes if (tag, name) == ("tbody", "data-axis")]
    hidden = [name for tag, name, _ in page.attributes if (tag, name) == ("tbody", "hidden")]
    assert axes == 2 * axes_of(gains)
    assert len(hidden) == 2 * 3


def test_an_axis_without_a_combination_says_so(make_gains, read):
    gains = make_gains(combinations=True)
    gains["interactions"] = [entry for entry in gains["interactions"] if entry["axis"] != "seconds"]
    rows = read(gains).rows("combinations", 0)
    assert [row for row in rows if len(row) == 1] == [["Nothing in seconds."]]


def test_an_interaction_that_is_a_bound(make_gains, read):
    gains = make_gains(combinations=True, axes={"model_flops": 1.0})
    censored = {"joint": None, "ratio": None, "lower_bound": 1.26, "interval": [1.1, None], "interval_90": None}
    gains["interactions"][0] |= censored | {"p_value": None, "verdict": "more than the product"}
    ((_, *cells),) = read(gains).rows("combinations", 0)
    assert cells == ["\u2014", "4.25", "\u2265 1.2", "[1.10, \u221e)", "\u2014", "\u2014", "more than the product"]


def test_forecasts_are_marked_as_extrapolated(make_gains, read):
    gains = make_gains(forecasts=True)
    gains["forecasts"] = [entry for entry in gains["forecasts"] if entry["axis"] == "model_flops"]
    page = read(gains)
    assert page.rows("forecasts")[1] == [
        "layer_norm",
        "4.00 \u00d7 10\u00b9\u2074",
        "2.0 decades",
        "~2.20",
        "[0.80, 4.90]",
        "[0.90, 4.80]",
    ]
    assert len(page.rows("forecasts")) == 10
    assert "Every value here is extrapolated" in page.text
    assert "Open markers with dashed bars are extrapolated" in page.text
    assert "Open markers" not in read(make_gains()).text


def test_what_is_told_on_one_axis_does_not_follow_the_choice_of_another(make_gains, read):
    gains = make_gains(forecasts=True, power=True)
    gains["forecasts"] = [entry for entry in gains["forecasts"] if entry["axis"] == "seconds"]
    page = read(gains)
    assert len(page.rows("forecasts")) == 10
    assert "Forecasts beyond the data Compute in seconds" in page.text
    axes = [value for tag, name, value in page.attributes if (tag, name) == ("tbody", "data-axis")]
    assert axes == axes_of(gains)


def test_extrapolated_gains_are_marked_and_explained(make_gains, make_gain, read):
    page = read(make_gains(points={"rope": make_gain(extrapolated=True)}))
    assert page.rows("headline")[0][1:5] == ["~2.31", "[1.80, 2.96]", "", "gain, extrapolated"]
    explained = "~ Extrapolated: the value comes from a fit"
    assert explained in page.text
    assert explained not in read(make_gains()).text


def test_fits_with_their_parameters_and_what_pinning_does(make_gains, read):
    gains = make_gains(fits=True, axes={"model_flops": 1.0})
    page = read(gains)
    assert "E = 1.817 [1.761, 1.870] , \u03b3 = 0.1823" in page.text
    assert "The fit converged, 17 of 20 starts agree; 99.4 % of the bootstrap replicates converged." in page.text
    assert page.rows("fits", 0)[:2] == [["baseline", "412.3"], ["layer_norm", "392.3"]]
    header, *rows = page.tables["fits"][1]
    assert header == ["E held at", "1.700", "1.900"]
    assert rows[0] == ["\u03b3", "0.1654", "0.2012"]
    assert page.rows("fits", 1)[1:3] == [["layer_norm", "2.00", "2.00"], ["rope", "2.10", "2.10"]]


def test_fits_that_share_other_parameters_or_were_not_pinned(make_gains, read):
    gains = make_gains(fits=True, axes={"model_flops": 1.0})
    fit = gains["fits"][0]
    free = {"law": "L = E + K C^-gamma, gamma of each <b>", "parameters": {"E": 0.0}, "pinned": [], "converged": False}
    ragged = {"baseline": {"K": 10.0}, "rope": {"K": 9.0, "gamma": 0.2}}
    surface = {"law": "L = E + A/N^alpha + B/D^beta", "variants": {}, "intervals": {}}
    gains["fits"] = [fit | free | {"variants": ragged}, fit | surface, fit | {"law": "L = E <i>"}]
    page = read(gains)
    assert page.rows("fits", 0) == [["baseline", "10.00", "\u2014"], ["rope", "9.000", "0.2000"]]
    assert page.tags.count("sup") == 1 + 2
    assert page.tags.count("i") == 1
    assert "L = E <i>" in page.text
    assert "gamma of each <b>" in page.text
    assert "The fit did not converge (17 of 20 starts agree); do not rely on it" in page.text


def test_seeds_needed(make_gains, read):
    page = read(make_gains(power=True, axes={"model_flops": 1.0}))
    assert page.rows("power")[0] == ["layer_norm", "3", "0.073", "5 (11)", "2.40 \u00d7 10\u00b9\u2074 model FLOPs"]
    assert "bring the 95 % interval within a factor 1.1 of the CEG" in page.text


def test_parts_without_entries_have_no_section(make_gains, read):
    assert set(read(make_gains()).tables) == {"headline", "classes", "loss", "curves", "axes", "provenance"}


def test_the_pooled_scale_says_what_it_is(make_gains, read):
    text = read(make_gains(scales=("compact", "all scales"))).text
    # Above the gains, the losses and the gains on every axis.
    assert text.count("all scales (the frontier over every scale)") == 3


def test_one_axis_needs_no_choice_and_is_still_drawn(make_gains, read):
    page = read(make_gains(axes={"seconds": 1.0}))
    assert "select" not in page.tags
    assert ("script", "data-headline", "seconds") in page.attributes


def test_provenance_of_every_run(make_gains, read):
    gains = make_gains()
    gains["runs"][1] |= {"state": "failed", "started": None, "seed": None, "lr": None}
    page = read(gains)
    runs = page.rows("provenance", 1)
    assert [row[0] for row in runs] == [run["path"] for run in gains["runs"]]
    assert runs[0][1:] == ["done", "0", "0.001", "2026-01-02 03:04 UTC"]
    assert runs[1][1:] == ["failed", "\u2014", "\u2014", "\u2014"]
    models = page.rows("provenance", 0)
    assert len(models) == 6
    sizes = ["1,234,567", "987,654", "1,020,422", "5.40 \u00d7 10\u2076", "5.90 \u00d7 10\u2076"]
    assert models[0] == ["compact", "baseline", *sizes]
    assert "commit 0123abcd; CPU, 2 cores, torch 2.13.0" in page.notes


def test_runs_from_two_machines_say_which(make_gains, read):
    gains = make_gains()
    gains["runs"][2] |= {"device": None, "versions": None, "git_commit": None, "parameters": None}
    gains["runs"][0] |= {"parameters": None, "flops_per_token": None}
    page = read(gains)
    assert [row[-1] for row in page.rows("provenance", 1)][:4] == ["E1", "E1", "E2", "E1"]
    assert "E2 commit unknown; device unknown" in [" ".join(note.split()) for note in page.notes]
    assert page.rows("provenance", 0)[0][2] == "1,234,567"


def test_warnings_caveats_and_sign_changes(make_gains, read):
    gains = make_gains()
    gains["warnings"] = ["joules: not measured in 2 runs.", "rope: add a larger rate."]
    gains["caveats"] = ["Costs are counted in evaluations."]
    gains["sign_changes"] = [
        {"scale": "compact", "variant": "mqa", "axes": ["flops_6nd"], "against": ["model_flops", "seconds"]}
    ]
    notes = read(gains).notes
    assert {*gains["warnings"], *gains["caveats"]} <= set(notes)
    assert "mqa at compact: a gain in 6ND, but a loss in model FLOPs, seconds." in notes


def test_terms_are_explained_where_they_are_used(make_gains, read):
    text = " ".join(" ".join(read(make_gains()).words).split())
    for words in (
        "the compute the baseline needs to reach a loss, over the compute the variant needs",
        "at 95 % confidence",
        "by how much was not measured",
        "at the edge of those tried",
        "above 1 at the smallest scale",
    ):
        assert words in text


def test_hostile_names_stay_text_everywhere(make_gains, make_gain, read, hostile):
    points = {name: make_gain() for name in (*hostile, "+".join(hostile))}
    options = {"combinations": True, "fits": True, "forecasts": True, "power": True}
    gains = make_gains(points=points, scales=hostile[:2], baseline=f"{hostile[0]}b", **options)
    script = hostile[0]
    gains |= {"study": script, "estimator": script, "created": script, "warnings": list(hostile)}
    gains |= {"caveats": list(hostile)}
    gains["sign_changes"] = [{"scale": script, "variant": script, "axes": [script], "against": [hostile[1]]}]
    for run in gains["runs"]:
        run |= {
            "device": script,
            "git_commit": hostile[1],
            "versions": {script: hostile[2]},
            "state": 'done" onload="x',
        }
        run |= {"parameters": {script: 1}, "flops_per_token": {hostile[1]: 2.0}, "started": script}
    parts = [gains[part] for part in ("gains", "frontiers", "interactions", "contributions", "fits", "forecasts")]
    for entry in [*itertools.chain(*parts), *gains["power"]["entries"]]:
        entry["axis"] = {"tokens": script}.get(entry["axis"], entry["axis"])
    for entry in gains["classes"]:
        entry["sign"] |= {"verdict": script}
        entry["slope"] |= {"verdict": hostile[1]}
    gains["correction"] = script
    for entry in gains["interactions"]:
        entry |= {"verdict": script}
    for entry in gains["contributions"]:
        entry |= {"method": hostile[1]}
    for fit in gains["fits"]:
        fit |= {"law": f"{script}, {hostile[1]}", "parameters": {hostile[1]: 1.0}, "variants": {script: {script: 1.0}}}
        fit["pinned"][0] |= {script: 1.0}
    page = read(gains)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert [row[0] for row in page.rows("headline")] == [printable(name) for name in points]
    assert {row[0] for row in page.rows("combinations")} == {"+".join(hostile)}
    assert {row[-1] for row in page.rows("combinations", 1)} == {hostile[1]}
    assert page.rows("fits", 0) == [[script, "1.000"]]
    assert [row[0] for row in page.rows("forecasts")[:2]] == [script] * 2
    assert [row[0] for row in page.rows("power")[: len(points)]] == list(points)
    assert [row[0] for row in page.rows("provenance", 1)] == [run["path"] for run in gains["runs"]]
    assert set(hostile) <= set(page.notes)
    assert "<" not in page.scripts[0]
    json.loads(page.scripts[0])


def test_surrogates_and_control_characters_can_be_written(make_gains, make_gain, read):
    page = read(make_gains(points={"bad\udc80\x00\u202ename": make_gain()}))
    assert page.rows("headline")[0][0] == "bad\\udc80\\x00\\u202ename"


@pytest.mark.parametrize("interval", [None, [None, None], [1.8, None], [None, 2.9]])
def test_null_intervals(make_gains, make_gain, read, interval):
    gains = make_gains(points={"rope": make_gain(interval=interval)}, seeds=1)
    row = read(gains).rows("headline")[0]
    assert row[1] == "2.31"
    assert row[2] == (format_interval(interval, typographic=True) or "(one seed)")


def test_a_gain_of_which_nothing_is_known(make_gains, make_gain, read):
    gains = make_gains(points={"rope": make_gain(ceg=None, interval=None)})
    for entry in gains["gains"]:
        entry |= {"target_loss": None, "baseline_compute": None}
        for point in entry["curve"]:
            point |= {"target_loss": None, "baseline_compute": None}
    for frontier in gains["frontiers"]:
        for point in frontier["points"]:
            point |= {"loss": None, "loss_sd": None, "val_loss_se": None}
    gains["classes"] = []
    row = read(gains).rows("headline")[0]
    assert [row[1], row[2], row[4], row[5]] == ["\u2014", "\u2014", "unknown", "\u2014"]


def test_no_gains_at_all(make_gains, read):
    gains = make_gains(points={}, scales=())
    gains["warnings"] = ["No run is done yet."]
    page = read(gains)
    text = " ".join(" ".join(page.words).split())
    for words in ("No gain could be computed.", "There are no results yet.", "No runs were found."):
        assert words in text
    assert page.notes == ["No run is done yet."]
    assert json.loads(page.scripts[0]) == {}


def test_only_the_baseline_ran(make_gains, read):
    page = read(make_gains(points={}))
    assert set(page.tables) == {"loss", "provenance"}
    assert len(page.rows("loss")) == 3


def test_another_estimators_axis_leads_where_model_flops_are_missing(make_gains, read):
    page = read(make_gains(axes={"evaluations": 1.0}))
    assert "Compute is counted here in evaluations." in " ".join(" ".join(page.words).split())


def test_an_older_report_is_replaced(make_gains, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(make_gains(), path)
    assert path.read_text() != "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_json_cannot_hold_are_refused_before_anything_is_written(make_gains, tmp_path):
    gains = make_gains()
    gains["frontiers"][0]["points"][0]["loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(gains, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_each_bound_and_interval_reaches_the_figures_hover_texts(make_gains, read):
    figures = json.loads(read(make_gains()).scripts[0])
    texts = [
        html.unescape(t["hovertext"][0]) for f in figures.values() for t in f["seconds"]["data"] if "hovertext" in t
    ]
    for words in ("2.31 [1.80, 2.96]", "\u2265 4.0", "\u2264 0.5", "1.00 [0.96, 1.04]", "3.48 [2.91, \u221e)"):
        assert any(f"<b>{words}</b>" in text for text in texts)
