"""The soak's accounting finds what is wrong, and excuses what may be."""

from __future__ import annotations

from .soak.accounting import Account, Accounting

BEGIN = """
1.0 O s {kind} a/
1.1 P 7 1 1 1
1.2 A 7 1 ok
1.3 R s 7 1 0
"""


def account(text: str, kind: str = "plain") -> Account:
    return Accounting().read(filter(None, (BEGIN.format(kind=kind) + text).splitlines()))


def published(number: int, *, qos: int = 1, stored: int = 1, outcome: str = "ok") -> str:
    return f"2.{number} P 7 {number} {qos} {stored}\n2.{number} A 7 {number} {outcome}\n"


def breaches(text: str, kind: str = "plain") -> str:
    return "\n".join(account(text, kind).breaches)


ALL_THREE = published(2) + published(3)
MISSING = ALL_THREE + "3.0 R s 7 3 0\n"


class TestALoss:
    def test_without_a_gap_is_a_breach(self) -> None:
        assert "7/2" in breaches(MISSING)
        assert "is missing, between 1 and 3" in breaches(MISSING)

    def test_at_a_gap_is_none_unless_it_was_stored_and_is_resumed(self) -> None:
        text = ALL_THREE + "2.9 G s 1\n3.0 R s 7 3 0\n"
        assert not breaches(text)
        assert "7/2" in breaches(text, "kept")
        assert "7/2" in breaches(MISSING, "heard")
        assert not breaches(text.replace("G s 1", "G s 0"), "kept")

    def test_is_none_when_the_storage_died_with_the_broker(self) -> None:
        text = ALL_THREE + "2.9 K 2.8\n2.9 G s 1\n3.0 R s 7 3 0\n"
        assert not breaches(text, "kept")
        assert not breaches(text, "heard")
        assert "7/2" in breaches(text.replace("2.9 K 2.8", "1.5 K 1.4"), "kept")

    def test_of_what_was_not_stored_is_told_between_what_came_live(self) -> None:
        text = published(2, stored=0) + published(3) + "2.9 G s 1\n3.0 R s 7 3 1\n"
        text += published(4) + "3.1 R s 7 4 0\n"
        assert not breaches(text, "kept")
        assert not breaches(text, "heard")
        assert "7/2" in breaches(text.replace("2.9 G s 1\n", ""), "kept")

    def test_is_none_when_the_log_told_of_it_to_handlers(self) -> None:
        text = ALL_THREE + "2.9 W a/\n3.0 R s 7 3 0\n"
        assert not breaches(text, "heard")

    def test_of_what_the_broker_never_accepted_is_none(self) -> None:
        for outcome in ("ConnectionLostError", "cancelled"):
            assert not breaches(published(2, outcome=outcome) + published(3) + "3.0 R s 7 3 0\n")

    def test_of_what_somebody_else_got_is_a_breach_at_qos_0_too(self) -> None:
        text = published(2, qos=0) + published(3) + "1.0 O t plain a/\n3.0 R t 7 2 0\n"
        assert "7/2" in breaches(text + "3.0 R s 7 3 0\n3.0 L 7 1 0\n")


class TestALossAtQos0:
    LOST = published(2, qos=0) + published(3, qos=0) + published(4) + "3.0 R s 7 4 0\n"

    def test_is_counted_as_uncertain_or_unsent(self) -> None:
        assert breaches(self.LOST).count("has got nowhere") == 2
        assert breaches(self.LOST + "3.0 L 7 1 0\n").count("has got nowhere") == 1
        assert not breaches(self.LOST + "3.0 L 7 1 1\n")
        assert account(self.LOST + "3.0 L 7 2 0\n").figures["lost and counted"] == 2

    def test_is_counted_when_it_happens(self) -> None:
        assert "7/3" in breaches("2.25 L 7 2 0\n" + self.LOST)

    def test_lies_close_to_the_others(self) -> None:
        text = published(2, qos=0) + published(3, qos=0) + published(4, qos=0) + published(5)
        text += "3.0 R s 7 3 0\n3.0 R s 7 5 0\n"
        assert "7/4" in breaches(text + "3.0 L 7 2 0\n")
        assert not breaches(text + "3.0 L 7 3 0\n")


class TestWhatComes:
    def test_comes_once_but_where_it_is_replayed(self) -> None:
        assert "came twice" in breaches("1.4 R s 7 1 0\n")
        assert not breaches("1.4 R s 7 1 1\n")

    def test_comes_in_order(self) -> None:
        text = ALL_THREE + "3.0 R s 7 3 {0}\n3.1 R s 7 2 {0}\n"
        assert "7/2 came behind 3" in breaches(text.format(0))
        assert "7/2 was replayed behind 3" in breaches(text.format(1))

    def test_was_published(self) -> None:
        assert "7/9 was never published" in breaches("1.4 R s 7 9 0\n")
        assert "7/2 was cancelled, and sent" in breaches(
            published(2, qos=0, outcome="cancelled") + "3.0 R s 7 2 0\n"
        )


def test_a_call_that_has_not_ended_is_a_breach() -> None:
    assert "7/2 has not ended" in breaches("2.0 P 7 2 1 0\n")
