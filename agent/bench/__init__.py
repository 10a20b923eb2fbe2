"""Benchmarks: ratios against peers measured side by side in the same run, and the bars they are held to."""
