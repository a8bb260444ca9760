"""Measuring models: loss and perplexity, the five rows, the byte ledger, reports."""

from offsite_fl.evaluation.ledger import Ledger, LedgerEntry
from offsite_fl.evaluation.record import RunReport, versions
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS, FiveRows, Row, Verdict, verdict

__all__ = [
    "ROW_KEYS",
    "ROW_LABELS",
    "Dropped",
    "FiveRows",
    "Ledger",
    "LedgerEntry",
    "RoundRecord",
    "Row",
    "RunReport",
    "Verdict",
    "verdict",
    "versions",
]
