"""The accounting of the soak test: it finds breaches and excuses permitted losses."""

from __future__ import annotations

import pytest

from .soak.accounting import Account, Accounting

JOURNAL_START = """
1.0 O s {kind} a/
1.1 P 7 1 1 1
1.2 A 7 1 ok
1.3 R s 7 1 0
"""


def account(text: str, kind: str = "plain") -> Account:
    return Accounting().read(filter(None, (JOURNAL_START.format(kind=kind) + text).splitlines()))


def published(number: int, *, qos: int = 1, stored: int = 1, outcome: str = "ok") -> str:
    return f"2.{number} P 7 {number} {qos} {stored}\n2.{number} A 7 {number} {outcome}\n"


def breaches(text: str, kind: str = "plain") -> str:
    return "\n".join(account(text, kind).breaches)


ALL_PUBLISHED = published(2) + published(3)
MISSING = ALL_PUBLISHED + "3.0 R s 7 3 0\n"


class TestLoss:
    def test_loss_without_a_gap_is_a_breach(self) -> None:
        assert "7/2" in breaches(MISSING)
        assert "is missing between 1 and 3" in breaches(MISSING)

    def test_loss_in_a_gap_is_a_breach_only_for_stored_and_resumed_messages(self) -> None:
        text = ALL_PUBLISHED + "2.9 G s 1\n3.0 R s 7 3 0\n"
        assert not breaches(text)
        assert "7/2" in breaches(text, "kept")
        assert "7/2" in breaches(MISSING, "heard")
        assert not breaches(text.replace("G s 1", "G s 0"), "kept")

    def test_loss_next_to_messages_that_were_read_back_belongs_to_their_gap(self) -> None:
        text = ALL_PUBLISHED + published(4) + "2.9 G s {}\n3.0 R s 7 {} 1\n3.1 R s 7 {} {}\n"
        for first, second, replayed in ((2, 4, 1), (2, 4, 0), (4, 2, 0)):
            assert not breaches(text.format(0, first, second, replayed), "kept")
            assert "7/3" in breaches(text.format(1, first, second, replayed), "kept")

    def test_loss_of_stored_messages_is_excused_by_a_killed_broker(self) -> None:
        text = ALL_PUBLISHED + "2.9 K 2.8\n2.9 G s 1\n3.0 R s 7 3 0\n"
        assert not breaches(text, "kept")
        assert not breaches(text, "heard")
        assert "7/2" in breaches(text.replace("2.9 K 2.8", "1.5 K 1.4"), "kept")

    def test_loss_of_unstored_messages_is_checked_between_live_ones(self) -> None:
        text = published(2, stored=0) + published(3) + "2.9 G s 1\n3.0 R s 7 3 1\n"
        text += published(4) + "3.1 R s 7 4 0\n"
        assert not breaches(text, "kept")
        assert not breaches(text, "heard")
        assert "7/2" in breaches(text.replace("2.9 G s 1\n", ""), "kept")

    def test_loss_for_handlers_is_excused_by_a_log_warning(self) -> None:
        text = ALL_PUBLISHED + "2.9 W a/\n3.0 R s 7 3 0\n"
        assert not breaches(text, "heard")

    def test_loss_of_a_message_never_accepted_is_excused(self) -> None:
        for outcome in ("ConnectionLostError", "cancelled"):
            assert not breaches(published(2, outcome=outcome) + published(3) + "3.0 R s 7 3 0\n")

    def test_loss_of_a_qos_0_message_that_another_received_is_a_breach(self) -> None:
        text = published(2, qos=0) + published(3) + "1.0 O t plain a/\n3.0 R t 7 2 0\n"
        assert "7/2" in breaches(text + "3.0 R s 7 3 0\n3.0 L 7 1 0\n")


class TestLossAtQos0:
    LOST = published(2, qos=0) + published(3, qos=0) + published(4) + "3.0 R s 7 4 0\n"

    def test_lost_messages_must_be_counted_as_uncertain_or_unsent(self) -> None:
        assert breaches(self.LOST).count("was never received") == 2
        assert breaches(self.LOST + "3.0 L 7 1 0\n").count("was never received") == 1
        assert not breaches(self.LOST + "3.0 L 7 1 1\n")
        assert account(self.LOST + "3.0 L 7 2 0\n").figures["lost and counted"] == 2

    def test_loss_after_the_count_is_a_breach(self) -> None:
        assert "7/3" in breaches("2.25 L 7 2 0\n" + self.LOST)

    def test_counted_losses_must_be_consecutive(self) -> None:
        text = published(2, qos=0) + published(3, qos=0) + published(4, qos=0) + published(5)
        text += "3.0 R s 7 3 0\n3.0 R s 7 5 0\n"
        assert "7/4" in breaches(text + "3.0 L 7 2 0\n")
        assert not breaches(text + "3.0 L 7 3 0\n")


