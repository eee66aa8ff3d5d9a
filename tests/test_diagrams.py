"""Sagas and outcomes drawn as Mermaid flowcharts.

The golden files are the whole text of a picture. ``nox -s pictures`` has Mermaid draw each of them.
"""

from __future__ import annotations

import re

import pytest
from drawing import GOLDEN, HOSTILE

from pysagas import (
    Commit,
    Outcome,
    Parallel,
    Saga,
    SagaScope,
    SagaState,
    Step,
    StepReport,
    StepState,
    TreeNode,
    outcome_of,
    saga,
)
from pysagas.diagrams import mermaid
from pysagas.diagrams._flowchart import flowchart

pytestmark = pytest.mark.anyio


class Declined(Exception):
    """Raised before anything is charged."""


def act():
    return "result"


def cancel():
    pass


def undo_it(result):
    pass


def no_answer():
    raise OSError("no answer")


def decline():
    raise Declined


def step(name, **options):
    return Step(act, cancel, name=name, **options)


@saga
async def rent(scope: SagaScope):
    await scope.step(step("car"))
    async with scope.nested() as extras:
        await extras.step(step("child seat"))
        await extras.parallel(step("map"), step("radio"), name="small things")
    await scope.step(no_answer, undo=undo_it)


def trip(*, last=act, seat_back=cancel):
    """A saga with one of everything."""
    return Saga(
        [
            step("flight", undo=undo_it),
            Parallel(
                Step(act, seat_back, name="seat"),
                Saga([step("room"), step("breakfast")], name="hotel"),
                Step(act, name="look up the weather"),
                name="bookings",
            ),
            Parallel(Step(last, undo=undo_it, not_applied=Declined, name="charge")),
            Commit(),
            rent,
            Saga([], name="nothing"),
            Step(no_answer, name="send"),
        ],
        name="trip",
    )


async def ended(runnable):
    """The outcome of a run, however it ended."""
    try:
        return await runnable.run()
    except Exception as error:
        return outcome_of(error)


async def pictures():
    """Each picture that is kept, by the name of its file."""
    return {
        "saga": mermaid(trip()),
        "function": mermaid(rent),
        "completed": mermaid(await ended(Saga([step("flight"), Commit(), step("car")], name="trip"))),
        "not-applied": mermaid(await ended(trip(last=decline))),
        "unknown": mermaid(await ended(trip(last=no_answer))),
        "compensation-failed": mermaid(await ended(trip(last=decline, seat_back=no_answer))),
        "committed": mermaid(await ended(trip())),
        "hostile": mermaid(Saga([Step(act, name=name) for name in HOSTILE], name='end "] %% <i>')),
        "hundred": mermaid(
            await ended(
                Saga(
                    [step(f"step {number}", undo=undo_it) for number in range(99)]
                    + [Step(decline, not_applied=Declined)],
                    name="hundred",
                )
            )
        ),
    }


async def test_pictures_are_as_they_were():
    """Sagas and outcomes of every kind are drawn as their golden files say, on every loop."""
    drawn = await pictures()

    kept = {path.name for path in GOLDEN.iterdir() if not path.name.startswith("timeline-")}
    assert {f"{name}.mmd" for name in drawn} == kept
    for name, picture in drawn.items():
        assert (GOLDEN / f"{name}.mmd").read_text(encoding="utf-8") == picture


async def test_an_outcome_has_the_shape_of_its_saga():
    """The picture of a run is that of its saga, but for states and for what a function has called."""

    def shape(picture):
        named = set(re.findall(r"^ *(?:subgraph )?(n[\w]*)[\[({]", picture, re.MULTILINE))
        lines = set(re.findall(r"^ *(n\w* \S+ n\w*)$", picture, re.MULTILINE))
        return named | lines

    of_saga, of_run = shape(mermaid(trip())), shape(mermaid(await ended(trip())))

    assert of_saga < of_run
    assert all(re.search(r"n_4_", added) for added in of_run - of_saga)


WORDS = {*(state.value for state in StepState), "failed", "interrupted", "running", "compensating"}


def of_every_state():
    """A picture with a step in each state, and in those that only a journal knows."""
    nodes = [TreeNode("step", word, (index,)) for index, word in enumerate(sorted(WORDS))]
    states = {node.path: node.name for node in nodes}
    return flowchart([TreeNode("saga", "trip", ()), *nodes], states, ())


async def test_every_state_has_its_class():
    """Each state that a step can be in has a class; a picture has those that it needs."""
    others = {"back", "commit"}

    def classes(text):
        return set(re.findall(r"classDef (\w+)", text))

    assert others == classes(mermaid(trip()))
    assert {"failed", "unknown", "completed", "compensated", "not_started"} | others == classes(
        mermaid(await ended(trip()))
    )
    assert {word.replace(" ", "_") for word in WORDS} | others == classes(of_every_state())
    assert classes(of_every_state()) - others == set(re.findall(r":::(\w+)", of_every_state()))


