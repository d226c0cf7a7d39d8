import io

import pytest
from rich.console import Console

from bench.report import print_gains


def printed(gains, width=240, **options):
    stream = io.StringIO()
    print_gains(gains, Console(file=stream, width=width, **options))
    return stream.getvalue()


def lines(text):
    return [line.rstrip() for line in text.splitlines()]


GOLDEN = """\
compact: target loss 2.8567, which cost the baseline 4.00e12 model FLOPs
variant                          CEG, model FLOPs   CEG, 6ND           CEG, seconds       \
learning rate  tuning                 class
layer_norm                       2.31 [1.80, 2.96]  2.31 [1.80, 2.96]  2.31 [1.80, 2.96]  \
0.002          tuned                  independent, slope inconclusive
rope                             >= 4.0             >= 4.0             >= 4.0             \
0.002          untuned: edge of grid  independent, slope inconclusive
mqa                              <= 0.5             <= 0.5             <= 0.5             \
0.002          tuned                  independent, slope inconclusive
flash_attention                  1.00 [0.96, 1.04]  1.00 [0.96, 1.04]  1.00 [0.96, 1.04]  \
0.002          tuned                  independent, slope inconclusive
flash_attention+layer_norm+rope  3.48 [2.91, inf)   3.48 [2.91, inf)   3.48 [2.91, inf)   \
0.002          tuned                  independent, slope inconclusive
"""


def test_plain_table(make_gains):
    assert lines(printed(make_gains()))[:7] == GOLDEN.splitlines()


def test_without_a_console_a_pipe_gets_unfolded_plain_ascii(make_gains, capsys):
    print_gains(make_gains())
    out = capsys.readouterr().out
    assert lines(out)[:7] == GOLDEN.splitlines()
    assert "\x1b" not in out
    assert out.isascii()


FOLDED = """\
layer_norm        2.31 [1.80, 2.96]  2.31 [1.80, 2.96]  0.002          tuned
rope              >= 4.0             >= 4.0             0.002          untuned:
                                                                       edge of grid
mqa               <= 0.5             <= 0.5             0.002          tuned
flash_attention   1.00 [0.96, 1.04]  1.00 [0.96, 1.04]  0.002          tuned
flash_attention+  3.48 [2.91, inf)   3.48 [2.91, inf)   0.002          tuned
layer_norm+
rope
"""


@pytest.mark.parametrize(("width", "axes"), [(122, 3), (105, 3), (86, 2)])
def test_a_narrower_console_gets_fewer_columns(make_gains, width, axes):
    out = lines(printed(make_gains(), width=width))
    assert max(len(line) for line in out) <= width
    assert sum("2.31 [1.80, 2.96]" in line for line in out) == 1
    assert next(line for line in out if line.startswith("layer_norm ")).count("2.31 [1.80, 2.96]") == axes
    folded = [line.split()[0] for line in out if line.startswith(("flash_attention+", "layer_norm+"))]
    assert folded == ["flash_attention+", "layer_norm+"]
    assert any("slope" in line for line in out) == (width > 110)


def test_the_least_table(make_gains):
    shown = lines(printed(make_gains(), width=86))
    assert shown[3:11] == FOLDED.splitlines()


@pytest.mark.parametrize("width", [20, 40, 60])
def test_a_narrow_console_gets_lines_instead_of_folded_cells(make_gains, width):
    out = lines(printed(make_gains(), width=width))
    assert "rope" in out
    joined = " ".join(line.strip() for line in out)
    assert "CEG, model FLOPs: 2.31 [1.80, 2.96]" in joined
    assert "tuning: untuned: edge of grid" in joined
    assert max(len(line) for line in out) <= width


def test_narrow_lines(make_gains, make_gain):
    gains = make_gains(points={"rope": make_gain(interval=None, ceg=1.02)}, seeds=1, axes={"seconds": 1.0})
    gains["classes"] = []
    assert lines(printed(gains, width=40)) == [
        "compact: target loss 2.8567, which cost",
        "the baseline 4.00e12 seconds",
        "rope",
        "  CEG, seconds: 1.02 (one seed)",
        "  learning rate: 0.002",
        "  tuning: untuned: edge of grid",
        "  class: -",
        "",
    ]


def test_a_terminal_gets_colour_and_the_same_words(make_gains):
    out = printed(make_gains(), force_terminal=True, color_system="standard")
    assert "\x1b[32m2.31 [1.80, 2.96]" in out
    assert "\x1b[3m>= 4.0" in out


def test_each_scale_has_its_table(make_gains):
    out = printed(make_gains(scales=("compact", "full")))
    assert out.index("compact: target loss") < out.index("full: target loss")
    assert out.count("flash_attention+layer_norm+rope") == 2


def test_axes_that_were_not_measured_are_left_out(make_gains):
    assert "seconds" not in printed(make_gains(axes={"model_flops": 1.0}))
    assert "CEG, evaluations" in printed(make_gains(axes={"evaluations": 1.0}))


def test_an_axis_that_lacks_a_variant_shows_a_dash(make_gains):
    gains = make_gains()
    gains["gains"] = [e for e in gains["gains"] if not (e["variant"] == "mqa" and e["axis"] == "seconds")]
    row = next(line for line in lines(printed(gains)) if line.startswith("mqa"))
    assert row.split()[:5] == ["mqa", "<=", "0.5", "<=", "0.5"]
    assert row.split()[5] == "-"


