from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Literal

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._presence import PresenceFeed
from emitter_anyio._requests import Member, PresenceEvent, PresenceStatus

NOW = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def feed() -> Iterator[PresenceFeed]:
    feed = PresenceFeed("a/", 10, "raise")
    yield feed
    feed.close()


def came(id: str, channel: str = "a/", username: str | None = None) -> PresenceEvent:
    return PresenceEvent(NOW, "subscribe", channel, (Member(id, username),))


def went(id: str, channel: str = "a/") -> PresenceEvent:
    return PresenceEvent(NOW, "unsubscribe", channel, (Member(id),))


def status(*ids: str, channel: str = "a/") -> PresenceStatus:
    return PresenceStatus(NOW, "status", channel, tuple(Member(id) for id in ids))


def asked(feed: PresenceFeed, *ids: str, channel: str = "a/") -> bool:
    """Ask for a status and take it in, with nothing in between."""
    feed.asking()
    return feed.correct(channel, status(*ids, channel=channel))


def in_doubt(feed: PresenceFeed) -> bool:
    return feed._doubt.is_set()


class TestMembers:
    def test_at_first_nobody_is_known(self, feed: PresenceFeed) -> None:
        assert dict(feed.members) == {}
        assert not in_doubt(feed)

    def test_the_first_status_says_who_is_there(self, feed: PresenceFeed) -> None:
        assert asked(feed, "X", "Y")
        assert dict(feed.members) == {"X": Member("X"), "Y": Member("Y")}

    def test_a_status_that_is_no_news(self, feed: PresenceFeed) -> None:
        assert not asked(feed)
        asked(feed, "X", "Y")
        assert not asked(feed, "Y", "X")
        assert asked(feed, "X")
        assert list(feed.members) == ["X"]

    def test_another_name_is_news(self, feed: PresenceFeed) -> None:
        asked(feed, "X")
        feed.asking()
        named = PresenceStatus(NOW, "status", "a/", (Member("X", "ann"),))
        assert feed.correct("a/", named)
        assert feed.members["X"].username == "ann"

    def test_who_comes_and_goes(self, feed: PresenceFeed) -> None:
        asked(feed)
        feed.note(came("X", username="ann"))
        assert dict(feed.members) == {"X": Member("X", "ann")}
        assert not in_doubt(feed)
        feed.note(went("X"))
        assert dict(feed.members) == {}

    def test_who_comes_twice_is_there_once(self, feed: PresenceFeed) -> None:
        feed.note(came("X"))
        feed.note(came("X", username="ann"))
        assert dict(feed.members) == {"X": Member("X", "ann")}
        feed.note(went("X"))
        assert dict(feed.members) == {}

    def test_it_is_a_view(self, feed: PresenceFeed) -> None:
        members = feed.members
        feed.note(came("X"))
        assert list(members) == ["X"]
        asked(feed)
        feed.note(came("Y"))
        assert "Y" in members
        with pytest.raises(TypeError):
            members["Z"] = Member("Z")  # type: ignore[index]  # that is the point


