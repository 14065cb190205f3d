"""What is subscribed on one link, and what the broker could not keep apart there."""

from __future__ import annotations

from collections.abc import Iterable

from ._channels import Key, fingerprint, unshare
from ._errors import SubscriptionConflictError
from ._messages import EmitterMessage
from ._pending import Grant, Pending
from ._router import Matcher, overlap, reaches


class Grants:
    """
    Who uses which subscription, and which feed of changes of presence.

    :param matcher: how the broker matches subscriptions
    :param allow_collisions: whether the broker keeps channels of the same fingerprint apart
    """

    def __init__(self, matcher: Matcher, *, allow_collisions: bool) -> None:
        self._linked = True
        self._matcher: Matcher = matcher
        self._allow_collisions = allow_collisions
        self._grants: dict[str, dict[Key, Grant]] = {}
        self._feeds: dict[str, int] = {}
        """How many use the feed of a channel's changes of presence."""
        self._left_feeds: set[str] = set()
        self.replays: set[Grant] = set()
        """The subscriptions whose stored messages the broker may be replaying now."""

    @property
    def linked(self) -> bool:
        """Tell whether there is a link that has been told what is subscribed."""
        return self._linked

    def overlapped(self, filter: str) -> bool:
        """Tell whether some channel reaches both this subscription and another one."""
        _, channel = unshare(filter)
        return any(overlap(channel, unshare(other)[1], self._matcher) for other in self._grants)

    def _is_deaf(self, filter: str) -> bool:
        # The default matcher never delivers to "#", though the broker replays to it, and on the
        # wire a replay looks like any other message.
        return self._matcher == "emitter" and filter.endswith("#/")

    def in_use(self, filter: str) -> bool:
        """Tell whether a subscription to just this channel has users."""
        return filter in self._grants

    def replaying(self, channel: str) -> Pending[None] | None:
        """
        Give a SUBSCRIBE whose replay is under way and would reach a subscription to a channel.
        """
        for grant in self.replays:
            if overlap(channel, grant.channel, self._matcher):
                return grant.asked
        return None

    def in_replay(self, message: EmitterMessage) -> bool:
        """
        Tell whether a message may belong to a replay that is under way; the broker replays 64 KiB
        at most.
        """
        for grant in self.replays:
            if grant.replay_left > 0 and reaches(grant.channel, message.channel, self._matcher):
                grant.replay_left -= len(message.binary) + 1
                return True
        return False

    def watch(self, channel: str) -> None:
        """
        Use the feed of a channel's changes of presence; asking the broker is up to the caller.

        :raises SubscriptionConflictError: if the broker would mix it up with another one
        """
        if channel not in self._feeds:
            self._check_collision("presence feed", channel, self._feeds)
        self._feeds[channel] = self._feeds.get(channel, 0) + 1

    def unwatch(self, channel: str) -> bool:
        """Stop using a feed; tells whether nobody uses it any more."""
        users = self._feeds.pop(channel, 0) - 1
        if users > 0:
            self._feeds[channel] = users
        elif not users and self._linked:
            self._left_feeds.add(channel)
        return not users

    def unwatched(self, channel: str) -> None:
        """The broker has ended the feed that nobody used any more."""
        self._left_feeds.discard(channel)

    def watched(self, channel: str) -> bool:
        """Tell whether the feed of just this channel has users."""
        return channel in self._feeds

    def _forget_link(self) -> None:
        """Keep what was granted and is used, for the next link."""
        self._linked = False
        self.replays.clear()
        self._left_feeds.clear()
        for filter, grants in list(self._grants.items()):
            kept = {source: g for source, g in grants.items() if g.granted and g.users}
            if kept:
                self._grants[filter] = kept
            else:
                del self._grants[filter]

    def _check_collision(self, what: str, channel: str, others: Iterable[str]) -> None:
        if self._allow_collisions:
            return
        mark = fingerprint(channel)
        for other in others:
            if other != channel and fingerprint(other) == mark:
                raise SubscriptionConflictError(
                    f"Emitter cannot keep the {what} of {channel!r} apart from that of {other!r} "
                    "on one link and would never deliver to it: use a second Emitter for it (or "
                    "connect(allow_collisions=True) with a broker without that fault)"
                )

    def _check_groups(self, filter: str) -> None:
        group, channel = unshare(filter)
        for other in self._grants:
            other_group, other_channel = unshare(other)
            if (group or other_group) and overlap(channel, other_channel, self._matcher):
                raise SubscriptionConflictError(
                    f"Emitter delivers one copy to a link, and cannot keep {filter!r} apart from "
                    f"{other!r}, which overlaps with it: use a second Emitter for a group"
                )
