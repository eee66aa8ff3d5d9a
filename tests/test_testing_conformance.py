"""Memory and the SQLite journal keep what is said of them; and a place that does not is found out."""

from __future__ import annotations

from contextlib import nullcontext

import anyio
import conformance_page
import pytest
from conformance_page import PAGE, cells, page, rows
from places import Memory, SQLite

from pysagas import Outcome, SagaState
from pysagas.testing import conformance
from pysagas.testing.conformance import CHECKS, SAGAS, Check, CheckResult, ConformanceReport, check
from pysagas.testing.conformance import _check as checking
from pysagas.testing.conformance import _stage as stages

pytestmark = pytest.mark.anyio
TABLE = rows(PAGE.read_text(encoding="utf-8"))


def column(name: str) -> list[str]:
    number = TABLE[0].index(name)
    return [row[number] for row in TABLE[1:]]


def checks(guarantee: str) -> list[Check]:
    return [one for one in CHECKS if one.guarantee == guarantee]


# --- the places ---------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_memory_is_as_the_page_says(anyio_backend):
    """Each guarantee holds in memory, or does not in the way that is said; G1 to G15."""
    async with Memory() as memory:
        report = await check(memory)

    assert report.ok, report
    assert cells(report) == column("memory")


@pytest.mark.timeout(240)
async def test_the_sqlite_journal_is_as_the_page_says(anyio_backend, tmp_path):
    """Each guarantee holds with a journal, whose process is really killed; G1 to G15, D1 to D5."""
    async with SQLite(str(tmp_path / "sagas.db")) as journal:
        report = await check(journal)

    assert report.ok, report
    assert cells(report) == column("SQLite journal")


def test_the_page_has_a_row_for_each_check():
    """The page is what its writer writes, in words and rows."""
    assert [[one.guarantee, one.says] for one in CHECKS] == [
        [row[0].partition("]")[0].lstrip("["), row[1]] for row in TABLE[1:]
    ]
    reports = [ConformanceReport(name, [CheckResult(one) for one in CHECKS]) for name in TABLE[0][2:]]
    written = page(reports)
    assert PAGE.read_text(encoding="utf-8").startswith(conformance_page.START)
    assert [row[:2] for row in rows(written)] == [row[:2] for row in TABLE]


def test_the_reasons_on_the_page_are_those_of_the_places():
    """A reason that a place gives stands on the page, under its name."""
    one, other, *_ = CHECKS
    report = ConformanceReport("here", [CheckResult(one, "for now"), CheckResult(other)])

    assert ["no (1)", "holds"] == cells(report)
    assert ["\n## here\n", "1. For now."] == list(conformance_page.notes(report))
    text = PAGE.read_text(encoding="utf-8")
    assert all(reason[1:] in text for reason in Memory.lacks.values())


def test_every_saga_is_known_by_its_name():
    """The names are those of the constants, each one's own: a worker finds them by name."""
    names = [saga.name for saga in SAGAS]

    assert sorted(set(names)) == names
    assert all(
        getattr(conformance._sagas, name) is saga for name, saga in zip(names, SAGAS, strict=True)
    )


# --- places that do not keep what is promised ------------------------------------------------------


class Forgetful(Memory):
    """Says that it remembers, and does not."""

    lacks = {}


class Modest(Memory):
    """Says that it cannot do what it can."""

    lacks = {
        **Memory.lacks,
        "cut": "it is not so",
        "rollback_timeout": "nor is this",
        "trio": "or this",
    }


class Careless(Memory):
    """Takes nothing back."""

    async def run_here(self, saga, order, run_id, exceptions, on_crash):
        faults, order = order.faults, type(order)(order.log)
        await super().run_here(saga, order, run_id, exceptions, on_crash)
        raise RuntimeError(f"something went wrong, with {faults}")


class Silent(Memory):
    """Loses every failure, and the outcomes."""

    async def run_here(self, saga, order, run_id, exceptions, on_crash):
        try:
            return await super().run_here(saga, order, run_id, exceptions, on_crash)
        except Exception:
            return Outcome(saga, SagaState.COMPENSATED, None, None)


async def problems(place: Memory, guarantees: str) -> dict[str, str]:
    """The checks that fail there, and why."""
    chosen = [one for name in guarantees.split() for one in checks(name)]
    async with place:
        report = await check(place, chosen)
    assert report.ok == all(result.ok for result in report.results)
    return {result.check.says: result.problem for result in report.results if not result.ok}


async def test_a_place_that_forgets_is_found_out(anyio_backend, monkeypatch):
    """Without a journal, each check that takes one fails for a place that says that it has one."""
    monkeypatch.setattr(checking, "_LIMIT", 0.3)  # some wait for what it never comes to
    found = await problems(Forgetful(), "D1 D2 D3 D4 D5")

    assert set(found) == {one.says for one in CHECKS if one.guarantee.startswith("D")}


async def test_a_place_that_can_do_what_it_says_it_cannot_is_found_out(anyio_backend):
    """What a place is said to lack is checked, too."""
    on_trio = anyio.get_cancelled_exc_class().__module__.startswith("trio")
    chosen = [one for one in CHECKS if {"cut", "rollback_timeout", "trio"} & set(one.without)]
    async with Modest() as place:
        report = await check(place, chosen)

    wrong = [result.check.says for result in report.results if not result.ok]
    assert wrong == [one.says for one in chosen if on_trio or one.guarantee]
    assert "WRONG" in report