def test_warnings_and_caveats_follow(make_gains):
    gains = make_gains()
    gains["warnings"], gains["caveats"] = ["joules: not measured."], ["Loss targets are noisy."]
    assert lines(printed(gains))[-2:] == ["warning: joules: not measured.", "caveat: Loss targets are noisy."]


def test_nothing_to_show(make_gains):
    gains = make_gains(points={}, scales=())
    gains["warnings"] = ["No run is done yet."]
    assert lines(printed(gains)) == ["No gain could be computed.", "warning: No run is done yet."]


SECTIONS = """\
classes: p-values are adjusted by Holm's method over 5 variants

compact: interactions: the joint gain over the product of the single gains, model FLOPs
variant                          joint  product  ratio              verdict
flash_attention+layer_norm+rope  3.48   4.25     0.82 [0.71, 0.95]  less than the product

compact: contributions: each innovation's factor inside a combination, model FLOPs
variant                          innovation       factor             method
flash_attention+layer_norm+rope  flash_attention  1.00 [0.93, 1.08]  leave one out
flash_attention+layer_norm+rope  layer_norm       1.60 [1.43, 1.78]  Shapley
flash_attention+layer_norm+rope  rope             2.20 [1.93, 2.48]  Shapley
"""


def test_combinations_follow_the_gains(make_gains):
    assert lines(printed(make_gains(combinations=True)))[8:19] == SECTIONS.splitlines()


def test_every_part_in_its_order_and_the_correction_once(make_gains):
    gains = make_gains(combinations=True, fits=True, forecasts=True, power=True, scales=("compact", "full"))
    gains["warnings"] = ["joules: not measured."]
    out = printed(gains)
    words = (
        "class",
        "~ marks",
        "Holm's",
        "interactions",
        "contributions",
        "forecasts",
        "seeds needed for",
        "fit, compact",
    )
    places = [out.index(word) for word in (*words, "fit, full", "warning")]
    assert places == sorted(places)
    assert out.count("Holm's") == 1


def test_extrapolated_values_are_marked_and_the_mark_is_explained(make_gains, make_gain):
    explained = "~ marks an extrapolated value"
    out = printed(make_gains(points={"rope": make_gain(extrapolated=True)}))
    assert "~2.31 [1.80, 2.96]" in out
    assert out.count(explained) == 1
    assert explained not in printed(make_gains())
    bound = make_gain(ceg=None, interval=None, lower_bound=4.0, extrapolated=True)
    assert explained not in printed(make_gains(points={"rope": bound}))


def test_ratios_and_factors_have_the_colours_of_gains(make_gains):
    out = printed(make_gains(combinations=True), force_terminal=True, color_system="standard")
    assert "\x1b[31m0.82 [0.71, 0.95]" in out
    assert "\x1b[32m2.20 [1.93, 2.48]" in out


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100])
def test_nothing_is_wider_than_the_console(make_gains, width):
    gains = make_gains(combinations=True, fits=True, forecasts=True, power=True, scales=("compact", "full"))
    out = lines(printed(gains, width=width))
    assert max(len(line) for line in out) <= width
    joined = " ".join(" ".join(out).split())
    for words in (
        "0.82 [0.71, 0.95]",
        "~2.20 [1.30, 3.90]",
        "1.0 decades beyond the data",
        "5 (11)",
        "17 of 20 starts",
    ):
        assert words in joined


def test_the_pooled_scale_says_what_it_is(make_gains):
    out = printed(make_gains(scales=("compact", "all scales")))
    assert "all scales (the frontier over every scale): target loss" in out


def test_target_loss_may_be_missing(make_gains):
    gains = make_gains()
    for entry in gains["gains"]:
        entry["target_loss"] = entry["baseline_compute"] = None
    assert lines(printed(gains))[0] == "compact"


def test_names_are_printed_letter_for_letter(make_gains, make_gain, hostile):
    points = {name: make_gain() for name in (*hostile, "e\x1b[2Jvil\n", "[red]a\x1b+b")}
    options = {"combinations": True, "fits": True, "forecasts": True, "power": True}
    gains = make_gains(points=points, scales=("[bold]s[/bold]",), **options)
    gains["warnings"] = ["[red]\x1b]0;title\x07"]
    gains["correction"] = "[b]by\x1b[2J"
    gains["fits"][0] |= {"law": "[i]\x1b", "parameters": {"[b]\x1b": 1.0}}
    gains["interactions"][0] |= {"verdict": "[u]\x1b"}
    gains["contributions"][0] |= {"innovation": "[s]\x1b", "method": "[m]\x1b"}
    for width in (30, 400):
        out = printed(gains, width=width)
        assert "\x1b" not in out
    for name in hostile:
        assert name in out
    assert "e\\x1b[2Jvil\\n" in out
    assert "[bold]s[/bold]: target" in out
    assert "warning: [red]\\x1b]0;title\\x07" in out
    for words in ("classes: [b]by\\x1b[2J", "fit, [bold]s[/bold]: [i]\\x1b, [b]\\x1b 1.000; converged"):
        assert words in out
    for words in ("[red]a\\x1b+b", "[u]\\x1b", "[s]\\x1b", "[m]\\x1b"):
        assert words in out
