"""The command ``presence``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from emitter_anyio import Member, PresenceEvent, PresenceFeed

from . import _arguments as arguments_
from ._arguments import Parser, add_matcher, check_matcher
from ._formats import iso_time, to_json
from ._output import Output, visible
from ._source import SECRET_HELP, Source, add_source, connect_once, stay_connected
from ._terminal import live_table

VERBS: Final = {"status": "is present", "subscribe": "joined", "unsubscribe": "left"}


def add_presence(parser: Parser) -> None:
    """Add the arguments of ``presence``."""
    parser.set_command(
        _presence,
        arguments="CHANNEL",
        description=(
            "Show the subscribers of a channel and of the channels below it, until Ctrl-C.\n\n"
            "On a terminal, a live table is shown if the extra 'cli' is installed. Otherwise,\n"
            "each change prints a line. A client is shown by its user name, or by the id of\n"
            "its connection if it has none."
        ),
        examples=(
            "  %(prog)s chat/\n"
            "  %(prog)s chat/ --once    # only the current ones\n"
            "  %(prog)s chat/ --json | jq .who"
        ),
    )
    parser.add_argument(
        "channel",
        type=arguments_.pattern,
        metavar="CHANNEL",
        help="channel, such as chat/ or chat/room/",
    )
    parser.add_argument(
        "--once", action="store_true", help="print the current subscribers and exit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per change")
    add_matcher(parser)
    add_source(parser, key="key with permission p", secret=SECRET_HELP)


async def _presence(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.once:
        async with connect_once(source) as emitter:
            key = source.key_for(emitter, "p", arguments.channel)
            status = await emitter.presence(key, arguments.channel)
        async with Output() as output:
            await output.write(_lines(status, as_json=arguments.json))
        return
    check_matcher(arguments.channel, arguments.matcher)
    async with stay_connected(source, matcher=arguments.matcher) as emitter:
        key = source.key_for(emitter, "p", arguments.channel)
        async with emitter.watch_presence(key, arguments.channel) as feed:
            await (_print if arguments.json else _show)(feed, arguments)


async def _print(feed: PresenceFeed, arguments: argparse.Namespace) -> None:
    async with Output() as output:
        async for event in feed:
            await output.write(_lines(event, as_json=arguments.json))


async def _show(feed: PresenceFeed, arguments: argparse.Namespace) -> None:
    since: dict[str, str] = {}
    with live_table(arguments.channel, ("member", "since", "connection")) as update:
        if update is None:
            await _print(feed, arguments)
        else:
            async for event in feed:
                time = f"{event.time.astimezone():%H:%M:%S}"
                for id in feed.members:
                    since.setdefault(id, time if event.event == "subscribe" else f"before {time}")
                update(f"{len(feed.members)} present", _rows(feed, since), _footer(event, time))


def _rows(feed: PresenceFeed, since: dict[str, str]) -> Sequence[Sequence[str]]:
    members = sorted(feed.members.values(), key=lambda member: (name(member), member.id))
    return [(name(each), since[each.id], visible(each.id)) for each in members]


def _footer(event: PresenceEvent, time: str) -> str:
    if event.event == "status":
        return f"as of {time}"
    return f"{time}  {name(event.who[0])} {VERBS[event.event]} ({visible(event.channel)})"


def name(member: Member) -> str:
    """Return the user name, or else the id, with control characters escaped."""
    return visible(member.username or member.id)


def _lines(event: PresenceEvent, *, as_json: bool) -> bytes:
    if as_json:
        who = [{"id": each.id, "username": each.username} for each in event.who]
        fields = {"time": iso_time(event.time), "event": event.event, "channel": event.channel}
        return f"{to_json({**fields, 'who': who})}\n".encode()
    local: datetime = event.time.astimezone()
    channel = visible(event.channel)
    if not event.who:
        return f"{local:%H:%M:%S}  no subscribers  {channel}\n".encode()
    return "".join(
        f"{local:%H:%M:%S}  {name(each)} {VERBS[event.event]}  {channel}\n" for each in event.who
    ).encode()
