from __future__ import annotations

import ssl
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import Backoff
from emitter_anyio._net.options import _OTHER_CHECKS, Options, Server, make_options
from emitter_anyio._values.will import Will


def make(options: Mapping[str, Any] | str | None = None, /, **keywords: Any) -> Options:
    return make_options(options, keywords)


def server_of(options: Mapping[str, Any] | str | None = None, /, **keywords: Any) -> Server:
    (server,) = make(options, **keywords).servers
    return server


class TestDefaults:
    def test_default_server_is_the_hosted_emitter(self) -> None:
        assert server_of() == Server("mqtts", "api.emitter.io", 443)

    def test_other_defaults(self) -> None:
        options = make()
        assert options.keepalive == 30
        assert (options.username, options.password, options.client_id) == (None, None, "")
        assert (options.connect_timeout, options.request_timeout) == (10, 10)
        assert options.disconnect_timeout == 5
        assert options.matcher == "emitter"
        assert options.max_message_size == 65536
        assert options.allow_collisions is False
        assert options.reconnect == Backoff(initial=0.1, maximum=30, tries=None)
        assert options.while_down == "wait"
        for name in ("will", "ssl_context", "connectable"):
            assert getattr(options, name) is None

    def test_default_port_follows_the_scheme(self) -> None:
        assert server_of(secure=False) == Server("mqtt", "api.emitter.io", 8080)
        assert server_of(secure=False, port=5) == Server("mqtt", "api.emitter.io", 5)


class TestMapping:
    def test_mapping_of_the_original_sdk(self) -> None:
        given = {"host": "h", "port": 8080, "secure": False, "keepalive": 20}
        options = make(given)
        assert options.servers == (Server("mqtt", "h", 8080),)
        assert options.keepalive == 20
        assert given == {"host": "h", "port": 8080, "secure": False, "keepalive": 20}

    def test_keywords_are_added_to_a_mapping(self) -> None:
        options = make({"host": "h"}, secure=False, username="ann")
        assert options.servers == (Server("mqtt", "h", 8080),)
        assert options.username == "ann"

    def test_keyword_can_repeat_the_mapping(self) -> None:
        assert server_of({"host": "h"}, host="h").host == "h"

    @pytest.mark.parametrize("options", [5, b"mqtt://h", ["mqtt://h"], None])
    def test_options_of_another_type_raise_type_error(self, options: Any) -> None:
        if options is None:
            assert server_of(options) == server_of()
        else:
            with pytest.raises(TypeError, match=f"not {type(options).__name__}$"):
                make(options)


