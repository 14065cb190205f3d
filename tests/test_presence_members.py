from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._features.feed import Members, PresenceFeed, Watch
from emitter_anyio._streams import Sender
from emitter_anyio._values.requests import Member, PresenceEvent, PresenceStatus

NOW = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def members() -> Members:
    return Members("a/")


def subscribed(id: str, channel: str = "a/", username: str | None = None) -> PresenceEvent:
    return PresenceEvent(NOW, "subscribe", channel, (Member(id, username),))


def unsubscribed(id: str, channel: str = "a/", username: str | None = None) -> PresenceEvent:
    return PresenceEvent(NOW, "unsubscribe", channel, (Member(id, username),))


def status(*ids: str, channel: str = "a/") -> PresenceStatus:
    return PresenceStatus(NOW, "status", channel, tuple(Member(id) for id in ids))


def apply_new_status(members: Members, *ids: str, channel: str = "a/") -> bool:
    """Request a status and apply it, with no event in between."""
    members.begin_status()
    return members.apply_status(channel, status(*ids, channel=channel))


def is_stale(members: Members) -> bool:
    return members._stale.is_set()


class TestMembers:
    def test_new_members_are_empty(self, members: Members) -> None:
        assert dict(members.view) == {}
        assert not is_stale(members)

    def test_first_status_sets_the_members(self, members: Members) -> None:
        assert apply_new_status(members, "X", "Y")
        assert dict(members.view) == {"X": Member("X"), "Y": Member("Y")}

    def test_status_returns_whether_it_changed_members(self, members: Members) -> None:
        assert not apply_new_status(members)
        apply_new_status(members, "X", "Y")
        assert not apply_new_status(members, "Y", "X")
        assert apply_new_status(members, "X")
        assert list(members.view) == ["X"]

    def test_changed_username_is_a_change(self, members: Members) -> None:
        apply_new_status(members, "X")
        members.begin_status()
        named = PresenceStatus(NOW, "status", "a/", (Member("X", "ann"),))
        assert members.apply_status("a/", named)
        assert members.view["X"].username == "ann"

    def test_member_joins_and_leaves(self, members: Members) -> None:
        apply_new_status(members)
        members.push(subscribed("X", username="ann"))
        assert dict(members.view) == {"X": Member("X", "ann")}
        assert not is_stale(members)
        members.push(unsubscribed("X", username="ann"))
        assert dict(members.view) == {}

    def test_member_that_joins_twice_is_listed_once(self, members: Members) -> None:
        members.push(subscribed("X"))
        members.push(subscribed("X", username="ann"))
        assert dict(members.view) == {"X": Member("X", "ann")}
        members.push(unsubscribed("X", username="ann"))
        assert dict(members.view) == {}

    def test_view_is_read_only_and_up_to_date(self, members: Members) -> None:
        view = members.view
        members.push(subscribed("X"))
        assert list(view) == ["X"]
        apply_new_status(members)
        members.push(subscribed("Y"))
        assert "Y" in view
        with pytest.raises(TypeError):
            view["Z"] = Member("Z")  # type: ignore[index]  # on purpose


