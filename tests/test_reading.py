"""The check of records against the model: it can fail."""

from __future__ import annotations

from functools import partial

import pytest
from choices import Run
from reading import read
from trees import Event, Par, Seq, Step

ONE = [Event("start", "one"), Event("first", "one"), Event("second", "one"), Event("done", "one")]
TWO = [event._replace(step="two") for event in ONE]
MIXED = [event for pair in zip(ONE, TWO, strict=True) for event in pair]
STEPS = (Step("one"), Step("two"))


def reads(events, tree):
    make = partial(Run, tree, (), functions=False, later=False)
    return read(events, make, failed=False)


def test_members_of_a_group_may_interleave():
    """G15."""
    assert reads(MIXED, Seq((Par(STEPS),))).state == {"one": "COMPLETED", "two": "COMPLETED"}


@pytest.mark.parametrize(
    "events",
    [[], ONE, MIXED, TWO + ONE, [*ONE, *TWO, Event("undo", "two"), Event("back done", "two")]],
    ids=["nothing", "too little", "interleaved", "in another order", "too much"],
)
def test_other_records_of_a_sequence_are_refused(events):
    """G1, G7."""
    with pytest.raises(AssertionError, match="not a history"):
        reads(events, Seq(STEPS))


def test_an_action_that_is_left_behind_is_refused():
    """G6."""
    with pytest.raises(AssertionError, match="left behind"):
        reads(ONE[:2], Seq((Step("one"),)))


def test_members_that_are_left_out_are_refused():
    """G1."""
    with pytest.raises(AssertionError, match="without a reason"):
        reads(ONE, Seq((Par(STEPS),)))


def test_a_group_that_takes_its_members_in_another_order_is_refused():
    """G15."""
    with pytest.raises(AssertionError, match="not in the order given"):
        reads(TWO + ONE, Seq((Par(STEPS),)))