class TestBelow:
    """A status of the channel names those whom a message to it would reach, and so nobody below."""

    def test_who_comes_and_goes_there(self, feed: PresenceFeed) -> None:
        asked(feed)
        feed.note(came("X", "a/b/"))
        assert list(feed.members) == ["X"]
        assert feed.next_below() == ["a/b/"]
        feed.note(went("X", "a/b/"))
        assert dict(feed.members) == {}
        assert not in_doubt(feed)

    def test_who_is_in_two_places_is_there_until_it_has_left_both(self, feed: PresenceFeed) -> None:
        asked(feed)
        feed.note(came("X", "a/"))
        feed.note(came("X", "a/b/"))
        feed.note(went("X", "a/"))
        assert list(feed.members) == ["X"]
        feed.note(went("X", "a/b/"))
        assert dict(feed.members) == {}
        assert not in_doubt(feed)

    def test_a_status_of_the_channel_says_nothing_of_them(self, feed: PresenceFeed) -> None:
        asked(feed)
        feed.note(came("X", "a/b/"))
        assert not asked(feed)
        assert list(feed.members) == ["X"]

    def test_a_status_of_their_own_channel_does(self, feed: PresenceFeed) -> None:
        asked(feed)
        feed.note(came("X", "a/b/"))
        assert not asked(feed, "X", channel="a/b/")
        assert asked(feed, "Y", channel="a/b/")
        assert list(feed.members) == ["Y"]
        assert asked(feed, channel="a/b/")
        assert dict(feed.members) == {}

    def test_it_names_those_above_too(self, feed: PresenceFeed) -> None:
        asked(feed, "X")
        feed.note(came("Y", "a/b/"))
        assert not asked(feed, "X", "Y", channel="a/b/")
        feed.note(went("Y", "a/b/"))
        assert asked(feed)
        assert dict(feed.members) == {}, "X is not held by the channel below"

    def test_all_channels_are_looked_at_each_in_its_turn(self, feed: PresenceFeed) -> None:
        assert feed.next_below() == []
        channels = [f"a/{number}/" for number in range(100)]
        for channel in channels:
            feed.note(came("X", channel))
        assert feed.next_below() == channels[:64]
        feed.note(came("Y", "a/new/"))
        assert feed.next_below() == [*channels[64:], *channels[:28]]
        assert feed.next_below() == [*channels[28:64], "a/new/", *channels[64:91]]

    def test_one_that_everybody_has_left_is_remembered(self, feed: PresenceFeed) -> None:
        """Somebody may come back, and no event tell of it."""
        feed.note(came("X", "a/b/"))
        feed.note(went("X", "a/b/"))
        assert not asked(feed, channel="a/b/")
        assert feed.next_below() == ["a/b/"]
        assert asked(feed, "Y", channel="a/b/")
        assert list(feed.members) == ["Y"]

    def test_of_those_that_everybody_has_left_the_latest_are_remembered(
        self, feed: PresenceFeed
    ) -> None:
        feed.note(came("X", "a/stays/"))
        for number in range(2000):
            feed.note(came("Y", f"a/{number}/"))
            feed.note(went("Y", f"a/{number}/"))
        below = {channel for _ in range(40) for channel in feed.next_below()}
        assert below == {"a/stays/"} | {f"a/{number}/" for number in range(2000 - 1023, 2000)}

    def test_all_in_which_somebody_is_are_remembered(self, feed: PresenceFeed) -> None:
        for number in range(1100):
            feed.note(came("X", f"a/{number}/"))
        assert len({channel for _ in range(20) for channel in feed.next_below()}) == 1100


class TestDoubts:
    def test_who_was_there_before_us_may_be_reached_otherwise_still(
        self, feed: PresenceFeed
    ) -> None:
        asked(feed, "X")
        feed.note(went("X"))
        assert dict(feed.members) == {}
        assert in_doubt(feed)
        assert asked(feed, "X"), "and so it is"
        assert list(feed.members) == ["X"]
        assert not in_doubt(feed)

    def test_who_was_there_before_us_and_leaves_a_place_below(self, feed: PresenceFeed) -> None:
        asked(feed, "X")
        feed.note(came("X", "a/b/"))
        feed.note(went("X", "a/b/"))
        assert list(feed.members) == ["X"]
        assert in_doubt(feed)

    def test_who_leaves_and_was_never_there(self, feed: PresenceFeed) -> None:
        feed.note(went("X"))
        feed.note(went("Y", "a/b/"))
        assert dict(feed.members) == {}
        assert in_doubt(feed)

    def test_who_comes_is_beyond_doubt(self, feed: PresenceFeed) -> None:
        feed.note(came("X"))
        feed.note(came("X", "a/b/"))
        assert not in_doubt(feed)

    def test_who_left_and_came_back_is_beyond_doubt(self, feed: PresenceFeed) -> None:
        asked(feed, "X")
        feed.note(went("X"))
        asked(feed)
        feed.note(came("X"))
        feed.note(went("X"))
        assert not in_doubt(feed)

    def test_who_is_gone_by_a_status_is_a_stranger_again(self, feed: PresenceFeed) -> None:
        feed.note(came("X"))
        asked(feed, "X")
        asked(feed)
        asked(feed, "X")
        feed.note(went("X"))
        assert in_doubt(feed), "it may be in other places by now"


class TestOtherNodes:
    """A status names those on one node of a cluster; events come from all of them."""

    def test_who_is_on_another_node_stays(self, feed: PresenceFeed) -> None:
        asked(feed, "X")
        feed.note(came("Y"))
        feed.note(came("Z", "a/b/"))
        assert not asked(feed, "X")
        assert not asked(feed, "X", channel="a/b/")
        assert sorted(feed.members) == ["X", "Y", "Z"]
        feed.note(went("Y"))
        feed.note(went("Z", "a/b/"))
        assert list(feed.members) == ["X"]

    def test_who_was_named_once_may_be_missed_in_any_channel(self, feed: PresenceFeed) -> None:
        feed.note(came("X", "a/b/"))
        asked(feed, "X", channel="a/b/")
        feed.note(came("X", "a/c/"))
        assert asked(feed, channel="a/b/") is False
        assert asked(feed, channel="a/c/")
        assert dict(feed.members) == {}

    def test_those_of_another_connection_stay_unconfirmed(self, feed: PresenceFeed) -> None:
        asked(feed, "W", "X")
        feed.note(came("Y", username="ann"))
        feed.note(came("Z"))
        feed.note_gap()
        assert {member.confirmed for member in feed.members.values()} == {False}
        assert not asked(feed, "X"), "nobody has come or gone"
        assert not asked(feed, "X"), "nor have those whom another node may have"
        feed.note(came("Z"))
        assert dict(feed.members) == {
            "W": Member("W", confirmed=False),
            "X": Member("X"),
            "Y": Member("Y", "ann", confirmed=False),
            "Z": Member("Z"),
        }
        feed.note(went("Y"))
        assert asked(feed), "X has been named since"
        assert sorted(feed.members) == ["W", "Z"]