class TestSubchannels:
    """A status lists only the clients that a message to the channel reaches."""

    def test_member_of_a_subchannel_joins_and_leaves(self, members: Members) -> None:
        apply_new_status(members)
        members.push(subscribed("X", "a/b/"))
        assert list(members.view) == ["X"]
        assert members.next_channels() == ["a/b/"]
        members.push(unsubscribed("X", "a/b/"))
        assert dict(members.view) == {}

    def test_member_of_two_channels_stays_until_it_left_both(self, members: Members) -> None:
        apply_new_status(members)
        members.push(subscribed("X", "a/"))
        members.push(subscribed("X", "a/b/"))
        members.push(unsubscribed("X", "a/"))
        assert list(members.view) == ["X"]
        members.push(unsubscribed("X", "a/b/"))
        assert dict(members.view) == {}

    def test_status_of_the_channel_keeps_members_of_subchannels(self, members: Members) -> None:
        apply_new_status(members)
        members.push(subscribed("X", "a/b/"))
        assert not apply_new_status(members)
        assert list(members.view) == ["X"]

    def test_status_of_a_subchannel_updates_its_members(self, members: Members) -> None:
        apply_new_status(members)
        members.push(subscribed("X", "a/b/"))
        assert not apply_new_status(members, "X", channel="a/b/")
        assert apply_new_status(members, "Y", channel="a/b/")
        assert list(members.view) == ["Y"]
        assert apply_new_status(members, channel="a/b/")
        assert dict(members.view) == {}

    def test_status_of_a_subchannel_includes_members_of_the_parent(self, members: Members) -> None:
        apply_new_status(members, "X")
        members.push(subscribed("Y", "a/b/"))
        assert not apply_new_status(members, "X", "Y", channel="a/b/")
        members.push(unsubscribed("Y", "a/b/"))
        assert apply_new_status(members)
        assert dict(members.view) == {}, "X should not be a member of the subchannel"

    def test_next_channels_rotates_through_all_subchannels(self, members: Members) -> None:
        assert members.next_channels() == []
        channels = [f"a/{number}/" for number in range(100)]
        for channel in channels:
            members.push(subscribed("X", channel))
        assert members.next_channels() == channels[:64]
        members.push(subscribed("Y", "a/new/"))
        assert members.next_channels() == [*channels[64:], *channels[:28]]
        assert members.next_channels() == [*channels[28:64], "a/new/", *channels[64:91]]

    def test_empty_subchannel_is_remembered(self, members: Members) -> None:
        """A member might join it again without an event."""
        members.push(subscribed("X", "a/b/"))
        members.push(unsubscribed("X", "a/b/"))
        assert not apply_new_status(members, channel="a/b/")
        assert members.next_channels() == ["a/b/"]
        assert apply_new_status(members, "Y", channel="a/b/")
        assert list(members.view) == ["Y"]

    def test_latest_empty_subchannels_are_remembered(self, members: Members) -> None:
        members.push(subscribed("X", "a/stays/"))
        for number in range(2000):
            members.push(subscribed("Y", f"a/{number}/"))
            members.push(unsubscribed("Y", f"a/{number}/"))
        below = {channel for _ in range(40) for channel in members.next_channels()}
        assert below == {"a/stays/"} | {f"a/{number}/" for number in range(2000 - 1023, 2000)}

    def test_all_subchannels_with_members_are_remembered(self, members: Members) -> None:
        for number in range(1100):
            members.push(subscribed("X", f"a/{number}/"))
        assert len({channel for _ in range(20) for channel in members.next_channels()}) == 1100


class TestStale:
    def test_leaving_member_from_the_first_status_might_still_be_reached(
        self, members: Members
    ) -> None:
        apply_new_status(members, "X")
        members.push(unsubscribed("X"))
        assert dict(members.view) == {}
        assert is_stale(members)
        assert apply_new_status(members, "X"), "the status should restore X"
        assert list(members.view) == ["X"]
        assert not is_stale(members)

    def test_member_from_the_first_status_that_leaves_a_subchannel_stays(
        self, members: Members
    ) -> None:
        apply_new_status(members, "X")
        members.push(subscribed("X", "a/b/"))
        members.push(unsubscribed("X", "a/b/"))
        assert list(members.view) == ["X"]
        assert is_stale(members)

    def test_unknown_member_that_leaves_makes_members_stale(self, members: Members) -> None:
        members.push(unsubscribed("X"))
        members.push(unsubscribed("Y", "a/b/"))
        assert dict(members.view) == {}
        assert is_stale(members)

    def test_joining_member_does_not_make_members_stale(self, members: Members) -> None:
        members.push(subscribed("X"))
        members.push(subscribed("X", "a/b/"))
        assert not is_stale(members)

    def test_member_reported_as_gone_by_another_node_is_restored_by_a_status(
        self, members: Members
    ) -> None:
        """The ids reported for a dead node's members might belong to other clients."""
        members.push(subscribed("X"))
        members.push(unsubscribed("X"))
        assert is_stale(members)
        assert apply_new_status(members, "X")
        assert list(members.view) == ["X"]

    def test_event_with_another_username_removes_no_member(self, members: Members) -> None:
        members.push(subscribed("X", username="ann"))
        members.push(subscribed("Y", "a/b/", username="ann"))
        members.push(unsubscribed("X", username="bob"))
        members.push(unsubscribed("Y", "a/b/"))
        assert sorted(members.view) == ["X", "Y"]
        assert is_stale(members)


