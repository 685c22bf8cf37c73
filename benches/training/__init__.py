"""The study of training: ``python -m benches.training --out DIR``."""
