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


def came(id: str, channel: str = "a/", username: str | None = None) -> PresenceEvent:
    return PresenceEvent(NOW, "subscribe", channel, (Member(id, username),))


def went(id: str, channel: str = "a/", username: str | None = None) -> PresenceEvent:
    return PresenceEvent(NOW, "unsubscribe", channel, (Member(id, username),))


def status(*ids: str, channel: str = "a/") -> PresenceStatus:
    return PresenceStatus(NOW, "status", channel, tuple(Member(id) for id in ids))


def asked(members: Members, *ids: str, channel: str = "a/") -> bool:
    """Ask for a status and take it in, with nothing in between."""
    members.begin_status()
    return members.apply_status(channel, status(*ids, channel=channel))


def is_stale(members: Members) -> bool:
    return members._stale.is_set()


class TestMembers:
    def test_at_first_nobody_is_known(self, members: Members) -> None:
        assert dict(members.view) == {}
        assert not is_stale(members)

    def test_the_first_status_says_who_is_there(self, members: Members) -> None:
        assert asked(members, "X", "Y")
        assert dict(members.view) == {"X": Member("X"), "Y": Member("Y")}

    def test_a_status_that_is_no_news(self, members: Members) -> None:
        assert not asked(members)
        asked(members, "X", "Y")
        assert not asked(members, "Y", "X")
        assert asked(members, "X")
        assert list(members.view) == ["X"]

    def test_another_name_is_news(self, members: Members) -> None:
        asked(members, "X")
        members.begin_status()
        named = PresenceStatus(NOW, "status", "a/", (Member("X", "ann"),))
        assert members.apply_status("a/", named)
        assert members.view["X"].username == "ann"

    def test_who_comes_and_goes(self, members: Members) -> None:
        asked(members)
        members.push(came("X", username="ann"))
        assert dict(members.view) == {"X": Member("X", "ann")}
        assert not is_stale(members)
        members.push(went("X", username="ann"))
        assert dict(members.view) == {}

    def test_who_comes_twice_is_there_once(self, members: Members) -> None:
        members.push(came("X"))
        members.push(came("X", username="ann"))
        assert dict(members.view) == {"X": Member("X", "ann")}
        members.push(went("X", username="ann"))
        assert dict(members.view) == {}

    def test_it_is_a_view(self, members: Members) -> None:
        view = members.view
        members.push(came("X"))
        assert list(view) == ["X"]
        asked(members)
        members.push(came("Y"))
        assert "Y" in view
        with pytest.raises(TypeError):
            view["Z"] = Member("Z")  # type: ignore[index]  # that is the point


class TestBelow:
    """A status of the channel names those whom a message to it would reach, and so nobody below."""

    def test_who_comes_and_goes_there(self, members: Members) -> None:
        asked(members)
        members.push(came("X", "a/b/"))
        assert list(members.view) == ["X"]
        assert members.next_channels() == ["a/b/"]
        members.push(went("X", "a/b/"))
        assert dict(members.view) == {}

    def test_who_is_in_two_places_is_there_until_it_has_left_both(self, members: Members) -> None:
        asked(members)
        members.push(came("X", "a/"))
        members.push(came("X", "a/b/"))
        members.push(went("X", "a/"))
        assert list(members.view) == ["X"]
        members.push(went("X", "a/b/"))
        assert dict(members.view) == {}

    def test_a_status_of_the_channel_says_nothing_of_them(self, members: Members) -> None:
        asked(members)
        members.push(came("X", "a/b/"))
        assert not asked(members)
        assert list(members.view) == ["X"]

    def test_a_status_of_their_own_channel_does(self, members: Members) -> None:
        asked(members)
        members.push(came("X", "a/b/"))
        assert not asked(members, "X", channel="a/b/")
        assert asked(members, "Y", channel="a/b/")
        assert list(members.view) == ["Y"]
        assert asked(members, channel="a/b/")
        assert dict(members.view) == {}

    def test_it_names_those_above_too(self, members: Members) -> None:
        asked(members, "X")
        members.push(came("Y", "a/b/"))
        assert not asked(members, "X", "Y", channel="a/b/")
        members.push(went("Y", "a/b/"))
        assert asked(members)
        assert dict(members.view) == {}, "X is not held by the channel below"

    def test_all_channels_are_looked_at_each_in_its_turn(self, members: Members) -> None:
        assert members.next_channels() == []
        channels = [f"a/{number}/" for number in range(100)]
        for channel in channels:
            members.push(came("X", channel))
        assert members.next_channels() == channels[:64]
        members.push(came("Y", "a/new/"))
        assert members.next_channels() == [*channels[64:], *channels[:28]]
        assert members.next_channels() == [*channels[28:64], "a/new/", *channels[64:91]]

    def test_one_that_everybody_has_left_is_remembered(self, members: Members) -> None:
        """Somebody may come back, and no event tell of it."""
        members.push(came("X", "a/b/"))
        members.push(went("X", "a/b/"))
        assert not asked(members, channel="a/b/")
        assert members.next_channels() == ["a/b/"]
        assert asked(members, "Y", channel="a/b/")
        assert list(members.view) == ["Y"]

    def test_of_those_that_everybody_has_left_the_latest_are_remembered(
        self, members: Members
    ) -> None:
        members.push(came("X", "a/stays/"))
        for number in range(2000):
            members.push(came("Y", f"a/{number}/"))
            members.push(went("Y", f"a/{number}/"))
        below = {channel for _ in range(40) for channel in members.next_channels()}
        assert below == {"a/stays/"} | {f"a/{number}/" for number in range(2000 - 1023, 2000)}

    def test_all_in_which_somebody_is_are_remembered(self, members: Members) -> None:
        for number in range(1100):
            members.push(came("X", f"a/{number}/"))
        assert len({channel for _ in range(20) for channel in members.next_channels()}) == 1100


