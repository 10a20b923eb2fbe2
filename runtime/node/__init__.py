"""A node: a pure state machine, the thread that computes, and the loop between them and the sockets."""