def contrast(one, other):
    """The ratio of two colours' luminance, as WCAG defines it."""

    def luminance(colour):
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return sum(map(float.__mul__, linear, (0.2126, 0.7152, 0.0722)))

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


async def test_every_class_is_legible():
    """Text has a contrast of 4.5 or more to its own background, so that the page's does not matter."""
    styles = re.findall(r"classDef .*fill:(#\w{6}).*color:(#\w{6})", of_every_state())

    assert len(WORDS) + 2 == len(styles)
    assert all(contrast(fill, color) >= 4.5 for fill, color in styles)


async def test_a_commit_that_was_not_passed():
    """A run that failed before its commit shows that it has not passed it."""
    parts = [Step(decline), Commit()]

    assert 'n_1{{"commit"}}:::commit' in mermaid(Saga(parts))
    assert 'n_1{{"commit<br/>not passed"}}:::not_started' in mermaid(await ended(Saga(parts)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_leave_its_label(name):
    """Whatever a name holds, its line has one label of letters, digits, codes and little else."""
    picture = mermaid(Saga([Step(act, name=name)], name=name))
    labels = re.findall(r'^  n\w*\(?\["(.*)"\]\)?$', picture, re.MULTILINE)

    assert 2 == len(labels)
    for label in labels:
        assert re.fullmatch(r"(?:[\w\s↵…\ufffd.,()-]|#\d+;)+", label)
        assert len(re.sub(r"#\d+;", "x", label)) <= 40


def test_a_name_is_cut_before_its_codes_are():
    """What is too long is cut between characters, not within the code of one."""
    assert f'["{39 * "#34;"}…"]' in mermaid(Saga([Step(act, name=41 * '"')]))
    assert f'["{40 * "#34;"}"]' in mermaid(Saga([Step(act, name=40 * '"')]))


def test_ways_back_are_kept_in_a_column():
    """Where two steps that have a way back follow each other, a line that is not drawn aligns these."""
    picture = mermaid(
        Saga([step("a"), step("b"), Step(act), step("c"), Parallel(step("d"), step("e"))])
    )

    assert ["n_0_back ~~~ n_1_back"] == re.findall(r"\S+ ~~~ \S+", picture)


def test_ids_come_from_paths():
    """The same saga is drawn the same each time, and steps of one name are told apart."""
    same = Saga([step("same"), Parallel(act_twice := Step(act, name="same"), act_twice)])

    assert mermaid(same) == mermaid(same)
    assert ["n", "n_0", "n_0_back", "n_1", "n_1_0", "n_1_1"] == re.findall(
        r"^ *(?:subgraph )?(n\w*)[\[(]", mermaid(same), re.MULTILINE
    )


def test_a_run_of_which_the_steps_alone_are_known():
    """What holds the steps of a recalled run is a box, in which nothing claims an order."""

    class Recalled:
        saga_name = "trip"
        run_id = "1"

        def reports(self):
            paths = [(0,), (1, 0), (1, 1), (2,)]
            return tuple(StepReport("step", path, StepState.COMPLETED) for path in paths)

    picture = mermaid(Outcome(Recalled(), SagaState.COMPLETED, None, None))

    assert '  subgraph n_1["part"]\n' in picture
    assert ["n --> n_0", "n_0 --> n_1", "n_1 --> n_2"] == re.findall(r"n\S* -\S+ n\S*", picture)


@pytest.mark.parametrize("wrong", [None, "trip", Parallel(), step("x"), Saga])
def test_what_cannot_be_drawn(wrong):
    """Anything but a saga or an outcome is refused, and shown."""
    with pytest.raises(TypeError, match="mermaid draws a Saga or an Outcome, not ") as raised:
        mermaid(wrong)
    assert repr(wrong) in str(raised.value)


def test_the_tree_of_a_saga():
    """A saga tells its places in the order of their paths, with how each step is taken back."""
    tree = trip().tree

    assert sorted(tree, key=lambda node: node.path) == list(tree)
    assert TreeNode("saga", "trip", ()) == tree[0]
    assert TreeNode("step", "flight", (0,), "cancel", "undo_it") == tree[1]
    assert TreeNode("group", "bookings", (1,)) in tree
    assert TreeNode("saga", "hotel", (1, 1)) in tree
    assert TreeNode("step", "look up the weather", (1, 2)) in tree
    assert TreeNode("commit", "commit", (3,)) in tree
    assert TreeNode("saga", "rent", (4,)) in tree
