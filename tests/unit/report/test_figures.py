"""report/figures.py: lines and looks, without a run."""

from axolotl_edpo.report import figures


def test_a_smooth_line_is_a_mean_of_what_is_near_and_starts_where_values_do():
    assert figures.smooth([1, 2, 6, 3], 1) == [1, 2, 6, 3]
    assert figures.smooth([1, 2, 6, 3, 9], 3) == [1, 3, 11 / 3, 6, 6]
    assert [figures.window(count) for count in (1, 15, 16, 94, 320)] == [
        1,
        1,
        3,
        11,
        41,
    ]


def test_runs_look_different_without_colour_too():
    looks = figures.looks(8)
    assert len({look.colour for look in looks[:7]}) == 7
    assert len({(look.line, look.marker) for look in looks}) == 8