class TestUrls:
    @pytest.mark.parametrize(
        ("url", "server"),
        [
            ("mqtt://h", Server("mqtt", "h", 8080)),
            ("mqtt://h/", Server("mqtt", "h", 8080)),
            ("mqtts://h", Server("mqtts", "h", 443)),
            ("mqtts://h:8443", Server("mqtts", "h", 8443)),
            ("MQTT://H:1", Server("mqtt", "h", 1)),
            ("mqtt://[::1]:8080", Server("mqtt", "::1", 8080)),
            ("unix:///tmp/a%20b", Server("unix", "/tmp/a b", 0)),
            ("ws://h", Server("ws", "h", 8080, "/")),
            ("ws://h:80/", Server("ws", "h", 80, "/")),
            ("wss://h", Server("wss", "h", 443, "/")),
            ("WSS://H:1/mqtt", Server("wss", "h", 1, "/mqtt")),
            (
                "wss://h/mqtt?token=a%2Fb&c=é ?",
                Server("wss", "h", 443, "/mqtt?token=a%2Fb&c=%C3%A9%20?"),
            ),
            ("ws://h?a=1", Server("ws", "h", 8080, "/?a=1")),
            ("ws://h/a%20b/é c;d/", Server("ws", "h", 8080, "/a%20b/%C3%A9%20c;d/")),
        ],
    )
    def test_url_gives_the_server(self, url: str, server: Server) -> None:
        assert server_of(url) == server

    def test_url_can_have_user_and_password(self) -> None:
        options = make("mqtt://ann%40x:p%2Fw@h")
        assert (options.username, options.password) == ("ann@x", "p/w")
        assert make("mqtt://ann@h").password is None

    def test_websocket_url_can_have_user_and_password(self) -> None:
        options = make("wss://ann:p@h/mqtt")
        assert (options.username, options.password) == ("ann", "p")
        assert "ann" not in str(options.servers)

    def test_path_as_host_is_a_unix_socket(self) -> None:
        assert server_of(host="/tmp/x") == Server("unix", "/tmp/x", 0)

    @pytest.mark.parametrize(
        "url",
        [
            "mqtt://h:8080",
            "mqtts://[::1]:443",
            "unix:///tmp/x",
            "ws://h:8080",
            "wss://[::1]:443/mqtt/",
        ],
    )
    def test_str_of_a_server_is_its_url(self, url: str) -> None:
        assert str(server_of(url)) == url

    @given(
        st.sampled_from(["mqtt", "mqtts", "ws", "wss"]),
        st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True),
        st.integers(1, 65535),
        st.from_regex(r"/([a-zA-Z0-9;:@!$&'()*+,=~_./-]|%[0-9A-F]{2}){0,20}", fullmatch=True),
    )
    def test_url_round_trip(self, scheme: str, host: str, port: int, path: str) -> None:
        server = Server(scheme, host, port, path if scheme.startswith("ws") else "")
        assert server_of(str(server)) == server

    @pytest.mark.parametrize(
        ("url", "pattern"),
        [
            ("h:8080", "scheme 'h'"),
            ("h", "scheme.*mqtt, mqtts, ws, wss or unix"),
            ("http://h", "scheme.*'http'"),
            ("mqtt://", "host"),
            ("mqtt://:8080", "host"),
            ("mqtt://h:0", "port.*1 to 65535.* 0"),
            ("mqtt://h:65536", "port.*1 to 65535"),
            ("mqtt://h:x", "port"),
            ("mqtt://h/chat/", "host and port"),
            ("mqtt://h?last=5", "host and port"),
            ("mqtt://h#x", "host and port"),
            ("wss://h/mqtt#x", "%23"),
            ("ws://h/?a@b", "%40"),
            ("ws:///mqtt", "host"),
            ("ws://h/\ud800", "surrogates"),
            ("mqtt://[::1", "host"),
            ("unix://", r"unix:///path"),
            ("unix://host/path", r"unix:///path"),
            ("unix:relative", r"unix:///path"),
            ("unix:///path?query", r"unix:///path"),
            ("unix:///path#fragment", r"unix:///path"),
        ],
    )
    def test_invalid_value_raises(self, url: str, pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            make(url)

    @pytest.mark.parametrize(
        "url",
        [
            "mqtt://ann:password@h:x",
            "mqtt://ann:password@h/chat/",
            "mqtt://ann:password@",
            "mqtt://ann:password@[::1",
            "mqtt://ann:password\u2100@h",
            "mqtt://ann:password@h:99999",
            "http://ann:password@h",
            "ws://ann:password@h/mqtt#fragment",
            "ws://ann:password@h/\ud800",
            "unix://ann:password@h/x",
        ],
    )
    def test_url_error_never_shows_a_password(self, url: str) -> None:
        with pytest.raises(ValueError, match=r".") as caught:
            make(url)
        error: BaseException | None = caught.value
        while error is not None:
            assert "password" not in repr(error)
            error = None if error.__suppress_context__ else error.__context__

    @pytest.mark.parametrize(
        "keywords",
        [
            {"host": "other"},
            {"port": 1},
            {"secure": True},
            {"username": "bob"},
            {"password": "other"},
        ],
    )
    def test_url_that_contradicts_a_keyword_raises(self, keywords: dict[str, Any]) -> None:
        (name,) = keywords
        with pytest.raises(TypeError, match=f"'{name}' in the URL"):
            make("mqtt://ann:word@h:8080", **keywords)

    @pytest.mark.parametrize("scheme", ["ws", "wss"])
    def test_websocket_url_that_contradicts_a_keyword_raises(self, scheme: str) -> None:
        secure = scheme == "wss"
        for name, value in (("host", "other"), ("port", 1), ("secure", not secure)):
            with pytest.raises(TypeError, match=f"'{name}' in the URL"):
                make(f"{scheme}://h:2/mqtt", **{name: value})
        agreed = server_of(f"{scheme}://h:2/mqtt", host="h", port=2, secure=secure)
        assert agreed == Server(scheme, "h", 2, "/mqtt")

    @pytest.mark.parametrize("keywords", [{"secure": 0}, {"port": 8080.0}])
    def test_keyword_of_another_type_raises_type_error(self, keywords: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=next(iter(keywords))):
            make("ws://h", **keywords)

    def test_mapping_that_contradicts_a_keyword_raises(self) -> None:
        with pytest.raises(TypeError, match="'host' in the mapping"):
            make({"host": "a"}, host="b")


class TestConnectable:
    def test_connectable_needs_no_host(self) -> None:
        connectable = anyio.as_connectable(("127.0.0.1", 1))
        server = server_of(connectable=connectable)
        assert server == Server("connectable", "", 0)
        assert str(server) == "the connectable"

    def test_connectable_can_have_a_url(self) -> None:
        connectable = anyio.as_connectable(("127.0.0.1", 1))
        assert str(server_of("mqtt://h", connectable=connectable)) == "mqtt://h:8080"

    def test_connectable_can_be_none(self) -> None:
        assert server_of(connectable=None) == server_of()


class TestHeaders:
    def test_are_kept_in_order(self) -> None:
        given = {"Authorization": "Bearer a.b-c", "X-Empty": "", "x_1": 'a "b"; c'}
        options = make("ws://h", headers=given)
        assert options.headers == tuple(given.items())

    def test_none_and_an_empty_mapping_are_accepted_without_websocket(self) -> None:
        assert make(headers=None).headers == make(headers={}).headers == ()

    @pytest.mark.parametrize("url", ["mqtt://h", "mqtts://h", "unix:///h"])
    def test_require_websocket(self, url: str) -> None:
        with pytest.raises(TypeError, match=r"headers requires WebSocket.*ws://"):
            make(url, headers={"a": "b"})

    @pytest.mark.parametrize(
        ("headers", "error", "words"),
        [
            ([("a", "b")], TypeError, "mapping of str, not list"),
            ("a: b", TypeError, "mapping of str, not str"),
            ({5: "secret"}, TypeError, "name in headers must be a str, not int"),
            ({b"a": "secret"}, TypeError, "name in headers must be a str, not bytes"),
            ({"a": b"secret"}, TypeError, "value in headers must be a str, not bytes"),
            ({"a": None}, TypeError, "value in headers must be a str, not NoneType"),
            ({"": "secret"}, ValueError, "invalid name"),
            ({"a b": "secret"}, ValueError, "invalid name"),
            ({"a:": "secret"}, ValueError, "invalid name"),
            ({"a\r\nb": "secret"}, ValueError, "invalid name"),
            ({"é": "secret"}, ValueError, "invalid name"),
            ({"a": "secret\r\nb: c"}, ValueError, "invalid value"),
            ({"a": "secret\n"}, ValueError, "invalid value"),
            ({"a": " secret"}, ValueError, "invalid value"),
            ({"a": "secret "}, ValueError, "invalid value"),
            ({"a": "secret\0"}, ValueError, "invalid value"),
            ({"a": "sécret"}, ValueError, "invalid value"),
            ({"Host": "secret"}, ValueError, "'Host', which the handshake"),
            ({"upgrade": "secret"}, ValueError, "handshake"),
            ({"CONNECTION": "secret"}, ValueError, "handshake"),
            ({"Sec-WebSocket-Protocol": "secret"}, ValueError, "handshake"),
            ({"Content-Length": "5"}, ValueError, "handshake"),
            ({"Transfer-Encoding": "chunked"}, ValueError, "handshake"),
            ({"a": "b", "A": "secret"}, ValueError, "'A' twice"),
        ],
    )
    def test_invalid_headers_are_rejected_without_their_values(
        self, headers: Any, error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words) as caught:
            make("ws://h", headers=headers)
        assert "secret" not in str(caught.value)


class TestReconnect:
    def test_false_means_none(self) -> None:
        assert make(reconnect=False).reconnect is None
        assert make({"reconnect": False}, reconnect=None).reconnect is None


class TestServers:
    def test_servers_keep_their_order(self) -> None:
        options = make(servers=["mqtt://a", "mqtt://b:1"])
        assert options.servers == (Server("mqtt", "a", 8080), Server("mqtt", "b", 1))

    def test_websocket_servers_have_their_own_paths(self) -> None:
        options = make(servers=["wss://a/mqtt", "wss://b"])
        assert options.servers == (
            Server("wss", "a", 443, "/mqtt"),
            Server("wss", "b", 443, "/"),
        )

    @pytest.mark.parametrize("other", [{"host": "h"}, {"port": 1}, {"secure": True}])
    def test_servers_conflict_with_host_port_and_secure(self, other: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=f"servers.*{next(iter(other))}"):
            make(servers=["mqtt://a"], **other)
        with pytest.raises(TypeError, match=r"servers.*host, port, secure"):
            make("mqtt://h", servers=["mqtt://a"])

    @pytest.mark.parametrize(
        ("servers", "error", "pattern"),
        [
            ([], ValueError, "servers.*empty"),
            ("mqtt://a", TypeError, "sequence of URLs"),
            (5, TypeError, "sequence of URLs"),
            ([5], TypeError, "str.*int"),
            (["mqtt://a", "mqtts://a"], ValueError, "scheme"),
            (["mqtt://a", "ws://a"], ValueError, "scheme"),
            (["mqtt://ann:password@a"], TypeError, "user.*password"),
            (["http://a"], ValueError, "scheme.*'http'"),
        ],
    )
    def test_invalid_value_raises(self, servers: Any, error: type[Exception], pattern: str) -> None:
        with pytest.raises(error, match=pattern) as caught:
            make(servers=servers)
        assert "ann" not in str(caught.value)


class TestOptions:
    def test_every_option_has_a_check(self) -> None:
        assert {"servers", *_OTHER_CHECKS} == {field.name for field in fields(Options)}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("keepalive", 1),
            ("keepalive", 60),
            ("keepalive", 0.5 + 1),
            ("connect_timeout", None),
            ("connect_timeout", 0),
            ("request_timeout", None),
            ("request_timeout", float("inf")),
            ("disconnect_timeout", 0),
            ("username", "x" * 65000),
            ("username", None),
            ("client_id", "me"),
            ("will", Will("k", "a/", "bye")),
            ("ssl_context", ssl.create_default_context()),
            ("matcher", "mqtt"),
            ("max_message_size", 1024),
            ("max_message_size", 0xFFFFFFF),
            ("allow_collisions", True),
            ("connectable", anyio.as_connectable(("127.0.0.1", 1))),
            ("reconnect", None),
            ("reconnect", Backoff(tries=3)),
            ("while_down", "raise"),
        ],
    )
    def test_valid_value_is_accepted(self, name: str, value: Any) -> None:
        assert getattr(make({name: value}), name) == value

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("host", 5, TypeError),
            ("host", "", ValueError),
            ("port", "8080", TypeError),
            ("port", True, TypeError),
            ("port", 8080.0, TypeError),
            ("port", 0, ValueError),
            ("port", 65536, ValueError),
            ("secure", 1, TypeError),
            ("keepalive", 0, ValueError),
            ("keepalive", 60.1, ValueError),
            ("keepalive", float("nan"), ValueError),
            ("keepalive", "30", TypeError),
            ("keepalive", None, TypeError),
            ("keepalive", True, TypeError),
            ("connect_timeout", -1, ValueError),
            ("connect_timeout", "1", TypeError),
            ("request_timeout", float("nan"), ValueError),
            ("disconnect_timeout", -1, ValueError),
            ("disconnect_timeout", None, TypeError),
            ("username", b"ann", TypeError),
            ("username", "x" * 65536, ValueError),
            ("username", "é" * 32768, ValueError),
            ("username", "\ud800", ValueError),
            ("client_id", None, TypeError),
            ("client_id", 5, TypeError),
            ("will", ("k", "a/", "bye"), TypeError),
            ("ssl_context", True, TypeError),
            ("matcher", "MQTT", ValueError),
            ("max_message_size", "1", TypeError),
            ("max_message_size", 65536.0, TypeError),
            ("max_message_size", 1023, ValueError),
            ("max_message_size", 0x10000000, ValueError),
            ("allow_collisions", 1, TypeError),
            ("connectable", "h:1", TypeError),
            ("reconnect", 5, TypeError),
            ("reconnect", True, TypeError),
            ("reconnect", 0, TypeError),
            ("while_down", "queue", ValueError),
        ],
    )
    def test_error_for_an_invalid_value_starts_with_the_option(
        self, name: str, value: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match=f"^{name} "):
            make({name: value})

    def test_error_names_the_limits(self) -> None:
        with pytest.raises(ValueError, match=r"keepalive.*1 to 60.*61"):
            make(keepalive=61)
        with pytest.raises(ValueError, match=r"connect_timeout.* 0 .*-1"):
            make(connect_timeout=-1)

    @pytest.mark.parametrize("name", ["keepAlive", "hostname", "", 5])
    def test_unknown_option_raises_type_error(self, name: Any) -> None:
        known = r"^unknown option .*; known options are .*keepalive, .*will$"
        with pytest.raises(TypeError, match=known) as caught:
            make({name: 1})
        assert repr(name) in str(caught.value)

    def test_password_needs_a_username(self) -> None:
        with pytest.raises(TypeError, match=r"password.*username") as caught:
            make(password="hush")
        assert "hush" not in str(caught.value)
        assert make(username="ann", password="hush").password == "hush"

    @pytest.mark.parametrize("bad", ["x" * 65536, "hush\ud800", b"hush"])
    def test_bad_password_is_not_shown(self, bad: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"^password ") as caught:
            make(username="ann", password=bad)
        assert "hush" not in repr(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_ssl_context_needs_tls(self, tmp_path: Path) -> None:
        context = ssl.create_default_context()
        connectable = anyio.as_connectable(("127.0.0.1", 1))
        for place in (
            {"secure": False},
            {"servers": ["mqtt://h"]},
            {"servers": ["ws://h"]},
            {"host": str(tmp_path / "socket")},
            {"connectable": connectable},
        ):
            with pytest.raises(TypeError, match=r"ssl_context.*TLS"):
                make(place, ssl_context=context)
        for url in ("mqtts://h", "wss://h"):
            assert make(url, ssl_context=context).ssl_context is context

    def test_ssl_context_for_servers_is_rejected(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        with pytest.raises(ValueError, match=r"ssl_context.*server"):
            make(ssl_context=context)

    def test_ssl_context_without_checks_logs_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        context = ssl.create_default_context()
        make(ssl_context=context)
        assert caplog.records == []
        context.check_hostname = False
        for option, mode in (("check_hostname", ssl.CERT_REQUIRED), ("CERT_NONE", ssl.CERT_NONE)):
            context.verify_mode = mode
            assert make("wss://h", ssl_context=context).ssl_context is context
            record = caplog.records[-1]
            assert (record.name, record.levelname) == ("emitter_anyio", "WARNING")
            assert "not verified" in record.getMessage()
            assert option in record.getMessage()
        assert len(caplog.records) == 2

    @pytest.mark.parametrize("place", [{"servers": ["ws://h"]}, {"servers": ["wss://h"]}])
    def test_websocket_needs_wsproto(
        self, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "wsproto", None)
        with pytest.raises(ImportError, match=r"pip install '\.\[websocket\]'"):
            make(place)
        make("mqtt://h")

    def test_repr_shows_no_secret(self) -> None:
        options = make(
            "ws://ann:password@h/path?token=query",
            will=Will("private", "a/", "x"),
            client_id="hidden",
            headers={"Authorization": "bearer"},
        )
        for secret in ("password", "private", "hidden", "bearer", "query"):
            assert secret not in repr(options)
            assert secret not in str(options.servers)


def test_servers_can_be_none() -> None:
    assert server_of(servers=None) == server_of()
