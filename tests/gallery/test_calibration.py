"""Thresholds on a split drawn by hand: two queries, four images of two persons."""

import pytest
import torch

from mra.gallery import Gallery
from mra.gallery.calibration import SplitScores, threshold_curve
from tests.helpers.galleries import encoder_of, make_split, write_pictures


def test_false_alarms_and_misses_by_hand():
    probabilities = torch.tensor([[0.9, 0.3, 0.6], [0.2, 0.8, 0.4]])
    scores = SplitScores(
        similarity=torch.tensor([[0.9, 0.5, 0.8, 0.1], [0.1, 0.7, 0.6, 0.8]]),
        top_indices=torch.tensor([[0, 2, 1], [3, 1, 2]]),
        log_odds=probabilities.logit()[None],
        is_own=torch.tensor([[True, False, True], [True, False, True]]),
        query_ids=torch.tensor([0, 1]),
        gallery_ids=torch.tensor([0, 0, 1, 1]),
    )
    curve = {point[0]: point[1:] for point in threshold_curve(scores, 0.01, 0.0, rerank=2)}
    # Present: 0.9 and 0.2, the own image first by similarity. Absent: 0.3 and 0.8, what is left when it is taken out.
    assert curve[0.1] == (1.0, 0.0)
    assert curve[0.5] == (0.5, 0.5)
    assert curve[0.85] == (0.0, 0.5)
    assert curve[1.0] == (0.0, pytest.approx(1.0))


def test_calibration_is_saved_with_the_gallery(model, tmp_path):
    write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        assert (gallery.threshold, gallery.calibration) == (0.5, None)
        saved = gallery.calibrate(make_split(), rerank=4, name="drawn")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert gallery.calibration == saved
        assert gallery.search("a red coat").threshold == saved.threshold
