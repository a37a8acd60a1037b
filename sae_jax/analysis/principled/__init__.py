"""Dictionaries against attributes that are known (Makelov, Lange, Nanda 2024)."""