class TestOtherNodes:
    """A status lists the clients of one node of a cluster; events come from all nodes."""

    def test_member_on_another_node_stays(self, members: Members) -> None:
        apply_new_status(members, "X")
        members.push(subscribed("Y"))
        members.push(subscribed("Z", "a/b/"))
        assert not apply_new_status(members, "X")
        assert not apply_new_status(members, "X", channel="a/b/")
        assert sorted(members.view) == ["X", "Y", "Z"]
        members.push(unsubscribed("Y"))
        members.push(unsubscribed("Z", "a/b/"))
        assert list(members.view) == ["X"]

    def test_member_listed_once_is_removed_by_a_status_without_it(self, members: Members) -> None:
        members.push(subscribed("X", "a/b/"))
        apply_new_status(members, "X", channel="a/b/")
        members.push(subscribed("X", "a/c/"))
        assert apply_new_status(members, channel="a/b/") is False
        assert apply_new_status(members, channel="a/c/")
        assert dict(members.view) == {}

    def test_members_from_another_connection_stay_unconfirmed(self, members: Members) -> None:
        apply_new_status(members, "W", "X")
        members.push(subscribed("Y", username="ann"))
        members.push(subscribed("Z"))
        members.note_gap()
        assert {member.confirmed for member in members.view.values()} == {False}
        assert not apply_new_status(members, "X"), "no member joined or left"
        assert not apply_new_status(members, "X"), "members on another node might still be there"
        members.push(subscribed("Z"))
        assert dict(members.view) == {
            "W": Member("W", confirmed=False),
            "X": Member("X"),
            "Y": Member("Y", "ann", confirmed=False),
            "Z": Member("Z"),
        }
        members.push(unsubscribed("Y", username="ann"))
        assert apply_new_status(members), "X was listed since, so the status removes it"
        assert sorted(members.view) == ["W", "Z"]


class TestChangesDuringAStatusRequest:
    """The reply might be older or newer than the change, so the change counts."""

    def test_member_that_joined_is_kept(self, members: Members) -> None:
        members.begin_status()
        members.push(subscribed("X"))
        assert not members.apply_status("a/", status())
        assert list(members.view) == ["X"]
        assert is_stale(members), "another status is needed"

    def test_member_that_left_stays_removed(self, members: Members) -> None:
        members.push(subscribed("X"))
        members.begin_status()
        members.push(unsubscribed("X"))
        assert not members.apply_status("a/", status("X"))
        assert dict(members.view) == {}
        assert is_stale(members)

    def test_other_members_are_corrected(self, members: Members) -> None:
        apply_new_status(members, "X", "Y")
        members.begin_status()
        members.push(subscribed("Z"))
        assert members.apply_status("a/", status("X"))
        assert sorted(members.view) == ["X", "Z"]

    def test_next_status_without_changes_is_final(self, members: Members) -> None:
        members.begin_status()
        members.push(subscribed("X"))
        members.apply_status("a/", status())
        assert not apply_new_status(members, "X")
        assert not is_stale(members)

    @given(
        st.lists(
            st.tuples(st.sampled_from(["subscribe", "unsubscribe"]), st.sampled_from("XYZ")),
            max_size=15,
        ),
        st.sets(st.sampled_from("XYZ")),
    )
    def test_status_without_changes_sets_the_members(
        self, changes: list[tuple[Literal["subscribe", "unsubscribe"], str]], listed: set[str]
    ) -> None:
        members = Members("a/")
        for event, id in changes:
            members.push(PresenceEvent(NOW, event, "a/", (Member(id),)))
        before = set(members.view)
        # A status removes only members that it listed before: others might be on another node.
        assert apply_new_status(members, *listed) == (not listed <= before)
        assert set(members.view) == listed | before
        apply_new_status(members, *"XYZ")
        assert apply_new_status(members, *listed) == (listed != set("XYZ"))
        assert set(members.view) == listed
        assert not is_stale(members)

    @given(st.lists(st.tuples(st.sampled_from("XYZ"), st.sampled_from(["a/", "a/b/", "a/c/"]))))
    def test_events_of_new_members_are_followed_exactly(self, moves: list[tuple[str, str]]) -> None:
        members = Members("a/")
        places: set[tuple[str, str]] = set()
        for place in moves:
            # The broker emits one event per change.
            members.push(unsubscribed(*place) if place in places else subscribed(*place))
            places ^= {place}
            assert set(members.view) == {id for id, _ in places}


