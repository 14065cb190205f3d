"""MQTT 3.1.1 without I/O: the codec (Paho and a fast path in front of it) and the session."""
