"""Analyses of what an SAE has learned, and of what it leaves out."""
