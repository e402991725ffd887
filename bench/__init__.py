"""Benchmarks against plain torch: ``make bench`` runs them and writes ``bench/results/``."""
