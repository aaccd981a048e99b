"""report/trace.py: means over the observations of a trace."""

import pandas
from helpers.report_pages import observation

from axolotl_edpo.report import trace


def test_margins_by_step_are_means_of_their_class():
    rows = [observation(s, f"{s}{i}", 1, s + i) for s in (1, 2, 50) for i in range(3)]
    rows += [observation(50, f"down {i}", -1, -2.0 * i) for i in range(3)]
    rows += [observation(50, "alone", 0, 7.0)]  # a mean of one is no curve
    curves = trace.margin_by_step(pandas.DataFrame(rows))
    assert [*curves] == [1, -1]
    up, down = (curve.to_dict("list") for curve in curves.values())
    # 50 steps make 25 stretches of two
    assert up == {"global_step": [1.5, 50], "margin": [2.5, 51], "count": [6, 3]}
    assert down == {"global_step": [50], "margin": [-2.0], "count": [3]}
