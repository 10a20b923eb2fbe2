"""One machine that stands for many: real processes, links that can be cut."""
