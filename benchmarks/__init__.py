"""How fast we are beside other MQTT clients: ``python -m nox -s bench``; see ``README.md``."""
