"""Rates, comparisons, intervals and the report."""
