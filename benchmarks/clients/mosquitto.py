"""
mosquitto's tools, which are written in C. The peer measures their time.

Their CPU time includes a few milliseconds for their start.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile

from benchmarks.clients import common
from benchmarks.clients.common import HOST, Figures, Job
from benchmarks.wire import channel, topic


def _run(job: Job, tool: str, *arguments: str, given: str | None = None) -> Figures:
    command = [tool, "-h", HOST, "-p", str(job.port), "-V", "mqttv311", "-k", "60", *arguments]
    if job.ca is not None:
        command += ["--cafile", job.ca]
    with tempfile.TemporaryFile("w+") as lines:
        if given is not None:
            lines.write(given)
            lines.seek(0)
        subprocess.run(command, stdin=lines, stdout=subprocess.DEVNULL, check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu_us": (usage.ru_utime + usage.ru_stime) / job.messages * 1e6}


def receive(job: Job) -> Figures:
    topics = [part for number in range(job.subscriptions) for part in ("-t", channel(number))]
    return _run(job, "mosquitto_sub", "-C", str(job.messages), *topics)


def publish(job: Job) -> Figures:
    lines = (job.body.decode() + "\n") * job.messages
    return _run(job, "mosquitto_pub", "-l", "-t", topic(0), given=lines)


def confirmed(job: Job) -> Figures:
    """Publish with QoS 1; the tool has at most 20 messages in flight."""
    lines = (job.body.decode() + "\n") * job.messages
    return _run(job, "mosquitto_pub", "-l", "-q", "1", "-t", topic(0), given=lines)


if __name__ == "__main__":
    common.main(
        {"receive": receive, "handler": receive, "publish": publish, "confirmed": confirmed}, ""
    )
