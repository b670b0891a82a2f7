"""What the loop counts: which validation was the best, and that all of it survives a checkpoint."""

from __future__ import annotations

import json
import math

import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.train.progress import REMEMBERED, Progress


def test_validations_are_compared_within_a_revision() -> None:
    progress = Progress()
    assert progress.validated(3.0, 0.0, 0) and progress.poor == 0
    assert not progress.validated(3.0, 0.0, 0) and progress.poor == 1
    assert not progress.validated(2.9, 0.5, 0) and progress.poor == 2
    assert progress.validated(5.0, 0.0, 1), "after a change of the model its losses begin anew"
    assert (progress.lowest, progress.poor) == (5.0, 0)


def test_only_a_measured_model_has_a_metric() -> None:
    progress = Progress(step=4)
    assert progress.metric(0) is None
    progress.validated(2.0, 0.0, 0)
    assert progress.metric(0) == 2.0
    assert progress.metric(1) is None  # the model was changed behind the validation
    progress.step = 5
    assert progress.metric(0) is None


def test_a_loss_that_is_no_number_is_no_gain_and_not_the_lowest() -> None:
    progress = Progress()
    assert not progress.validated(math.nan, 0.0, 0)
    assert progress.lowest == math.inf and progress.validated(9.0, 0.0, 0)


def test_everything_survives_json() -> None:
    progress = Progress(step=7, seconds=1.5, loss=math.nan, refused=2)
    progress.validated(math.inf, 0.0, 3)
    progress.speeds.extend(range(REMEMBERED + 5))
    again = Progress.restored(json.loads(json.dumps(progress.state(), allow_nan=False)))
    assert again.state() == progress.state()
    assert math.isnan(again.loss) and math.isinf(again.lowest)
    assert len(again.speeds) == REMEMBERED and again.speed == progress.speed


def test_another_state_is_refused() -> None:
    with pytest.raises(ModelError, match=r"progress holds \['step'\], expected"):
        Progress.restored({"step": 1})
