"""The subscriptions and presence feeds that the client needs on every connection."""

from __future__ import annotations

from collections.abc import Iterable

from emitter_anyio._values.channels import KeySource, channel_hash, unshare
from emitter_anyio._values.errors import SubscriptionConflictError
from emitter_anyio._values.router import Matcher, overlap, reaches

from .pending import Grant


class Wants:
    """
    The subscriptions and presence feeds of a client, and the number of users of each.

    The object lives as long as the client and sends nothing. A :class:`Session` sends the requests.

    :param matcher: how the broker matches subscriptions
    :param allow_collisions: whether the broker distinguishes channels with equal hashes
    """

    def __init__(self, matcher: Matcher, *, allow_collisions: bool = False) -> None:
        self.matcher: Matcher = matcher
        self._allow_collisions = allow_collisions
        self._grants: dict[str, dict[KeySource, Grant]] = {}
        """The grants by filter, then by the key or key function that the user passed."""
        self._feeds: dict[str, int] = {}
        """The number of users of each presence feed, by channel."""

    def clear(self) -> None:
        """Remove everything, because the client has ended."""
        self._grants.clear()
        self._feeds.clear()

    # Subscriptions

    @property
    def grants(self) -> list[Grant]:
        """All subscriptions, in the order in which their filters were added."""
        return [grant for by_source in self._grants.values() for grant in by_source.values()]

    def find(self, source: KeySource, filter: str) -> Grant | None:
        """Return the subscription with a certain key and filter, or ``None``."""
        return self._grants.get(filter, {}).get(source)

    def check(self, filter: str) -> None:
        """
        Check that the broker can distinguish a new filter from the existing ones.

        :raises SubscriptionConflictError: if it cannot
        """
        if filter not in self._grants:
            self._check_collision("subscription", filter, self._grants)
            self._check_groups(filter)

    def add(self, grant: Grant) -> None:
        """Add a subscription."""
        self._grants.setdefault(grant.filter, {})[grant.source] = grant

    def remove(self, grant: Grant) -> list[Grant]:
        """
        Remove a subscription that the broker has refused.

        :return: the subscriptions to unsubscribe: those of other keys to the filter, if they have
            no users
        """
        grants = self._grants.get(grant.filter, {})
        if grants.get(grant.source) is not grant:
            return []
        del grants[grant.source]
        return self._remove_unused(grant.filter)

    def leave(self, grant: Grant) -> list[Grant]:
        """
        Remove a user of a subscription.

        :return: the subscriptions to unsubscribe: those of all keys to the filter, if they have no
            users
        """
        grant.leave()
        return self._remove_unused(grant.filter)

    def keep_accepted(self) -> None:
        """Keep only the subscriptions to restore: those that were accepted and have users."""
        for filter, grants in list(self._grants.items()):
            kept = {source: each for source, each in grants.items() if each.accepted and each.users}
            if kept:
                self._grants[filter] = kept
            else:
                del self._grants[filter]

    def is_subscribed(self, filter: str) -> bool:
        """Return whether there is a subscription with exactly this filter."""
        return filter in self._grants

    def overlaps(self, filter: str) -> bool:
        """Return whether a message could reach both this filter and an existing subscription."""
        _, channel = unshare(filter)
        return any(overlap(channel, unshare(other)[1], self.matcher) for other in self._grants)

    def subscription_reaches(self, channel: str) -> bool:
        """Return whether a message to a channel reaches a subscription."""
        filters = (unshare(filter)[1] for filter in self._grants)
        return any(reaches(filter, channel, self.matcher) for filter in filters)

    def _remove_unused(self, filter: str) -> list[Grant]:
        grants = self._grants.get(filter, {})
        if any(grant.users for grant in grants.values()):
            return []
        self._grants.pop(filter, None)
        return list(grants.values())

    def _check_groups(self, filter: str) -> None:
        group, channel = unshare(filter)
        for other in self._grants:
            other_group, other_channel = unshare(other)
            if (group or other_group) and overlap(channel, other_channel, self.matcher):
                raise SubscriptionConflictError(
                    f"cannot subscribe to {filter!r}: it overlaps with {other!r}, and Emitter "
                    "delivers only one copy of a message to a connection; use a second Emitter for "
                    "the group"
                )

    # Presence feeds

    def watch(self, channel: str) -> None:
        """
        Add a user of a channel's presence feed.

        :raises SubscriptionConflictError: if the broker cannot distinguish it from another feed
        """
        if channel not in self._feeds:
            self._check_collision("presence feed", channel, self._feeds)
        self._feeds[channel] = self._feeds.get(channel, 0) + 1

    def unwatch(self, channel: str) -> bool:
        """Remove a user of a presence feed, and return whether it was the last one."""
        users = self._feeds.pop(channel, 0) - 1
        if users > 0:
            self._feeds[channel] = users
        return users == 0

    def is_watched(self, channel: str) -> bool:
        """Return whether there is a presence feed of exactly this channel."""
        return channel in self._feeds

    def feed_reaches(self, channel: str) -> bool:
        """Return whether a feed covers the presence changes of a channel."""
        return any(reaches(feed, channel, self.matcher) for feed in self._feeds)

    def _check_collision(self, what: str, channel: str, others: Iterable[str]) -> None:
        if self._allow_collisions:
            return
        hash = channel_hash(channel)
        for other in others:
            if other != channel and channel_hash(other) == hash:
                raise SubscriptionConflictError(
                    f"cannot use the {what} of {channel!r}: on one connection, Emitter cannot "
                    f"distinguish it from {other!r} and would never deliver to it; use a second "
                    "Emitter, or allow_collisions=True if the broker does not have this bug"
                )
