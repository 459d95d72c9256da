"""Layer 1: the protocol's state machines. They take events and the time, and know no socket, clock, task or lock."""
