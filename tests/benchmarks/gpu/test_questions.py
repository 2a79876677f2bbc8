"""What a GPU run records is explained where RESULTS.md shows it."""

import pytest

from benchmarks import questions
from benchmarks.gpu import bandwidth, link, overlap, packing, steps, tune, worker


@pytest.mark.parametrize("module", [bandwidth, link, overlap, packing, tune, worker])
def test_every_figure_of_a_step_has_a_heading(module):
    assert questions.question(module.QUESTION) is not None


def test_sessions_of_every_shape_have_a_heading():
    shapes = {value for step in steps.STEPS for name, value in step.arguments if name == "shape"}
    assert shapes == {"1b", "8b"}
    assert all(questions.question(f"serving/gpu-sessions-{shape}") for shape in shapes)
