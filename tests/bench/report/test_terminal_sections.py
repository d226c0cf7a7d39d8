import pytest

from bench.report.terminal_sections import fit_lines, sections

COMBINED = "flash_attention+layer_norm+rope"


def everything(make_gains, **options):
    return make_gains(combinations=True, fits=True, forecasts=True, power=True, **options)


def test_nothing_new_gives_no_sections(make_gains):
    assert sections(make_gains(), "model_flops") == []
    assert fit_lines(make_gains(), "model_flops") == []


def test_each_part_is_a_section_with_a_row_an_entry(make_gains):
    gains = everything(make_gains)
    interactions, contributions, forecasts, power = sections(gains, "model_flops")
    assert interactions.title == (
        "compact: interactions: the joint gain over the product of the single gains, model FLOPs"
    )
    ((variant, joint, product, ratio, verdict),) = interactions.rows
    assert (variant, joint, product, verdict) == (COMBINED, "3.48", "4.25", "less than the product")
    assert ratio["ceg"] == 0.82
    assert [row[1] for row in contributions.rows] == COMBINED.split("+")
    assert [row[3] for row in contributions.rows] == ["leave one out", "Shapley", "Shapley"]
    assert len(forecasts.rows) == 5 * 2
    assert forecasts.rows[1][1] == "4.00e14"
    assert forecasts.rows[1][3] == "2.0 decades beyond the data"
    assert "within a factor 1.1 of the CEG" in power.title
    assert power.rows[0] == ("layer_norm", "3", "0.073", "5 (11)", "2.40e14")
    for section in (interactions, contributions, forecasts, power):
        assert {len(row) for row in section.rows} == {len(section.headings)}


def test_only_the_axis_asked_for(make_gains):
    gains = everything(make_gains)
    gains["forecasts"] = [entry for entry in gains["forecasts"] if entry["axis"] == "seconds"]
    assert len(sections(gains, "model_flops")) == 3
    assert len(sections(gains, "seconds")) == 4
    assert sections(gains, "joules") == []


def test_several_scales_are_a_column(make_gains):
    for section in sections(everything(make_gains, scales=("compact", "all scales")), "seconds"):
        assert section.headings[:2] == ("variant", "scale")
        assert {row[1] for row in section.rows} == {"compact", "all scales"}
        assert not section.title.startswith("compact")


def test_what_is_not_known_is_a_dash(make_gains):
    gains = everything(make_gains)
    for entry in gains["interactions"]:
        entry |= {"joint": None, "product": None, "ratio": None, "lower_bound": 1.2, "interval": None}
    for entry in gains["power"]["entries"]:
        entry |= {"seed_sd": None, "seeds_needed": None, "seeds_cautious": None, "cost": None}
    interactions, *_, power = sections(gains, "model_flops")
    assert interactions.rows[0][1:3] == ("-", "-")
    assert power.rows[0] == ("layer_norm", "3", "-", "-", "-")


@pytest.mark.parametrize(("converged", "words"), [(True, "converged, 17"), (False, "did not converge (17")])
def test_a_line_for_each_fit(make_gains, converged, words):
    gains = everything(make_gains, scales=("compact", "full"))
    for fit in gains["fits"]:
        fit["converged"] = converged
    lines = fit_lines(gains, "model_flops")
    assert len(lines) == 2
    assert lines[0].startswith(
        f"fit, compact: L = E + K C^-gamma, E 1.817 [1.761, 1.870], gamma 0.1823; {words} of 20 starts agree"
    )
    gains["fits"][0]["parameters"] = {}
    assert fit_lines(gains, "model_flops")[0].startswith(f"fit, compact: L = E + K C^-gamma; {words}")
