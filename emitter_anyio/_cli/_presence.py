"""``presence``: who is there, and who comes and goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from emitter_anyio import Member, PresenceEvent, PresenceFeed

from . import _arguments as arguments_
from ._arguments import Commands, add_command
from ._formats import stamp, to_json
from ._output import Output, visible
from ._painting import board
from ._source import TO_MAKE_A_KEY, Source, add_source, asking, lasting

VERBS: Final = {"status": "is here", "subscribe": "has come", "unsubscribe": "has left"}


def add_presence(commands: Commands) -> None:
    """Add ``presence``."""
    parser = add_command(
        commands,
        "presence",
        _presence,
        help="watch who is there",
        description=(
            "Show who is subscribed to a channel, and who comes and goes, there and below, until "
            "Ctrl-C: on a\nterminal a board that is kept up to date (with the extra 'cli'), else "
            "a line for each change. Who\nconnects with a user name is shown by that, else by the "
            "connection's id."
        ),
        examples=(
            "  %(prog)s chat/\n"
            "  %(prog)s chat/ --once          # who is there now\n"
            "  %(prog)s chat/ --json | jq .who"
        ),
    )
    parser.add_argument("channel", type=arguments_.pattern, help="such as chat/ or chat/room/")
    parser.add_argument("--once", action="store_true", help="tell who is there now, and end")
    parser.add_argument(
        "--json", action="store_true", help="print each change as JSON, on a terminal too"
    )
    add_source(
        parser,
        key="a key that permits presence (p)",
        secret=TO_MAKE_A_KEY,
    )


async def _presence(arguments: argparse.Namespace) -> None:
    source: Source = arguments.source
    if arguments.once:
        async with asking(source) as emitter:
            key = source.key_for(emitter, "p", arguments.channel)
            status = await emitter.presence(key, arguments.channel)
        async with Output() as output:
            await output.write(_lines(status, as_json=arguments.json))
        return
    async with lasting(source) as emitter:
        key = source.key_for(emitter, "p", arguments.channel)
        async with emitter.watch_presence(key, arguments.channel) as feed:
            await (_print if arguments.json else _show)(feed, arguments)


async def _print(feed: PresenceFeed, arguments: argparse.Namespace) -> None:
    async with Output() as output:
        async for event in feed:
            await output.write(_lines(event, as_json=arguments.json))


async def _show(feed: PresenceFeed, arguments: argparse.Namespace) -> None:
    since: dict[str, str] = {}
    with board(arguments.channel) as show:
        if show is None:
            await _print(feed, arguments)
        else:
            async for event in feed:
                time = f"{event.time.astimezone():%H:%M:%S}"
                for id in feed.members:
                    since.setdefault(id, time if event.event == "subscribe" else f"before {time}")
                show(f"{len(feed.members)} here", _rows(feed, since), _last(event, time))


def _rows(feed: PresenceFeed, since: dict[str, str]) -> Sequence[Sequence[str]]:
    members = sorted(feed.members.values(), key=lambda member: (name(member), member.id))
    return [(name(each), since[each.id], visible(each.id)) for each in members]


def _last(event: PresenceEvent, time: str) -> str:
    if event.event == "status":
        return f"as of {time}"
    return f"{time}  {name(event.who[0])} {VERBS[event.event]} ({visible(event.channel)})"


def name(member: Member) -> str:
    """Give what a member is called; it has chosen that itself."""
    return visible(member.username or member.id)


def _lines(event: PresenceEvent, *, as_json: bool) -> bytes:
    if as_json:
        who = [{"id": each.id, "username": each.username} for each in event.who]
        told = {"time": stamp(event.time), "event": event.event, "channel": event.channel}
        return f"{to_json({**told, 'who': who})}\n".encode()
    local: datetime = event.time.astimezone()
    channel = visible(event.channel)
    if not event.who:
        return f"{local:%H:%M:%S}  nobody is here  {channel}\n".encode()
    return "".join(
        f"{local:%H:%M:%S}  {name(each)} {VERBS[event.event]}  {channel}\n" for each in event.who
    ).encode()
