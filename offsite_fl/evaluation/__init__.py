"""Measuring models: loss and perplexity, the five rows, the byte ledger, reports."""