class TestDoubts:
    def test_who_was_there_before_us_may_be_reached_otherwise_still(self, members: Members) -> None:
        asked(members, "X")
        members.push(went("X"))
        assert dict(members.view) == {}
        assert is_stale(members)
        assert asked(members, "X"), "and so it is"
        assert list(members.view) == ["X"]
        assert not is_stale(members)

    def test_who_was_there_before_us_and_leaves_a_place_below(self, members: Members) -> None:
        asked(members, "X")
        members.push(came("X", "a/b/"))
        members.push(went("X", "a/b/"))
        assert list(members.view) == ["X"]
        assert is_stale(members)

    def test_who_leaves_and_was_never_there(self, members: Members) -> None:
        members.push(went("X"))
        members.push(went("Y", "a/b/"))
        assert dict(members.view) == {}
        assert is_stale(members)

    def test_who_comes_is_beyond_doubt(self, members: Members) -> None:
        members.push(came("X"))
        members.push(came("X", "a/b/"))
        assert not is_stale(members)

    def test_a_member_that_another_node_reports_as_gone_is_restored_by_a_status(
        self, members: Members
    ) -> None:
        """A dead node's members are reported with ids that others may have."""
        members.push(came("X"))
        members.push(went("X"))
        assert is_stale(members)
        assert asked(members, "X")
        assert list(members.view) == ["X"]

    def test_an_event_with_another_user_name_removes_no_member(self, members: Members) -> None:
        members.push(came("X", username="ann"))
        members.push(came("Y", "a/b/", username="ann"))
        members.push(went("X", username="bob"))
        members.push(went("Y", "a/b/"))
        assert sorted(members.view) == ["X", "Y"]
        assert is_stale(members)


class TestOtherNodes:
    """A status names those on one node of a cluster; events come from all of them."""

    def test_who_is_on_another_node_stays(self, members: Members) -> None:
        asked(members, "X")
        members.push(came("Y"))
        members.push(came("Z", "a/b/"))
        assert not asked(members, "X")
        assert not asked(members, "X", channel="a/b/")
        assert sorted(members.view) == ["X", "Y", "Z"]
        members.push(went("Y"))
        members.push(went("Z", "a/b/"))
        assert list(members.view) == ["X"]

    def test_who_was_named_once_may_be_missed_in_any_channel(self, members: Members) -> None:
        members.push(came("X", "a/b/"))
        asked(members, "X", channel="a/b/")
        members.push(came("X", "a/c/"))
        assert asked(members, channel="a/b/") is False
        assert asked(members, channel="a/c/")
        assert dict(members.view) == {}

    def test_those_of_another_connection_stay_unconfirmed(self, members: Members) -> None:
        asked(members, "W", "X")
        members.push(came("Y", username="ann"))
        members.push(came("Z"))
        members.note_gap()
        assert {member.confirmed for member in members.view.values()} == {False}
        assert not asked(members, "X"), "nobody has come or gone"
        assert not asked(members, "X"), "nor have those whom another node may have"
        members.push(came("Z"))
        assert dict(members.view) == {
            "W": Member("W", confirmed=False),
            "X": Member("X"),
            "Y": Member("Y", "ann", confirmed=False),
            "Z": Member("Z"),
        }
        members.push(went("Y", username="ann"))
        assert asked(members), "X has been named since"
        assert sorted(members.view) == ["W", "Z"]


