"""Comparison with other MQTT clients: ``python -m nox -s bench``; see ``README.md``."""
