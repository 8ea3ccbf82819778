import pytest
from accelerate import PartialState

from mra.training.splits import hold_out_identities
from tests.helpers.training import make_pedes


@pytest.fixture(autouse=True)
def logging_state():
    """The loggers ask which process they are in."""
    PartialState(cpu=True)
    yield
    PartialState._reset_state()


def test_no_person_is_on_both_sides():
    rows = make_pedes(20)
    train, held_out = hold_out_identities(rows, 0.3, seed=1)
    assert len(train) + len(held_out) == 20
    assert len(set(held_out["image_id"])) == 3 and not set(held_out["image_id"]) & set(train["image_id"])
    assert set(hold_out_identities(rows, 0.3, seed=1)[1]["image_id"]) == set(held_out["image_id"])
    assert hold_out_identities(rows, 0, seed=1)[1] is None
    with pytest.raises(ValueError, match="`validation_fraction`"):
        hold_out_identities(rows, 0.01, seed=1)