class TestChangesWhileAskingForAStatus:
    """The answer is from before or after the change: nobody knows, so the change counts."""

    def test_who_came(self, members: Members) -> None:
        members.begin_status()
        members.push(came("X"))
        assert not members.apply_status("a/", status())
        assert list(members.view) == ["X"]
        assert is_stale(members), "another status is to tell"

    def test_who_went(self, members: Members) -> None:
        members.push(came("X"))
        members.begin_status()
        members.push(went("X"))
        assert not members.apply_status("a/", status("X"))
        assert dict(members.view) == {}
        assert is_stale(members)

    def test_the_others_are_corrected(self, members: Members) -> None:
        asked(members, "X", "Y")
        members.begin_status()
        members.push(came("Z"))
        assert members.apply_status("a/", status("X"))
        assert sorted(members.view) == ["X", "Z"]

    def test_asking_again_without_changes_settles_it(self, members: Members) -> None:
        members.begin_status()
        members.push(came("X"))
        members.apply_status("a/", status())
        assert not asked(members, "X")
        assert not is_stale(members)

    @given(
        st.lists(
            st.tuples(st.sampled_from(["subscribe", "unsubscribe"]), st.sampled_from("XYZ")),
            max_size=15,
        ),
        st.sets(st.sampled_from("XYZ")),
    )
    def test_a_status_with_nothing_in_between_is_the_truth(
        self, changes: list[tuple[Literal["subscribe", "unsubscribe"], str]], there: set[str]
    ) -> None:
        members = Members("a/")
        for event, id in changes:
            members.push(PresenceEvent(NOW, event, "a/", (Member(id),)))
        before = set(members.view)
        # It removes nobody, who may be on another node, before it has named him once.
        assert asked(members, *there) == (not there <= before)
        assert set(members.view) == there | before
        asked(members, *"XYZ")
        assert asked(members, *there) == (there != set("XYZ"))
        assert set(members.view) == there
        assert not is_stale(members)

    @given(st.lists(st.tuples(st.sampled_from("XYZ"), st.sampled_from(["a/", "a/b/", "a/c/"]))))
    def test_who_comes_under_our_eyes_is_followed_exactly(
        self, moves: list[tuple[str, str]]
    ) -> None:
        members = Members("a/")
        places: set[tuple[str, str]] = set()
        for place in moves:
            # The broker tells of each place once.
            members.push(went(*place) if place in places else came(*place))
            places ^= {place}
            assert set(members.view) == {id for id, _ in places}


class TestTheFeed:
    @pytest.fixture
    def watch(self) -> Watch:
        return Watch("a/", Sender("watch_presence('a/')", 10, "raise"))

    @pytest.fixture
    def feed(self, watch: Watch) -> Iterator[PresenceFeed]:
        with PresenceFeed(watch.send, "a/", watch.members.view) as feed:
            yield feed

    def test_the_status_comes_first(self, watch: Watch, feed: PresenceFeed) -> None:
        event = came("X")
        watch.send.push(event)
        first = status("X")
        watch.send.put_in_front([first])
        assert [feed.receive_nowait(), feed.receive_nowait()] == [first, event]

    def test_members_stay_up_to_date_and_cannot_be_changed(
        self, watch: Watch, feed: PresenceFeed
    ) -> None:
        watch.members.push(came("X"))
        assert list(feed.members) == ["X"]
        assert not hasattr(feed.members, "clear")

    def test_a_gap_is_counted_and_leaves_members_unconfirmed(
        self, watch: Watch, feed: PresenceFeed
    ) -> None:
        watch.members.push(came("X"))
        watch.note_gap()
        assert feed.statistics().gaps == 1
        assert not feed.members["X"].confirmed

    def test_a_clone_shares_the_events(self, watch: Watch, feed: PresenceFeed) -> None:
        event = came("X")
        watch.send.push(event)
        with feed.clone() as clone:
            assert clone.receive_nowait() is event

    def test_says_what_it_is(self, feed: PresenceFeed) -> None:
        assert repr(feed) == "<PresenceFeed watch_presence('a/'), open, 0 buffered>"


@pytest.mark.virtual_time
class TestWaitingForDoubts:
    async def waited(self, members: Members, seconds: float) -> tuple[bool, float]:
        """Whether the members are stale, and how long that took."""
        start = anyio.current_time()
        stale = await members.wait_stale(seconds)
        return stale, round(anyio.current_time() - start, 6)

    async def later(self, seconds: float, act: Callable[[], object]) -> None:
        await anyio.sleep(seconds)
        act()

    async def test_a_status_is_wanted_now_and_then(self, members: Members) -> None:
        assert await self.waited(members, 60) == (False, 60)

    async def test_doubts_are_gathered_for_a_little_while(self, members: Members) -> None:
        members.mark_stale()
        members.mark_stale()
        assert await self.waited(members, 60) == (True, 0.1)

    async def test_a_doubt_that_comes_later(self, members: Members) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.later, 5, members.mark_stale)
            assert await self.waited(members, math.inf) == (True, 5.1)

    async def test_a_doubt_puts_nothing_off(self, members: Members) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.later, 59.95, members.mark_stale)
            assert await self.waited(members, 60) == (True, 60)

    async def test_asking_settles_the_doubts(self, members: Members) -> None:
        members.mark_stale()
        members.begin_status()
        assert await self.waited(members, 60) == (False, 60)