async def test_a_place_that_takes_nothing_back_is_found_out(anyio_backend):
    """A rollback that does not happen is seen in what the steps wrote."""
    found = await problems(Careless(), "G2 G3 G5 G10 G11 G12 G13 G14")

    every = [one.says for name in "G2 G3 G5 G10 G11 G12 G13 G14".split() for one in checks(name)]
    assert list(found) == every
    assert "something went wrong" in found["A step's own exception reaches the caller, with a note."]


async def test_a_place_that_loses_failures_is_found_out(anyio_backend):
    """A failure that does not come out is seen."""
    found = await problems(Silent(), "G5 G11 G14")

    assert len(found) == 4


async def test_a_check_that_hangs_is_ended(anyio_backend, monkeypatch):
    """A step that waits for what never comes is reported with what its run did until then."""
    monkeypatch.setattr(checking, "_LIMIT", 0.2)

    async def hangs(stage):
        run = stage(conformance._sagas.trip, book_hotel="waits")
        async with run.running():
            await run.wait_for("done book ticket")

    async with Memory() as memory:
        result = await Check("G1", "Everything ends.", hangs)(memory)

    assert not result.ok
    assert "WRONG" == result.verdict
    assert "TimeoutError" in result.problem
    assert "done book flight, begin book hotel" in result.problem


async def test_a_check_that_fails_while_its_run_waits_lets_it_go(anyio_backend):
    """A run that is being taken back, which cannot be cancelled, is let go on."""

    async def wrong(stage):
        run = stage(conformance._sagas.trip, book_hotel="naps", book_car="fails", cancel_hotel="waits")
        async with run.running():
            await run.wait_for("begin cancel hotel")
            stages.expect(1, 2, "a number")

    async with Memory() as memory:
        result = await Check("", "Is wrong.", wrong)(memory)

    first, run = result.problem.splitlines()
    assert "a number: 1, and should be 2" == first
    assert run.endswith("done cancel flight")


async def test_a_page_is_written_by_what_every_place_does(anyio_backend, monkeypatch, capsys):
    """Whoever writes the page asks memory and the journal, and sees their reports."""

    async def asked(place):
        return ConformanceReport(place.name, [])

    monkeypatch.setattr(conformance_page, "check", asked)

    reports = await conformance_page.in_process()

    assert ["memory", "SQLite journal"] == [report.name for report in reports]
    assert "SQLite journal: 0 of 0 checks are wrong\n" in capsys.readouterr().err


@pytest.mark.parametrize("ok", [True, False])
def test_the_page_is_written_if_all_is_as_it_should_be(monkeypatch, tmp_path, ok):
    """A place that is not what it is said to be leaves the page as it was."""

    async def asked(place=None):
        report = ConformanceReport("Restate", [CheckResult(one) for one in CHECKS])
        wrong = ConformanceReport("memory", [CheckResult(one, problem="it is not") for one in CHECKS])
        return report if place else [report if ok else wrong]

    monkeypatch.setattr(conformance_page, "in_process", asked)
    monkeypatch.setattr(conformance_page, "asked", asked)
    monkeypatch.setattr(conformance_page, "restate", lambda: nullcontext("a place"))
    monkeypatch.setattr(conformance_page, "PAGE", tmp_path / "page.md")

    if ok:
        conformance_page.main()
        assert "| holds | holds |" in (tmp_path / "page.md").read_text()
    else:
        with pytest.raises(SystemExit, match="the page is as it was"):
            conformance_page.main()
        assert not list(tmp_path.iterdir())


# --- the report ---------------------------------------------------------------------------------


def test_the_report_is_a_table():
    """What holds, what does not and why, and what is wrong, each under its number."""
    holds, no, wrong = (Check(number, f"That is {number}.", None) for number in ("G1", "D1", "D2"))
    results = (CheckResult(holds), CheckResult(no, "no disk"), CheckResult(wrong, problem="it is not"))
    report = ConformanceReport("here", results)

    assert report == (
        "here: 1 of 3 checks are wrong\n"
        "\n"
        "  G1   holds   That is G1.\n"
        "  D1   no (1)  That is D1.\n"
        "  D2   WRONG   That is D2.\n"
        "\n"
        "  (1) no disk\n"
        "\n"
        "D2 That is D2.\n"
        "  it is not"
    )
    assert (report.name, report.results, report.ok) == ("here", results, False)
    assert "<ConformanceReport of here: 1 of 3 checks are wrong>" == repr(report)


def test_a_report_of_nothing_is_not_ok():
    """Nothing that was checked proves nothing."""
    assert not ConformanceReport("here", []).ok
    assert ConformanceReport("here", [CheckResult(CHECKS[0])]).ok


def test_a_report_is_not_its_own_verdict():
    """A test that forgot ``.ok`` fails."""
    with pytest.raises(TypeError, match=r"write `assert report\.ok, report`"):
        bool(ConformanceReport("here", []))
