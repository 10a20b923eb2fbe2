"""What travels: messages, codecs, and the one module that knows ZeroMQ (`channel`)."""
