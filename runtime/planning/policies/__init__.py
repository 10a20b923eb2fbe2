"""One file per family of rules; `registry` is the one table of their names."""
