"""Decisions without torch and without sockets: what a plan does, what it costs, which rule picks one."""
