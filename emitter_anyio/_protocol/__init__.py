"""MQTT 3.1.1 as bytes: Paho as the engine, and the fast path in front of it. No I/O."""