class TestReceivedMessages:
    def test_live_message_must_not_repeat(self) -> None:
        assert "arrived twice" in breaches("1.4 R s 7 1 0\n")
        assert not breaches("1.4 R s 7 1 1\n")

    def test_messages_must_be_in_order(self) -> None:
        text = ALL_PUBLISHED + "3.0 R s 7 3 {0}\n3.1 R s 7 2 {0}\n"
        assert "7/2 arrived after 3" in breaches(text.format(0))
        assert "7/2 was replayed after 3" in breaches(text.format(1))

    def test_messages_must_have_been_published(self) -> None:
        assert "7/9 was never published" in breaches("1.4 R s 7 9 0\n")
        assert "7/2 was cancelled, and sent" in breaches(
            published(2, qos=0, outcome="cancelled") + "3.0 R s 7 2 0\n"
        )


def test_call_that_has_not_ended_is_a_breach() -> None:
    assert "7/2 has not ended" in breaches("2.0 P 7 2 1 0\n")


class TestCluster:
    """The subscriber ``8`` and the publisher ``7`` are on different nodes."""

    START = "0.1 C 7 one\n0.1 C 8 two\n"
    FAULT = "4.0 X 1.9\n"

    def account(self, text: str, kind: str = "plain", start: str = START) -> Account:
        journal = (start + JOURNAL_START.format(kind=kind) + text).replace(" s", " 8.s")
        return Accounting().read(filter(None, journal.splitlines()))

    @pytest.mark.parametrize(
        ("kind", "figure"),
        [
            ("plain", "unseen: live between two nodes"),
            ("kept", "unseen: stored on a node that was not asked"),
        ],
    )
    def test_loss_between_nodes_is_counted(self, kind: str, figure: str) -> None:
        # A stream reads stored messages back only after it has reconnected.
        missing = MISSING.replace("3.0 R", "2.9 C 8 none\n2.95 C 8 two\n3.0 R")
        account = self.account(missing + self.FAULT, kind)
        assert account.breaches == []
        assert account.figures[figure] == 1
        for later in ("", "9.0 X 8.9\n"):
            account = self.account(missing + later, kind)
            if kind == "kept":
                assert "7/2" in account.breaches[0]
            else:
                assert account.figures[f"{figure}, without a fault"] == 1

    def test_stored_message_that_is_read_back_during_a_later_fault_is_unseen(self) -> None:
        text = MISSING.replace("3.0 R", "7.5 C 8 two\n8.0 R") + "9.0 X 7.0\n"
        assert self.account(text, "kept").breaches == []

    def test_loss_on_one_node_is_a_breach(self) -> None:
        start = self.START.replace("two", "one")
        assert "7/2" in self.account(MISSING + self.FAULT, start=start).breaches[0]

    def test_message_that_waited_for_the_next_node_is_between_nodes(self) -> None:
        start = self.START.replace("two", "one")
        text = "2.15 C 7 none\n" + MISSING.replace("2.3 P", "2.25 C 7 two\n2.3 P") + self.FAULT
        assert self.account(text, start=start).breaches == []

    def test_order_and_repetition_are_checked_on_one_node(self) -> None:
        late = ALL_PUBLISHED + "3.0 R s 7 3 0\n{}3.1 R s 7 2 0\n3.2 R s 7 2 0\n"
        assert len(self.account(late.format("")).breaches) == 2
        # A client notes its node after it has received the first messages from it.
        for text in (late.format("3.05 C 8 one\n"), late.format("") + "3.4 C 8 one\n"):
            account = self.account(text)
            assert account.breaches == []
            assert account.figures["twice or late after a failover"] == 2

    def test_order_of_a_publisher_is_checked_on_one_connection(self) -> None:
        for letter in "01":
            text = published(2) + "2.25 C 7 one\n" + published(3).replace("2.3", "2.9")
            text += f"3.0 R s 7 3 {letter}\n3.1 R s 7 2 {letter}\n"
            assert self.account(text).breaches == []