class TestChangesWhileAskingForAStatus:
    """The answer is from before or after the change: nobody knows, so the change counts."""

    def test_who_came(self, feed: PresenceFeed) -> None:
        feed.asking()
        feed.note(came("X"))
        assert not feed.correct("a/", status())
        assert list(feed.members) == ["X"]
        assert in_doubt(feed), "another status is to tell"

    def test_who_went(self, feed: PresenceFeed) -> None:
        feed.note(came("X"))
        feed.asking()
        feed.note(went("X"))
        assert not feed.correct("a/", status("X"))
        assert dict(feed.members) == {}
        assert in_doubt(feed)

    def test_the_others_are_corrected(self, feed: PresenceFeed) -> None:
        asked(feed, "X", "Y")
        feed.asking()
        feed.note(came("Z"))
        assert feed.correct("a/", status("X"))
        assert sorted(feed.members) == ["X", "Z"]

    def test_asking_again_without_changes_settles_it(self, feed: PresenceFeed) -> None:
        feed.asking()
        feed.note(came("X"))
        feed.correct("a/", status())
        assert not asked(feed, "X")
        assert not in_doubt(feed)

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
        feed = PresenceFeed("a/", 10, "raise")
        for event, id in changes:
            feed.note(PresenceEvent(NOW, event, "a/", (Member(id),)))
        before = set(feed.members)
        # It removes nobody, who may be on another node, before it has named him once.
        assert asked(feed, *there) == (not there <= before)
        assert set(feed.members) == there | before
        asked(feed, *"XYZ")
        assert asked(feed, *there) == (there != set("XYZ"))
        assert set(feed.members) == there
        assert not in_doubt(feed)
        feed.close()

    @given(st.lists(st.tuples(st.sampled_from("XYZ"), st.sampled_from(["a/", "a/b/", "a/c/"]))))
    def test_who_comes_under_our_eyes_is_followed_exactly(
        self, moves: list[tuple[str, str]]
    ) -> None:
        feed = PresenceFeed("a/", 10, "raise")
        places: set[tuple[str, str]] = set()
        for place in moves:
            # The broker tells of each place once.
            feed.note(went(*place) if place in places else came(*place))
            places ^= {place}
            assert set(feed.members) == {id for id, _ in places}
        assert not in_doubt(feed)
        feed.close()


class TestTheStream:
    def test_the_status_comes_first(self, feed: PresenceFeed) -> None:
        event = came("X")
        feed.note(event)
        feed.push(event)
        first = status("X")
        feed.put_in_front([first])
        assert [feed.receive_nowait(), feed.receive_nowait()] == [first, event]

    def test_says_what_it_is(self, feed: PresenceFeed) -> None:
        assert repr(feed) == "<PresenceFeed watch_presence('a/'), open, 0 buffered>"


@pytest.mark.virtual_time
class TestWaitingForDoubts:
    async def waited(self, feed: PresenceFeed, seconds: float) -> tuple[bool, float]:
        """Whether there is a doubt, and how long that took."""
        start = anyio.current_time()
        doubted = await feed.doubted(seconds)
        return doubted, round(anyio.current_time() - start, 6)

    async def later(self, seconds: float, act: Callable[[], object]) -> None:
        await anyio.sleep(seconds)
        act()

    async def test_a_status_is_wanted_now_and_then(self, feed: PresenceFeed) -> None:
        assert await self.waited(feed, 60) == (False, 60)

    async def test_doubts_are_gathered_for_a_little_while(self, feed: PresenceFeed) -> None:
        feed.doubt()
        feed.doubt()
        assert await self.waited(feed, 60) == (True, 0.1)

    async def test_a_doubt_that_comes_later(self, feed: PresenceFeed) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.later, 5, feed.doubt)
            assert await self.waited(feed, math.inf) == (True, 5.1)

    async def test_a_doubt_puts_nothing_off(self, feed: PresenceFeed) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.later, 59.95, feed.doubt)
            assert await self.waited(feed, 60) == (True, 60)

    async def test_asking_settles_the_doubts(self, feed: PresenceFeed) -> None:
        feed.doubt()
        feed.asking()
        assert await self.waited(feed, 60) == (False, 60)
