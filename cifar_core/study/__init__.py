"""Compares our runs with the published study: tables, the study's claims, figures, and docs/results.md.

`python -m cifar_core.report` writes the report. This package reads run folders and exports; it trains nothing.
"""
