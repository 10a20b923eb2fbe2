"""The Gymnasium environment over the runtime. Empty until the issue that builds it."""
