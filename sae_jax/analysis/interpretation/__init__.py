"""Automatic interpretation: what a feature stands for, in words, and whether it does.

After Paulo, Mallen, Juang, Belrose 2024, arXiv:2410.13928. `windows` cuts the firings
of held-out text into examples to explain and others to test on; an explainer says what
the first have in common; a judge says from these words alone what it expects of the
others; `scores` holds that against what the feature did.

Explainers and judges are callables: `token_rules` needs no model, `chat` asks one.
"""
