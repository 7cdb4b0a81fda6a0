"""Importers: other people's data sets -> ``history.jsonl``, images by content, a report and a data card."""
