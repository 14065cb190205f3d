"""The rows of the benchmarks, the clients that run in them, and the goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from benchmarks.peer import Part

Reference: TypeAlias = Literal["fastest", "mosquitto", "row", "nothing"]


@dataclass(frozen=True)
class Figure:
    """
    A figure that a row measures.

    :ivar higher: whether a higher value is better
    """

    key: str
    title: str
    higher: bool = False
    digits: int = 0


@dataclass(frozen=True)
class Goal:
    """
    A goal for one figure of emitter_anyio.

    :ivar bound: the least value if higher is better, otherwise the largest
    :ivar against: the reference that ``bound`` is a multiple of: the fastest Python peer,
        mosquitto's tool, or the same client in the row ``row``; ``"nothing"`` for an absolute bound
    """

    figure: Figure
    bound: float
    against: Reference = "fastest"
    row: str = ""


@dataclass(frozen=True)
class Client:
    """
    A client and the rows in which it can run.

    :ivar environment: the table of ``pins.toml`` with its requirements; empty for emitter_anyio and
        for system tools
    :ivar program: the system tool that it needs
    :ivar share: the share of the messages that it gets, which is small for slow clients
    """

    name: str
    module: str
    variant: str = ""
    environment: str = ""
    program: str = ""
    lacks: frozenset[str] = frozenset()
    share: float = 1.0

    @property
    def title(self) -> str:
        """The name that tables and plots show."""
        if not self.ours:
            return self.name
        return f"emitter_anyio, {'Trio' if self.variant == 'trio' else self.variant}"

    @property
    def ours(self) -> bool:
        return self.module == "us"

    @property
    def uvloop(self) -> bool:
        return self.variant == "uvloop"

    @property
    def python(self) -> bool:
        return not self.program


RATE: Final = Figure("rate", "messages/s", higher=True)
CPU: Final = Figure("cpu_us", "CPU µs each", digits=2)
P50: Final = Figure("p50_us", "p50 µs")
P99: Final = Figure("p99_us", "p99 µs")
IDLE: Final = Figure("idle_ms", "CPU ms per 10 s", digits=1)
PING: Final = Figure("ping_us", "CPU µs per ping")
MEMORY: Final = Figure("memory_kb", "KB per connection", digits=1)
OPENED: Final = Figure("seconds", "s to open all", digits=2)
GROWTH: Final = Figure("growth_mb", "MB grown", digits=1)
UNCOUNTED: Final = Figure("uncounted", "drops not counted")
LOST: Final = Figure("lost_by_healthy", "lost by the healthy stream")
IMPORT: Final = Figure("import_ms", "ms")


@dataclass(frozen=True, eq=False)
class Row:
    """
    One row of the table.

    :ivar case: its name in the clients' programs
    :ivar messages: the number of messages; ``quick`` in a quick run
    :ivar job: further parameters for the client
    :ivar needs: a feature that a client must have: ``"tls"`` or ``"websocket"``
    """

    name: str
    title: str
    case: str
    figures: tuple[Figure, ...]
    goals: tuple[Goal, ...]
    mode: Literal["blast", "drip", "sink", "echo", "many", "none"]
    messages: int
    quick: int
    job: Mapping[str, Any] = field(default_factory=dict)
    topics: int = 1
    needs: str = ""

    def runs_on(self, client: Client) -> bool:
        """Return whether a client can run in this row."""
        wanted = {self.case, self.needs, self.name}
        return not (wanted & client.lacks)

    def part(self, messages: int, subscriptions: int) -> Part:
        """Return what the peer does in this row."""
        assert self.mode != "none"
        return Part(
            mode=self.mode,
            messages=messages,
            payload=self.job.get("payload", 64),
            subscriptions=subscriptions,
            topics=self.topics,
            websocket=self.needs == "websocket",
        )


def _receive(name: str, title: str, *goals: Goal, **more: Any) -> Row:
    more = {"messages": 150_000, "quick": 60_000, "job": {"subscriptions": 8}, **more}
    return Row(name, title, more.pop("case", "receive"), (RATE, CPU), goals, "blast", **more)


def _publish(name: str, title: str, *goals: Goal, **more: Any) -> Row:
    more = {"messages": 150_000, "quick": 60_000, **more}
    return Row(name, title, more.pop("case", "publish"), (RATE, CPU), goals, "sink", **more)


def _confirmed(in_flight: int, title: str, bound: float, messages: int) -> Row:
    return _publish(
        f"confirmed-{in_flight}",
        f"publish QoS 1, {title}",
        Goal(RATE, bound),
        case="confirmed",
        messages=messages,
        quick=messages // 5,
        job={"in_flight": in_flight},
    )


def _fan_in(subscriptions: int, *goals: Goal) -> Row:
    return _receive(
        f"fan-in-{subscriptions}",
        f"fan-in: {subscriptions:,} subscription{'s' * (subscriptions > 1)}, each with a task",
        *goals,
        case="fan_in",
        job={"subscriptions": subscriptions},
        topics=subscriptions,
    )


_KIB: Final = {"payload": 1024}
_BIG: Final = {"payload": 256 * 1024}

ROWS: Final = (
    _receive(
        "receive",
        "receive, `async for` over one of 8 subscriptions",
        Goal(RATE, 1.5),
        Goal(RATE, 1.5, "mosquitto"),
        Goal(CPU, 0.67),
    ),
    Row(
        "thin",
        "receive, one message per millisecond",
        "receive",
        (CPU,),
        # The fastest peers call a function in the event loop, without waking a task.
        (Goal(CPU, 1.2),),
        "drip",
        3_000,
        1_000,
        {"subscriptions": 8},
    ),
    _receive(
        "handler",
        'receive, `on("message")` with a plain function',
        Goal(RATE, 1.5),
        case="handler",
    ),
    _publish("publish", "publish QoS 0, each awaited", Goal(RATE, 2.5), Goal(CPU, 0.4)),
    _confirmed(1, "one by one", 1.0, 5_000),
    _confirmed(20, "20 in flight", 2.0, 20_000),
    _confirmed(100, "100 in flight", 2.0, 20_000),
    Row(
        "round-trip",
        "round trip",
        "round_trip",
        (P50, P99),
        (Goal(P50, 1.0), Goal(P99, 1.0)),
        "echo",
        5_000,
        2_000,
    ),
    Row(
        "connect",
        "connect and close",
        "connect",
        (P50, P99, CPU),
        (Goal(P50, 2.3),),
        "sink",
        500,
        200,
    ),
    _receive(
        "receive-1k",
        "receive, 1 KiB",
        Goal(RATE, 1.5),
        messages=60_000,
        quick=30_000,
        job=_KIB,
    ),
    _publish(
        "publish-1k",
        "publish QoS 0, 1 KiB",
        Goal(RATE, 1.5),
        messages=60_000,
        quick=30_000,
        job=_KIB,
    ),
    _receive(
        "receive-256k",
        "receive, 256 KiB",
        Goal(RATE, 1.2),
        messages=2_000,
        quick=1_000,
        job=_BIG,
    ),
    _publish(
        "publish-256k",
        "publish QoS 0, 256 KiB",
        Goal(RATE, 1.0),
        messages=2_000,
        quick=1_000,
        job=_BIG,
    ),
    Row(
        "idle",
        "200 idle connections",
        "idle",
        (IDLE, PING),
        (Goal(IDLE, 2.0, "nothing"), Goal(PING, 110, "nothing")),
        "many",
        0,
        0,
        {"connections": 200},
    ),
    Row(
        "connections",
        "1,000 connections, opened in parallel, each publishes",
        "connections",
        (MEMORY, OPENED),
        (Goal(MEMORY, 60, "nothing"),),
        "many",
        0,
        0,
        {"connections": 1_000},
    ),
    Row(
        "stalled",
        "stalled consumer, 500,000 messages (emitter_anyio: with a second, healthy stream)",
        "stalled",
        (GROWTH, UNCOUNTED, LOST),
        # The buffer holds 1024 messages, which is 64 KiB of payload.
        (
            Goal(GROWTH, 2.0 + 0.065, "nothing"),
            Goal(UNCOUNTED, 0, "nothing"),
            Goal(LOST, 0, "nothing"),
        ),
        "blast",
        500_000,
        500_000,
    ),
    _fan_in(1),
    _fan_in(10, Goal(CPU, 1.2, "row", "fan-in-1")),
    _fan_in(100, Goal(CPU, 1.5, "row", "fan-in-1")),
    _fan_in(1_000, Goal(CPU, 4.0, "row", "fan-in-1")),
    _receive("tls-receive", "receive over TLS", Goal(RATE, 1.5), needs="tls"),
    _publish("tls-publish", "publish QoS 0 over TLS", Goal(RATE, 1.5), needs="tls"),
    _receive("ws-receive", "receive over WebSocket", needs="websocket"),
    _publish("ws-publish", "publish QoS 0 over WebSocket", needs="websocket"),
    Row("import", "import", "import", (IMPORT,), (), "none", 7, 3),
)

_NO_STREAMS: Final = frozenset({"fan_in"})
# The clients that need minutes to open 1,000 connections.
_FEW_CONNECTIONS: Final = frozenset({"connections"})

CLIENTS: Final = (
    Client("us-asyncio", "us", "asyncio"),
    Client("us-uvloop", "us", "uvloop", lacks=frozenset({"import"})),
    Client("us-trio", "us", "trio", lacks=frozenset({"import"})),
    Client(
        "gmqtt",
        "peers.gmqtt",
        environment="gmqtt",
        lacks=_NO_STREAMS | {"confirmed", "websocket"},
    ),
    Client(
        "gmqtt-uvloop",
        "peers.gmqtt",
        "uvloop",
        environment="gmqtt",
        lacks=_NO_STREAMS | {"confirmed", "websocket", "import"},
    ),
    Client("mqttium", "peers.mqttium", environment="mqttium", lacks=_NO_STREAMS),
    Client("zmqtt", "peers.zmqtt", environment="zmqtt", lacks=frozenset({"websocket"}), share=0.2),
    Client("paho-asyncio", "peers.paho_aio", environment="paho", lacks=_NO_STREAMS, share=0.3),
    Client(
        "paho-thread",
        "peers.threads",
        environment="paho",
        lacks=_NO_STREAMS | _FEW_CONNECTIONS | {"import"},
        share=0.3,
    ),
    Client(
        "aiomqtt",
        "peers.aiomqtt",
        environment="aiomqtt",
        lacks=_NO_STREAMS | _FEW_CONNECTIONS,
        share=0.1,
    ),
    Client(
        "emitter-io",
        "peers.threads",
        "emitter-io",
        environment="emitter-io",
        lacks=_NO_STREAMS | _FEW_CONNECTIONS | {"websocket"},
        share=0.3,
    ),
    Client(
        "mosquitto",
        "mosquitto",
        program="mosquitto_sub",
        lacks=_NO_STREAMS
        # The tool has up to 20 messages in flight; the number cannot be set.
        | {
            "confirmed-1",
            "confirmed-100",
            "round_trip",
            "connect",
            "idle",
            "connections",
            "stalled",
            "import",
        }
        | {"websocket"},
    ),
)
