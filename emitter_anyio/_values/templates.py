"""Channel templates: channels in which levels have names."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

from .channels import check_channel, check_target, is_level, levels, unshare
from .checks import check_choice, check_text
from .errors import InvalidChannelError
from .router import Matcher, reaches


@dataclass(frozen=True, slots=True)
class Channel:
    """
    A channel in which levels have names, such as ``sensors/{id}/temp/``.

    It is accepted wherever a channel with wildcards is, and then means its :attr:`pattern`.

    :ivar template: the channel. A name in braces stands for any one level. A level can also be
        ``+``, and with ``matcher="mqtt"`` the last level ``#``
    :ivar matcher: how :meth:`match` matches: ``"emitter"`` (the default) or ``"mqtt"``, as the
        option of :func:`connect`
    :raises InvalidChannelError: if the broker would not accept the pattern or not deliver to it, or
        if a name is not an identifier or occurs twice
    :raises TypeError: if a value has the wrong type
    :raises ValueError: if the matcher is unknown
    """

    template: str
    _: KW_ONLY
    matcher: Matcher = "emitter"

    def __post_init__(self) -> None:
        matcher = check_choice("matcher", self.matcher, ("emitter", "mqtt"))
        template = check_text("template", self.template, " such as 'sensors/{id}/'")
        if not template.endswith("/"):
            template += "/"
        if matcher == "emitter" and _parse(template)[1].endswith("#/"):
            raise InvalidChannelError(
                f"invalid template {template!r}: Emitter delivers nothing to '#' with its default "
                f"matcher; use {template[:-2] or '+/'!r}, which includes all channels below it, or "
                "matcher='mqtt' if the broker is configured with it"
            )
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "matcher", matcher)

    @property
    def pattern(self) -> str:
        """The channel with the wildcard ``+`` in the place of each name."""
        return _parse(self.template)[1]

    def match(self, channel: str) -> dict[str, str] | None:
        """
        Return the levels of a channel that the names stand for.

        With ``matcher="emitter"``, a template matches its channels and all channels below them, as
        a subscription does. With ``matcher="mqtt"``, it matches channels with the same number of
        levels only, or with ``#`` all channels below.

        :param channel: the channel of a message
        :return: the levels by name; ``None`` if a subscription to the pattern would not receive
            from the channel
        :raises TypeError: if ``channel`` is not a ``str``
        """
        try:
            channel = check_channel(channel)
        except InvalidChannelError:
            return None
        names, pattern = _parse(self.template)
        if not reaches(pattern, channel, self.matcher):
            return None
        found = levels(channel)
        return {name: found[index] for name, index in names.items()}

    def format(self, /, **values: str | int) -> str:
        """
        Return the channel with a value in the place of each name.

        :param values: a level for each name: a ``str`` without slashes and wildcards, or an ``int``
        :return: the channel, without wildcards
        :raises TypeError: if a name is missing or unknown, or a value has the wrong type
        :raises InvalidChannelError: if a value is not one level that the broker accepts, or the
            template has a wildcard
        """
        names, pattern = _parse(self.template)
        if missing := [name for name in names if name not in values]:
            raise TypeError(f"cannot format {self.template!r}: missing {', '.join(missing)}")
        if unknown := [name for name in values if name not in names]:
            raise TypeError(f"cannot format {self.template!r}: unknown {', '.join(unknown)}")
        parts = levels(pattern)
        for name, index in names.items():
            parts[index] = _check_level(name, values[name])
        if "+" in parts or "#" in parts:
            raise InvalidChannelError(
                f"cannot format {self.template!r}: it contains a wildcard; name that level"
            )
        return check_channel("/".join(parts))


def check_pattern(channel: str | Channel) -> str:
    """
    Check a channel that may have wildcards.

    :return: the channel with a trailing slash; the pattern of a template
    :raises InvalidChannelError: if the broker would not accept it
    """
    if isinstance(channel, Channel):
        return channel.pattern
    return check_channel(channel, wildcards=True)


def check_target_pattern(channel: str | Channel) -> str:
    """Check the target of a key, as :func:`check_target` does."""
    return check_target(channel.pattern if isinstance(channel, Channel) else channel)


@lru_cache(maxsize=1024)
def _parse(template: str) -> tuple[dict[str, int], str]:
    """
    Return the index of each named level, and the pattern.

    :raises InvalidChannelError: if it is malformed
    """
    names: dict[str, int] = {}
    parts = levels(template)
    for index, level in enumerate(parts):
        if "{" not in level and "}" not in level:
            continue
        name = level[1:-1]
        if not (level[0] == "{" and level[-1] == "}" and name.isidentifier()):
            raise InvalidChannelError(
                f"invalid template {template!r}: {level!r} must be a name in braces that is a "
                "whole level, such as '{id}'"
            )
        if name in names:
            raise InvalidChannelError(f"invalid template {template!r}: {level!r} occurs twice")
        names[name] = index
        parts[index] = "+"
    try:
        pattern = check_channel("/".join(parts), wildcards=True)
    except InvalidChannelError as exc:
        raise InvalidChannelError(f"invalid template {template!r}: {exc}") from None
    if unshare(pattern)[0] is not None:
        raise InvalidChannelError(
            f"invalid template {template!r}: it contains a share group; use subscribe(group=)"
        )
    return names, pattern


def _check_level(name: str, value: object) -> str:
    # A bool is an int, but its text would hardly be the name of a level.
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{name} must be a str or an int, not {type(value).__name__}")
    level = str.__str__(value) if isinstance(value, str) else int.__repr__(value)
    if not is_level(level):
        raise InvalidChannelError(
            f"invalid {name} {level!r}: it must be one level, of letters, digits and "
            "$ - . : [ \\ ] ^ _ `"
        )
    return level