class TestFeed:
    @pytest.fixture
    def watch(self) -> Watch:
        return Watch("a/", Sender("watch_presence('a/')", 10, "raise"))

    @pytest.fixture
    def feed(self, watch: Watch) -> Iterator[PresenceFeed]:
        with PresenceFeed(watch.send, "a/", watch.members.view) as feed:
            yield feed

    def test_status_comes_first(self, watch: Watch, feed: PresenceFeed) -> None:
        event = subscribed("X")
        watch.send.push(event)
        first = status("X")
        watch.send.put_in_front([first])
        assert [feed.receive_nowait(), feed.receive_nowait()] == [first, event]

    def test_members_stay_up_to_date_and_cannot_be_changed(
        self, watch: Watch, feed: PresenceFeed
    ) -> None:
        watch.members.push(subscribed("X"))
        assert list(feed.members) == ["X"]
        assert not hasattr(feed.members, "clear")

    def test_gap_is_counted_and_makes_members_unconfirmed(
        self, watch: Watch, feed: PresenceFeed
    ) -> None:
        watch.members.push(subscribed("X"))
        watch.note_gap()
        assert feed.statistics().gaps == 1
        assert not feed.members["X"].confirmed

    def test_clone_shares_the_events(self, watch: Watch, feed: PresenceFeed) -> None:
        event = subscribed("X")
        watch.send.push(event)
        with feed.clone() as clone:
            assert clone.receive_nowait() is event

    def test_repr(self, feed: PresenceFeed) -> None:
        assert repr(feed) == "<PresenceFeed watch_presence('a/'), open, 0 buffered>"


@pytest.mark.virtual_time
class TestWaitStale:
    async def time_wait_stale(self, members: Members, seconds: float) -> tuple[bool, float]:
        """Wait until the members are stale or ``seconds`` passed; return which, and the time."""
        start = anyio.current_time()
        stale = await members.wait_stale(seconds)
        return stale, round(anyio.current_time() - start, 6)

    async def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        await anyio.sleep(seconds)
        function()

    async def test_wait_stale_times_out(self, members: Members) -> None:
        assert await self.time_wait_stale(members, 60) == (False, 60)

    async def test_stale_marks_are_batched_for_a_tenth_of_a_second(self, members: Members) -> None:
        members.mark_stale()
        members.mark_stale()
        assert await self.time_wait_stale(members, 60) == (True, 0.1)

    async def test_stale_mark_during_the_wait(self, members: Members) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.call_later, 5, members.mark_stale)
            assert await self.time_wait_stale(members, math.inf) == (True, 5.1)

    async def test_stale_mark_does_not_extend_the_wait(self, members: Members) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.call_later, 59.95, members.mark_stale)
            assert await self.time_wait_stale(members, 60) == (True, 60)

    async def test_requesting_a_status_clears_the_stale_mark(self, members: Members) -> None:
        members.mark_stale()
        members.begin_status()
        assert await self.time_wait_stale(members, 60) == (False, 60)
