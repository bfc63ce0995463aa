"""Data sets: one that needs no download, and what published recipes need that mm* lacks."""
